"""Labels of frames: from videos and pictures, kept and found again, of the clip's own macroblocks."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops
from PIL import Image

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.video import Detections, labels
from keras_efficient.video.encoder import RoiEncoder
from keras_efficient.video.frames import packages

RNG = np.random.default_rng(0)


class Left:
    """A server that looks at the left half of a frame, and counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def predict(self, frames):
        return [None] * len(frames)

    def reference(self, frames):
        self.asked += 1
        return ops.cast(frames, "float32")

    def score(self, frames, reference):
        half = frames.shape[2] // 2
        return -ops.sum(ops.abs(frames - reference)[:, :, :half], axis=(1, 2, 3))


@pytest.fixture
def clips(tmp_path):
    """A video of eleven frames, and a picture."""
    folder = tmp_path / "clips"
    folder.mkdir()
    small = RNG.integers(0, 256, (13, 17, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(small[:96, :128]).save(folder / "b.png")
    with packages().open(str(folder / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(11):
            array = np.ascontiguousarray(small[index % 4 :, index % 5 :][:96, :128])
            container.mux(stream.encode(packages().VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    (folder / "notes.txt").write_text("no clip")
    return folder


def test_labels_of_a_video_and_of_a_picture(clips):
    found = labels.clips_of(clips)
    assert [path.name for path in found] == ["a.mkv", "b.png"]
    video = labels.labels_of(Left(), found[0], labels.Coding(every=2))
    assert video.frames.shape == (6, 96, 128, 3)
    assert video.gains.shape == (6, 6, 8)
    picture = labels.labels_of(Left(), found[1], labels.Coding())
    assert picture.frames.shape == (1, 96, 128, 3)
    for made in (video, picture):
        assert (made.gains[:, :, :4] > 0).mean() > 0.9
        assert (made.gains[:, :, 4:] == 0).all()
    shrunk = labels.labels_of(Left(), found[0], labels.Coding(every=5), size=(24, 32))
    assert shrunk.frames.shape == (3, 24, 32, 3)
    assert shrunk.gains.shape == (3, 6, 8)
    whole = video.frames[0].reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk.frames[0] - whole).mean() < 3


class Boxes:
    """Finds one object in every frame, where it is bright."""

    def predict(self, frames):
        return [Detections(np.array([[16.0, 0.0, 40.0, 20.0]]), np.array([0.5]), np.array([0])) for _ in frames]


def test_labels_that_are_what_was_found(clips):
    found = labels.labels_of(Boxes(), clips / "a.mkv", labels.Coding(label="found", every=3))
    assert found.gains.shape[0] == len(found.frames)
    assert found.gains[:, :2, 1:3] == pytest.approx(0.52)
    found.gains[:, :2, 1:3] = 0.02
    assert found.gains == pytest.approx(0.02)
    pieces = labels.labels_of(Boxes(), clips / "a.mkv", labels.Coding(label="found", every=3), deadline=np.inf)
    whole = labels.labels_of(Boxes(), clips / "a.mkv", labels.Coding(label="found"))
    np.testing.assert_array_equal(pieces.frames[-1], whole.frames[-1])
    picture = labels.labels_of(Boxes(), clips / "b.png", labels.Coding(label="found"), frame_size=(48, 64))
    assert picture.gains.shape == (1, 3, 4)


def test_they_are_kept(clips, tmp_path):
    server, kept = Left(), tmp_path / "labels"
    path = labels.clips_of(clips)[0]
    first = labels.labels_of(server, path, labels.Coding(), folder=kept, name="left")
    asked = server.asked
    again = labels.labels_of(server, path, labels.Coding(), folder=kept, name="left")
    assert server.asked == asked
    np.testing.assert_array_equal(again.gains, first.gains)
    labels.labels_of(server, path, labels.Coding(), folder=kept, name="another")
    labels.labels_of(server, path, labels.Coding(high=28), folder=kept, name="left")
    assert len(list(kept.iterdir())) == 3
    good = {file: file.read_bytes() for file in kept.iterdir()}
    for damage in (lambda data: b"nonsense", lambda data: data[: len(data) // 2], lambda data: b""):
        for file, data in good.items():
            file.write_bytes(damage(data))
        with pytest.raises(FileProblem, match="is damaged"):
            labels.labels_of(server, path, labels.Coding(), folder=kept, name="left")


class Clock:
    """Of which a second is over each time that a server is asked."""

    def __init__(self, server):
        self.server = server

    def monotonic(self):
        return self.server.asked


LONG = 210  # frames


def numbered(path, muxer=None, **options):
    """A video whose frames are as light as their number says."""
    texture = RNG.integers(0, 8, (48, 64, 1)).repeat(3, axis=2)
    with packages().open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"qp": "4", "g": "60", "sc_threshold": "0", **options}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(LONG):
            array = (texture + 20 + number).astype(np.uint8)
            container.mux(stream.encode(packages().VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(found):
    return found.frames.mean(axis=(1, 2, 3)) - 23.5


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"bf": "0"}),
        ("a.ts", {}),
        ("a.avi", {"bf": "0"}),
        ("open.mp4", {"x264-params": "open-gop=1"}),
        ("live.mkv", {"muxer": {"live": "1"}}),
    ],
)
def test_pieces_of_a_video_are_all_of_it(tmp_path, file, options):
    path = numbered(tmp_path / file, **options)
    found = labels.labels_of(Left(), path, labels.Coding(every=4), deadline=np.inf)
    want = [*range(3, 208, 4), 209]  # from the last frame of a piece on; two frames are left at the end
    assert len(found.frames) == len(want)
    np.testing.assert_allclose(numbers(found), want, atol=1.6)  # an .avi is a frame late
    assert found.gains.shape == (len(want), 3, 4)


def test_what_there_is_time_for_is_from_all_over_a_video(tmp_path, monkeypatch):
    path, server, kept = numbered(tmp_path / "a.mp4"), Left(), tmp_path / "labels"
    monkeypatch.setattr(labels, "time", Clock(server))
    found = labels.labels_of(server, path, labels.Coding(every=2), deadline=7, folder=kept, name="left")
    assert server.asked == 8, "no longer than a piece too late"
    starts = np.array([0, 64, 128, 192])
    np.testing.assert_allclose(numbers(found), (starts[:, None] + np.arange(1, 16, 2)).ravel(), atol=0.9)
    again = labels.labels_of(server, path, labels.Coding(every=2), deadline=11, folder=kept, name="left")
    assert server.asked == 12, "those that are kept are not made again"
    assert len(again.frames) == len(found.frames) + 16
    assert len(labels.labels_of(server, path, labels.Coding(every=2), deadline=0).frames) == 8
    sparse = labels.labels_of(server, path, labels.Coding(every=50), deadline=np.inf)
    np.testing.assert_allclose(numbers(sparse), [15, 65, 115, 165, 209], atol=0.9)


def test_pictures_are_scaled_to_the_cameras_frames(tmp_path):
    """What is too wide is cut on both sides alike."""
    array = np.full((60, 200, 3), 90, np.uint8)
    array[:, 40:160] = 180
    Image.fromarray(array).save(tmp_path / "wide.png")
    Image.fromarray(array[:, 40:120]).save(tmp_path / "small.png")
    for name in ("wide", "small"):
        found = labels.labels_of(Left(), tmp_path / f"{name}.png", labels.Coding(), frame_size=(97, 160))
        assert found.size == (96, 160)
        assert found.frames.shape == (1, 96, 160, 3)
        assert found.gains.shape == (1, 6, 10)
        assert np.abs(found.frames[0, :, 8:-8].astype(int) - 180).max() < 6


def test_what_is_interrupted_leaves_nothing(clips, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(labels, "accuracy_gradient", stopped)
    with pytest.raises(KeyboardInterrupt):
        labels.labels_of(Left(), labels.clips_of(clips)[0], labels.Coding(), folder=tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_what_is_refused(tmp_path):
    with pytest.raises(FileProblem, match="no such file or folder"):
        labels.clips_of(tmp_path / "none")
    with pytest.raises(FileProblem, match="holds no video and no picture"):
        labels.clips_of(tmp_path)
    for options in ({"high": 40}, {"low": ()}, {"low": (52,)}, {"every": 0}):
        with pytest.raises(WrongArgument, match="cannot be coded so"):
            labels.Coding(**options)
    assert RoiEncoder(128, 96, 25).rows == 6


def test_averages_over_frames():
    gains = np.arange(5.0).reshape(5, 1, 1)
    np.testing.assert_allclose(labels._averaged(gains, 1), gains)
    np.testing.assert_allclose(labels._averaged(gains, 3).ravel(), [0.5, 1, 2, 3, 3.5])
    np.testing.assert_allclose(labels._averaged(gains, 4).ravel(), [1, 1.5, 2.5, 3, 3.5])

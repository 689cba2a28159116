"""Videos as people have them: sound first, turned, odd, of other formats, cut off, none at all."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest

from keras_efficient.errors import FileProblem
from keras_efficient.video.encode import encode_file
from keras_efficient.video.frames import Appearance, Video, packages, rgb


def written(
    path,
    *,
    sizes=((64, 48),),
    pix_fmt="yuv420p",
    codec="libx264",
    frames=6,
    pts=None,
    sound=False,
    options=None,
    rotation=0,
):
    av = packages()
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=8000) if sound else None
        streams = []
        for width, height in sizes:
            stream = container.add_stream(codec, rate=25, options={"g": "3", **(options or {})})
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if rotation:
                stream.set_display_rotation(rotation)
            streams.append(stream)
        if audio is not None:
            for start in range(0, 4000, 1000):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 8000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for stream in streams:
            for index in range(frames):
                array = np.zeros((stream.height, stream.width, 3), np.uint8)
                array[:, : stream.width // 2] = (255, 4 * index, 0)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts = index if pts is None else pts[index]
                frame.time_base = Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def test_frames_of_a_video(tmp_path):
    video = Video.open(written(tmp_path / "a.mp4"))
    assert (video.width, video.height, video.rate, video.frames) == (64, 48, 25, 6)
    frames = list(video)
    assert len(frames) == 6
    assert rgb(frames[0]).shape == (48, 64, 3)
    assert rgb(frames[0])[10, 5].tolist() == pytest.approx([255, 0, 0], abs=6)


def test_sound_may_come_first(tmp_path):
    video = Video.open(written(tmp_path / "a.mkv", sound=True))
    assert len(list(video)) == 6


@pytest.mark.parametrize(
    ("rotation", "size", "red"), [(90, (48, 64), "bottom"), (180, (64, 48), "right"), (-90, (48, 64), "top")]
)
def test_turned_videos_become_upright(tmp_path, rotation, size, red):
    """`rotation` degrees against the clock have to be turned; the left half of the coded picture is red."""
    video = Video.open(written(tmp_path / "a.mp4", rotation=rotation))
    assert (video.width, video.height) == size
    first, *_, last = video
    assert (last.pts - first.pts) * last.time_base == Fraction(5, 25)
    halves = {"top": np.s_[:20], "bottom": np.s_[-20:], "left": np.s_[:, :20], "right": np.s_[:, -20:]}
    reds = {name: rgb(first)[part][..., 0].mean() for name, part in halves.items()}
    assert max(reds, key=reds.get) == red
    assert reds[red] > 240


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p", "yuv444p"])
def test_other_formats_become_this_one(tmp_path, pix_fmt):
    frame = next(iter(Video.open(written(tmp_path / "a.mkv", pix_fmt=pix_fmt))))
    assert frame.format.name == "yuv420p"
    assert rgb(frame)[10, 5].tolist() == pytest.approx([255, 0, 0], abs=6)


def test_odd_sides_lose_a_line(tmp_path):
    video = Video.open(written(tmp_path / "a.mkv", sizes=((65, 47),), pix_fmt="yuv444p"))
    assert (video.width, video.height) == (64, 46)
    assert all((frame.width, frame.height) == (64, 46) for frame in video)


def test_variable_rates_keep_their_stamps(tmp_path):
    video = Video.open(written(tmp_path / "a.mkv", pts=[0, 1, 5, 6, 20, 21], options={"bf": "0"}))
    stamps = [float(frame.pts * frame.time_base) for frame in video]
    assert stamps == pytest.approx([0, 0.04, 0.2, 0.24, 0.8, 0.84], abs=2e-3)


def test_what_is_no_video(tmp_path):
    av = packages()
    with pytest.raises(FileProblem, match="no such file"):
        Video.open(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(FileProblem, match="is empty"):
        Video.open(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(FileProblem, match="is no video that can be read"):
        Video.open(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.mka"), "w") as container:
        audio = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    with pytest.raises(FileProblem, match="has no video stream"):
        Video.open(tmp_path / "sound.mka")


def test_what_is_no_camera(tmp_path):
    with pytest.raises(FileProblem, match="/dev/null: cannot be read as a camera"):
        Video.open("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileProblem, match="is a pipe, which cannot be opened twice"):
        Video.open(tmp_path / "pipe")


def test_pyav_without_cameras(monkeypatch):
    def without(path, format=None, **_):
        raise ValueError(f"no container format {format!r}")

    monkeypatch.setattr(packages(), "open", without)
    with pytest.raises(FileProblem, match="this PyAV has no v4l2"):
        Video.open("/dev/null")


def test_a_video_that_is_cut_off(tmp_path):
    whole = written(tmp_path / "a.ts", frames=60)
    (tmp_path / "cut.mp4").write_bytes(written(tmp_path / "b.mp4", frames=60).read_bytes()[:-900])
    with pytest.raises(FileProblem, match="is no video that can be read"):
        Video.open(tmp_path / "cut.mp4")  # its table of contents stands at the end
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\xaa" * 2000
    (tmp_path / "hurt.ts").write_bytes(data)
    with pytest.raises(FileProblem, match=r"is damaged or cut off at frame [0-9]"):
        list(Video.open(tmp_path / "hurt.ts"))


def test_real_clips(data_dir):
    sizes = {"dashcam_highway_960x540": (960, 540, 221), "people_street_800x450": (800, 450, 460)}
    for name, want in sizes.items():
        video = Video.open(data_dir / "video" / f"{name}.mp4")
        assert (video.width, video.height, video.frames) == want
        assert sum(1 for _ in video) == want[2]


def marked(path, *, full=False, matrix=1, aspect=Fraction(1), level=250, rotation=0):
    """A grey video with what players are told."""
    av = packages()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if full else "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = matrix, matrix, matrix
        context.color_range, context.sample_aspect_ratio = 2 if full else 1, aspect
        if rotation:
            stream.set_display_rotation(rotation)
        array = np.full((48, 64, 3), level, np.uint8)
        frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
            format=stream.pix_fmt, dst_color_range="JPEG" if full else "MPEG"
        )
        for number in range(3):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("level", [5, 250])
def test_levels_are_kept(tmp_path, full, level):
    source = marked(tmp_path / "a.mkv", full=full, level=level)
    encode_file(source, tmp_path / "b.mkv", None, base=10)
    for path in (source, tmp_path / "b.mkv"):
        frames = list(Video.open(path))
        assert rgb(frames[0]).mean() == pytest.approx(level, abs=2)
        assert int(frames[0].to_ndarray()[0, 0]) == pytest.approx(16 + 219 * level / 255, abs=2)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_what_players_are_told_is_kept(tmp_path, codec):
    source = marked(tmp_path / "a.mkv", matrix=1, aspect=Fraction(4, 3))
    encode_file(source, tmp_path / "b.mkv", None, codec=codec)
    assert Video.open(source).appearance == Appearance(1, 1, 1, Fraction(4, 3))
    assert Video.open(tmp_path / "b.mkv").appearance == Appearance(1, 1, 1, Fraction(4, 3))


def test_pixels_of_turned_videos_are_turned(tmp_path):
    source = marked(tmp_path / "a.mp4", aspect=Fraction(4, 3), rotation=90)
    assert Video.open(source).appearance.aspect == Fraction(3, 4)


@pytest.mark.parametrize(("name", "options"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})])
def test_a_file_that_was_cut_off_where_a_frame_ends(tmp_path, name, options):
    """FFmpeg gives the frames that are there, and says nothing."""
    av = packages()
    whole = written(tmp_path / "whole.mkv", frames=60)
    with av.open(str(whole)) as source, av.open(str(tmp_path / name), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / name).read_bytes()
    assert len(list(Video.open(tmp_path / name))) == 60
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(FileProblem, match="cut off"):
        list(Video.open(tmp_path / name))

"""A camera model learns where a server looks; training goes on where it stopped."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import export, models, video
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.macroblocks import grid
from keras_efficient.video import gradient, training
from keras_efficient.video.frames import packages
from keras_efficient.video.interpolation import reach, resized

SIZE = (96, 128)


class Red:
    """A server that sees nothing but what is red."""

    def predict(self, frames):
        return [None] * len(frames)

    def reference(self, frames):
        frames = ops.cast(frames, "float32")
        red = ops.cast(frames[..., 0] > 1.6 * ops.mean(frames, axis=-1), "float32")
        return frames, red

    def score(self, frames, reference):
        wanted, red = reference
        return -ops.sum(red * ops.sum(ops.abs(frames - wanted), axis=-1), axis=(1, 2))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Red and blue squares on a grey ground."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("clips") / "squares.mkv"
    with packages().open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for _ in range(60):
            array = random.integers(60, 160, (*SIZE, 1)).repeat(3, axis=2).astype(np.uint8)
            for colour in ((220, 30, 30), (30, 30, 220)):
                top, left = random.integers(0, SIZE[0] - 32), random.integers(0, SIZE[1] - 32)
                noise = random.integers(-25, 25, (32, 32, 3))
                array[top : top + 32, left : left + 32] = (np.array(colour) + noise).clip(0, 255)
            container.mux(stream.encode(packages().VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def trained(clip, **options):
    keras.utils.set_random_seed(0)  # weights do not hang on the tests before
    model = models.AccModel(SIZE, width=0.25, shrink=2)
    options = {"coding": video.Coding(every=2), "name": "red", **options}
    return video.train_accmodel(Red(), clip, model=model, batch=8, **options)


def test_it_learns_where_the_server_looks(clip):
    told = []
    found = trained(clip, steps=120, coding=video.Coding(every=1), on_progress=told.append)
    assert (found.frames, found.steps) == (54, 120)
    assert found.correlation > 0.15  # of most macroblocks nothing is gained: their order is noise
    assert found.model.output_shape == (None, 6, 8)
    assert told[0] == "labels of squares.mkv (1 of 1)"
    frame = np.full((1, *SIZE, 3), 110.0, "float32")
    frame[:, 16:48, 32:64] = (220, 30, 30)
    frame[:, 48:80, 80:112] = (30, 30, 220)
    scores = ops.convert_to_numpy(found.model(frame))[0]
    assert scores[1:3, 2:4].mean() > scores[3:5, 5:7].mean() + 1
    offsets = video.graded_offsets(2.0**scores)
    assert offsets[1:3, 2:4].mean() < 0


def test_it_goes_on_where_it_stopped(clip, tmp_path):
    first = trained(clip, steps=6, folder=tmp_path)
    assert first.steps == 6
    again = trained(clip, steps=9, folder=tmp_path)
    assert again.steps == 9
    lines = (tmp_path / "training.csv").read_text().split()
    assert [int(line.split(",")[0]) for line in lines] == list(range(1, 10))
    kept = trained(clip, steps=9, folder=tmp_path)
    for left, right in zip(kept.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    state = (tmp_path / "training.npz").read_bytes()
    for damaged in (b"nonsense", state[: len(state) // 2], b""):
        (tmp_path / "training.npz").write_bytes(damaged)
        with pytest.raises(FileProblem, match="is damaged, or of another model"):
            trained(clip, steps=9, folder=tmp_path)


def test_frames_without_anything_to_see_are_left_out(tmp_path):
    random = np.random.default_rng(0)
    grey = random.integers(60, 160, (2, *SIZE, 1)).repeat(3, axis=3).astype(np.uint8)
    seen = grey[0].copy()
    seen[16:48, 16:48] = (220, 30, 30)
    for name, array in {"seen": seen, "one": grey[0], "other": grey[1]}.items():
        packages().VideoFrame.from_ndarray(array, format="rgb24").to_image().save(tmp_path / f"{name}.png")
    found = trained(tmp_path, steps=1, held_out=0)
    assert found.frames == 1
    with pytest.raises(WrongArgument, match=r"held_out=0\.9 takes all 1 of them"):
        trained(tmp_path / "seen.png", steps=1, held_out=0.9)
    with pytest.raises(WrongArgument, match="sees nothing in any of 2"):
        trained([tmp_path / "one.png", tmp_path / "other.png"], steps=1, held_out=0)


def test_it_keeps_to_its_time(clip, monkeypatch):
    """By a clock of the test's own: labels of the whole clip would take 36 seconds, a step takes a tenth of one."""

    class Clock:
        now = 0.0

        def monotonic(self):
            self.now += 0.1
            return self.now

    class Slow(Red):
        def reference(self, frames):
            clock.now += 0.6 * len(frames)
            return super().reference(frames)

    clock, told = Clock(), []
    for module in ("training", "labels"):
        monkeypatch.setattr(f"keras_efficient.video.{module}.time", clock)
    found = video.train_accmodel(
        *(Slow(), clip),
        **{"model": models.AccModel(SIZE, width=0.25, shrink=2), "coding": video.Coding(every=1), "minutes": 0.25},
        on_progress=lambda line: told.append((clock.now, line)),
    )
    labelled, line = next(pair for pair in told if pair[1].startswith("training on"))
    # A piece that is begun in time is ended, of 5 frames that are labelled and tried.
    assert 5 < labelled < training.LABELLING * 15 + 5
    assert line.startswith("training on 14 frames")
    assert 14.9 < found.seconds < 16


def pictures(folder, count):
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = 96 + 2 * number, 128 + 10 * number
        array = random.integers(60, 160, (height, width, 1)).repeat(3, axis=2).astype(np.uint8)
        array[16:48, 16:48] = (220, 30, 30)
        packages().VideoFrame.from_ndarray(array, format="rgb24").to_image().save(folder / f"{number:02}.png")


def test_pictures_of_many_sizes(tmp_path):
    """Some are held out, and one gradient is compiled for all."""
    pictures(tmp_path, 10)
    server = Red()
    model = models.AccModel(SIZE, width=0.25, shrink=2)
    found = video.train_accmodel(server, tmp_path, model=model, steps=1, held_out=0.2)
    assert found.frames == 8
    assert np.isfinite(found.correlation)
    assert len(gradient._COMPILED[server]) == 1


def test_clips_that_cannot_be_read_are_left_out(clip, tmp_path):
    pictures(tmp_path, 2)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.mkv").write_bytes(clip.read_bytes()[:20_000])
    with packages().open(str(tmp_path / "tiny.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "yuv420p"
        frame = packages().VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    told = []
    assert trained(tmp_path, steps=1, held_out=0, on_progress=told.append).frames == 2
    out = [line for line in told if line.startswith("left out")]
    assert len(out) == 3
    for line, name, why in zip(
        out, ("cut.mkv", "empty.png", "tiny.mkv"), ("cut off", "empty", "even sides"), strict=True
    ):
        assert name in line
        assert why in line
    with pytest.raises(FileProblem, match=r"empty.png: is empty"):
        trained(tmp_path / "empty.png", steps=1)


def test_gradients_of_few_sizes_are_kept(monkeypatch):
    monkeypatch.setattr(gradient, "MOST", 2)
    server = Red()
    for width in (16, 32, 48, 16):
        x = np.full((1, 16, width, 3), (220.0, 30.0, 30.0))
        video.accuracy_gradient(server, x, x / 2)
    assert [key[1] for key in gradient._COMPILED[server]] == [48, 16]


def test_sizes_of_labels():
    x = np.random.default_rng(0).random((2, 6, 8)).astype("float32")
    assert resized(x, (3, 5)).shape == (2, 3, 5)
    np.testing.assert_allclose(resized(x, (6, 8)), x)
    np.testing.assert_allclose(resized(np.ones((1, 4, 5, 3)), (9, 7)), np.ones((1, 9, 7, 3)))
    ramp = np.arange(4.0)[None, None].repeat(2, axis=1)
    np.testing.assert_allclose(resized(ramp, (2, 8))[0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def rows_of(height, size):
    """At which pixel of a frame lie the middles of the cells of a model for frames of another height."""
    cells = grid(height, 160)
    places = np.broadcast_to((np.arange(cells[0]) + 0.5)[:, None] * 16 / height, cells)
    wanted = grid(*size)
    have, want = reach((height, 160), cells), reach(size, wanted)
    return resized(places, wanted, have=have, want=want)[:, 0] * size[0]


@pytest.mark.parametrize("height", [360, 450, 464, 540, 720, 1080])
@pytest.mark.parametrize("model", [450, 720, 1080])
def test_cells_lie_where_macroblocks_do(height, model):
    """Of a model for another height too, where the last row of either may lie partly outside of the frame."""
    found = rows_of(model, (height, 160))
    want = (np.arange(len(found)) + 0.5) * 16
    first, *_, last = (np.arange(grid(model, 160)[0]) + 0.5) * 16 / model * height  # nothing is known beyond them
    np.testing.assert_allclose(found, want.clip(first, last), atol=0.1)


def test_gains_come_to_where_the_model_has_its_cells(monkeypatch):
    """Gains of a clip of 450 rows that say in which of them they are, for a model for 720."""
    monkeypatch.setattr(training, "FLOOR", 0.0)
    rows = (np.arange(29) + 0.5) * 16
    gains = np.broadcast_to(2.0 ** (rows[None, :, None] / 100), (1, 29, 50)).astype("float32")
    labels = training.Labels(np.zeros((1, 180, 320, 3), np.uint8), gains, (450, 800))
    inner = models.without_shrink(models.AccModel((720, 1280), width=0.25))
    _, found = training._wanted(labels, inner)
    want = ((np.arange(45) + 0.5) * 16 * 450 / 720).clip(8) / 100
    np.testing.assert_allclose(found[0, :, 0], want - want.mean(), atol=1e-3)


def test_reach():
    assert reach((450, 800), (29, 50)) == (464 / 450, 1.0)
    assert reach((113, 200), (29, 50)) == (116 / 113, 1.0)  # the same frame, shrunk
    assert reach((450, 800), (10, 10)) == (1.0, 1.0)


def test_parts_of_frames_stay_with_their_gains():
    """Frames that say in which row and column they are, and gains that say the same."""
    height, width = 90, 160
    cells, random = grid(height, width), np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    frames = np.stack([y, x, y + x], axis=-1)[None]
    for part in (0, 1):
        gains = (np.indices(cells)[part] + 0.5)[None] * 16.0
        for _ in range(20):
            found, of_them = training._cropped((frames[0], gains[0]), reach((height, width), cells), random)
            at = np.ix_(*(np.arange(8, size, 16) for size in (height, width)))
            inside = slice(1, len(of_them) - 1), slice(1, -1)  # beyond the middles of the outer cells nothing is known
            np.testing.assert_allclose(found[..., part][at][inside], of_them[inside], atol=1.0)


def test_what_is_refused(clip, tmp_path):
    with pytest.raises(WrongArgument, match="Nothing is trained in minutes=0"):
        trained(clip, minutes=0)
    with pytest.raises(WrongArgument, match="Give the server's name="):
        trained(clip, steps=1, folder=tmp_path, name="")
    with pytest.raises(WrongArgument, match=r"Labels took all of the 1e-05 minutes"):
        trained(clip, minutes=1e-5)
    with pytest.raises(WrongArgument, match=r"'sesr.*' is no AccModel"):
        video.train_accmodel(Red(), clip, model=models.SESR())
    with pytest.raises(FileProblem, match="no such file"):
        trained(tmp_path / "none.mp4")


def teacher_and_pupil(**options):
    keras.utils.set_random_seed(1)
    return [models.AccModel(SIZE, width=0.25, shrink=2, **one) for one in ({}, {"int8_aware": True, **options})]


def test_one_that_rounds_is_taught(clip, tmp_path):
    teacher, pupil = teacher_and_pupil()
    told = []
    options = {"folder": tmp_path, "frames": 40, "rate": 1e-3, "on_progress": told.append}
    found = video.teach_accmodel(pupil, teacher, clip, steps=30, **options)
    assert (found.model, found.frames, found.steps) == (pupil, 36, 30)
    assert found.correlation > 0.9
    assert told[0] == "teaching on 36 frames"
    norm = teacher.get_layer("down_norm")
    np.testing.assert_array_equal(norm.moving_variance, pupil.get_layer("down_norm").moving_variance)
    assert pupil.get_layer("down_norm").trainable
    assert not np.array_equal(teacher.get_layer("down_project").kernel, pupil.get_layer("down_project").kernel)
    assert video.teach_accmodel(teacher_and_pupil()[1], teacher, clip, steps=32, **options).steps == 32


def test_it_is_better_for_integers(clip, tmp_path):
    """An int8 file of the one that was taught is nearer to the teacher than one of the teacher itself."""
    teacher, pupil = teacher_and_pupil()
    teacher.get_layer("stem_norm").set_weights([np.array([9.0, 9, *[0.02] * 6]), *[np.zeros(8)] * 2, np.ones(8)])
    video.teach_accmodel(pupil, teacher, clip, steps=60, rate=1e-3)
    frames = video.calibration(clip, models.without_shrink(teacher).input_shape[1:3])
    wanted = models.without_shrink(teacher).predict(frames, verbose=0)
    errors = []
    for model in (teacher, pupil):
        path = tmp_path / f"{len(errors)}.tflite"
        inner = models.without_shrink(model)
        export.save(inner, path, precision="int8", calibration=frames, verify=False)
        file = export.load(path)
        errors.append(np.square(np.concatenate([file(one[None]) for one in frames]) - wanted).mean())
    assert errors[1] < errors[0]


def test_what_cannot_be_taught(clip, tmp_path):
    teacher, pupil = teacher_and_pupil()
    other = models.AccModel(SIZE, width=0.25, shrink=1)
    for wrong, text in (
        ({"model": other}, "must take and give the same"),
        ({"model": models.without_shrink(pupil)}, "is a part of another model"),
        ({"features": ["fine"]}, "Unknown layer: 'fine'"),
        ({"steps": 0}, "steps=0"),
        ({"frames": 0}, "frames=0"),
        ({"held_out": 0.999}, "There is no frame to train on"),
        ({"steps": None, "minutes": 1e-6}, "Frames took all"),
        ({"model": models.AccModel(SIZE, width=0.5, shrink=2)}, "features of 'coarse_mix_add' differ"),
    ):
        before = pupil.get_weights()
        with pytest.raises((WrongArgument, UnknownName), match=text):
            video.teach_accmodel(**{"model": pupil, "teacher": teacher, "source": clip, "steps": 1, **wrong})
        assert all(map(np.array_equal, before, pupil.get_weights())) or "minutes" in wrong
    with pytest.raises(WrongArgument, match="its ranges are not known"):
        video.train_accmodel(Red(), clip, model=teacher_and_pupil()[1], steps=1)
    kept = tmp_path / "kept"
    video.teach_accmodel(pupil, teacher, clip, steps=1, folder=kept, features=[])
    with pytest.raises(FileProblem, match="another teacher"):
        video.teach_accmodel(pupil, models.AccModel(SIZE, width=0.25, shrink=2), clip, steps=1, folder=kept)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    told = []
    video.teach_accmodel(pupil, teacher, [broken, clip], steps=1, on_progress=told.append)
    assert told[0].startswith("left out: ")
    with pytest.raises(FileProblem):
        video.teach_accmodel(pupil, teacher, broken, steps=1)


def test_taught_by_pictures(clip, tmp_path):
    """The last of them by name are held out; normalisation inside of a backbone stays, too."""
    from PIL import Image

    for number in range(10):
        Image.fromarray(np.full((60, 80, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    train, test = training._taught_frames(sorted(tmp_path.glob("*.png")), (48, 64), 8, 0.2, print)
    assert (len(train), len(test)) == (8, 2)
    assert abs(int(test.min()) - 160) < 5

    def made():
        norm = keras.Sequential([keras.layers.Conv2D(8, 3, 8, "same"), keras.layers.BatchNormalization()])
        return models.AccModel(SIZE, shrink=2, backbone=norm, stride=8), norm.layers[1]

    (teacher, _), (pupil, norm) = made(), made()
    before = np.array(norm.moving_mean)
    video.teach_accmodel(pupil, teacher, [clip, tmp_path], features=[], steps=2)
    np.testing.assert_array_equal(before, norm.moving_mean)
    assert norm.trainable

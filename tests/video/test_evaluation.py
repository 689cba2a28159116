"""Curves, savings, and evaluations of a tiny clip by servers without weights."""

from __future__ import annotations

import html.parser
from fractions import Fraction
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient import plot, video
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.video import report
from keras_efficient.video.accuracy import FrameF1, MeanIoU, PooledF1
from keras_efficient.video.delay import bandwidth_for
from keras_efficient.video.encoder import qp_map
from keras_efficient.video.evaluation import Curve, Point, _Tried, isotonic
from keras_efficient.video.frames import packages
from keras_efficient.video.schemes import OFF, SCHEMES, _Form

FRAMES, SIZE = 23, (96, 128)


class Shades:
    """A segmenter: each square of 8 pixels has the class of its contrast, which coarse coding lowers."""

    measures = (MeanIoU(8),)

    def __init__(self):
        self.calls = 0

    def predict(self, frames):
        self.calls += len(frames)
        x = np.asarray(frames, float)[..., 1]
        cells = x.reshape(len(x), SIZE[0] // 8, 8, SIZE[1] // 8, 8)
        return list((cells.std(axis=(2, 4)) / 4).astype(int).clip(0, 7))

    def reference(self, frames):
        return ops.convert_to_tensor(frames, "float32")

    def score(self, frames, reference):
        return -ops.sum(ops.square(frames - reference), axis=(1, 2, 3))


class Finder(Shades):
    """A detector: one box, of the brightest eighth of the columns."""

    measures = (PooledF1(),)

    def predict(self, frames):
        self.calls += len(frames)
        lefts = 16 * np.asarray(frames, float).sum(axis=(1, 3)).reshape(len(frames), 8, 16).sum(axis=2).argmax(axis=1)
        return [
            video.Detections(np.array([[left, 16.0, left + 16.0, 64.0]]), np.array([0.9]), np.zeros(1, np.int32))
            for left in lefts
        ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Noise that moves, a bright column, in a file whose name is no HTML."""
    av = packages()
    path = tmp_path_factory.mktemp("clip") / "<b>a&b.mp4"
    noise = np.random.default_rng(0).integers(0, 128, (SIZE[0] // 2, SIZE[1] // 2, 1)).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = *SIZE, "yuv420p", {"crf": "10"}
        for shift in range(FRAMES):
            picture = np.roll(noise, shift // 3, axis=1).repeat(2, axis=0).repeat(2, axis=1).repeat(3, axis=2)
            picture[:, 16 * (shift // 8) : 16 * (shift // 8) + 16] += 100
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return video.Clip(video.Video.open(path))


def curve(amounts, accuracies, frames=60, seed=0):
    """Frames whose accuracies lie around their mean."""
    around = np.random.default_rng(seed).normal(0, 0.02, (len(amounts), frames))
    each = np.asarray(accuracies)[:, None] + around - around.mean(axis=1, keepdims=True)
    return Curve(np.asarray(amounts, float), np.stack([each, np.ones_like(each)], axis=-1), FrameF1())


UNIFORM = curve([1000, 2000, 4000, 8000, 16000], [0.7, 0.8, 0.88, 0.94, 0.98])


def test_the_isotonic_fit():
    from sklearn.isotonic import IsotonicRegression

    random = np.random.default_rng(0)
    for count in (1, 2, 5, 30):
        values = random.normal(size=count).round(1) + np.arange(count) * 0.05
        np.testing.assert_allclose(isotonic(values), IsotonicRegression().fit_transform(np.arange(count), values))


def test_bytes_at_an_accuracy():
    assert UNIFORM.accuracies() == pytest.approx([0.7, 0.8, 0.88, 0.94, 0.98])
    assert UNIFORM.bytes_at(0.84) == pytest.approx(2000 * 2**0.5)
    assert UNIFORM.bytes_at(0.7) == pytest.approx(1000, rel=1e-6)
    assert (UNIFORM.bytes_at(0.69), UNIFORM.bytes_at(0.985)) == (None, None)
    uneven = curve([4000, 1000, 2000, 3000], [0.95, 0.7, 0.9, 0.8])
    assert uneven.bytes_at(0.85) == pytest.approx(2000), "the two that fall are pooled, and the first reaches it"


def test_uniform_against_itself():
    found = video.saving(UNIFORM, UNIFORM, [0.8, 0.9])
    for one in (*found.at, found.mean, found.highest):
        assert one.value == 0
        assert one.low <= 0 <= one.high


def test_a_worse_encoder_saves_less_than_nothing():
    worse = Curve(UNIFORM.amounts * 1.25, UNIFORM.sums, UNIFORM.measure)
    found = video.saving(worse, UNIFORM, [0.8, 0.9, 0.99])
    assert [one.value for one in found.at] == [pytest.approx(-0.25), pytest.approx(-0.25), None]
    assert found.mean.value == pytest.approx(-0.25)
    assert (found.highest.accuracy, found.highest.value) == (pytest.approx(0.98), pytest.approx(-0.25))
    assert video.saving(UNIFORM, worse, [0.9]).mean.value == pytest.approx(0.2)


def test_the_bootstrap():
    other = curve(UNIFORM.amounts * 0.8, [0.68, 0.8, 0.9, 0.93, 0.97], seed=1)
    first, again, different = (video.saving(other, UNIFORM, [0.8, 0.9], seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.mean.value == different.mean.value
    assert first.mean.low != different.mean.low
    assert first.mean.low < first.mean.value < first.mean.high
    few = Curve(UNIFORM.amounts, UNIFORM.sums[:, :20], UNIFORM.measure)
    assert video.saving(few, few, [0.8]).mean.low is None, "two blocks say nothing"


def test_curves_that_do_not_meet():
    low = curve([100, 200], [0.3, 0.4])
    found = video.saving(low, UNIFORM, [0.8])
    assert (found.at[0].value, found.mean.value, found.highest.value) == (None, None, None)
    with pytest.raises(WrongArgument, match="60 and 20 frames"):
        video.saving(UNIFORM, curve([100, 200], [0.3, 0.4], frames=20), [0.8])


def test_uniform_has_one_qp(clip):
    form = _Form(None)
    stream = form._stream(clip, clip.video, {"qp": 34}, OFF)
    frames = list(video.decoded(stream.packets, quality=True))
    assert {int(qp) for frame in frames[1:] for qp in np.unique(qp_map(frame))} == {34}
    (scheme,) = video.coding_schemes(["uniform"], Shades())
    assert scheme.code(clip, 34).sizes.tolist() == stream.sizes.tolist()


def bright():
    x = keras.Input((*SIZE, 3))
    mean = layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(1 / 75))
    return keras.Model(x, layers.Reshape((6, 8))(mean(layers.AveragePooling2D(16)(x))))


def test_every_scheme_codes_every_frame(clip):
    model, sizes = bright(), {}
    for scheme in video.coding_schemes(SCHEMES, Finder(), model, key_every=8):
        coded = scheme.code(clip, 40)
        pictures = list(coded.pictures())
        assert [picture.shape for picture in pictures] == [(*SIZE, 3)] * FRAMES, scheme.name
        assert (coded.sizes > 0).all()
        assert (coded.out_at >= np.arange(FRAMES)).all()
        assert (coded.out_at < FRAMES).all()
        assert coded.offsets is None or len(coded.offsets) == FRAMES
        on_camera = ("boxes", "vigil", "camera", "two-levels", "camera-short", "camera-live")
        assert (coded.looking > 0) == (scheme.name in on_camera)
        assert 0 < coded.encoding < 0.5, "a model is compiled meanwhile, which does not count"
        sizes[scheme.name] = int(coded.sizes.sum())
        if scheme.name in ("vigil", "boxes"):
            assert (coded.offsets[9] != coded.offsets[10]).any(), "the column has moved"
            assert coded.offsets[0].tolist() == [
                [0 if 1 <= row < 4 and column == 0 else 6 for column in range(8)] for row in range(6)
            ]
    assert (coded.out_at == np.arange(FRAMES)).all(), "the last one, camera-live, keeps nothing back"
    assert sizes["vigil"] < sizes["uniform"] < sizes["dds"]


def test_the_second_pass_is_seen_inside_of_boxes(clip):
    (scheme,) = video.coding_schemes(["dds"], Finder())
    source = [frame.to_ndarray(format="rgb24") for frame in clip]
    inside, outside = [], []
    for picture, frame, offsets in zip(
        scheme.code(clip, 46).pictures(), source, scheme.code(clip, 46).offsets, strict=True
    ):
        apart = np.abs(picture.astype(int) - frame).mean(axis=2).reshape(6, 16, 8, 16).mean(axis=(1, 3))
        inside.append(apart[offsets < 0].mean())
        outside.append(apart[offsets == 0].mean())
    assert np.mean(inside) < 0.7 * np.mean(outside)
    assert np.mean(outside) < 30, "not black"


def test_schemes_that_there_are_not():
    with pytest.raises(UnknownName, match="unifrm"):
        video.coding_schemes(["unifrm"], Shades())
    with pytest.raises(WrongArgument, match="needs a camera model"):
        video.coding_schemes(["camera"], Shades())
    with pytest.raises(WrongArgument, match="`preset` must be one of"):
        video.coding_schemes(["uniform"], Shades(), preset="quick")
    with pytest.raises(WrongArgument, match="finds no boxes"):
        video.coding_schemes(["vigil"], Shades())[0].code(TINY, 30)


class _Tiny:
    """A clip of one frame."""

    video = type("Video", (), {"width": 128, "height": 96, "rate": Fraction(25)})

    def __iter__(self):
        return iter([packages().VideoFrame.from_ndarray(np.zeros((*SIZE, 3), np.uint8), format="rgb24")])


TINY = _Tiny()


@pytest.fixture(scope="module")
def evaluated(clip):
    server = Shades()
    schemes = video.coding_schemes(["uniform", "defaults", "oracle"], server, step=5)
    return server, video.evaluate(server, clip, schemes, every=2)


def test_an_evaluation(evaluated, clip):
    server, found = evaluated
    assert [point.setting for point in found.points["uniform"]] == [30, 35, 40, 45, 50]
    uniform = found.curve("uniform")
    assert uniform.sums.shape == (5, 12, 24)
    assert uniform.accuracies()[0] == 1, "QP 30 is the reference"
    assert uniform.accuracies()[-1] < 0.5
    assert (np.diff(uniform.amounts) < 0).all()
    assert found.seconds == pytest.approx(FRAMES / 25)
    wanted = 8 * uniform.bytes_at(0.9) / FRAMES * 10 / 0.6
    assert bandwidth_for(found, "uniform", 0.9) == pytest.approx(wanted)
    assert found.cost("uniform", 0.9, lambda point: point.bytes**2) > uniform.bytes_at(0.9) ** 2, (
        "straight between points"
    )
    assert found.cost("uniform", 1.0, lambda point: point.setting) == pytest.approx(30)
    assert found.cost("defaults", 1.0, lambda point: 1.0) is None
    against_source = video.evaluate(server, clip, found.schemes[:1], every=2, reference=None)
    assert 0.5 < against_source.curve("uniform").accuracies()[0] < 1
    with pytest.raises(UnknownName, match="camera"):
        found.curve("camera")


def test_it_goes_on_where_it_was(clip, tmp_path):
    class Broken(Exception):
        pass

    def breaks(done, total):
        if done == 2:
            raise Broken

    server = Shades()
    schemes = video.coding_schemes(["uniform"], server, step=5)
    with pytest.raises(Broken):
        video.evaluate(server, clip, schemes, folder=tmp_path, name="shades", on_progress=breaks)
    assert len(list(tmp_path.iterdir())) == 2
    whole = video.evaluate(server, clip, schemes, folder=tmp_path, name="shades")
    server.calls = 0
    again = video.evaluate(server, clip, schemes, folder=tmp_path, name="shades")
    assert server.calls == 0
    for one, other in zip(whole.points["uniform"], again.points["uniform"], strict=True):
        assert (one.setting, one.bytes, one.encoding, one.passes) == (
            other.setting,
            other.bytes,
            other.encoding,
            other.passes,
        )
        np.testing.assert_array_equal(one.sums["mean IoU"], other.sums["mean IoU"])
    video.evaluate(server, clip, schemes, folder=tmp_path, name="another")
    assert server.calls == 6 * FRAMES, "another server's results are its own"
    kept = next(iter(tmp_path.iterdir()))
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(FileProblem, match="is damaged"):  # it is one of both servers'
        [video.evaluate(server, clip, schemes, folder=tmp_path, name=name) for name in ("shades", "another")]
    with pytest.raises(WrongArgument, match="Give the server's name="):
        video.evaluate(server, clip, schemes, folder=tmp_path)


def test_settings_that_are_far_off_are_left_out(clip, monkeypatch):
    """Halved until both ends are found; two more on each side are tried."""
    accuracy = [0.99, 0.98, 0.99, 0.97, 0.96, 0.93, 0.9, 0.86, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    scheme = video.Scheme("one", "", None, range(len(accuracy)))
    seen, told = [], []

    def tried(scheme, setting):
        seen.append(setting)
        sums = np.array([[accuracy[setting], 1.0]])
        return Point(setting, np.ones(3, int), np.arange(3), 0.0, 0.0, 1, 0.0, {"mean F1 of frames": sums})

    points = _Tried(scheme, FrameF1(), tried, told.append).points((0.8, 0.95))
    assert {point.setting for point in points} == set(seen) >= set(range(3, 11))
    assert len(seen) == len(told) < 13
    assert [point.setting for point in points] == sorted(seen)
    everything = _Tried(scheme, FrameF1(), tried, told.append).points(None)
    assert [point.setting for point in everything] == list(range(len(accuracy)))


def test_a_clip_that_is_shorter_than_a_chunk(clip):
    server = Finder()
    few = video.Clip(clip.video, 3)
    found = video.evaluate(server, few, video.coding_schemes(["uniform", "eaar", "oracle"], server, step=10))
    numbers = report.summary(found, video.Link(1e6), draws=10)
    assert numbers["frames"] == 3
    assert video.delays(found.points["eaar"][0], 25, video.Link(1e6))["fill"].tolist() == [3 / 25]


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("href", "src", "srcset", "data")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page(evaluated, clip):
    server, found = evaluated
    link = video.Link(2e5)
    numbers = report.summary(found, link, draws=20)
    frames = {"oracle": report.shown(server, found, "oracle", 2)}
    text = report.page([(found, numbers, frames)], link, "T<i>tle")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert "<b>" not in text
    assert "<i>tle" not in text
    assert "<b>a&b.mp4" in page.text
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    for word in ("<script", "http:", "https:", "url(", "@import"):
        assert word not in text
    assert text.count("<polyline") == 2 * 3
    tree = ElementTree.fromstring(report.picture([found, found], ["uniform", "oracle"]))
    drawn = tree.iter("{http://www.w3.org/2000/svg}polyline")
    assert [one.get("stroke") for one in drawn] == [*plot.COLOURS[:2]] * 2
    assert "a&b" in "".join(tree.itertext())
    (row,) = [one for one in numbers["savings"] if (one["scheme"], one["against"]) == ("oracle", "uniform")]
    wanted = video.saving(found.curve("oracle"), found.curve("uniform"), [0.9], draws=0).at[0].value
    assert [one["value"] for one in row["at"] if one["accuracy"] == 0.9] == [wanted]


def test_marks_of_detectors_and_of_points(clip):
    boxes = video.Detections(np.array([[1.0, 2, 31, 42]]), np.array([0.5]), np.zeros(1, np.int32))
    picture, offsets = np.zeros((*SIZE, 3), np.uint8), np.zeros((6, 8), int)
    offsets[1, 2] = -10
    drawn = report._frame(report.Shown(3, picture, offsets, boxes, boxes))
    assert drawn.count('width="30.0" height="40.0"') == 2
    assert drawn.count("stroke-dasharray") == 1
    assert 'x="32" y="16" width="16" height="16"' in drawn
    points = np.array([[[5, 6, 0.9], [7, 8, 0.1]]])
    assert report._frame(report.Shown(3, picture, offsets, points, points)).count("<circle") == 2
    classes = np.zeros((6, 8), int)
    other = classes.copy()
    other[0, 0] = 1
    coloured = report._coloured(picture, classes, other)
    assert coloured[0, 0].tolist() == [127, 0, 0]
    assert not coloured[16:, 16:].any()


def test_boxes_of_a_server_are_as_old_as_its_answers(clip, monkeypatch):
    assert [_Form(None, chunk=chunk).back_after(rate) for chunk, rate in ((10, 25), (10, 30), (60, 30), (10, 10))] == [
        3,
        3,
        2,
        2,
    ]
    monkeypatch.setattr(_Form, "back_after", lambda form, rate: 1)
    coded = _Form(Finder()).boxes(old=True, mode="exact")(clip, 40)
    assert not np.any(coded.offsets[:10]), "nothing has come back"
    fresh = _Form(Finder())._inside(list(clip)[9])
    assert coded.offsets[10].tolist() == np.where(fresh, 0, 6).tolist()
    assert coded.looking == 0


def test_two_levels_and_one_time_of_the_server(clip):
    (scheme,) = video.coding_schemes(["two-levels"], Finder(), bright())
    coded = scheme.code(clip, 50)
    assert set(np.unique(coded.offsets)) == {-10, 0}
    found = video.evaluate(Finder(), clip, video.coding_schemes(["uniform", "aq"], Finder(), step=10), every=4)
    assert len({point.serving for curve in found.points.values() for point in curve}) == 1

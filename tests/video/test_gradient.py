"""Accuracy gradients: of scores whose gradient is known, of frames of any size, of a real detector."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from keras_efficient import video
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)


class Linear:
    """A score that is a weighted sum of pixels."""

    def __init__(self, weights):
        self.weights = weights

    def predict(self, frames):
        return list(ops.convert_to_numpy(self.score(frames, None)))

    def reference(self, frames):
        return ops.sum(frames)

    def score(self, frames, reference):
        return ops.sum(frames * self.weights, axis=(1, 2, 3)) + 0.0 * reference


def pair(height, width, number=2):
    return RNG.random((2, number, height, width, 3)).astype("float32") * 255


@pytest.mark.contract
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (16, 7)])
@pytest.mark.parametrize("norm", [1, 2])
def test_a_linear_score(size, norm):
    high, low = pair(*size)
    weights = RNG.normal(size=(*size, 3)).astype("float32")
    found = video.accuracy_gradient(Linear(weights), high, low, norm=norm)
    each = np.linalg.norm(weights, norm, axis=-1) * np.linalg.norm(high - low, norm, axis=-1)
    assert found.shape == (2, -(-size[0] // 16), -(-size[1] // 16))
    np.testing.assert_allclose(found.sum(axis=(1, 2)), each.sum(axis=(1, 2)), rtol=1e-4)
    last = each[:, found.shape[1] * 16 - 16 :, found.shape[2] * 16 - 16 :]
    np.testing.assert_allclose(found[:, -1, -1], last.sum(axis=(1, 2)), rtol=1e-4)


def test_its_variants():
    high, low = pair(16, 32)
    weights = RNG.normal(size=(16, 32, 3)).astype("float32")
    server = Linear(weights)
    bare = video.accuracy_gradient(server, high, low, weight="none")
    np.testing.assert_allclose(bare[0], np.abs(weights).reshape(1, 16, 2, 16, 3).sum(axis=(1, 3, 4)), rtol=1e-4)
    low[:, :, :16] = high[:, :, :16]
    found = video.accuracy_gradient(server, high, low)
    assert (found[:, 0, 0] == 0).all()
    assert (found[:, 0, 1] > 0).all()
    twice = video.accuracy_gradient(Linear(2 * weights), high, low)
    np.testing.assert_allclose(twice, 2 * found, rtol=1e-4)


@pytest.mark.contract
def test_each_part_counts_alike():
    class Halves(Linear):
        """The left half is worth a thousand times what the right one is; a third part is worth nothing."""

        def parts(self, frames, reference):
            left, right = ops.sum(frames[:, :, :16], axis=(1, 2, 3)), ops.sum(frames[:, :, 16:], axis=(1, 2, 3))
            return ops.stack([1000 * left, right, 0 * left], axis=-1)

        def score(self, frames, reference):
            return ops.sum(self.parts(frames, reference), axis=-1)

    high, low = pair(16, 32)
    found = video.accuracy_gradient(Halves(1.0), high, low, each=True)
    np.testing.assert_allclose(found, np.ones((2, 1, 2)), rtol=1e-5)
    whole = video.accuracy_gradient(Halves(1.0), high, low)
    assert (whole[:, 0, 0] > 100 * whole[:, 0, 1]).all()
    with pytest.raises(WrongArgument, match="has no parts"):
        video.accuracy_gradient(Linear(1.0), high, low, each=True)


def test_where_it_is_taken():
    class Square(Linear):
        def score(self, frames, reference):
            return ops.sum(ops.square(frames), axis=(1, 2, 3)) / 2 + 0.0 * reference

    high, low = pair(16, 16)
    for at, frames in (("low", low), ("high", high)):
        found = video.accuracy_gradient(Square(1.0), high, low, at=at, weight="none")
        np.testing.assert_allclose(found[:, 0, 0], frames.sum(axis=(1, 2, 3)), rtol=1e-4)


def test_what_has_no_gradient():
    class Chosen(Linear):
        def score(self, frames, reference):
            return ops.sum(ops.cast(ops.argmax(frames, axis=-1), "float32"), axis=(1, 2)) + 0.0 * reference

    class Apart(Linear):
        def score(self, frames, reference):
            return ops.sqrt(ops.sum(frames * 0.0, axis=(1, 2, 3)))

    high, low = pair(16, 16)
    with pytest.raises(WrongArgument, match=r"has no gradient|does not depend"):
        video.accuracy_gradient(Chosen(1.0), high, low)
    with pytest.raises(WrongArgument, match="not finite"):
        video.accuracy_gradient(Apart(1.0), high, low)
    with pytest.raises(WrongArgument, match="of one shape"):
        video.accuracy_gradient(Linear(1.0), high, low[:, :8])
    with pytest.raises(WrongArgument, match="at='middle'"):
        video.accuracy_gradient(Linear(1.0), high, low, at="middle")


def test_where_nothing_is_seen_nothing_is_lost():
    high, low = pair(20, 16)
    assert not video.accuracy_gradient(Linear(0.0), high, low).any()


@pytest.fixture(scope="module", params=["likelihood", "hits"])
def detector(data_dir, request):
    return video.onnx_server(data_dir / "models" / "yolox_nano.onnx", "detection", "yolox", score=request.param)


def test_a_detector_finds_people(detector, data_dir):
    frames = video.Video.open(data_dir / "video" / "people_street_800x450.mp4")
    frame = next(frame for index, frame in enumerate(frames) if index == 60).to_ndarray(format="rgb24")
    (found,) = detector.predict(frame[None])
    assert len(found) >= 10
    assert (found.classes[found.scores > 0.5] == 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= 800).all()
    assert (found.boxes[:, 3] <= 450).all()
    areas = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], axis=1)
    assert areas.max() > 20_000


def test_a_detectors_score_is_best_for_the_reference(detector, data_dir):
    frame = next(iter(video.Video.open(data_dir / "video" / "dashcam_highway_1280x720.mp4"))).to_ndarray(format="rgb24")
    reference = detector.reference(frame[None])
    small = frame[::8, ::8].repeat(8, axis=0).repeat(8, axis=1)
    same, worse = (float(ops.convert_to_numpy(detector.score(x[None], reference))[0]) for x in (frame, small))
    assert same > worse + 0.1


def test_a_detectors_gradient_of_any_batch(detector, data_dir):
    frames = video.Video.open(data_dir / "video" / "traffic_highway_640x360.mp4")
    high = np.stack([one.to_ndarray(format="rgb24") for one, _ in zip(frames, range(3), strict=False)])
    low = high[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)
    together = video.accuracy_gradient(detector, high, low)
    for some in (slice(0, 2), slice(2, 3)):
        alone = video.accuracy_gradient(detector, high[some], low[some])
        np.testing.assert_allclose(alone, together[some], rtol=0.05, atol=1e-3 * together.max())


def test_a_detectors_gradient_is_where_its_objects_are(detector, data_dir):
    frames = video.Video.open(data_dir / "video" / "dashcam_highway_1280x720.mp4")
    high = next(iter(frames)).to_ndarray(format="rgb24")[None]
    small = high[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)
    gains = video.accuracy_gradient(detector, high, small)[0]
    assert gains.shape == (45, 80)
    (found,) = detector.predict(high)
    inside = np.zeros((45, 80), bool)
    for left, top, right, bottom in found.boxes / 16:
        inside[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
    assert 0 < inside.mean() < 0.2
    assert gains[inside].mean() > 5 * gains[~inside].mean()

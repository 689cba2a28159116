"""A camera: scores move with the picture between the frames that are looked at; offsets reach the encoder."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient import export, models, video
from keras_efficient.errors import WrongArgument
from keras_efficient.video.frames import packages
from keras_efficient.video.motion import carried, small_luma

SIZE = (96, 160)


def frame(at=(32, 32), size=SIZE, seed=0):
    """Noise, with a bright square of its own noise somewhere."""
    array = np.random.default_rng(seed).integers(60, 100, (*size, 1)).repeat(3, axis=2).astype(np.uint8)
    inside = np.random.default_rng(7).integers(150, 250, (32, 32, 1)).astype(np.uint8)
    array[at[0] : at[0] + 32, at[1] : at[1] + 32] = inside
    return array


def bright():
    """A camera model to which bright macroblocks are worth more."""
    x = keras.Input((*SIZE, 3))
    y = layers.AveragePooling2D(16)(x)
    y = layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(1 / 75), name="sum")(y)
    return keras.Model(x, layers.Reshape((6, 10))(y), name="bright")


def picture(array):
    return packages().VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")


@pytest.mark.parametrize(("down", "across"), [(16, 0), (0, -16), (16, 32), (0, 0), (-8, 8)])
def test_scores_move_with_the_picture(down, across):
    then = small_luma(picture(frame()))
    now = small_luma(picture(frame((32 + down, 32 + across))))
    scores = np.zeros((6, 10), np.float32)
    scores[2:4, 2:4] = 1.0
    found = carried(scores, then, now)
    middle = (np.indices(found.shape) * found).sum(axis=(1, 2)) / found.sum()
    np.testing.assert_allclose(middle, [2.5 + down / 16, 2.5 + across / 16], atol=0.3)
    assert found.sum() == pytest.approx(4, abs=2.5)


def test_nothing_moves_where_nothing_is_seen():
    grey = small_luma(picture(np.full((*SIZE, 3), 100, np.uint8)))
    scores = np.arange(60, dtype=np.float32).reshape(6, 10)
    np.testing.assert_array_equal(carried(scores, grey, grey), scores)


@pytest.mark.parametrize("size", [(90, 150), (96, 160), (450, 802), (16, 16)])
def test_sizes_of_small_luma(size):
    luma = small_luma(picture(frame(size=size, at=(0, 0)) if min(size) > 32 else np.zeros((*size, 3), np.uint8)))
    assert luma.shape == (-(-size[0] // 16) * 2, -(-size[1] // 16) * 2)


def test_offsets_follow_what_the_model_sees():
    options = {"mode": "exact", "base": 34, "allocate": lambda scores: video.graded_offsets(2.0**scores, strength=4)}
    camera = video.Camera(bright(), SIZE[1], SIZE[0], 25, every=5, **options)
    packets = []
    for number in range(10):
        packets += camera.encode(frame((32, 32 + 4 * number), seed=number))
        assert camera.offsets.shape == (6, 10)
    packets += camera.flush()
    assert camera.offsets[2, 5] < camera.offsets[0, 0]  # the square has moved by 36 pixels
    assert len(packets) == 10
    first = next(video.decoded(packets, quality=True))
    assert video.qp_map(first)[2:4, 2:4].max() < 30


def test_the_model_looks_at_every_kth_frame_and_at_key_frames():
    looks = []
    camera = video.Camera(bright(), SIZE[1], SIZE[0], 25, every=4)
    saliency = camera._saliency
    camera._saliency = lambda picture: looks.append(camera._count) or saliency(picture)
    for number in range(12):
        camera.encode(frame(), key=number == 6)
    assert looks == [0, 4, 6, 10]


def test_without_a_model_it_is_the_encoder():
    # Without B frames: with them and its macroblock tree x264 gives other bytes now and then, for the same frames.
    makers = (partial(video.Camera, None), video.RoiEncoder)
    camera, encoder = (make(160, 96, 25, base=30, threads=1, b_frames=0) for make in makers)
    frames = [frame(seed=number) for number in range(6)]
    both = [
        [packet.data for array in frames for packet in one.encode(array)] + [packet.data for packet in one.flush()]
        for one in (camera, encoder)
    ]
    assert both[0] == both[1]
    assert camera.offsets is None


def test_frames_of_another_size_than_the_models():
    scores = video.Saliency(bright())(picture(frame(size=(180, 330), at=(64, 64))))
    assert scores.shape == (12, 21)
    assert scores[4:6, 4:6].min() > scores[10:, 15:].max()


def test_a_file_says_what_its_model_says(tmp_path):
    model = models.AccModel(SIZE, width=0.25, shrink=2)
    export.save(model, tmp_path / "camera.tflite")
    image = picture(np.random.default_rng(0).integers(0, 255, (6, 10, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8))
    found, wanted = (video.Saliency(one)(image) for one in (tmp_path / "camera.tflite", model))
    assert found.shape == wanted.shape == (6, 10)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_a_bitrate_is_kept(share):
    """Within a twentieth over a clip, with offsets; the content changes in its middle."""
    random = np.random.default_rng(0)
    camera = video.Camera(bright(), SIZE[1], SIZE[0], 25, bitrate=int(share * 200_000))
    packets = []
    for number in range(250):
        noise = random.integers(0, 120 if number < 125 else 40, (*SIZE, 1)).repeat(3, axis=2)
        packets += camera.encode((frame() // 2 + noise).astype(np.uint8))
    packets += camera.flush()
    rate = 8 * sum(len(packet.data) for packet in packets) / 10
    assert rate == pytest.approx(share * 200_000, rel=0.05)


def test_what_is_refused(tmp_path):
    with pytest.raises(WrongArgument, match="`every` must be 1 or more"):
        video.Camera(None, 160, 96, 25, every=0)
    with pytest.raises(WrongArgument, match="not RGB frames"):
        video.Saliency(models.SESR())
    with pytest.raises(WrongArgument, match="A camera model is a Keras model or the path of a file, not list"):
        video.Saliency([1])
    x = keras.Input((96, 160, 3))
    with pytest.raises(WrongArgument, match="not \\(batch, rows, columns\\) of scores"):
        video.Saliency(keras.Model(x, layers.Dense(1)(x)))


def test_a_camera_that_runs_a_file_imports_neither_keras_nor_tensorflow(tmp_path):
    path = tmp_path / "camera.tflite"
    export.save(models.AccModel(SIZE, width=0.25, shrink=2), path)
    code = f"""
import sys
import numpy as np
from keras_efficient import video
from keras_efficient.video.transport import Sender, Spool, chunked
camera = video.Camera({str(path)!r}, 160, 96, 25)
camera.encode(np.zeros((96, 160, 3), np.uint8))
assert camera.offsets.shape == (6, 10)
print(sorted({{"keras", "tensorflow", "jax"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("height", [90, 96, 180, 360])
def test_scores_lie_where_the_model_saw_them(height):
    """Of a model for 90 rows, whose scores say at which share of the frame's height they lie."""
    x = keras.Input((90, 160, 3))
    rows = np.broadcast_to((np.arange(6)[:, None] + 0.5) * 16 / 90, (6, 10)).astype("float32")
    scores = ops.mean(x, axis=(1, 2, 3), keepdims=True)[..., 0] * 0 + rows
    saliency = video.Saliency(keras.Model(x, scores))
    found = saliency(picture(np.zeros((height, 160, 3), np.uint8)))[:, 0]
    want = (np.arange(len(found)) + 0.5) * 16 / height
    np.testing.assert_allclose(found, want.clip(rows[0, 0], rows[-1, 0]), atol=1e-5)

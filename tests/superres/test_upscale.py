"""Upscaling of pictures in memory: every type and number of channels, alpha, tiles, questions that are left."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.superres import (
    Bicubic,
    Image,
    from_unit,
    imresize,
    rgb_to_ycbcr,
    to_unit,
    upscale,
    ycbcr_to_rgb,
)


class Recorded:
    """The baseline as a model: it reaches 3 pixels, and repeats the border, so a tile must know its own."""

    halo = 3

    def __init__(self, scale, input_shape=None):
        self._upscale = Bicubic(scale)
        self.shapes = set()
        if input_shape is not None:
            self.input_shape = input_shape

    def __call__(self, y):
        assert y.dtype == np.float32
        assert y.min() >= 0
        assert y.max() <= 1
        self.shapes.add(y.shape)
        return self._upscale(y)


def picture(*shape, dtype=np.uint8, seed=0):
    image = np.random.default_rng(seed).random(shape)
    return from_unit(image.astype(np.float32 if dtype == np.float16 else np.float64), dtype)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_colour_is_the_protocols_formula_rounded_once(scale, dtype):
    image = picture(21, 34, 3, dtype=dtype)
    exact = ycbcr_to_rgb(imresize(rgb_to_ycbcr(image, dtype=np.float64), scale))
    result = upscale(image, Recorded(scale))
    assert result.dtype == dtype
    if dtype == np.float32:
        np.testing.assert_allclose(result, np.clip(exact, 0, 1), atol=3e-6)
    else:
        peak = np.iinfo(dtype).max
        # One rounding (½), and float32: 2⁻²⁴ of some ten terms.
        np.testing.assert_allclose(result, np.clip(exact, 0, 1) * peak, atol=0.5 + peak * 3e-6)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 2), (6, 5, 3), (6, 5, 4), (1, 1), (1, 1, 4), (900, 3, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_keeps_type_and_channels(shape, dtype):
    result = upscale(picture(*shape, dtype=dtype), Recorded(2))
    assert result.shape == (2 * shape[0], 2 * shape[1], *shape[2:])
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_runs_from_0_to_1(dtype):
    image = picture(9, 8, dtype=dtype)
    expected = from_unit(imresize(to_unit(image, dtype=np.float64), 2), dtype)
    np.testing.assert_allclose(upscale(image, Recorded(2)).astype(int), expected, atol=1)
    gray_alpha = np.stack([image, np.full_like(image, np.iinfo(dtype).max)], axis=-1)
    np.testing.assert_array_equal(upscale(gray_alpha, Recorded(2))[..., 0], upscale(image, Recorded(2)))


@pytest.mark.parametrize("tile", [16, (16, 11), (64, 9), "auto", None])
@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)])
def test_tiles_make_no_difference(tile, channels):
    image = picture(41, 37, *channels)
    np.testing.assert_array_equal(upscale(image, Recorded(2), tile=tile), upscale(image, Recorded(2), tile=None))


def test_auto_cuts_large_pictures_into_equal_tiles():
    model = Recorded(2)
    image = picture(700, 900)
    assert (upscale(image, model) == upscale(image, Recorded(2), tile=None)).all()
    (shape,) = (s for s in model.shapes if s[1] > 32)
    assert shape[1] * shape[2] <= 512 * 512
    assert shape[1] < 400, "700 rows make two tiles of about half"


def test_a_model_of_fixed_size():
    model = Recorded(2, input_shape=(1, 24, 20, 1))
    image = picture(50, 61, 3)
    np.testing.assert_array_equal(upscale(image, model), upscale(image, Recorded(2)))
    assert model.shapes == {(1, 24, 20, 1)}
    small = picture(5, 61, 3)  # padded by its edge, which is what this model does anyway
    np.testing.assert_array_equal(upscale(small, model), upscale(small, Recorded(2)))
    with pytest.raises(WrongArgument, match="24×20"):
        upscale(image, model, tile=32)


def test_what_an_exported_file_carries_is_used():
    class File:
        input_shapes: ClassVar = {"y": (1, 24, 20, 1)}
        metadata: ClassVar = {"scale": 2, "halo": 2}

        def __call__(self, y):
            assert y.shape == (1, 24, 20, 1)
            assert y.any(), "no run only to find the scale"
            return Bicubic(2)(y)

    image = picture(50, 61, 3)
    np.testing.assert_array_equal(upscale(image, File()), upscale(image, Bicubic(2)))


def test_opaque_alpha_changes_nothing():
    image = picture(12, 13, 3)
    opaque = np.concatenate([image, np.full((12, 13, 1), 255, np.uint8)], axis=2)
    result = upscale(opaque, Recorded(2))
    np.testing.assert_array_equal(result[..., :3], upscale(image, Recorded(2)))
    assert (result[..., 3] == 255).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_colours_under_transparent_pixels_do_not_bleed(channels):
    """A disc of one colour on transparent pixels of another: what can be seen of the result has the disc's colour."""
    y, x = np.mgrid[-10:10, -10:10]
    inside = x**2 + y**2 < 50
    colour, hidden = ([200], [0]) if channels == 2 else ([220, 40, 90], [0, 255, 30])
    image = np.where(inside[..., None], [*colour, 255], [*hidden, 0]).astype(np.uint8)
    result = upscale(image, Recorded(2)).astype(int)
    visible = result[..., -1] > 8
    assert visible.sum() > 4 * inside.sum() * 0.9
    assert np.abs(result[visible][:, :-1] - colour).max() <= 2
    np.testing.assert_array_equal(result[..., -1], upscale(image[..., -1], Recorded(2)))


@pytest.mark.parametrize("radius", [3, 15])
def test_a_model_sees_no_hidden_colour_however_far_it_looks(radius):
    class Mean:
        """Over 2·radius + 1 columns."""

        halo = radius

        def __call__(self, y):
            wide = np.pad(y, ((0, 0), (0, 0), (radius, radius), (0, 0)), mode="edge")
            mean = np.mean([wide[:, :, i : i + y.shape[2]] for i in range(2 * radius + 1)], axis=0, dtype=np.float32)
            return mean.repeat(2, 1).repeat(2, 2)

    image = np.full((6, 80, 4), [100, 100, 100, 255], np.uint8)
    image[:, 40:, 3] = 0
    other = image.copy()
    other[:, 40:, :3] = 255
    result, expected = upscale(other, Mean()), upscale(image, Mean())
    visible = expected[..., 3] > 0
    np.testing.assert_array_equal(result[visible], expected[visible])


def test_half_transparent_colours_are_weighted_by_alpha():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:, :4] = [255, 0, 0, 255]
    image[:, 4:] = [0, 0, 255, 1]  # nearly invisible blue beside opaque red
    result = upscale(image, Recorded(2)).astype(int)
    red = rgb_to_ycbcr(np.array([[[255, 0, 0]]], np.uint8))[0, 0]
    beside = rgb_to_ycbcr(result[8, 7, :3][None, None].astype(np.uint8))[0, 0]
    np.testing.assert_allclose(beside[1:], red[1:], atol=0.05)


def test_fully_transparent_pictures_pass():
    image = picture(8, 9, 4)
    image[..., 3] = 0
    assert (upscale(image, Recorded(2))[..., 3] == 0).all()


def test_rgb_models():
    calls = []

    def model(rgb):
        calls.append(rgb.shape)
        return np.repeat(np.repeat(rgb, 2, 1), 2, 2)

    image = picture(7, 6, 3)
    expected = np.repeat(np.repeat(image, 2, 0), 2, 1)
    np.testing.assert_array_equal(upscale(image, model, channels=3), expected)
    np.testing.assert_array_equal(upscale(image[..., 0], model, channels=3), expected[..., 0])
    with_alpha = np.concatenate([image, np.full((7, 6, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(upscale(with_alpha, model, channels=3)[..., :3], expected)
    model.input_shape = (None, None, None, 3)
    np.testing.assert_array_equal(upscale(image, model), expected)
    assert {shape[3] for shape in calls} == {3}


def test_an_image_keeps_what_belongs_to_it():
    image = Image(picture(5, 4, 3), icc_profile=b"profile", exif=b"exif")
    large = upscale(image, Recorded(2))
    assert (large.icc_profile, large.exif) == (b"profile", b"exif")
    np.testing.assert_array_equal(large.pixels, upscale(image.pixels, Recorded(2)))


def test_halo_and_scale_of_a_keras_model_are_derived():
    keras = pytest.importorskip("keras", reason="makes the model")
    x = keras.Input((None, None, 1))
    y = keras.layers.Conv2D(9, 5, padding="same", activation="sigmoid")(x)
    model = keras.Model(x, keras.ops.depth_to_space(y, 3))
    image = picture(40, 50)
    whole = upscale(image.astype(np.float32) / 255, model, tile=None)
    np.testing.assert_allclose(upscale(image.astype(np.float32) / 255, model, tile=20), whole, atol=1e-6)
    assert whole.shape == (120, 150)
    looks_everywhere = keras.Model(x, x * keras.layers.GlobalAveragePooling2D(keepdims=True)(x))
    assert upscale(image, looks_everywhere).shape == (40, 50), "one pass needs no halo"
    with pytest.raises(UnsupportedLayer, match="halo="):
        upscale(image, looks_everywhere, tile=20)


def test_progress_is_reported():
    seen = []
    upscale(picture(20, 20), Recorded(2), tile=(20, 13), on_progress=lambda *p: seen.append(p))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((4, 4), np.int64), {}, "int64"),
        (np.full((4, 4), 255.0), {}, r"\[0, 1\]"),
        (np.full((4, 4), np.nan), {}, r"\[0, 1\]"),
        (np.zeros((4, 4, 5), np.uint8), {}, r"1 … 4"),
        (np.zeros((0, 4), np.uint8), {}, "empty"),
        (np.zeros((40, 40), np.uint8), {"scale": 3}, "scale 3"),
        (np.zeros((40, 40), np.uint8), {"scale": 2.5}, "whole number"),
        (np.zeros((40, 40), np.uint8), {"tile": 0}, "tile"),
        (np.zeros((40, 40), np.uint8), {"tile": 6}, "no room"),
        (np.zeros((40, 40), np.uint8), {"halo": -1}, "halo"),
        (np.zeros((40, 40), np.uint8), {"channels": 2}, "channels"),
    ],
)
def test_bad_input_is_refused(image, arguments, message):
    with pytest.raises(WrongArgument, match=message):
        upscale(image, Recorded(2), **arguments)


def test_a_function_of_unknown_reach_is_asked_for_its_halo():
    image = picture(40, 40)
    with pytest.raises(WrongArgument, match="halo"):
        upscale(image, lambda y: Bicubic(2)(y), tile=20)
    expected = upscale(image, Bicubic(2), tile=None)
    np.testing.assert_array_equal(upscale(image, lambda y: Bicubic(2)(y), tile=20, halo=2), expected)
    np.testing.assert_array_equal(upscale(image, Bicubic(2), tile=20), expected)
    assert (upscale(image, Bicubic(2), tile=20, halo=1) != expected).any()
    with pytest.raises(WrongArgument, match="no upscaled picture"):
        upscale(image, lambda y: y[:, ::2])


def test_importing_and_using_it_loads_no_framework():
    program = """
import sys
import numpy as np
from keras_efficient import superres
model = superres.Bicubic(2)
superres.upscale(np.zeros((8, 8, 3), np.uint8), model)
heavy = {"keras", "tensorflow", "jax", "torch", "av", "onnx", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_full_hd_frame_needs_little_memory():
    program = """
import resource, sys
import numpy as np
from keras_efficient import superres
image = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8, endpoint=False)
def model(y):
    return np.repeat(np.repeat(y, 2, 1), 2, 2)
model.halo = 9
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
superres.upscale(image, model)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
    # float32 Y, Cb, Cr (24 MiB) and a copy of Y (8), the large Y (32), the result (24), strips and tiles: some 110.
    assert float(result.stdout) < 160

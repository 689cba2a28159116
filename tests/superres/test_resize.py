"""MATLAB's bicubic: all golden files bit for bit, a naive oracle, borders, types."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keras_efficient.errors import WrongArgument
from keras_efficient.superres import imresize


def naive(image, scale, border):
    """One sample at a time, by the definition, in float64, never rounded."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def line(values):
        n, s = len(values), min(scale, 1)
        result = []
        for x in range(1, math.ceil(scale * n) + 1):
            u = x / scale + 0.5 * (1 - 1 / scale)
            total = weight_sum = 0.0
            for i in range(math.floor(u - 2 / s) - 1, math.ceil(u + 2 / s) + 2):
                weight = kernel(s * (u - i))
                if border == "replicate":
                    j = min(max(i, 1), n)
                else:
                    j = (i - 1) % (2 * n)
                    j = j + 1 if j < n else 2 * n - j
                total += weight * values[j - 1]
                weight_sum += weight
            result.append(total / weight_sum)
        return np.array(result)

    return np.apply_along_axis(line, 1, np.apply_along_axis(line, 0, image))


def golden_files(data_dir):
    return sorted((data_dir / "sr" / "matlab_lr").rglob("*.png"))


def high_of(golden):
    with Image.open(golden.parents[3] / golden.parent.parent.name / golden.name) as file:
        image = np.asarray(file)
    scale = int(golden.parent.name[1])
    height, width = (n - n % scale for n in image.shape[:2])
    return image[:height, :width], scale


def test_every_golden_file_bit_for_bit(data_dir):
    files = golden_files(data_dir)
    assert len(files) == 57
    for golden in files:
        high, scale = high_of(golden)
        with Image.open(golden) as file:
            np.testing.assert_array_equal(imresize(high, 1 / scale), np.asarray(file), err_msg=str(golden))


def test_symmetric_border_differs_in_the_outer_two_pixels_only(data_dir):
    golden = next(f for f in golden_files(data_dir) if f.parent.name == "x2")
    high, scale = high_of(golden)
    replicated, mirrored = (imresize(high, 1 / scale, border=border) for border in ("replicate", "symmetric"))
    np.testing.assert_array_equal(replicated[2:-2, 2:-2], mirrored[2:-2, 2:-2])
    assert (replicated != mirrored).any()


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.sampled_from([0.25, 1 / 3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0]),
    border=st.sampled_from(["replicate", "symmetric"]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(height, width, scale, border, seed):
    image = np.random.default_rng(seed).random((height, width))
    expected = naive(image, scale, border)
    # Sums of at most 18×18 numbers below 2 in float64.
    np.testing.assert_allclose(imresize(image, scale, border=border), expected, atol=1e-13)
    # The same in float32: 24-bit mantissa, some 30 additions.
    np.testing.assert_allclose(imresize(image.astype(np.float32), scale, border=border), expected, atol=5e-6)


def test_output_size_has_a_scale_for_each_axis():
    image = np.random.default_rng(0).random((10, 12, 2))
    assert imresize(image, output_size=(5, 36)).shape == (5, 36, 2)
    np.testing.assert_array_equal(imresize(image, output_size=(20, 24)), imresize(image, 2))


def test_without_antialiasing_halving_reads_four_samples():
    impulse = np.zeros((1, 40))
    impulse[0, 20] = 1
    assert np.count_nonzero(imresize(impulse, 0.5, antialias=False)) == 2
    assert np.count_nonzero(imresize(impulse, 0.5)) == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 4), (300, 3), (2, 5, 7)])
def test_a_constant_stays_constant_in_every_type(dtype, shape):
    image = np.full(shape, 200 if np.dtype(dtype).kind == "u" else 0.5, dtype)
    for scale in (2, 3, 0.5):
        result = imresize(image, scale)
        assert result.dtype == dtype
        np.testing.assert_allclose(result, np.full(result.shape, image.flat[0]), rtol=1e-6)


def test_integers_are_rounded_half_up_after_each_pass_and_saturate():
    steep = np.array([[0, 255], [0, 255]], np.uint8)
    large = imresize(steep, 2)
    # Bicubic at ¾ pixel from a step: overshoots are cut at 0 and 255, and the sums 255·0.203125 = 51.797 round to 52.
    np.testing.assert_array_equal(large[0], [0, 52, 203, 255])
    high = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    once = np.floor(imresize(high.astype(np.float64), 0.5) + 0.5)
    assert (np.clip(once, 0, 255) != imresize(high, 0.5)).any(), "rounding once is another result"


@pytest.mark.parametrize(
    ("image", "arguments"),
    [
        (np.zeros((4, 4), np.int32), {"scale": 2}),
        (np.zeros((4, 4), bool), {"scale": 2}),
        (np.zeros((4,)), {"scale": 2}),
        (np.zeros((0, 4)), {"scale": 2}),
        (np.zeros((4, 4)), {}),
        (np.zeros((4, 4)), {"scale": 0}),
        (np.zeros((4, 4)), {"scale": (2, 2)}),
        (np.zeros((4, 4)), {"scale": 2, "output_size": (8, 8)}),
        (np.zeros((4, 4)), {"output_size": (0, 8)}),
        (np.zeros((4, 4)), {"scale": 2, "border": "mirror"}),
    ],
)
def test_bad_input_is_refused(image, arguments):
    with pytest.raises(WrongArgument):
        imresize(image, **arguments)

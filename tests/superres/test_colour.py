"""Studio-range BT.601: known colours, the inverse, 8 and 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.errors import WrongArgument
from keras_efficient.superres import from_unit, rgb_to_y, rgb_to_ycbcr, to_unit, ycbcr_to_rgb


@pytest.mark.parametrize(
    ("rgb", "ycbcr"),  # on 0 … 255
    [
        ((0, 0, 0), (16, 128, 128)),
        ((255, 255, 255), (235, 128, 128)),
        ((255, 0, 0), (81.481, 90.203, 240)),
        ((0, 255, 0), (144.553, 53.797, 34.214)),
        ((0, 0, 255), (40.966, 240, 109.786)),
    ],
)
def test_known_colours_in_both_directions(rgb, ycbcr):
    expected = np.array(ycbcr) / 255
    for image in (np.array([[rgb]], np.uint8), np.array([[rgb]], np.uint16) * np.uint16(257), np.array([[rgb]]) / 255):
        # float32 has 24 bits; four terms below 1.
        np.testing.assert_allclose(rgb_to_ycbcr(image)[0, 0], expected, atol=3e-7)
        np.testing.assert_allclose(rgb_to_y(image)[0, 0], expected[0], atol=3e-7)
    # White's chroma is 1e-17 away from 128 by the tabulated coefficients; the inverse amplifies by 2.
    np.testing.assert_allclose(ycbcr_to_rgb(expected[None, None])[0, 0], np.array(rgb) / 255, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_there_and_back_is_exact_for_integers(dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (200, 200, 3), dtype, endpoint=True)
    image[:2, :2] = [[[0, 0, 0], [255, 0, 255]], [[255, 255, 255], [0, 255, 0]]]
    np.testing.assert_array_equal(from_unit(ycbcr_to_rgb(rgb_to_ycbcr(image)), dtype), image)


def test_there_and_back_in_float64():
    image = np.random.default_rng(1).random((50, 50, 3))
    np.testing.assert_allclose(ycbcr_to_rgb(rgb_to_ycbcr(image, dtype=np.float64)), image, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_unit_scale_is_undone_exactly_for_every_value(dtype):
    values = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    unit = to_unit(values)
    assert unit.dtype == np.float32
    assert unit[0] == 0
    assert unit[-1] == 1
    np.testing.assert_array_equal(from_unit(unit, dtype), values)


def test_from_unit_clips_and_leaves_its_argument():
    values = np.array([-0.5, 0.5, 1.5], np.float32)
    np.testing.assert_array_equal(from_unit(values, np.uint8), [0, 128, 255])
    np.testing.assert_array_equal(from_unit(values, np.float32), [0, 0.5, 1])
    np.testing.assert_array_equal(values, np.array([-0.5, 0.5, 1.5], np.float32))


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(WrongArgument):
        rgb_to_y(np.zeros((4, 4), np.uint8))
    with pytest.raises(WrongArgument):
        to_unit(np.zeros((4, 4), np.int32))
    with pytest.raises(WrongArgument):
        ycbcr_to_rgb(np.zeros((4, 4, 3), np.uint8))

"""Corruptions: worse at each severity, the same for the same seed, and pictures all the while."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.bayes.corruptions import CHUNK, CORRUPTIONS, SEVERITIES, corrupted
from keras_efficient.errors import UnknownName, WrongArgument


def pictures(size, channels=1, count=60):
    """Bright discs off the middle on dark ground."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / (size - 1)
    row, column = random.uniform(0.25, 0.75, (2, count, 1, 1))
    discs = 1 / (1 + np.exp(30 * (np.hypot(rows - row, 2 * (columns - column)) - 0.25)))
    return np.repeat(discs[..., None], channels, axis=-1).astype(np.float32)


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_farther_from_the_picture(name, size):
    x = pictures(size)
    far = [float(np.abs(corrupted(x, name, severity, seed=3) - x).mean()) for severity in SEVERITIES]
    assert far[0] > 0.001
    assert far == sorted(far)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pictures_stay_pictures(name):
    for x in (pictures(9, channels=3, count=4), pictures(9, count=4)[..., 0]):
        kept = x.copy()
        found = corrupted(x, name, 5, seed=0)
        assert found.shape == x.shape
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_seed_same_pictures(name):
    x = pictures(8, count=CHUNK + 3)
    first, again, other = (corrupted(x, name, 4, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    if name in ("gaussian_noise", "rotation", "translation"):
        assert not np.array_equal(first, other)


def test_noise_has_its_sd():
    x = np.full((200, 28, 28), 0.5, np.float32)
    assert abs(corrupted(x, "gaussian_noise", 1, 0).std() - 0.08) < 0.001


def test_a_quarter_turn_is_numpys():
    """What samples between pixels is right where there is nothing between: at 90 degrees, were they a severity."""
    from keras_efficient.bayes import corruptions

    x = pictures(8, count=3)
    rows, columns = np.broadcast_arrays(np.arange(8)[None, :, None] * 1.0, np.arange(8)[None, None, :] * 1.0)
    rows, columns = (np.repeat(one, 3, axis=0) for one in (rows, columns))
    np.testing.assert_allclose(corruptions._sampled(x, columns, 7 - rows), np.rot90(x, axes=(1, 2)), atol=1e-6)


def test_blur_and_pixelation_keep_what_is_even():
    x = np.full((2, 11, 7, 3), 0.3, np.float32)
    for name in ("gaussian_blur", "pixelate", "rotation", "translation", "contrast"):
        np.testing.assert_allclose(corrupted(x, name, 5, 0), x, atol=1e-6)


def test_pixels_are_means_of_their_squares():
    x = np.random.default_rng(0).random((2, 8, 8)).astype(np.float32)
    squares = x.reshape(2, 4, 2, 4, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(corrupted(x, "pixelate", 2, 0), squares.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)


def test_bad_calls():
    x = pictures(8, count=2)
    with pytest.raises(UnknownName, match=r"Did you mean 'gaussian_blur'"):
        corrupted(x, "gausian_blur", 1, 0)
    with pytest.raises(WrongArgument, match="severity is one of 1, 2, 3, 4, 5, not 6"):
        corrupted(x, "rotation", 6, 0)
    with pytest.raises(WrongArgument, match="from 0 to 1"):
        corrupted(x * 255, "rotation", 1, 0)
    with pytest.raises(WrongArgument, match="from 0 to 1"):
        corrupted(x * np.nan, "rotation", 1, 0)
    with pytest.raises(WrongArgument, match=r"not \(2, 64\)"):
        corrupted(x.reshape(2, 64), "rotation", 1, 0)

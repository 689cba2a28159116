"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keras_efficient.errors import WrongArgument
from keras_efficient.superres import psnr, ssim

skimage = pytest.importorskip("skimage.metrics", reason="compared with scikit-image")


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 256, (60, 47)).astype(np.uint8)
    noise = generator.normal(0, 12, reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


@pytest.mark.parametrize("shave", [0, 2, 5])
def test_psnr_equals_skimage(images, shave):
    image, reference = images
    cut = slice(shave, -shave or None)
    expected = skimage.peak_signal_noise_ratio(reference[cut, cut], image[cut, cut])
    assert psnr(image, reference, shave=shave) == pytest.approx(expected, abs=1e-9)
    assert psnr(image / 255, reference / 255, shave=shave) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shave", [0, 3])
def test_ssim_equals_skimage(images, shave):
    image, reference = images
    cut = slice(shave, -shave or None)
    _, full = skimage.structural_similarity(
        reference[cut, cut].astype(float),
        image[cut, cut].astype(float),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    assert ssim(image, reference, shave=shave) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)
    assert ssim(image / 255, reference / 255, shave=shave) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_equal_images():
    image = np.random.default_rng(0).random((20, 20, 3))
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == pytest.approx(1)


def test_only_the_border_differs():
    image = np.zeros((20, 20), np.uint8)
    other = image.copy()
    other[:2] = 255
    assert psnr(image, other, shave=2) == math.inf
    assert psnr(image, other, shave=1) < 20


def test_bad_input_is_refused():
    with pytest.raises(WrongArgument):
        psnr(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(WrongArgument, match="data_range"):
        psnr(np.zeros((4, 4)), np.zeros((4, 4), np.uint8))
    with pytest.raises(WrongArgument, match="uint8 and uint16"):
        psnr(np.full((4, 4), 255, np.uint8), np.full((4, 4), 65535, np.uint16))
    assert psnr(np.zeros((4, 4), np.float32), np.zeros((4, 4))) == math.inf
    with pytest.raises(WrongArgument):
        psnr(np.zeros((4, 4)), np.zeros((4, 4)), shave=2)
    with pytest.raises(WrongArgument, match="11"):
        ssim(np.zeros((12, 12)), np.zeros((12, 12)), shave=1)

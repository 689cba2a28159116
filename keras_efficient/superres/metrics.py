"""PSNR and SSIM as the super-resolution literature reports them: on one channel, a border shaved off."""

from __future__ import annotations

import math

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["psnr", "ssim"]

_WINDOW = 11
_SIGMA = 1.5


def psnr(image: np.ndarray, reference: np.ndarray, *, shave: int = 0, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10·log10(data_range² / mean((image − reference)²)); infinite for equal images.

    Args:
        image, reference: arrays of one shape, H×W or H×W×C.
        shave: pixels left out on each of the four sides; the standard protocol takes the scale.
        data_range: the peak; by default 255 for uint8, 65535 for uint16, 1 for floating point.

    Raises:
        WrongArgument: different shapes; different types, and no `data_range`.
    """
    image, reference, peak = _prepared(image, reference, shave, data_range)
    error = float(np.mean((image - reference) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(image: np.ndarray, reference: np.ndarray, *, shave: int = 0, data_range: float | None = None) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), the mean over all whole windows.

    The map is (2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)) with C1 = (0.01 L)², C2 = (0.03 L)²,
    moments weighted by an 11×11 Gaussian of σ 1.5, no padding, population covariance. Channels are averaged.

    Args:
        image, reference, shave: as in `psnr`; at least 11×11 pixels must stay.
        data_range: L, by default as in `psnr`.
    """
    x, y, peak = _prepared(image, reference, shave, data_range)
    if min(x.shape[:2]) < _WINDOW:
        raise WrongArgument(f"SSIM needs {_WINDOW}×{_WINDOW} pixels or more; {x.shape[0]}×{x.shape[1]} are left.")
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x * mean_x
    variance_y = _blurred(y * y) - mean_y * mean_y
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))


def _prepared(image, reference, shave, data_range) -> tuple[np.ndarray, np.ndarray, float]:
    image, reference = np.asarray(image), np.asarray(reference)
    if image.shape != reference.shape or image.ndim not in (2, 3):
        raise WrongArgument(
            f"Images of one shape, H×W or H×W×C, are needed; these have {image.shape}, {reference.shape}."
        )
    if data_range is None:
        if image.dtype != reference.dtype and not image.dtype.kind == reference.dtype.kind == "f":
            raise WrongArgument(f"Images of {image.dtype} and {reference.dtype} have no common range: give data_range.")
        data_range = 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
    if shave < 0 or 2 * shave >= min(image.shape[:2]):
        raise WrongArgument(f"Shaving {shave} pixels leaves nothing of {image.shape[0]}×{image.shape[1]}.")
    inner = slice(shave, -shave if shave else None)
    return image[inner, inner].astype(np.float64), reference[inner, inner].astype(np.float64), data_range


def _blurred(image: np.ndarray) -> np.ndarray:
    offset = np.arange(_WINDOW) - _WINDOW // 2
    weight = np.exp(-(offset**2) / (2 * _SIGMA**2))
    weight /= weight.sum()
    for axis in (0, 1):
        keep = image.shape[axis] - _WINDOW + 1
        slices = [(slice(None),) * axis + (slice(i, i + keep),) for i in range(_WINDOW)]
        image = sum(w * image[s] for w, s in zip(weight, slices, strict=True))
    return image

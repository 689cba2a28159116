"""Bicubic resizing as MATLAB's ``imresize`` does it: the resampling that published super-resolution scores rest on.

Kernel, antialiasing, order of the passes and rounding are those of MATLAB's ``imresize(image, scale, 'bicubic')``; see
`imresize`. `contributions` and `resample` are its two halves, for callers that resize an image in strips.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["Border", "contributions", "imresize", "resample"]

Border = Literal["replicate", "symmetric"]

_KERNEL_WIDTH = 4.0
# Sums are made in blocks of about this many numbers, so that no temporary grows with the image.
_BLOCK = 1 << 20


def imresize(
    image: np.ndarray,
    scale: float | None = None,
    *,
    output_size: tuple[int, int] | None = None,
    border: Border = "replicate",
    antialias: bool = True,
) -> np.ndarray:
    """Resizes an image by bicubic interpolation, bit for bit as MATLAB does.

    With u = x/s + (1 − 1/s)/2 for output position x = 1, 2, …, an axis is resized by

        out(x) = Σ_i w(u − i) · in(i) / Σ_i w(u − i),   w(t) = k(t), or s·k(s·t) where s < 1 and `antialias`,

    k the cubic kernel with a = −1/2. The axis with the smaller scale comes first, rows (vertical) where both are equal.
    An integer image is rounded (half up) and saturated **after each of the two passes**; a floating-point image is
    never rounded, and computed in its own precision (float16 in float32).

    Args:
        image: H×W or H×W×C; uint8, uint16 or floating point.
        scale: factor for both axes. The size becomes ⌈scale·n⌉.
        output_size: (height, width) instead of `scale`; the axes then have a scale each.
        border: what lies beyond the image. "replicate" repeats the edge pixel: older MATLAB, and the low-resolution
            files of the benchmarks. "symmetric" mirrors: later MATLAB, and its ports to Python. They differ in the
            outer two pixels of the result.
        antialias: widen the kernel when shrinking.

    Returns:
        An array of `image`'s type, sH×sW or sH×sW×C.

    Raises:
        WrongArgument: for another type or rank, an empty image, an impossible scale or size.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise WrongArgument(f"imresize takes H×W or H×W×C with no empty axis, not the shape {image.shape}.")
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise WrongArgument(
            f"imresize takes uint8, uint16 or floating point, not {image.dtype}.", hint="Convert it with astype first."
        )
    scales, size = _scales_and_size(image.shape[:2], scale, output_size)
    for axis in np.argsort(scales, kind="stable"):
        taps = contributions(image.shape[axis], size[axis], scales[axis], border=border, antialias=antialias)
        image = resample(image, *taps, axis=int(axis))
    return image


def contributions(
    length: int,
    out_length: int,
    scale: float,
    *,
    border: Border = "replicate",
    antialias: bool = True,
    shift: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples make up each output sample of one axis, and with what weights.

    Args:
        length: samples of the input.
        out_length: samples of the output.
        scale: scale of the axis.
        border, antialias: as in `imresize`.
        shift: samples of the input by which the result is moved towards its start.

    Returns:
        `indices` (out_length×P, in 0 … length − 1) and `weights` (out_length×P, float64, rows sum to 1).
    """
    if border not in ("replicate", "symmetric"):
        raise WrongArgument(f"Unknown border: {border!r}.", hint="Known: 'replicate', 'symmetric'.")
    shrink = scale if antialias and scale < 1 else 1.0
    width = _KERNEL_WIDTH / shrink
    centre = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale) + shift
    first = np.floor(centre - width / 2)
    position = first[:, None] + np.arange(math.ceil(width) + 2)
    weights = shrink * _cubic(shrink * (centre[:, None] - position))
    weights /= weights.sum(axis=1, keepdims=True)

    used = np.any(weights != 0, axis=0)
    weights, position = weights[:, used], position[:, used].astype(np.int64) - 1
    if border == "replicate":
        indices = np.clip(position, 0, length - 1)
    else:
        position = position % (2 * length)
        indices = np.where(position < length, position, 2 * length - 1 - position)
    return indices, weights


def resample(image: np.ndarray, indices: np.ndarray, weights: np.ndarray, *, axis: int) -> np.ndarray:
    """Makes out[x] = Σ_p weights[x, p] · image[indices[x, p]] along one axis (0 or 1), in `image`'s type.

    Integers are summed in float64, rounded half up and saturated; floating point stays in its own precision.
    """
    shape = list(image.shape)
    shape[axis] = len(indices)
    out = np.empty(shape, image.dtype)
    is_float = image.dtype.kind == "f"
    precision = np.promote_types(image.dtype, np.float32) if is_float else np.dtype(np.float64)
    weights = weights.astype(precision)
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        block = slice(start, start + rows)
        if axis == 0:
            total = _weighted_sum(image, indices[block], weights[block], 0, precision)
        else:
            total = _weighted_sum(image[block], indices, weights, 1, precision)
        if not is_float:
            total += 0.5
            np.floor(total, out=total)
            np.clip(total, 0, np.iinfo(image.dtype).max, out=total)
        out[block] = total
    return out


def _weighted_sum(image, indices, weights, axis, precision) -> np.ndarray:
    along = (slice(None),) + (None,) * (image.ndim - 1 - axis)
    total = np.zeros((), precision)
    for index, weight in zip(indices.T, weights.T, strict=True):  # in the order of positions, as the original sums
        term = np.take(image, index, axis=axis).astype(precision, copy=False)
        term *= weight[along]
        total = np.add(total, term, out=term)
    return total


def _cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = −1/2."""
    x = np.abs(x)
    x2, x3 = x**2, x**3
    return (1.5 * x3 - 2.5 * x2 + 1) * (x <= 1) + (-0.5 * x3 + 2.5 * x2 - 4 * x + 2) * ((x > 1) & (x <= 2))


def _scales_and_size(shape, scale, output_size) -> tuple[tuple[float, float], tuple[int, int]]:
    if (scale is None) == (output_size is None):
        raise WrongArgument("imresize needs either scale or output_size.")
    if output_size is not None:
        size = tuple(int(n) for n in output_size)
        if len(size) != 2 or min(size) < 1:
            raise WrongArgument(f"output_size is (height, width), each at least 1, not {output_size!r}.")
        return (size[0] / shape[0], size[1] / shape[1]), (size[0], size[1])
    if not (isinstance(scale, int | float | np.number) and 0 < scale < math.inf):
        raise WrongArgument(f"scale is a positive number, not {scale!r}.", hint="Use output_size for a size.")
    factor = float(scale)
    return (factor, factor), (math.ceil(factor * shape[0]), math.ceil(factor * shape[1]))

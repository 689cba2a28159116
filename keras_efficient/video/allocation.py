"""From what macroblocks are worth to the QP offset of each."""

from __future__ import annotations

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.video.encoder import MOST_OFFSET

__all__ = ["graded_offsets", "two_levels"]


def graded_offsets(
    gains: np.ndarray, *, strength: float = 1.0, least: int = -10, most: int = 10, step: int = 2, floor: float = 0.05
) -> np.ndarray:
    """Lower QPs where more is gained, in proportion to the logarithm of the gain.

    ```
    offset = − strength · log2((gain + floor · mean) / median of that)      rounded to `step`, from `least` to `most`
    ```

    The amplitude of coding errors doubles with six QPs and bits fall about linearly with them, so that equal gain per
    bit everywhere asks for offsets that are linear in the logarithm.

    Args:
        gains: (…, rows, columns) from 0 on: `accuracy_gradient`, or two to the power of a camera model's scores.
        strength: QPs for each doubling of the gain.
        least, most: of the offsets.
        step: between offsets; 2 at least if they must be exact.
        floor: share of a frame's mean that is added to every gain.

    Returns:
        (…, rows, columns) integers, for `RoiEncoder.encode`.

    Raises:
        WrongArgument: gains that are negative or not finite, numbers out of range.
    """
    gains = np.asarray(gains, np.float64)
    if gains.ndim < 2 or not gains.size or not np.isfinite(gains).all() or gains.min() < 0:
        raise WrongArgument(f"Gains must be finite numbers from 0 on, (…, rows, columns), got {gains.shape}.")
    if not (strength >= 0 and floor > 0 and step >= 1 and -MOST_OFFSET <= least <= most <= MOST_OFFSET):
        numbers = f"strength={strength!r}, floor={floor!r}, step={step!r}, least={least!r}, most={most!r}"
        raise WrongArgument(f"No offsets have {numbers}.")
    gains = gains + floor * gains.mean(axis=(-2, -1), keepdims=True)
    logarithms = np.log2(np.maximum(gains, np.finfo(np.float64).tiny))
    wanted = -strength * (logarithms - np.median(logarithms, axis=(-2, -1), keepdims=True))
    found: np.ndarray = (step * np.round(wanted / step)).clip(least, most).astype(np.int64)
    return found


def two_levels(scores: np.ndarray, *, threshold: float, low: int = 0, high: int = -10, dilation: int = 0) -> np.ndarray:
    """The paper's way: one better quality for what matters and what is near it, one worse for the rest.

    Args:
        scores: (…, rows, columns).
        threshold: scores above it matter.
        low, high: offsets of what does not matter, and of what does.
        dilation: macroblocks around what matters that do, too, diagonally as well.

    Returns:
        (…, rows, columns) integers.

    Raises:
        WrongArgument: offsets out of range, a dilation below 0.
    """
    scores = np.asarray(scores)
    if scores.ndim < 2 or dilation < 0 or not -MOST_OFFSET <= high <= low <= MOST_OFFSET:
        raise WrongArgument(f"No two levels have low={low!r}, high={high!r}, dilation={dilation!r}: {scores.shape}.")
    matters = scores > threshold
    rows, columns = matters.shape[-2:]
    padded = np.pad(matters, [(0, 0)] * (matters.ndim - 2) + [(dilation, dilation)] * 2)
    shifts = range(2 * dilation + 1)
    near = np.any([padded[..., i : i + rows, j : j + columns] for i in shifts for j in shifts], axis=0)
    return np.where(near, high, low)

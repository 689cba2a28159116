"""How good predictions are, and whether what is said to be likely is as often so."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_efficient.bayes.tasks._inputs import labelled
from keras_efficient.errors import WrongArgument

__all__ = ["calibration_error", "classwise_calibration_error", "prediction", "reliability"]

SMOOTHING = 1e-4  # of probabilities before a logarithm, as the released URSABench does
BINS = 15


def prediction(probabilities: Any, labels: Any) -> dict[str, float]:
    """Error and calibration of the mean over members.

    ```
    NLL = − mean log p(label)        Brier = mean Σ_classes (p − 1[class = label])²
    ```

    Args:
        probabilities: (members, n, classes), or (n, classes).
        labels: (n,) integers.

    Returns:
        `error`, `nll`, `nll_smoothed` (each p mixed with a ten-thousandth of the uniform one, which caps what one
        example can cost at 11.5 for ten classes), `brier` (0 to 2), `ece` (15 bins of equal width), `adaptive_ece`
        (15 bins of as many examples), `classwise_ece`.

    Raises:
        WrongArgument: rows that are no distributions, labels that do not belong to them.
    """
    p, y = labelled(probabilities, labels)
    own = p[np.arange(len(y)), y]
    smoothed = (1 - SMOOTHING) * own + SMOOTHING / p.shape[1]
    return {
        "error": float((p.argmax(axis=1) != y).mean()),
        "nll": float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean()),
        "nll_smoothed": float(-np.log(smoothed).mean()),
        "brier": float((np.square(p).sum(axis=1) - 2 * own + 1).mean()),
        "ece": calibration_error(p, y),
        "adaptive_ece": calibration_error(p, y, adaptive=True),
        "classwise_ece": classwise_calibration_error(p, y),
    }


def calibration_error(probabilities: Any, labels: Any, *, bins: int = BINS, adaptive: bool = False) -> float:
    """Expected calibration error: Σ_bins share of the bin · |mean confidence − accuracy|.

    Args:
        probabilities, labels: of `prediction`.
        bins: how many, each without its lower edge and with its upper one.
        adaptive: bins hold as many examples each, but for equal confidences, which share one.

    Raises:
        WrongArgument: as `prediction`, or no bin.
    """
    found = reliability(probabilities, labels, bins=bins, adaptive=adaptive)
    gaps = abs(found["confidence"] - found["accuracy"])
    return float((found["share"] * gaps).sum())


def classwise_calibration_error(probabilities: Any, labels: Any, *, bins: int = BINS) -> float:
    """Mean over classes of the calibration error of each class' probability, likely or not, with bins of equal width.

    Source: Kull et al., NeurIPS 2019, https://arxiv.org/abs/1910.12656; there "classwise-ECE".
    """
    p, y = labelled(probabilities, labels)
    errors = []
    for number in range(p.shape[1]):
        _, stated, seen = _binned(p[:, number], y == number, bins, adaptive=False)
        errors.append(abs(stated - seen).sum() / len(y))
    return float(np.mean(errors))


def reliability(probabilities: Any, labels: Any, *, bins: int = BINS, adaptive: bool = False) -> dict[str, np.ndarray]:
    """A reliability diagram's data: of each bin of confidences that is not empty, in rising order.

    Args:
        probabilities, labels, bins, adaptive: of `calibration_error`.

    Returns:
        `confidence` and `accuracy`, the bin's means, and `share`, which sums to 1.

    Raises:
        WrongArgument: as `calibration_error`.
    """
    p, y = labelled(probabilities, labels)
    count, stated, right = _binned(p.max(axis=1), p.argmax(axis=1) == y, bins, adaptive)
    there = count > 0
    count, stated, right = count[there], stated[there], right[there]
    return {"confidence": stated / count, "accuracy": right / count, "share": count / len(y)}


def _binned(p: np.ndarray, is_so: np.ndarray, bins: int, adaptive: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin: examples, the sum of their probabilities, and for how many it is so."""
    if bins < 1:
        raise WrongArgument(f"There is one bin at least, not {bins!r}.")
    if adaptive:
        place = np.searchsorted(np.sort(p), p) * bins // len(p)  # by how many are below: equal ones stay together
    else:
        # Rounding must not lift a confidence that is an edge into the bin above.
        place = np.ceil(p * bins - 1e-6).clip(1, bins).astype(np.int64) - 1
    count, stated, so = (np.bincount(place, weights, minlength=bins) for weights in (None, p, is_so.astype(np.float64)))
    return count, stated, so

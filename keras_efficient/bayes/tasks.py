"""What a posterior's predictions are good for, measured from probabilities and labels alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["calibration_error", "prediction", "uncertainty"]

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
        (15 bins of as many examples).

    Raises:
        WrongArgument: shapes that do not belong together.
    """
    p, y = _mean(probabilities, labels)
    rows, classes = np.arange(len(y)), p.shape[1]
    own = p[rows, y]
    smoothed = (1 - SMOOTHING) * own + SMOOTHING / classes
    right = np.eye(classes)[y]
    return {
        "error": float((p.argmax(axis=1) != y).mean()),
        "nll": float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean()),
        "nll_smoothed": float(-np.log(smoothed).mean()),
        "brier": float(np.square(p - right).sum(axis=1).mean()),
        "ece": calibration_error(p, y),
        "adaptive_ece": calibration_error(p, y, adaptive=True),
    }


def calibration_error(probabilities: Any, labels: Any, *, bins: int = BINS, adaptive: bool = False) -> float:
    """Expected calibration error: Σ_bins share of the bin · |mean confidence − accuracy|.

    Args:
        probabilities, labels: of `prediction`.
        bins: how many, each without its lower edge and with its upper one.
        adaptive: bins hold as many examples each, instead of being equally wide.
    """
    p, y = _mean(probabilities, labels)
    if bins < 1:
        raise WrongArgument(f"There is one bin at least, not {bins!r}.")
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    if adaptive:
        parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    else:
        # Rounding must not lift a confidence that is an edge into the bin above.
        place = np.ceil(confidence * bins - 1e-6).clip(1, bins).astype(int)
        parts = [np.flatnonzero(place == number) for number in range(1, bins + 1)]
    gaps = [abs(confidence[part].sum() - right[part].sum()) for part in parts if len(part)]
    return float(sum(gaps) / len(y))


def uncertainty(probabilities: Any) -> dict[str, np.ndarray]:
    """Entropies in nats, (n,) each, of (members, n, classes).

    ```
    total = H(mean p)        aleatoric = mean H(p)        epistemic = total − aleatoric ≥ 0
    ```
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 3:
        raise WrongArgument(f"Probabilities of members are (members, n, classes), not {p.shape}.")
    total, aleatoric = _entropy(p.mean(axis=0)), _entropy(p).mean(axis=0)
    return {"total": total, "aleatoric": aleatoric, "epistemic": np.maximum(total - aleatoric, 0.0)}


def _entropy(p: np.ndarray) -> np.ndarray:
    found: np.ndarray = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=-1)
    return found


def _mean(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    p = p.mean(axis=0) if p.ndim == 3 else p
    if p.ndim != 2 or y.shape != p.shape[:1] or not len(y) or y.min() < 0 or y.max() >= p.shape[1]:
        raise WrongArgument(f"Probabilities {np.shape(probabilities)} do not belong to labels {y.shape}.")
    return p, y.astype(int)

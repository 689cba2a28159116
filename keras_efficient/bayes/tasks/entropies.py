"""How unsure predictions are, and of what kind that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from keras_efficient.bayes.tasks._inputs import checked
from keras_efficient.errors import UnknownName, WrongArgument

__all__ = ["SCORES", "Score", "scores", "uncertainty"]

Score = Literal["confidence", "total", "model"]
SCORES: tuple[Score, ...] = ("confidence", "total", "model")


def uncertainty(probabilities: Any) -> dict[str, np.ndarray]:
    """Entropies in nats, (n,) each, of (members, n, classes).

    ```
    total = H(mean p)        aleatoric = mean H(p)        epistemic = total − aleatoric ≥ 0
    ```

    Raises:
        WrongArgument: no members, or rows that are no distributions.
    """
    if np.ndim(probabilities) != 3:
        raise WrongArgument(f"Probabilities of members are (members, n, classes), not {np.shape(probabilities)}.")
    p = checked(probabilities)
    total, aleatoric = _entropy(p.mean(axis=0, dtype=np.float64)), _mean_entropy(p)
    return {"total": total, "aleatoric": aleatoric, "epistemic": np.maximum(total - aleatoric, 0.0)}


def scores(probabilities: Any, name: str = "probabilities") -> Mapping[str, np.ndarray | None]:
    """What is higher where a prediction is less sure, (n,) each.

    `confidence`: one minus the highest probability. `total`: the entropy. `model`: its epistemic part, `None` of
    one member, where it is the rounding of a zero.
    """
    p = checked(probabilities, name)
    mean = p.mean(axis=0, dtype=np.float64)
    total = _entropy(mean)
    model = np.maximum(total - _mean_entropy(p), 0.0) if len(p) > 1 else None
    return {"confidence": 1 - mean.max(axis=1), "total": total, "model": model}


def score(probabilities: Any, by: str) -> np.ndarray:
    """One of `scores`.

    Raises:
        WrongArgument: there is none of that name, or `"model"` is asked of one member.
    """
    if by not in SCORES:
        raise UnknownName("score", by, SCORES)
    found = scores(probabilities)[by]
    if found is None:
        raise WrongArgument("The model uncertainty of one member is not defined.", hint='Use "confidence" or "total".')
    return found


def _mean_entropy(p: np.ndarray) -> np.ndarray:
    """Over members, one of them at a time in float64."""
    found: np.ndarray = np.mean([_entropy(member) for member in p], axis=0)
    return found


def _entropy(p: np.ndarray) -> np.ndarray:
    p = p.astype(np.float64)
    found: np.ndarray = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=-1)
    return found

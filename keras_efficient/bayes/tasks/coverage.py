"""Answers for the surest inputs only: the risk that is left, and how many are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_efficient.bayes.tasks._inputs import labelled
from keras_efficient.bayes.tasks.entropies import Score, score
from keras_efficient.errors import WrongArgument

__all__ = ["area_under_risk_coverage", "risk_coverage", "selective_prediction"]

COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def selective_prediction(
    probabilities: Any, labels: Any, *, coverages: Sequence[float] = COVERAGES, by: Score = "confidence"
) -> dict[str, float]:
    """The share of mistakes among the surest part of the examples.

    Args:
        probabilities: (members, n, classes), or (n, classes).
        labels: (n,) integers.
        coverages: shares of examples that are answered, above 0 and at most 1; rounded up to whole examples.
        by: what makes an example sure: `"confidence"`, `"total"` or `"model"` uncertainty.

    Returns:
        `risk_0.9` for a coverage of 0.9, and so on, and `aurc`, the mean risk over all coverages.

    Raises:
        WrongArgument: rows that are no distributions, labels that do not belong to them, coverages out of range, or
            `"model"` for one member.
    """
    if any(not 0 < one <= 1 for one in coverages):
        raise WrongArgument(f"Coverages are above 0 and at most 1, not {list(coverages)!r}.")
    risk = risk_coverage(probabilities, labels, by=by)["risk"]
    found = {}
    for coverage in coverages:
        # Rounding must not answer one more than 0.7 · 10.
        found[f"risk_{coverage:g}"] = float(risk[int(np.ceil(coverage * len(risk) - 1e-9)) - 1])
    return {**found, "aurc": float(risk.mean())}


def risk_coverage(probabilities: Any, labels: Any, *, by: Score = "confidence") -> dict[str, np.ndarray]:
    """The curve of risks over coverages.

    Returns:
        `coverage`, 1/n to 1, and `risk`, the share of mistakes among so many; (n,) each. Of equally sure examples, any
        of which may come first, it is the mean over their orders.

    Raises:
        WrongArgument: as `selective_prediction`.

    Source: Geifman and El-Yaniv, NeurIPS 2017, https://arxiv.org/abs/1705.08500.
    """
    p, y = labelled(probabilities, labels)
    risk = _risks(score(probabilities, by), p.argmax(axis=1) != y)
    return {"coverage": np.arange(1, len(y) + 1) / len(y), "risk": risk}


def area_under_risk_coverage(unsure: np.ndarray, wrong: np.ndarray) -> float:
    """The mean risk over all coverages."""
    return float(_risks(unsure, wrong).mean())


def _risks(unsure: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Share of mistakes among the k least unsure, for k of 1 to n."""
    _, group, sizes = np.unique(unsure, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    mistakes = np.concatenate([[0], np.cumsum(np.bincount(group, wrong, minlength=len(sizes)))])
    answered = np.arange(1, len(unsure) + 1)
    found: np.ndarray = np.interp(answered, ends, mistakes) / answered
    return found

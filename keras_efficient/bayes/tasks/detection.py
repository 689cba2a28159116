"""Does uncertainty tell mistakes from right answers, and foreign inputs from one's own?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_efficient.bayes.tasks._inputs import labelled
from keras_efficient.bayes.tasks.coverage import area_under_risk_coverage
from keras_efficient.bayes.tasks.entropies import scores
from keras_efficient.errors import WrongArgument

__all__ = [
    "area_under_precision_recall",
    "area_under_roc",
    "false_positive_rate",
    "misclassification",
    "out_of_distribution",
]

Measures = dict[str, Callable[[np.ndarray, np.ndarray], float | None]]


def misclassification(probabilities: Any, labels: Any) -> dict[str, float | None]:
    """How well uncertainty finds mistakes, which are the positives.

    Args:
        probabilities: (members, n, classes), or (n, classes).
        labels: (n,) integers.

    Returns:
        `auroc_…`, `aupr_…`, `aurc_…` by `confidence` (1 − highest probability), `total` (entropy of the mean) and
        `model` (epistemic) uncertainty. `None` is not defined: everything by `model` for one member, where it is the
        rounding of a zero; AUROC and AUPR where all are right or all wrong.

    Raises:
        WrongArgument: rows that are no distributions, labels that do not belong to them.
    """
    p, y = labelled(probabilities, labels)
    wrong = p.argmax(axis=1) != y
    measures: Measures = {
        "auroc": area_under_roc,
        "aupr": area_under_precision_recall,
        "aurc": area_under_risk_coverage,
    }
    found: dict[str, float | None] = {}
    for by, unsure in scores(probabilities).items():
        for name, measure in measures.items():
            found[f"{name}_{by}"] = None if unsure is None else measure(unsure, wrong)
    return found


def out_of_distribution(inside: Any, outside: Any, *, logits: tuple[Any, Any] | None = None) -> dict[str, float | None]:
    """How well uncertainty finds inputs of another distribution, which are the positives.

    ```
    energy = − mean over members of log Σ_classes exp(logit)
    ```

    Args:
        inside: probabilities of the data set's own inputs, (members, n, classes), or (n, classes).
        outside: of the others, as many members and classes.
        logits: of both, in the same shapes. Probabilities do not have the energy: it is in what a softmax takes away.

    Returns:
        `auroc_…`, `aupr_…`, `fpr95_…` (the share of inside inputs that is taken for outside ones at the highest
        threshold that finds 95 % of these) by `confidence`, `total`, `model` and `energy`. `None` is not defined: by
        `model` for one member, by `energy` without logits.

    Raises:
        WrongArgument: rows that are no distributions, other members or classes, logits that do not belong to them.
    """
    if np.shape(inside)[:-2] != np.shape(outside)[:-2] or np.shape(inside)[-1:] != np.shape(outside)[-1:]:
        shapes = f"{np.shape(inside)} and {np.shape(outside)}"
        raise WrongArgument(f"Inside and outside differ in examples only, not as {shapes}.")
    own, others = scores(inside, "inside"), scores(outside, "outside")
    energies = (None, None) if logits is None else (_energy(logits[0], inside), _energy(logits[1], outside))
    pairs = {by: (own[by], others[by]) for by in own} | {"energy": energies}
    measures: Measures = {"auroc": area_under_roc, "aupr": area_under_precision_recall, "fpr95": false_positive_rate}
    is_outside = np.arange(np.shape(inside)[-2] + np.shape(outside)[-2]) >= np.shape(inside)[-2]
    found: dict[str, float | None] = {}
    for by, (one, other) in pairs.items():
        both = None if one is None or other is None else np.concatenate([one, other])
        for name, measure in measures.items():
            found[f"{name}_{by}"] = None if both is None else measure(both, is_outside)
    return found


def area_under_roc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """The chance that a positive has a higher score than a negative, ties counting half; `None` without either."""
    caught, passed = _curve(score, positive)
    if not caught[-1] or not passed[-1]:
        return None
    return float(np.trapezoid(caught, passed) / (caught[-1] * passed[-1]))


def area_under_precision_recall(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Average precision, Σ (recall − recall before) · precision over thresholds; `None` without either kind."""
    caught, passed = _curve(score, positive)
    if not caught[-1] or not passed[-1]:
        return None
    precision = caught[1:] / (caught[1:] + passed[1:])
    return float((np.diff(caught) * precision).sum() / caught[-1])


def false_positive_rate(score: np.ndarray, positive: np.ndarray, recall: float = 0.95) -> float | None:
    """Share of negatives at or above the highest threshold that finds so many positives; `None` without either kind."""
    caught, passed = _curve(score, positive)
    if not caught[-1] or not passed[-1]:
        return None
    # Rounding must not ask for one more than 0.95 · 20.
    first = np.searchsorted(caught, recall * caught[-1] - 1e-9)
    return float(passed[first] / passed[-1])


def _curve(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives at or above each threshold, from none to all; equal scores pass together."""
    _, group, sizes = np.unique(-score, return_inverse=True, return_counts=True)
    hits = np.bincount(group, positive, minlength=len(sizes))
    caught, passed = (np.concatenate([[0.0], np.cumsum(part)]) for part in (hits, sizes - hits))
    return caught, passed


def _energy(logits: Any, probabilities: Any) -> np.ndarray:
    values = np.asarray(logits)
    if values.shape != np.shape(probabilities) or not np.isfinite(values).all():
        raise WrongArgument(f"Logits are finite and {np.shape(probabilities)} as probabilities, not {values.shape}.")
    values = values.reshape(-1, *values.shape[-2:]).astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    found: np.ndarray = -(np.log(np.exp(values - top).sum(axis=-1)) + top[..., 0]).mean(axis=0)
    return found

"""Conformal prediction: sets of classes that hold the right one with a chance that is chosen beforehand."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from keras_efficient.bayes.tasks._inputs import checked_labels, labelled, mean_of
from keras_efficient.errors import WrongArgument

__all__ = ["conformal", "conformal_sets"]

Method = Literal["lac", "aps"]


def conformal(
    calibration: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    alpha: float = 0.1,
    method: Method = "lac",
    seed: int = 0,
) -> dict[str, float]:
    """How often sets hold the label, and how large they are.

    Args:
        calibration, test: (probabilities, labels) of examples that were not trained on, each of its own.
        alpha, method, seed: of `conformal_sets`.

    Returns:
        `coverage`, the share of sets with the label, which is 1 − alpha or more but for chance; `mean_size`; `empty`,
        the share of sets without any class.

    Raises:
        WrongArgument: rows that are no distributions, labels that do not belong to them, an alpha out of range.
    """
    probabilities, labels = test
    sets = conformal_sets(*calibration, probabilities, alpha=alpha, method=method, seed=seed)
    y = checked_labels(labels, len(sets), sets.shape[1], "test labels")
    size = sets.sum(axis=1)
    return {
        "coverage": float(sets[np.arange(len(y)), y].mean()),
        "mean_size": float(size.mean()),
        "empty": float((size == 0).mean()),
    }


def conformal_sets(
    calibration: Any, labels: Any, test: Any, *, alpha: float = 0.1, method: Method = "lac", seed: int = 0
) -> np.ndarray:
    """Sets of classes by split conformal prediction.

    ```
    lac: score = 1 − p(class)        aps: score = Σ p of likelier classes + u · p(class),   u ~ U(0, 1)
    set = {score ≤ q},   q = the ⌈(n + 1)(1 − alpha)⌉-th smallest score of a calibration label, ∞ beyond the last
    ```

    Args:
        calibration: probabilities of n examples that were not trained on, (members, n, classes) or (n, classes).
        labels: (n,) their labels.
        test: probabilities of other examples.
        alpha: share of sets that may miss the label, above 0 and below 1.
        method: `"lac"`, whose sets are the smallest on the whole, or `"aps"`, which grow with an example's difficulty.
        seed: of u.

    Returns:
        (test examples, classes) booleans.

    Raises:
        WrongArgument: rows that are no distributions, labels that do not belong to them, an alpha out of range.

    Source: Sadinle et al. 2019, https://arxiv.org/abs/1609.00451 (lac); Romano et al. 2020,
    https://arxiv.org/abs/2006.02544 (aps).
    """
    if not 0 < alpha < 1 or method not in ("lac", "aps"):
        raise WrongArgument(f'alpha is above 0 and below 1, a method "lac" or "aps": {alpha=}, {method=}.')
    p, y = labelled(calibration, labels)
    others = mean_of(test, "test probabilities")
    if others.shape[1] != p.shape[1]:
        raise WrongArgument(f"Calibration has {p.shape[1]} classes, the test has {others.shape[1]}.")
    random = np.random.default_rng(seed)
    own = _scores(p, method, random)[np.arange(len(y)), y]
    rank = int(np.ceil((len(y) + 1) * (1 - alpha) - 1e-9))
    limit = np.sort(own)[rank - 1] if rank <= len(y) else np.inf
    return _scores(others, method, random) <= limit


def _scores(p: np.ndarray, method: Method, random: np.random.Generator) -> np.ndarray:
    """How strange each class would be, (n, classes)."""
    if method == "lac":
        return 1 - p
    order = np.argsort(-p, axis=1, kind="stable")
    ordered = np.take_along_axis(p, order, axis=1)
    before = np.empty_like(p)
    np.put_along_axis(before, order, np.cumsum(ordered, axis=1) - ordered, axis=1)
    return before + random.random((len(p), 1)) * p

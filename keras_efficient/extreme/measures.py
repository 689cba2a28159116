"""How good answers of candidates are, against the answers of all classes, and how much is looked at for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keras_efficient import ranking
from keras_efficient.extreme.queries import Queries

__all__ = ["Measures", "measure"]

BYTES = 256 * 2**20  # of logits at once


@dataclass(frozen=True)
class Measures:
    """Means over queries; shares are of one.

    Attributes:
        queries: how many there were.
        neurons: rows that a query is multiplied with, those that find candidates included.
        share: of all neurons.
        precision: P@k by k: the share of right classes among the first k answers.
        full_precision: the same where all classes are looked at.
        label_recall: share of labels that are among the candidates.
        head, middle, tail: label recall of the classes that make up the first, second and last third of labels.
    """

    queries: int
    neurons: int
    share: float
    precision: dict[int, float]
    full_precision: dict[int, float]
    label_recall: float
    head: float
    middle: float
    tail: float

    def kept(self, k: int = 1) -> float:
        """P@k over that of the full layer."""
        return self.precision[k] / max(self.full_precision[k], 1e-12)


def measure(
    candidates: Callable[[np.ndarray], np.ndarray],
    neurons: int,
    rows: np.ndarray,
    queries: Queries,
    *,
    counts: np.ndarray | None = None,
    at: tuple[int, ...] = (1, 5),
) -> Measures:
    """Compares the best candidates with the best of all classes.

    Args:
        candidates: (b, d) queries to (b, n) classes, −1 for none.
        neurons: rows that it takes to find and to score them.
        rows: (units, d + 1) weights and bias of each class.
        queries: labelled.
        counts: (units,) how often each class is a label in training, by which classes are frequent; by default here.
        at: the k of P@k.
    """
    units, most = len(rows), max(at)
    weights, bias = np.ascontiguousarray(rows[:, :-1]), rows[:, -1]
    some, all_of_them, found = [], [], []
    step = max(1, BYTES // (4 * units))
    for start in range(0, len(queries), step):
        part = queries.select(np.arange(start, min(start + step, len(queries))))
        logits = part.vectors @ weights.T + bias
        ids = np.asarray(candidates(part.vectors))
        inside = np.zeros((len(part), units + 1), bool)  # the last column takes what is none
        np.put_along_axis(inside, ids, True, axis=1)
        found.append(inside[part.owners, part.labels])
        all_of_them.append(ranking.top_k(logits, min(most, units)))
        some.append(ranking.top_k(np.where(inside[:, :-1], logits, -np.inf), min(most, units)))
    there, relevant = np.concatenate(found), (queries.labels, queries.offsets)
    counts = np.bincount(queries.labels, minlength=units) if counts is None else counts
    third = np.searchsorted([1 / 3, 2 / 3], _rank_of_labels(counts, queries.labels), side="right")
    parts = [float(there[third == which].mean()) if (third == which).any() else float("nan") for which in range(3)]
    precision, full = (
        {k: float(np.nanmean(ranking.precision(np.concatenate(ranked), relevant, k))) for k in at}
        for ranked in (some, all_of_them)
    )
    return Measures(len(queries), neurons, neurons / units, precision, full, float(there.mean()), *parts)


def _rank_of_labels(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each label the share of labels that are of more frequent classes."""
    order = np.argsort(-counts, kind="stable")
    before = np.empty(len(counts))
    falling = np.bincount(labels, minlength=len(counts))[order]
    before[order] = np.cumsum(falling) - falling
    return before[labels] / max(len(labels), 1)

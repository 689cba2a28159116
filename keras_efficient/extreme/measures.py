"""How good answers of candidates are, against the answers of all classes, and how much is looked at for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keras_efficient import ranking
from keras_efficient.extreme.queries import Queries

__all__ = ["DEPTH", "Measures", "full_answers", "measure"]

DEPTH = 64  # answers of the full layer, among which the best candidates nearly always are
BYTES = 256 * 2**20  # of rows, or of logits, at once


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


def full_answers(rows: np.ndarray, queries: Queries, k: int) -> np.ndarray:
    """The k classes with the largest logits of all, the best first: (n, k) int32.

    Args:
        rows: (units, d + 1) weights and bias of each class.
        queries: labelled or not.
        k: how many; where there are fewer classes, −1 fills up.
    """
    weights, bias = np.ascontiguousarray(rows[:, :-1].T), rows[:, -1]
    step = max(1, BYTES // (4 * len(rows)))
    parts = (queries.vectors[start : start + step] @ weights + bias for start in range(0, len(queries), step))
    return np.concatenate([np.zeros((0, k), np.int32), *(ranking.top_k(part, k) for part in parts)])


def measure(
    candidates: Callable[[np.ndarray], np.ndarray],
    neurons: int,
    rows: np.ndarray,
    queries: Queries,
    *,
    counts: np.ndarray | None = None,
    at: tuple[int, ...] = (1, 5),
    full: np.ndarray | None = None,
) -> Measures:
    """Compares the best candidates with the best of all classes.

    Args:
        candidates: (b, d) queries to (b, n) classes, −1 for none.
        neurons: rows that it takes to find and to score them.
        rows: (units, d + 1) weights and bias of each class.
        queries: labelled.
        counts: (units,) how often each class is a label in training, by which classes are frequent; by default here.
        at: the k of P@k.
        full: what `full_answers` found for these queries, for the largest k at least; with more of them fewer logits
            have to be computed. By default it is asked here.
    """
    units = len(rows)
    at = tuple(k for k in at if k <= units)
    most = max(at)
    full = full_answers(rows, queries, min(max(most, DEPTH), units)) if full is None else full
    some, found = [], []
    step = max(1, BYTES // (4 * rows.shape[1] * neurons))
    for start in range(0, len(queries), step):
        part = queries.select(np.arange(start, min(start + step, len(queries))))
        ids = np.sort(np.asarray(candidates(part.vectors)), axis=1)
        some.append(_best_candidates(rows, part.vectors, ids, full[start : start + step], most))
        found.append(_are_among(part.owners, part.labels, ids, units))
    there, relevant = np.concatenate(found), (queries.labels, queries.offsets)
    counts = np.bincount(queries.labels, minlength=units) if counts is None else counts
    third = np.searchsorted([1 / 3, 2 / 3], _rank_of_labels(counts, queries.labels), side="right")
    parts = [float(there[third == which].mean()) if (third == which).any() else float("nan") for which in range(3)]
    precision, full_precision = (
        {k: float(np.nanmean(ranking.precision(ranked, relevant, k))) for k in at}
        for ranked in (np.concatenate(some), full[:, :most])
    )
    return Measures(len(queries), neurons, neurons / units, precision, full_precision, float(there.mean()), *parts)


def _best_candidates(rows: np.ndarray, vectors: np.ndarray, ids: np.ndarray, full: np.ndarray, k: int) -> np.ndarray:
    """The k candidates with the largest logits: those of the best of all classes that are among the candidates.

    Only where fewer than k are, logits have to be computed.
    """
    owners = np.repeat(np.arange(len(full)), full.shape[1])
    inside = _are_among(owners, full.ravel(), ids, len(rows)).reshape(full.shape) & (full >= 0)
    order = np.argsort(~inside, axis=1, kind="stable")[:, :k]
    best = np.full((len(full), k), -1, np.int32)
    best[:, : order.shape[1]] = np.take_along_axis(full, order, axis=1)
    for few in np.flatnonzero(inside.sum(axis=1) < k):
        there = np.unique(ids[few])
        there = there[there >= 0]
        logits = rows[there, :-1] @ vectors[few] + rows[there, -1]
        places = ranking.top_k(logits[None], k)[0]
        best[few] = np.where(places < 0, -1, there[np.maximum(places, 0)] if len(there) else -1)
    return best


def _are_among(owners: np.ndarray, classes: np.ndarray, ids: np.ndarray, units: int) -> np.ndarray:
    """Whether each class is one of those ``(n, m)`` of its owner, a row; −1 among these is none."""
    keys = np.sort((np.arange(len(ids))[:, None] * (units + 1) + ids + 1).ravel())
    wanted = owners * (units + 1) + classes + 1
    return keys[np.searchsorted(keys, wanted).clip(0, len(keys) - 1)] == wanted


def _rank_of_labels(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each label the share of labels that are of more frequent classes."""
    order = np.argsort(-counts, kind="stable")
    before = np.empty(len(counts))
    falling = np.bincount(labels, minlength=len(counts))[order]
    before[order] = np.cumsum(falling) - falling
    return before[labels] / max(len(labels), 1)

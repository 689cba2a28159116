"""Groups of nearly equal size whose members are alike."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["balanced_groups", "group_sums", "k_means", "some", "unit"]

MOST_AT_ONCE = 32  # groups that points are compared with at once; more are made of groups of groups
CHUNK = 65536  # rows that are sorted at once
STEPS = 8  # of k-means: the similarity rises by less than a part in a thousand in the last of them


def balanced_groups(points: np.ndarray, count: int, capacity: int, random: np.random.Generator) -> np.ndarray:
    """A group from 0 to count − 1 for each point, none with more than `capacity` points: spherical k-means.

    Many groups are made by dividing the points a few times, so that neighbouring numbers are groups that are alike.

    Args:
        points: (n, d) float32.
        count: of groups.
        capacity: most points of a group; ``count · capacity`` must not be less than n.
        random: where the centres begin.

    Returns:
        (n,) int32.
    """
    groups = np.zeros(len(points), np.int32)
    _divide(unit(points), np.arange(len(points)), 0, count, capacity, random, groups)
    return groups


def k_means(points: np.ndarray, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means: unit centres (count, d), and for each point the one with the largest inner product, (n,)."""
    points = unit(points)
    centres = points[random.choice(len(points), count, replace=len(points) < count)]
    for _ in range(STEPS):
        centres = _moved(points, (points @ centres.T).argmax(1), count, random)
    return centres, (points @ centres.T).argmax(1)


def group_sums(values: np.ndarray, groups: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """``Σ_{i in group} weight_i · value_i``: (n, d) values to (count, d) float64; those in group −1 are left out."""
    sums = np.zeros((count, values.shape[1]))
    for start in range(0, len(values), CHUNK):
        part = groups[start : start + CHUNK]
        order = np.argsort(part, kind="stable")[np.count_nonzero(part < 0) :]
        if not len(order):
            continue
        there, starts = np.unique(part[order], return_index=True)
        rows = values[start : start + CHUNK][order]
        if weights is not None:
            rows = rows * weights[start : start + CHUNK][order, None]
        sums[there] += np.add.reduceat(rows, starts, axis=0)
    return sums


def _divide(
    points: np.ndarray,
    members: np.ndarray,
    first: int,
    count: int,
    capacity: int,
    random: np.random.Generator,
    groups: np.ndarray,
) -> None:
    """Gives the members the groups from `first` on, `count` of them."""
    if count == 1:
        groups[members] = first
        return
    # Parts of nearly equal numbers of groups, at most so many that each has a few groups, or all of them.
    parts = count if count <= MOST_AT_ONCE else min(MOST_AT_ONCE, math.ceil(math.sqrt(count)))
    sizes = np.diff(np.linspace(0, count, parts + 1).round().astype(int))
    chosen = _k_means(some(points, members), sizes * capacity, random)
    starts = first + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for part, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        _divide(points, members[chosen == part], int(start), int(size), capacity, random, groups)


def _k_means(points: np.ndarray, capacities: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each point one of a few centres; no centre has more points than its capacity."""
    count = len(capacities)
    if len(points) <= count:
        return np.arange(len(points)) % count
    centres = points[random.choice(len(points), count, replace=False)]
    for step in range(STEPS):
        similar = points @ centres.T
        chosen = similar.argmax(1) if step < STEPS // 2 else _within(similar, capacities)
        centres = _moved(points, chosen, count, random)
    return _within(points @ centres.T, capacities)


def _moved(points: np.ndarray, chosen: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """The centres of groups; one without a member goes to a point."""
    empty = np.bincount(chosen, minlength=count) == 0
    centres = unit(group_sums(points, chosen, count))
    centres[empty] = points[random.choice(len(points), empty.sum())]
    return centres


def _within(similar: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """For each row a column, those of high values first, with at most so many rows for each column.

    Where a column is wanted by too many, those stay that would lose most by going to their next choice.
    """
    chosen = np.full(len(similar), -1)
    free = capacities.copy()
    left = np.arange(len(similar))
    similar = similar.copy()
    while len(left):
        similar[:, free <= 0] = -np.inf
        values = similar[left]
        best = values.argmax(1)
        top = values[np.arange(len(left)), best]
        values[np.arange(len(left)), best] = -np.inf
        loss = top - values.max(1)  # infinite where no other column is free
        order = np.lexsort((-loss, best))
        starts = np.searchsorted(best[order], np.arange(len(capacities)))
        place = np.arange(len(left)) - starts[best[order]]
        stays = order[place < free[best[order]]]
        chosen[left[stays]] = best[stays]
        free = free - np.bincount(best[stays], minlength=len(free))
        left = np.delete(left, stays)
    return chosen


def some(points: np.ndarray, members: np.ndarray) -> np.ndarray:
    """These rows; the array itself where all are meant in order, since a copy may be large."""
    return points if len(members) == len(points) else points[members]


def unit(points: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis; zeros stay zeros."""
    norm = np.linalg.norm(points, axis=-1, keepdims=True)
    return (points / np.maximum(norm, 1e-12)).astype(np.float32)

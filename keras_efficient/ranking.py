"""Ranking metrics over all items, in NumPy: one value a user, then a mean with its standard error.

Lists of what was ranked are arrays (users, k) of item ids, the best first, −1 where there is nothing. What is relevant
is a pair (items, offsets), as `Interactions.histories` gives it: user u's are ``items[offsets[u]:offsets[u + 1]]``; an
item that stands there twice counts once. Users without relevant items get nan.
"""

from __future__ import annotations

import math

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = [
    "hit_rate",
    "mean_and_error",
    "ndcg",
    "precision",
    "propensities",
    "propensity_precision",
    "recall",
    "reciprocal_rank",
    "top_k",
]

Lists = tuple[np.ndarray, np.ndarray]


def top_k(scores: np.ndarray, k: int, exclude: Lists | None = None) -> np.ndarray:
    """The k items with the highest scores for each user, best first; of equal scores the lower id comes first.

    Args:
        scores: (users, items) numbers; −inf means that the item is not to be ranked.
        k: length of the lists.
        exclude: (items, offsets) of what must not be ranked, such as the training items of each user.

    Returns:
        (users, k) int32 ids; −1 at the end of a list where fewer than k items are left.

    Raises:
        WrongArgument: wrong shapes, a score that is nan, an excluded item that does not exist.
    """
    scores = _scores(scores, k)
    rows, items = scores.shape
    if exclude is not None:
        owners, excluded = _owned(exclude, rows)
        if excluded.size and excluded.max() >= items:
            raise WrongArgument(f"Item {excluded.max()} is to be excluded, scores have items 0 to {items - 1}.")
        scores = scores.copy()
        scores[owners, excluded] = -np.inf
    found = np.full((rows, k), -1, np.int32)
    if not items:
        return found
    row, item = _candidates(scores, k)
    order = np.lexsort((item, -scores[row, item], row))
    row, item = row[order], item[order]
    place = np.arange(len(row)) - np.searchsorted(row, np.arange(rows))[row]
    inside = place < k
    found[row[inside], place[inside]] = item[inside]
    return found


def _candidates(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and items of all scores that may be among the k highest of their row: −inf is not.

    The items are dealt out to stretches, and only those whose highest score is among the k highest are looked into.
    """
    rows, items = scores.shape
    stretches = max(min(k, items), items // 64)
    length = items // stretches
    highest = scores[:, : length * stretches].reshape(rows, length, stretches).max(axis=1)
    rest = items - length * stretches
    np.maximum(highest[:, :rest], scores[:, length * stretches :], out=highest[:, :rest])
    last = stretches - min(k, items)
    least = np.partition(highest, last, axis=1)[:, last, None]  # k scores or more reach it
    row, stretch = np.nonzero((highest >= least) & (highest > -np.inf))
    item = stretch[:, None] + stretches * np.arange(length + 1)
    there = item < items
    values = scores[row[:, None], np.where(there, item, 0)]
    chosen, place = np.nonzero(there & (values >= least[row]) & (values > -np.inf))
    return row[chosen], item[chosen, place]


def ndcg(ranked: np.ndarray, relevant: Lists, k: int) -> np.ndarray:
    """``Σ_r hit(r)/log2(1 + r)`` over ranks r = 1 … k, divided by its value for min(k, relevant items) hits on top.

    Returns:
        (users,) float64 in [0, 1].

    Raises:
        WrongArgument: wrong shapes, lists shorter than k, an item twice in a list.
    """
    hits, numbers = _hits(ranked, relevant, k)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[np.nan], np.cumsum(discounts)])[np.minimum(numbers, k)]
    return hits @ discounts / ideal


def precision(ranked: np.ndarray, relevant: Lists, k: int) -> np.ndarray:
    """P@k, the share of the first k that is relevant: (users,) float64 in [0, 1]. Raises as `ndcg` does."""
    hits, numbers = _hits(ranked, relevant, k)
    return _or_nan(hits.mean(axis=1), numbers)


def propensity_precision(ranked: np.ndarray, relevant: Lists, k: int, propensities: np.ndarray) -> np.ndarray:
    """PSP@k: ``Σ hit / p`` over the first k, over the most that k relevant items could give: (users,) float64.

    Items that are rarely labelled, though they are relevant, count for more (Jain, Prabhu and Varma, KDD 2016).

    Args:
        ranked, relevant, k: as for `ndcg`.
        propensities: (items,) p in (0, 1]: how likely a relevant item is labelled; see `propensities`.

    Raises:
        WrongArgument: as `ndcg` does; a propensity that is not above zero.
    """
    propensities = np.asarray(propensities, np.float64)
    if propensities.ndim != 1 or not (propensities > 0).all():
        raise WrongArgument("propensities must be one number above 0 for each item.")
    hits, numbers = _hits(ranked, relevant, k)
    gains = (1 / propensities)[np.maximum(np.asarray(ranked)[:, :k], 0)] * hits
    owners, items = _owned(relevant, len(hits))
    keys = np.unique(owners * len(propensities) + items)
    owners, worth = keys // len(propensities), 1 / propensities[keys % len(propensities)]
    order = np.lexsort((-worth, owners))
    place = np.arange(len(order)) - np.searchsorted(owners[order], np.arange(len(hits)))[owners[order]]
    best = np.bincount(owners[order], worth[order] * (place < k), minlength=len(hits))
    return _or_nan(gains.sum(axis=1), numbers) / np.where(numbers > 0, best, 1)


def propensities(counts: np.ndarray, users: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    """``p = 1 / (1 + C (n + b)^−a)`` with ``C = (log N − 1)(b + 1)^a``, of items that n of N users have in training.

    Args:
        counts: (items,) n.
        users: N.
        a, b: of the data set: 0.55 and 1.5 by default, 0.5 and 0.4 for Wikipedia's, 0.6 and 2.6 for Amazon's.
    """
    scale = (math.log(users) - 1) * (b + 1) ** a
    return 1 / (1 + scale * (np.asarray(counts, np.float64) + b) ** -a)


def recall(ranked: np.ndarray, relevant: Lists, k: int) -> np.ndarray:
    """The share of a user's relevant items that is among the first k: (users,) float64. Raises as `ndcg` does.

    Of more than k relevant items k can be found at most: 1 is out of reach then, as in LightGCN's protocol.
    """
    hits, numbers = _hits(ranked, relevant, k)
    return _or_nan(hits.sum(axis=1), numbers) / np.maximum(numbers, 1)


def reciprocal_rank(ranked: np.ndarray, relevant: Lists, k: int) -> np.ndarray:
    """One over the rank of the first relevant item among the first k, 0 without one: (users,) float64.

    Raises as `ndcg` does.
    """
    hits, numbers = _hits(ranked, relevant, k)
    return _or_nan((hits / np.arange(1, k + 1)).max(axis=1), numbers)


def hit_rate(ranked: np.ndarray, relevant: Lists, k: int) -> np.ndarray:
    """1 where a relevant item is among the first k, else 0: (users,) float64. Raises as `ndcg` does."""
    hits, numbers = _hits(ranked, relevant, k)
    return _or_nan(hits.max(axis=1), numbers)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error over users, those with nan left out; nan where too few are left (none, or one)."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, error


def _hits(ranked: np.ndarray, relevant: Lists, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each place of the lists, (users, k), holds a relevant item; how many each user has, (users,)."""
    ranked = _ranked(ranked, k)
    owners, items = _owned(relevant, len(ranked))
    width = max(ranked.max(initial=0), items.max(initial=0)) + 1
    keys = np.unique(owners * width + items)
    places = np.arange(len(ranked))[:, None] * width + ranked
    hits = np.isin(places, keys) & (ranked >= 0)
    return hits, np.bincount(keys // width, minlength=len(ranked))


def _or_nan(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.where(numbers > 0, values, np.nan)


def _scores(scores: np.ndarray, k: int) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise WrongArgument(f"scores must have shape (users, items), got {scores.shape}.")
    _check_k(k)
    if scores.dtype.kind in "biu":
        scores = scores.astype(np.float64)
    elif scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32)  # float16 and bfloat16, which NumPy sorts slowly or not at all
    if np.isnan(scores).any():
        raise WrongArgument(f"The scores of user {np.flatnonzero(np.isnan(scores).any(axis=1))[0]} hold nan.")
    return scores


def _ranked(ranked: np.ndarray, k: int) -> np.ndarray:
    ranked = np.asarray(ranked)
    _check_k(k)
    if ranked.ndim != 2 or ranked.dtype.kind not in "iu" or ranked.shape[1] < k:
        raise WrongArgument(
            f"ranked must hold item ids of shape (users, {k}) or more, got shape {ranked.shape} of {ranked.dtype}."
        )
    ranked = ranked[:, :k].astype(np.int64)
    ordered = np.sort(ranked, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise WrongArgument(f"The list of user {np.flatnonzero(twice)[0]} holds an item twice.")
    return ranked


def _owned(lists: Lists, users: int) -> tuple[np.ndarray, np.ndarray]:
    """The user of each item of (items, offsets), and the items, both int64."""
    if not isinstance(lists, (tuple, list)) or len(lists) != 2:
        hint = "Of one user: (items, [0, len(items)])."
        raise WrongArgument("Lists of items are given as (items, offsets).", hint=hint)
    items, offsets = (np.asarray(array) for array in lists)
    if items.ndim != 1 or offsets.shape != (users + 1,):
        raise WrongArgument(
            f"For {users} users, offsets must have shape ({users + 1},) and items one axis, "
            f"got {offsets.shape} and {items.shape}."
        )
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(items) or lengths.min(initial=0) < 0:
        raise WrongArgument(f"Offsets must rise from 0 to the number of items, {len(items)}.")
    if items.size and (items.dtype.kind not in "iu" or items.min() < 0):
        raise WrongArgument(f"Item ids must be integers from 0, got {items.dtype} from {items.min()}.")
    return np.repeat(np.arange(users), lengths), items.astype(np.int64)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise WrongArgument(f"k must be a whole number from 1, got {k!r}.")

"""How well a model ranks: every item is ranked for every user, but for those that the user is known to have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.recsys.batches import padded

if TYPE_CHECKING:
    from keras_efficient.recsys.interactions import Interactions

__all__ = ["Ranking", "evaluate", "history_batches"]

Predict = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Ranking:
    """Means over users, with standard errors of the mean over users.

    Attributes:
        k: length of the ranked lists.
        users: how many were ranked.
        ndcg, recall, reciprocal_rank: of the first k items.
        ndcg_error, recall_error: standard errors.
    """

    k: int
    users: int
    ndcg: float
    recall: float
    reciprocal_rank: float
    ndcg_error: float
    recall_error: float


def evaluate(
    predict: Predict,
    known: Interactions,
    held_out: Interactions,
    *,
    k: int = 20,
    users: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Ranks all items for the users of `held_out` by what is `known` of them.

    Args:
        predict: histories ``(batch, length)`` of item ids plus one, padded with 0, to scores ``(batch, items)``: a
            Keras model, a file that `export.load` opened, or a function.
        known: the histories; their items are not ranked.
        held_out: what should be found. nDCG has gains of one and an ideal of min(k, items of the user).
        k: length of the lists.
        users: so many of them, drawn with `seed`, instead of all.

    Raises:
        WrongArgument: parts of different numbers of users, scores of another number of items, or nobody has both a
            history and something held out.
    """
    from keras_efficient import ranking

    if known.num_users != held_out.num_users:
        raise WrongArgument(
            f"The two parts have {known.num_users} and {held_out.num_users} users.", hint="Read both with num_users=."
        )
    items, offsets = known.histories()
    wanted, wanted_offsets = held_out.histories()
    who = np.flatnonzero((np.diff(offsets) > 0) & (np.diff(wanted_offsets) > 0))
    if not len(who):
        raise WrongArgument("No user has both a history and held-out items.")
    if users is not None and users < len(who):
        who = np.sort(np.random.default_rng(seed).choice(who, users, replace=False))
    ranked = np.empty((len(who), k), np.int32)
    done = 0
    for places, ids in history_batches(items, offsets, who):
        scores = np.asarray(_numpy(predict(ids)))[: len(places)]
        if scores.ndim == 2 and scores.shape[1] != known.num_items:
            raise WrongArgument(
                f"The model scores {scores.shape[1]} items, the interactions have {known.num_items}.",
                hint="Histories are of items plus one, since 0 is padding; scores are of the items themselves.",
            )
        chosen = who[places]
        ranked[places] = ranking.top_k(scores, k, exclude=_parts(items, offsets, chosen))
        done += len(places)
        if on_progress is not None:
            on_progress(done, len(who))
    relevant = _parts(wanted, wanted_offsets, who)
    ndcg, ndcg_error = ranking.mean_and_error(ranking.ndcg(ranked, relevant, k))
    recall, recall_error = ranking.mean_and_error(ranking.recall(ranked, relevant, k))
    rank, _ = ranking.mean_and_error(ranking.reciprocal_rank(ranked, relevant, k))
    return Ranking(k, len(who), ndcg, recall, rank, ndcg_error, recall_error)


def history_batches(
    items: np.ndarray, offsets: np.ndarray, users: np.ndarray, batch_size: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole histories of users as padded ids (item plus one), those of like length together.

    Lengths are powers of two and batches of one size, filled up with padding, so that a compiled model meets few
    shapes. Gives the places in `users` of a batch's rows, and the ids.
    """
    lengths = np.diff(offsets)[users]
    widths = 2 ** np.ceil(np.log2(np.maximum(lengths, 8))).astype(int)
    for width in np.unique(widths):
        places = np.flatnonzero(widths == width)
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            flat, bounds = _parts(items, offsets, users[part])
            owner = np.repeat(np.arange(len(part)), np.diff(bounds))
            column = np.arange(len(flat)) - bounds[owner]
            yield part, padded(flat + 1, owner, column, column < width, (batch_size, width), 0)


def _parts(items: np.ndarray, offsets: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histories of some users, one after the other, and where each begins."""
    lengths = np.diff(offsets)[users]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    index = np.repeat(offsets[users] - bounds[:-1], lengths) + np.arange(bounds[-1])
    return items[index], bounds


def _numpy(values: Any) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values
    from keras import ops

    return ops.convert_to_numpy(values)

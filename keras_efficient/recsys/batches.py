"""Batches of histories and targets, drawn anew in every epoch: a function of seed, epoch and number of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_efficient.distribution import local_rows
from keras_efficient.errors import WrongArgument
from keras_efficient.models.sampled import Negatives

if TYPE_CHECKING:
    from keras_efficient.recsys.interactions import Interactions

__all__ = ["HistoryBatches", "padded"]


class HistoryBatches(keras.utils.PyDataset):
    """Users of an interaction set as ``{"inputs", "targets", "weights", "negatives", "log_expected", "hits"}``.

    Without times a random part of a user's items is the history and the items are the targets, as in a denoising
    autoencoder; of more items than `targets`, those that are in the history come first. With times the target is a
    random position of the user's sequence, and the history what came before.

    On several hosts each gives the part of a batch that its devices hold under the distribution that is set.

    Args:
        interactions: what to train on.
        batch_size: users in a batch.
        length: most items in a history; longer ones are cut at random (by time: to the last ones).
        targets: most targets of a user; where there are more, each counts for more.
        keep: mean part of a user's items that are in the history, without times.
        negatives: classes drawn for each batch, in proportion to ``count^power`` (plus one).
        power: of the counts.
        seed: of all that is drawn.

    Raises:
        WrongArgument: a number out of range.
    """

    def __init__(
        self,
        interactions: Interactions,
        *,
        batch_size: int = 512,
        length: int = 64,
        targets: int = 64,
        keep: float = 0.5,
        negatives: int = 4096,
        power: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        _check_counts(batch_size=batch_size, length=length, targets=targets)
        _check_part(keep)
        self._negatives = Negatives(interactions.counts(), negatives, power)
        self.items, self.offsets = interactions.histories()
        self.ordered = interactions.times is not None
        lengths = np.diff(self.offsets)
        # A sequence of one item has nothing to predict from.
        self.users = np.flatnonzero(lengths > (1 if self.ordered else 0))
        self.batch_size = min(batch_size, max(len(self.users), 1))
        self.length, self.targets, self.keep = length, targets, keep
        self.seed, self.epoch, self._rows = seed, 0, local_rows(self.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.users) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.users))
        # The last batch is filled up from the beginning, so that all have one shape.
        places = np.arange(index * self.batch_size, (index + 1) * self.batch_size) % len(order)
        random = np.random.default_rng([self.seed, self.epoch, index])
        batch = (self._next_items if self.ordered else self._halves)(self.users[order[places]], random)
        batch = {name: values[self._rows] for name, values in batch.items()}
        return ({**batch, **self._negatives.draw(random, batch["targets"])},)

    def _halves(self, users: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        lengths, owner, place, index = self._flat(users)
        shuffled = np.lexsort((random.random(len(index)), owner))  # owners stay in order
        items = self.items[index[shuffled]]
        kept = np.clip(random.binomial(lengths, self.keep), 1, self.length)
        ids = padded(items + 1, owner, place, place < kept[owner], (len(users), self.length), 0)
        targets = padded(items, owner, place, place < self.targets, (len(users), self.targets), -1)
        return {
            "inputs": ids,
            "targets": targets,
            "weights": (lengths / np.minimum(lengths, self.targets)).astype("float32"),
        }

    def _next_items(self, users: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        lengths, owner, place, index = self._flat(users)
        cut = 1 + np.floor(random.random(len(users)) * (lengths - 1)).astype(int)
        first = np.maximum(cut - self.length, 0)[owner]
        inside = (place >= first) & (place < cut[owner])
        ids = padded(self.items[index] + 1, owner, place - first, inside, (len(users), self.length), 0)
        targets = self.items[self.offsets[users] + cut].astype("int32")[:, None]
        return {"inputs": ids, "targets": targets, "weights": np.ones(len(users), "float32")}

    def _flat(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lengths of the users' histories; for each of their items its user's place here, its own, and its index."""
        lengths = np.diff(self.offsets)[users]
        owner = np.repeat(np.arange(len(users)), lengths)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return lengths, owner, place, self.offsets[users][owner] + place


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise WrongArgument(f"`{name}` must be a whole number from 1 on, not {value!r}.")


def _check_part(keep: Any) -> None:
    if not isinstance(keep, Real) or not 0 < float(keep) <= 1:
        raise WrongArgument(f"`keep` must be above 0 and at most 1, not {keep!r}.")


def padded(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, chosen: np.ndarray, shape: Sequence[int], fill: int
) -> np.ndarray:
    """An int32 array of this shape with the chosen values at their rows and columns, and `fill` elsewhere."""
    result = np.full(tuple(shape), fill, "int32")
    result[rows[chosen], columns[chosen]] = values[chosen]
    return result

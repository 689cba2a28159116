"""Who interacted with what: the one form of data that everything else here takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["LARGEST_ID", "Interactions", "by_frequency"]

# So that an id plus one, which models use where 0 is padding, is an int32 still.
LARGEST_ID = 2**31 - 2


@dataclass(frozen=True, eq=False)
class Interactions:
    """Pairs of a user and an item, one entry of each array a pair; a pair may stand in it more than once.

    Attributes:
        users, items: (pairs,) int32, from 0.
        num_users, num_items: how many there are; some may have no pairs.
        ratings: (pairs,) float32, or `None`.
        times: (pairs,) int64, in any unit: only their order is used. `None` where it is not known.

    Raises:
        WrongArgument: arrays of other shapes or types, an id out of range, a rating that is not finite.
    """

    users: np.ndarray
    items: np.ndarray
    num_users: int
    num_items: int
    ratings: np.ndarray | None = None
    times: np.ndarray | None = None

    def __post_init__(self):
        checked = {
            "num_users": _number("num_users", self.num_users),
            "num_items": _number("num_items", self.num_items),
            "users": _ids("users", self.users, self.num_users),
            "items": _ids("items", self.items, self.num_items),
        }
        if self.ratings is not None:
            checked["ratings"] = _ratings(self.ratings)
        if self.times is not None:
            checked["times"] = _integers("times", self.times).astype(np.int64, copy=False)
        lengths = {name: len(array) for name, array in checked.items() if isinstance(array, np.ndarray)}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise WrongArgument(f"The arrays must have one length: {found}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __len__(self) -> int:
        return len(self.users)

    def counts(self) -> np.ndarray:
        """How often each item occurs: (num_items,) int64."""
        return np.bincount(self.items, minlength=self.num_items)

    def select(self, mask: np.ndarray) -> Interactions:
        """The pairs where `mask`, a boolean for each pair, is true; users and items keep their ids.

        Raises:
            WrongArgument: `mask` is not of booleans, or of another length.
        """
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != self.users.shape:
            raise WrongArgument(f"A mask must be {len(self)} booleans, got shape {mask.shape} of {mask.dtype}.")
        ratings, times = (None if array is None else array[mask] for array in (self.ratings, self.times))
        return replace(self, users=self.users[mask], items=self.items[mask], ratings=ratings, times=times)

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs sorted by user, and by time inside a user; without times, and at one time, in the order given.

        Returns:
            index: (pairs,) which pair comes at each place.
            offsets: (num_users + 1,) int64; the places of user u are ``offsets[u]`` up to ``offsets[u + 1]``, which
                are equal where u has no pairs.
        """
        keys = (self.users,) if self.times is None else (self.times, self.users)  # the last counts most
        index = np.lexsort(keys)
        offsets = np.zeros(self.num_users + 1, np.int64)
        np.cumsum(np.bincount(self.users, minlength=self.num_users), out=offsets[1:])
        return index, offsets

    def histories(self) -> tuple[np.ndarray, np.ndarray]:
        """The items of each user, one user after the other, in the order of `order`.

        Returns:
            items: (pairs,) int32.
            offsets: (num_users + 1,) int64; those of user u are ``items[offsets[u]:offsets[u + 1]]``.
        """
        index, offsets = self.order()
        return self.items[index], offsets


def by_frequency(*parts: Interactions, counts: np.ndarray | None = None) -> tuple[tuple[Interactions, ...], np.ndarray]:
    """Renumbers items so that the most frequent one is 0, as MEmCom and other hashed tables want it.

    Args:
        *parts: parts of one data set; all get the same new ids.
        counts: (num_items,) how often each item occurs; by default in the first part, which is that for training.

    Returns:
        parts: the same pairs, in the same order.
        new_ids: (num_items,) int32, the new id of each old id. Items that occur equally often stay in their order.

    Raises:
        WrongArgument: no parts, parts with different numbers of items, or `counts` of another length or negative.
    """
    numbers = sorted({part.num_items for part in parts})
    if len(numbers) != 1:
        raise WrongArgument(
            f"Parts must have one number of items, got {numbers}.",
            hint="Read them with num_items=…, or use dataclasses.replace(part, num_items=…).",
        )
    counts = parts[0].counts() if counts is None else np.asarray(counts)
    if counts.shape != (numbers[0],):
        raise WrongArgument(f"counts must have shape ({numbers[0]},), got {counts.shape}.")
    if counts.dtype.kind not in "iuf" or not np.isfinite(counts).all() or (counts < 0).any():
        raise WrongArgument("counts must be finite numbers, not negative.")
    order = np.argsort(-counts.astype(np.float64), kind="stable")  # unsigned counts have no negative
    new_ids = np.empty(numbers[0], np.int32)
    new_ids[order] = np.arange(numbers[0], dtype=np.int32)
    return tuple(replace(part, items=new_ids[part.items]) for part in parts), new_ids


def _number(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= LARGEST_ID + 1:
        raise WrongArgument(f"{name} must be a whole number from 0 to {LARGEST_ID + 1}, got {value!r}.")
    return int(value)


def _integers(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise WrongArgument(f"{name} must be a flat array of integers, got shape {array.shape} of {array.dtype}.")
    return array


def _ids(name: str, values: np.ndarray, number: int) -> np.ndarray:
    array = _integers(name, values)
    if array.size and (array.min() < 0 or array.max() >= number):
        place = int(np.flatnonzero((array < 0) | (array >= number))[0])
        raise WrongArgument(f"{name}[{place}] is {array[place]}, ids must be from 0 to {number - 1}.")
    return array.astype(np.int32, copy=False)


def _ratings(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise WrongArgument(f"ratings must be a flat array of numbers, got shape {array.shape} of {array.dtype}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise WrongArgument(f"ratings[{place}] is {values[place]}, ratings must be finite.")
    return array

"""Parts of interactions to train on, to choose settings by, and to report.

Each split gives (training, validation, test). Every pair is in exactly one of them, in the order given; users and items
keep their ids and numbers.
"""

from __future__ import annotations

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.recsys.interactions import Interactions

__all__ = ["at_random", "by_time", "leave_one_out", "without"]

Parts = tuple[Interactions, Interactions, Interactions]


def leave_one_out(interactions: Interactions) -> Parts:
    """The last item of each user is for test, the last but one for validation.

    Users with fewer than 3 pairs are for training with all of them. Of pairs at one time, the one that comes later in
    the data counts as the later.

    Raises:
        WrongArgument: there are no times.
    """
    _times(interactions, "leave_one_out")
    index, offsets = interactions.order()
    ends = offsets[1:][np.diff(offsets) >= 3]
    part = np.zeros(len(interactions), np.int8)
    part[index[ends - 2]], part[index[ends - 1]] = 1, 2
    return _parts(interactions, part)


def by_time(interactions: Interactions, valid: float = 0.1, test: float = 0.1) -> Parts:
    """The latest pairs of all users are for test, those before them for validation: the same two moments for everyone.

    Pairs at one time are never torn apart; where the cut falls among them, all go to the later part. Times must be of
    one clock: the positions that `read_sequences` gives are not, use `leave_one_out` there.

    Args:
        interactions: pairs with times.
        valid, test: shares of the pairs, from 0; less than 1 together.

    Raises:
        WrongArgument: there are no times, or the shares are wrong.
    """
    times = _times(interactions, "by_time")
    _, for_test, held_out = _sizes(len(interactions), valid, test)
    part = np.zeros(len(interactions), np.int8)
    ordered = np.sort(times)
    for number, size in ((1, held_out), (2, for_test)):
        if size:
            part[times >= ordered[-size]] = number
    return _parts(interactions, part)


def at_random(interactions: Interactions, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> Parts:
    """Every pair for itself; a user may have none in a part. The same `seed` gives the same parts.

    A pair that stands twice in the data may be in two parts: read such data with ``duplicates="drop"``.

    Args:
        interactions: pairs.
        valid, test: shares of the pairs, from 0; less than 1 together.
        seed: of the draw.

    Raises:
        WrongArgument: the shares are wrong.
    """
    for_validation, for_test, _ = _sizes(len(interactions), valid, test)
    part = np.zeros(len(interactions), np.int8)
    part[:for_validation] = 1
    part[for_validation : for_validation + for_test] = 2
    return _parts(interactions, np.random.default_rng(seed).permutation(part))


def without(interactions: Interactions, other: Interactions) -> Interactions:
    """The pairs whose user and item do not stand together in `other`, as in "training minus validation"."""
    width = max(interactions.num_items, other.num_items)  # below 2³¹, and so are users: a key fits 64 bits
    ours, theirs = (part.users.astype(np.int64) * width + part.items for part in (interactions, other))
    return interactions.select(~np.isin(ours, theirs))


def _parts(interactions: Interactions, part: np.ndarray) -> Parts:
    train, valid, test = (interactions.select(part == number) for number in range(3))
    return train, valid, test


def _sizes(pairs: int, valid: float, test: float) -> tuple[int, int, int]:
    """Pairs for validation, for test, and for both."""
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise WrongArgument(f"Shares must be 0 or more, and less than 1 together: valid {valid}, test {test}.")
    for_test, held_out = round(test * pairs), round((valid + test) * pairs)
    return held_out - for_test, for_test, held_out


def _times(interactions: Interactions, name: str) -> np.ndarray:
    if interactions.times is None:
        raise WrongArgument(f"{name} needs to know when things happened, and these interactions have no times.")
    return interactions.times

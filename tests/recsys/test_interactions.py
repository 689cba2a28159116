"""Interactions: what they refuse, how they are sorted, how items are renumbered."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_efficient import recsys
from keras_efficient.errors import WrongArgument
from keras_efficient.recsys import Interactions, by_frequency

USERS, ITEMS = np.array([2, 0, 2, 2]), np.array([5, 1, 5, 3])


def lists(most=20, users=4, items=6, times=3):
    """(user, item, time) triples, with many equal ones."""
    return st.lists(st.tuples(*(st.integers(0, n - 1) for n in (users, items, times))), max_size=most)


def made(triples, users=4, items=6):
    columns = np.array(triples, np.int64).reshape(-1, 3).T
    return Interactions(columns[0], columns[1], users, items, np.arange(len(triples)), columns[2])


def test_types_and_length():
    found = Interactions(USERS, ITEMS.astype(np.uint8), np.int64(4), 7, [1, 2.5, 3, 4], [4, 3, 2, 1])
    arrays = (found.users, found.items, found.ratings, found.times)
    assert [array.dtype for array in arrays] == [np.int32, np.int32, np.float32, np.int64]
    assert len(found) == 4
    assert len(Interactions([], [], 0, 0)) == 0
    assert found.counts().tolist() == [0, 1, 0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"users": USERS[:3]}, "one length: users 3, items 4"),
        ({"ratings": np.ones(3)}, "one length"),
        ({"times": np.ones(5, int)}, "one length"),
        ({"items": ITEMS - 2}, r"items\[1\] is -1, ids must be from 0 to 5"),
        ({"num_items": 5}, r"items\[0\] is 5, ids must be from 0 to 4"),
        ({"num_users": 2}, r"users\[0\] is 2"),
        ({"users": USERS + 2**32}, "users"),  # would fit after a cast to 32 bits
        ({"users": USERS.astype(float)}, "integers"),
        ({"users": USERS > 1}, "integers"),
        ({"users": USERS.astype("timedelta64[s]")}, "integers"),
        ({"items": ITEMS[:, None]}, "flat"),
        ({"times": np.ones(4)}, "times must be a flat array of integers"),
        ({"times": np.ones(4, "datetime64[s]")}, "times must be a flat array of integers"),
        ({"ratings": np.array(["1", "2", "3", "4"])}, "ratings must be a flat array of numbers"),
        ({"ratings": np.array([1, np.nan, 1, 1])}, r"ratings\[1\] is nan"),
        ({"ratings": np.array([1, 1, 1e39, 1])}, r"ratings\[2\] is 1e\+39"),
        ({"num_users": 3.0}, "num_users must be a whole number"),
        ({"num_users": True}, "num_users must be a whole number"),
        ({"num_items": -1}, "num_items must be a whole number"),
        ({"num_items": 2**31}, "num_items must be a whole number"),
    ],
)
def test_refusals(changed, match):
    with pytest.raises(WrongArgument, match=match):
        Interactions(**{"users": USERS, "items": ITEMS, "num_users": 3, "num_items": 6, **changed})


def test_select():
    whole = Interactions(USERS, ITEMS, 3, 6, [1, 2, 3, 4], [9, 8, 7, 6])
    part = whole.select(whole.users == 2)
    assert part.items.tolist() == [5, 5, 3]
    assert part.ratings.tolist() == [1, 3, 4]
    assert part.times.tolist() == [9, 7, 6]
    assert (part.num_users, part.num_items) == (3, 6)
    for mask in ([0, 1, 2, 3], [True], [[True] * 4]):
        with pytest.raises(WrongArgument, match="4 booleans"):
            whole.select(mask)


@given(lists(), st.booleans())
def test_histories(triples, timed):
    interactions = made(triples)
    if not timed:
        interactions = replace(interactions, times=None)
    items, offsets = interactions.histories()
    assert (len(offsets), offsets[0], offsets[-1], offsets.dtype) == (5, 0, len(triples), np.int64)
    for user in range(4):
        own = [t for t in triples if t[0] == user]
        own = sorted(own, key=lambda t: t[2]) if timed else own  # a stable sort
        assert items[offsets[user] : offsets[user + 1]].tolist() == [item for _, item, _ in own]


@given(lists(), lists())
def test_by_frequency(train, test):
    train, test = made(train), made(test)
    parts, new_ids = by_frequency(train, test)
    assert sorted(new_ids) == list(range(6))
    counts = Counter(train.items.tolist())
    assert np.argsort(new_ids).tolist() == sorted(range(6), key=lambda item: (-counts[item], item))
    for old, new in zip((train, test), parts, strict=True):
        assert new.items.tolist() == new_ids[old.items].tolist()
        np.testing.assert_array_equal(new.users, old.users)
        np.testing.assert_array_equal(new.ratings, old.ratings)
        np.testing.assert_array_equal(new.times, old.times)


def test_by_frequency_of_other_counts():
    part = Interactions([0, 0, 0], [0, 0, 2], 1, 3)
    (new,), new_ids = by_frequency(part, counts=np.array([1, 9, 0], np.uint8))
    assert new_ids.tolist() == [1, 0, 2]
    assert new.items.tolist() == [1, 1, 2]
    with pytest.raises(WrongArgument, match="counts"):
        by_frequency(part, counts=[1, 2])
    for wrong in ([1, np.nan, 2], [1, -3, 2], ["a", "b", "c"]):
        with pytest.raises(WrongArgument, match="finite numbers, not negative"):
            by_frequency(part, counts=np.array(wrong))
    with pytest.raises(WrongArgument, match=r"\[3, 4\]"):
        by_frequency(part, replace(part, num_items=4))
    with pytest.raises(WrongArgument, match="one number of items"):
        by_frequency()


def test_every_public_name_is_there():
    assert set(recsys.__all__) == set(dir(recsys))
    for name in recsys.__all__:
        assert hasattr(recsys, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        recsys.no_such_name


def test_reading_splitting_and_scoring_import_no_keras():
    code = (
        "import sys\n"
        "from keras_efficient import ranking\n"
        "from keras_efficient.recsys import files, interactions, losses, splits\n"
        "assert not {'keras', 'tensorflow', 'jax', 'pyarrow', 'keras_rs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

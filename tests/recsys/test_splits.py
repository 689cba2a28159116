"""Splits: no pair is lost or doubled, and each goes where the split says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_efficient.errors import WrongArgument
from keras_efficient.recsys import Interactions, at_random, by_time, leave_one_out, read_lists, read_movielens, without

TRIPLES = st.lists(st.tuples(*(st.integers(0, n - 1) for n in (4, 6, 5))), max_size=30)
SHARES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))


def made(triples):
    """Ratings number the pairs, so that each can be told from its doubles."""
    columns = np.array(triples, np.int64).reshape(-1, 3).T
    return Interactions(columns[0], columns[1], 4, 6, np.arange(len(triples)), columns[2])


def keys(part):
    return Counter(zip(part.users.tolist(), part.items.tolist(), strict=True))


def rows(part):
    return list(zip(*(array.tolist() for array in (part.ratings, part.users, part.items, part.times)), strict=True))


def check_whole(interactions, parts):
    assert sorted(row for part in parts for row in rows(part)) == rows(interactions)
    for part in parts:
        assert (part.num_users, part.num_items) == (4, 6)
        assert (np.diff(part.ratings) > 0).all()  # the order given


@given(TRIPLES)
def test_leave_one_out(triples):
    interactions = made(triples)
    parts = leave_one_out(interactions)
    check_whole(interactions, parts)
    train, valid, test = (part.ratings.tolist() for part in parts)
    for user in range(4):
        own = [n for n, t in sorted(enumerate(triples), key=lambda pair: pair[1][2]) if t[0] == user]
        if len(own) >= 3:
            assert own[-1] in test
            assert own[-2] in valid
            own = own[:-2]
        assert set(own) <= set(train)


@given(TRIPLES, SHARES)
def test_by_time(triples, shares):
    interactions = made(triples)
    parts = by_time(interactions, *shares)
    check_whole(interactions, parts)
    bounds = [(part.times.min(), part.times.max()) for part in parts if len(part)]
    assert all(before[1] < after[0] for before, after in pairwise(bounds))
    assert len(parts[2]) >= round(shares[1] * len(triples))
    assert len(parts[1]) + len(parts[2]) >= round(sum(shares) * len(triples))
    # No more than asked, but for pairs at the moment of the cut.
    if len(parts[2]):
        assert (parts[2].times > parts[2].times.min()).sum() < round(shares[1] * len(triples))


def test_by_time_without_ties():
    order = np.random.default_rng(0).permutation(100)
    interactions = Interactions(np.zeros(100, int), np.zeros(100, int), 1, 1, times=order)
    train, valid, test = by_time(interactions, 0.1, 0.2)
    assert sorted(test.times) == list(range(80, 100))
    assert sorted(valid.times) == list(range(70, 80))
    assert sorted(train.times) == list(range(70))


@given(TRIPLES, SHARES, st.integers(0, 5))
def test_at_random(triples, shares, seed):
    interactions = made(triples)
    parts = at_random(interactions, *shares, seed=seed)
    check_whole(interactions, parts)
    assert len(parts[2]) == round(shares[1] * len(triples))
    assert len(parts[1]) + len(parts[2]) == round(sum(shares) * len(triples))
    assert [rows(part) for part in at_random(interactions, *shares, seed=seed)] == [rows(part) for part in parts]


def test_seeds_differ_and_every_pair_is_drawn_alike():
    interactions = Interactions(np.zeros(1000, int), np.arange(1000), 1, 1000)
    drawn = [at_random(interactions, 0.1, 0.2, seed=seed)[2].items for seed in range(50)]
    assert not np.array_equal(drawn[0], drawn[1])
    # 10 of 50 draws are expected of a pair, with a standard deviation of 2.8: 30 is seven of them away.
    counts = np.bincount(np.concatenate(drawn), minlength=1000)
    assert counts.mean() == 10
    assert counts.min() > 0
    assert counts.max() < 30


@given(TRIPLES, TRIPLES)
def test_without(triples, others):
    interactions = made(triples)
    known = {t[:2] for t in others}
    expected = [row for row in rows(interactions) if row[1:3] not in known]
    assert rows(without(interactions, made(others))) == expected


def test_without_knows_parts_of_other_sizes():
    large = Interactions([0, 1, 2**31 - 2], [5, 0, 2**31 - 2], 2**31 - 1, 2**31 - 1)
    small = Interactions([0, 1], [5, 1], 2, 6)
    assert without(large, small).users.tolist() == [1, 2**31 - 2]
    assert without(small, large).items.tolist() == [1]


# Pairs whose keys meet if items of the other part are too many for the key, or if it has 32 bits.
@pytest.mark.parametrize(("ours", "theirs", "items"), [((1, 1), (0, 7), (6, 8)), ((2, 2), (0, 0), (2**31 - 1,) * 2)])
def test_different_pairs_are_different(ours, theirs, items):
    parts = (Interactions([pair[0]], [pair[1]], 3, n) for pair, n in zip((ours, theirs), items, strict=True))
    assert len(without(*parts)) == 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, -0.1), (float("nan"), 0.1), (0, 1)])
def test_shares_that_make_no_sense(shares):
    interactions = made([(0, 0, 0)])
    for split in (by_time, at_random):
        with pytest.raises(WrongArgument, match="Shares"):
            split(interactions, *shares)


def test_times_are_needed():
    interactions = replace(made([(0, 0, 0)]), times=None)
    for split in (by_time, leave_one_out):
        with pytest.raises(WrongArgument, match=f"{split.__name__} needs"):
            split(interactions)


def test_movielens(data_dir):
    path = data_dir / "recsys/ml-100k/ratings.tsv.gz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    interactions = read_movielens(path)
    for parts in (leave_one_out(interactions), by_time(interactions), at_random(interactions)):
        assert sum((keys(part) for part in parts), Counter()) == keys(interactions)
    _, valid, test = leave_one_out(interactions)
    assert np.array_equal(np.sort(test.users), np.arange(943))
    later = np.zeros(943, np.int64)
    later[test.users] = test.times
    assert (valid.times <= later[valid.users]).all()


def test_gowalla(data_dir):
    folder = data_dir / "recsys/gowalla"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    train, valid, test = (read_lists(folder / f"{part}.txt.gz") for part in ("train", "valid", "test"))
    assert len(without(train, valid)) == 810_128 - 91_047
    assert len(without(train, test)) == 810_128
    assert len(without(valid, train)) == 0

"""Ranking metrics against cases by hand, scikit-learn and keras-rs; top_k against a plain sort; RankNet's loss."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from keras_efficient.errors import MissingDependency, WrongArgument
from keras_efficient.recsys import (
    Interactions,
    hit_rate,
    mean_and_error,
    ndcg,
    ranknet,
    recall,
    reciprocal_rank,
    top_k,
)

METRICS = (ndcg, recall, reciprocal_rank, hit_rate)
USERS, ITEMS = 40, 60


def flat(lists):
    return np.array([item for items in lists for item in items], int), np.cumsum([0, *map(len, lists)])


@pytest.fixture(scope="module")
def drawn():
    """Scores without ties, and labels, some of whose rows have none."""
    random = np.random.default_rng(1)
    scores = random.permuted(np.tile(np.linspace(-3, 3, ITEMS), (USERS, 1)), axis=1)
    labels = random.random((USERS, ITEMS)) < random.choice([0, 0.02, 0.1, 0.5], (USERS, 1))
    return scores, labels


def test_by_hand():
    ranked = np.arange(20)[None]
    relevant = flat([[0, 3, 77]])
    dcg, ideal = 1 + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / 2
    assert (dcg, ideal) == pytest.approx((1.43068, 2.13093), abs=5e-6)
    assert ndcg(ranked, relevant, 20) == pytest.approx([0.67139], abs=5e-6)
    assert recall(ranked, relevant, 20) == pytest.approx([2 / 3])
    assert recall(ranked, relevant, 3) == pytest.approx([1 / 3])
    assert ndcg(ranked, relevant, 1) == pytest.approx([1])
    assert reciprocal_rank(ranked, flat([[3, 4]]), 20) == pytest.approx([1 / 4])
    assert reciprocal_rank(ranked, flat([[3, 4]]), 3) == pytest.approx([0])
    assert hit_rate(ranked, flat([[3, 4]]), 4) == pytest.approx([1])
    assert hit_rate(ranked, flat([[3, 4]]), 3) == pytest.approx([0])


def test_the_ideal_is_capped_at_k():
    assert ndcg(np.array([[4, 2]]), flat([range(9)]), 2) == pytest.approx([1])
    assert recall(np.array([[4, 2]]), flat([range(9)]), 2) == pytest.approx([2 / 9])


def test_users_without_relevant_items_and_lists_that_end_early():
    ranked = np.array([[5, 1, -1], [5, 1, 2], [-1, -1, -1]])
    relevant = flat([[1], [], [2]])
    assert ndcg(ranked, relevant, 3) == pytest.approx([1 / math.log2(3), np.nan, 0], nan_ok=True)
    assert recall(ranked, relevant, 3) == pytest.approx([1, np.nan, 0], nan_ok=True)
    assert reciprocal_rank(ranked, relevant, 3) == pytest.approx([1 / 2, np.nan, 0], nan_ok=True)
    assert hit_rate(ranked, relevant, 3) == pytest.approx([1, np.nan, 0], nan_ok=True)


# The lists of neighbours meet where ids are largest and smallest.
def test_users_are_kept_apart():
    ranked = np.array([[9, 0], [9, 0]])
    assert hit_rate(ranked, flat([[1], [9]]), 2).tolist() == [0, 1]
    assert hit_rate(ranked, flat([[0], [8]]), 2).tolist() == [1, 0]
    assert hit_rate(np.array([[2, -1], [-1, -1]]), flat([[9], [1]]), 2).tolist() == [0, 0]


def test_a_relevant_item_that_stands_twice_counts_once():
    ranked = np.array([[1, 2, 3]])
    for metric in METRICS:
        assert metric(ranked, flat([[2, 8, 2]]), 3) == metric(ranked, flat([[2, 8]]), 3)


@pytest.mark.parametrize("k", [1, 5, 20, ITEMS])
def test_ndcg_is_that_of_scikit_learn(drawn, k):
    sklearn = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    scores, labels = drawn
    found = ndcg(top_k(scores, k), flat([np.flatnonzero(row) for row in labels]), k)
    assert np.isnan(found).sum() == (~labels.any(axis=1)).sum() > 0
    for user in np.flatnonzero(labels.any(axis=1)):
        expected = sklearn.ndcg_score(labels[user : user + 1], scores[user : user + 1], k=k, ignore_ties=True)
        assert found[user] == pytest.approx(expected, abs=1e-12)


# Gains of 2^y − 1 and of y are the same for labels 0 and 1. Users without relevant items are nan here and count with 0
# there, hence they are left out. float32 there.
@pytest.mark.parametrize("k", [1, 5, 20])
def test_metrics_are_those_of_keras_rs(drawn, k):
    metrics = pytest.importorskip("keras_rs", reason="compared with keras-rs").metrics
    scores, labels = (array[drawn[1].any(axis=1)] for array in drawn)
    ranked, relevant = top_k(scores, k), flat([np.flatnonzero(row) for row in labels])
    for ours, theirs in (
        (ndcg, metrics.NDCG),
        (recall, metrics.RecallAtK),
        (reciprocal_rank, metrics.MeanReciprocalRank),
    ):
        metric = theirs(k=k, shuffle_ties=False)
        metric.update_state(labels.astype("float32"), scores.astype("float32"))
        assert mean_and_error(ours(ranked, relevant, k))[0] == pytest.approx(float(metric.result()), abs=1e-6)


def test_mean_and_error():
    mean, error = mean_and_error(np.array([1.0, np.nan, 2.0, 6.0]))
    assert mean == pytest.approx(3)
    assert error == pytest.approx(math.sqrt(7 / 3))  # (4 + 1 + 9) / 2 / 3
    assert mean_and_error([5.0, np.nan]) == pytest.approx((5, np.nan), nan_ok=True)
    assert all(map(math.isnan, mean_and_error(np.array([np.nan]))))
    assert all(map(math.isnan, mean_and_error([])))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("ranked", "relevant", "k", "match"),
    [
        ([[1, 2]], flat([[1]]), 3, r"\(users, 3\)"),
        ([1, 2], flat([[1]]), 1, "ranked"),
        ([[1.0, 2.0]], flat([[1]]), 2, "ranked"),
        ([[1, 1]], flat([[1]]), 2, "user 0 holds an item twice"),
        ([[1, 2]], flat([[1]]), 0, "k must be"),
        ([[1, 2]], flat([[1]]), 2.0, "k must be"),
        ([[1, 2]], flat([[1]]), True, "k must be"),
        ([[1, 2]], flat([[1], [2]]), 2, "For 1 users"),
        ([[1, 2]], ([1, 2], [0, 1]), 2, "rise from 0"),
        ([[1, 2]], ([1, 2], [1, 2]), 2, "rise from 0"),
        ([[1, 2], [1, 2]], ([1, 2], [0, 3, 2]), 2, "rise from 0"),
        ([[1, 2]], ([-1], [0, 1]), 2, "from 0"),
        ([[1, 2]], ([0.5], [0, 1]), 2, "integers"),
    ],
)
def test_refusals(metric, ranked, relevant, k, match):
    with pytest.raises(WrongArgument, match=match):
        metric(np.array(ranked), relevant, k)


# top_k.

NUMBERS = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5000001, 2.0, math.inf])  # many ties


@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float64]), st.tuples(st.integers(0, 4), st.integers(0, 8)), elements=NUMBERS
    ),
    st.integers(1, 10),
    st.data(),
)
def test_top_k_is_a_sort(scores, k, data):
    rows, items = scores.shape
    seen = data.draw(
        st.lists(st.lists(st.integers(0, items - 1)) if items else st.just([]), min_size=rows, max_size=rows)
    )
    before = scores.copy()
    found = top_k(scores, k, exclude=flat(seen))
    assert (found.shape, found.dtype) == ((rows, k), np.int32)
    np.testing.assert_array_equal(scores, before)
    for row in range(rows):
        allowed = [item for item in range(items) if item not in seen[row] and scores[row, item] > -math.inf]
        expected = sorted(allowed, key=lambda item: (-scores[row, item], item))[:k]
        assert found[row].tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("items", [127, 5003])
def test_top_k_of_many_items(items):
    scores = np.random.default_rng(0).integers(0, 300, (5, items)).astype("float32")
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(top_k(scores, 20), expected)


def test_top_k_of_other_types():
    assert top_k(np.array([[1, 3, 2**53, 2]]), 2).tolist() == [[2, 1]]
    assert top_k(np.array([[1, 3, 2]], np.uint8), 2).tolist() == [[1, 2]]
    assert top_k(np.array([[1, 3, 2]], np.float16), 2).tolist() == [[1, 2]]


def test_top_k_with_histories():
    known = Interactions([1, 1, 0], [3, 2, 0], 2, 4)
    scores = np.tile(np.array([4.0, 3.0, 2.0, 1.0], np.float32), (2, 1))
    assert top_k(scores, 2, exclude=known.histories()).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 3, exclude=known.histories()).tolist() == [[1, 2, 3], [0, 1, -1]]


@pytest.mark.parametrize(
    ("scores", "k", "exclude", "match"),
    [
        ([1.0, 2.0], 1, None, "users, items"),
        ([[1.0, 2.0]], 0, None, "k must be"),
        ([[1.0, 2.0], [1.0, np.nan]], 1, None, "user 1 hold nan"),
        ([[1.0, 2.0]], 1, flat([[2]]), "Item 2"),
        ([[1.0, 2.0]], 1, flat([[-1]]), "from 0"),
        ([[1.0, 2.0]], 1, flat([[1], [1]]), "For 1 users"),
    ],
)
def test_top_k_refuses(scores, k, exclude, match):
    with pytest.raises(WrongArgument, match=match):
        top_k(np.array(scores), k, exclude)


# RankNet's loss.


def test_ranknet():
    pytest.importorskip("keras_rs", reason="compared with keras-rs")
    labels, scores = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])
    one = math.log1p(math.exp(-1))
    assert one == pytest.approx(0.31326, abs=5e-6)
    assert float(ranknet(reduction="sum")(labels, scores)) == pytest.approx(one, rel=1e-6)
    # keras-rs divides by the number of items, two, and not by that of pairs.
    assert float(ranknet()(labels, scores)) == pytest.approx(one / 2, rel=1e-6)
    assert float(ranknet()(np.repeat(labels, 3, 0), np.repeat(scores, 3, 0))) == pytest.approx(one / 2, rel=1e-6)
    swapped = float(ranknet(reduction="sum")(labels[:, ::-1].copy(), scores))
    assert swapped == pytest.approx(math.log1p(math.exp(1)), rel=1e-6)
    assert float(ranknet(reduction="sum", temperature=2.0)(labels, scores)) == pytest.approx(
        math.log1p(math.exp(-0.5)), rel=1e-6
    )


def test_keras_rs_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_rs", None)
    monkeypatch.delitem(sys.modules, "keras_rs.losses", raising=False)
    with pytest.raises(MissingDependency, match=r"keras-efficient\[recsys\]"):
        ranknet()

"""Offsets from gains: in proportion to their logarithm, whatever their scale; two levels and what is around."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient import video
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)


def test_a_doubling_is_worth_the_strength():
    gains = 2.0 ** np.arange(-4, 5)[None].repeat(3, axis=0)
    found = video.graded_offsets(gains, strength=2.0, floor=1e-9, step=1)
    np.testing.assert_array_equal(found, -2 * np.arange(-4, 5)[None].repeat(3, axis=0))
    assert video.graded_offsets(gains, strength=4.0, floor=1e-9, least=-6, most=10).min() == -6
    assert set(np.unique(video.graded_offsets(gains, step=3) % 3)) == {0}


def test_the_scale_does_not_matter_and_frames_are_apart():
    gains = RNG.random((2, 6, 9)) ** 4
    first = video.graded_offsets(gains)
    np.testing.assert_array_equal(first, video.graded_offsets(gains * np.array([1e6, 1e-6])[:, None, None]))
    np.testing.assert_array_equal(first[1], video.graded_offsets(gains[1]))
    order = np.argsort(gains[0].ravel())
    assert (np.diff(first[0].ravel()[order]) <= 0).all()


def test_nothing_to_gain_asks_for_nothing():
    assert not video.graded_offsets(np.zeros((4, 5))).any()
    assert not video.graded_offsets(RNG.random((4, 5)), strength=0).any()


def test_two_levels():
    scores = np.zeros((5, 7))
    scores[2, 0] = 1.0
    assert (video.two_levels(scores, threshold=0.5) == np.where(scores > 0, -10, 0)).all()
    found = video.two_levels(scores, threshold=0.5, dilation=1, low=4, high=-6)
    want = np.full((5, 7), 4)
    want[1:4, :2] = -6
    np.testing.assert_array_equal(found, want)
    both = video.two_levels(np.stack([scores, -scores]), threshold=0.5, dilation=1)
    np.testing.assert_array_equal(both, [np.where(want < 0, -10, 0), np.zeros((5, 7))])


@pytest.mark.parametrize(
    "options",
    [{"strength": -1}, {"strength": np.nan}, {"floor": 0}, {"step": 0}, {"least": 5, "most": 2}, {"most": 60}],
)
def test_what_is_refused(options):
    with pytest.raises(WrongArgument, match="No offsets have"):
        video.graded_offsets(np.ones((2, 2)), **options)
    with pytest.raises(WrongArgument, match="Gains must be finite"):
        video.graded_offsets(np.full((2, 2), np.nan))
    with pytest.raises(WrongArgument, match="No two levels have"):
        video.two_levels(np.ones((2, 2)), threshold=0.5, dilation=-1)

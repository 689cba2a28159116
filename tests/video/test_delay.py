"""The delay of chunks, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient import video
from keras_efficient.errors import WrongArgument
from keras_efficient.video.delay import TERMS
from keras_efficient.video.evaluation import Point


def point(sizes, *, held=0, encoding=0.0, looking=0.0, passes=1, serving=0.0):
    out_at = np.minimum(np.arange(len(sizes)) + held, len(sizes) - 1)
    return Point(30, np.array(sizes), out_at, encoding, looking, passes, serving, {})


def totals(*arguments):
    return np.sum(list(video.delays(*arguments).values()), axis=0)


def test_chunks_wait_for_those_before_them():
    # 10 frames a second, chunks of 2: there at 0.2, 0.4, 0.6; 1000 bits a second.
    sent = point([50, 0, 25, 0, 1, 0])  # 0.4, 0.2 and 0.008 s on the link
    found = video.delays(sent, 10, video.Link(1000, 0.1, chunk=2))
    assert list(found) == list(TERMS)
    assert found["link"] == pytest.approx([0.4, 0.2, 0.008])
    assert found["queue"] == pytest.approx([0, 0.2, 0.2])  # free at 0.6 and at 0.8
    assert totals(sent, 10, video.Link(1000, 0.1, chunk=2)) == pytest.approx([0.65, 0.65, 0.458])
    alone = video.Link(1000, 0.1, chunk=2, queues=False)
    assert totals(sent, 10, alone) == pytest.approx([0.65, 0.45, 0.258])
    assert alone.delay(sent, 10) == pytest.approx((0.65 + 0.45 + 0.258) / 3)
    assert alone.delay(sent, 10, np.max) == pytest.approx(0.65)


def test_the_other_terms():
    sent = point([10] * 5, held=3, encoding=0.5, looking=0.06, passes=2, serving=0.03)
    link = video.Link(1e9, 0.1, chunk=2)
    found = video.delays(sent, 10, link)
    assert found["fill"] == pytest.approx([0.2, 0.2, 0.1])
    assert found["hold"] == pytest.approx([0.3, 0.1, 0])  # the end of the clip lets everything out
    assert found["encode"] == pytest.approx([0.2, 0.2, 0.1])
    assert found["look"] == pytest.approx([0.02] * 3)
    assert found["round trip"] == pytest.approx([0.15] * 3)
    assert found["server"] == pytest.approx([0.06] * 3)
    given = video.delays(sent, 10, video.Link(1e9, 0.1, 2, holds=False, look=0.5, encode=0.7, server=0.9))
    for name, value in (("hold", 0), ("look", 0.5), ("encode", 0.7), ("server", 1.8)):
        assert given[name] == pytest.approx([value] * 3)


def test_fewer_frames_than_a_chunk():
    assert totals(point([125, 125]), 10, video.Link(1000, 0)) == pytest.approx([2.2])


@pytest.mark.parametrize("numbers", [(0,), (-1,), (1000, -0.1), (1000, 0.1, 0)])
def test_links_that_there_are_not(numbers):
    with pytest.raises(WrongArgument, match="no such link"):
        video.Link(*numbers)

"""Measures of results against a reference: cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient import video
from keras_efficient.errors import WrongArgument
from keras_efficient.video.accuracy import FrameF1, KeypointShare, MeanIoU, PooledF1, measures_of


def detections(*found):
    """Of (left, score) or (left, score, class): squares of side 10."""
    rows = [(one[0], one[1], one[2] if len(one) > 2 else 0) for one in found]
    boxes = np.array([[left, 0, left + 10, 10] for left, *_ in rows], float).reshape(-1, 4)
    return video.Detections(boxes, np.array([row[1] for row in rows]), np.array([row[2] for row in rows], np.int32))


@pytest.mark.parametrize(
    ("reference", "found", "counts"),
    [
        ([(0, 0.9)], [(1, 0.35)], (1, 0, 0)),  # weak, but the same
        ([(0, 0.9)], [(1, 0.29)], (0, 0, 1)),
        ([(0, 0.45)], [], (0, 0, 0)),  # too weak in the reference
        ([], [(0, 0.45)], (0, 0, 0)),  # neither right nor wrong
        ([], [(0, 0.5)], (0, 1, 0)),
        ([(0, 0.9)], [(4, 0.9)], (0, 1, 1)),  # 6 / 14 of overlap
        ([(0, 0.9, 1)], [(0, 0.9, 2)], (0, 1, 1)),
        ([(0, 0.9)], [(0, 0.9), (1, 0.8)], (1, 1, 0)),  # twice the same object
        ([(0, 0.6), (2, 0.9)], [(1.5, 0.9)], (1, 0, 1)),
        ([(0, 0.9), (2, 0.6)], [(1.2, 0.9), (0, 0.31)], (2, 0, 0)),
    ],
)
def test_detections_are_counted(reference, found, counts):
    assert tuple(PooledF1().sums(detections(*reference), detections(*found))) == counts


def test_f1_is_pooled_or_the_mean_of_frames():
    frames = [
        (detections((0, 0.9), (20, 0.9)), detections((0, 0.9))),  # F1 2/3
        (detections((0, 0.9)), detections()),  # 0
        (detections(), detections()),  # 1
        (detections((0, 0.4)), detections((0, 0.35))),  # 1 by the paper; not counted by ours
    ]
    pooled, mean = PooledF1(), FrameF1()
    assert pooled.accuracy(sum(pooled.sums(*frame) for frame in frames)) == pytest.approx(2 / 4)
    assert mean.accuracy(sum(mean.sums(*frame) for frame in frames)) == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert pooled.accuracy(np.zeros((5, 3))).tolist() == [1.0] * 5


def test_classes_of_pixels():
    measure = MeanIoU(4)
    sums = measure.sums(np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 2]]))
    assert measure.accuracy(sums) == pytest.approx((1 / 2 + 1 / 3) / 2)  # class 2 is not in the reference
    more = measure.sums(np.array([[2, 2], [2, 2]]), np.array([[2, 2], [2, 0]]))
    assert measure.accuracy(np.stack([sums + more, sums])) == pytest.approx([(1 / 3 + 1 / 3 + 3 / 5) / 3, 5 / 12])
    rare = measure.sums(np.array([[3, *[0] * 199]]), np.array([[0] * 200]))
    assert measure.accuracy(rare) == pytest.approx(199 / 200), "half a per cent of the pixels does not count"
    assert MeanIoU(4, least=0).accuracy(rare) == pytest.approx(199 / 400)
    with pytest.raises(WrongArgument, match="beyond 4"):
        measure.sums(np.array([[4]]), np.array([[0]]))


def test_points_of_people():
    person = np.array([[0, 0, 0.9], [60, 80, 0.9], [30, 40, 0.5], [30, 30, 0.4]])  # diagonal 100
    moved = person.copy()
    moved[:, 0] += [9, 11, -9, 99]
    measure = KeypointShare()
    assert measure.sums(person[None], moved[None]).tolist() == [2, 3]
    other = person + np.array([300, 0, 0])
    both = np.stack([person, other])
    assert measure.sums(both, both[::-1]).tolist() == [6, 6], "the nearest are a pair"
    assert measure.sums(both, person[None]).tolist() == [3, 6]
    assert measure.sums(np.stack([person, person]), person[None]).tolist() == [3, 6], "a pair has two"
    assert measure.sums(np.zeros((0, 4, 3)), person[None]).tolist() == [0, 0]
    assert measure.accuracy(np.array([[2, 3], [0, 0]])) == pytest.approx([2 / 3, 1])


def test_who_is_judged_how():
    network, preprocessing = (lambda x: x), video.PREPROCESSING["deeplab"]
    assert [one.name for one in measures_of(video.SegmentationServer(network, preprocessing))] == ["mean IoU"]
    detector = video.DetectionServer(network, video.PREPROCESSING["yolox"])
    assert [one.name for one in measures_of(detector)] == ["F1", "mean F1 of frames"]
    detector.measures = [MeanIoU(3)]
    assert measures_of(detector) == [MeanIoU(3)]
    with pytest.raises(WrongArgument, match="how to judge a object"):
        measures_of(object())

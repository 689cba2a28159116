"""Where a server finds something: of boxes, of people, of classes of pixels."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.errors import WrongArgument
from keras_efficient.video import Detections
from keras_efficient.video.found import boxes_of, covered, sureness


def test_the_best_box_counts():
    boxes = np.array([[10.0, 10.0, 30.0, 20.0], [0.0, 0.0, 40.0, 8.0], [70.0, 40.0, 200.0, 60.0]])
    found = sureness(Detections(boxes, np.array([0.5, 0.3, 0.9]), np.array([0, 1, 0])), 50, 80)
    wanted = np.zeros((4, 5), np.float32)
    wanted[0, :2] = wanted[1, :2] = 0.5
    wanted[0, 2] = 0.3
    wanted[2:, 4] = 0.9
    np.testing.assert_allclose(found, wanted)
    np.testing.assert_array_equal(covered(boxes, 50, 80), wanted > 0)


def test_people_and_classes_of_pixels():
    points = np.array([[[20.0, 20.0, 1.0], [30.0, 40.0, 1.0]]])
    np.testing.assert_allclose(boxes_of(points), [[20, 20, 30, 40]])
    assert sureness(points, 48, 64).sum() == 2
    classes = np.zeros((6, 8), np.int32)
    classes[:2] = 15
    np.testing.assert_allclose(sureness(classes, 48, 64)[:, 0], [1, 0, 0], atol=0.26)
    assert sureness(np.zeros((6, 8), np.int32), 50, 64).shape == (4, 4)
    assert not sureness(Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)), 48, 64).any()
    with pytest.raises(WrongArgument, match="finds no boxes"):
        boxes_of(np.zeros((4, 4), int))

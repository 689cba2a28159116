"""Results as JSON: what was found, bounded."""

from __future__ import annotations

import json

import numpy as np

from keras_efficient.video import Detections
from keras_efficient.video.transport import plain


def test_detections():
    found = Detections(
        np.array([[1.26, 2, 3, 4], [5, 6, 7, 8.04]], "float32"), np.array([0.5, 0.91239]), np.array([3, 7], "int32")
    )
    assert plain(found) == {"boxes": [[5, 6, 7, 8.0], [1.3, 2, 3, 4]], "scores": [0.912, 0.5], "classes": [7, 3]}
    many = Detections(np.zeros((1000, 4), "float32"), np.linspace(0, 1, 1000), np.arange(1000, dtype="int32"))
    assert plain(many)["classes"] == list(range(999, 699, -1))
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, "int32"))
    assert plain(none) == {"boxes": [], "scores": [], "classes": []}


def test_a_map_of_classes():
    found = np.zeros((4, 5), "int32")
    found[1:3, 2:] = 15
    small = plain(found)
    assert small["shares"] == {"0": 0.7, "15": 0.3}
    again = np.concatenate([np.full(length, kind) for kind, length in small["runs"]]).reshape(small["shape"])
    np.testing.assert_array_equal(again, found)
    assert plain(np.zeros((3, 3), "int32")) == {"shares": {"0": 1.0}, "shape": [3, 3], "runs": [[0, 9]]}
    noise = np.random.default_rng(0).integers(0, 21, (257, 257)).astype("int32")
    assert set(plain(noise)) == {"shares", "shape"}
    assert len(json.dumps(plain(noise))) < 1000


def test_points():
    found = plain(np.full((2, 3, 3), 1.23456, "float32"))
    assert found == {"people": [[[1.23] * 3] * 3] * 2}
    assert plain(np.zeros((0, 33, 3), "float32")) == {"people": []}

"""Detectors of objects: boxes with a class and a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.video.servers.base import Preprocessing
from keras_efficient.video.servers.heads import Head, YoloxHead

__all__ = ["DetectionServer", "Detections", "intersection_over_union"]

SOFTNESS = 0.1  # of a decision, in probability


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in a frame.

    Attributes:
        boxes: (n, 4) left, top, right, bottom in pixels of the frame.
        scores: (n,).
        classes: (n,) int32.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """Those with a score of at least that."""
        kept = self.scores >= score
        return Detections(self.boxes[kept], self.scores[kept], self.classes[kept])


class DetectionServer:
    """A detector that gives each anchor a probability p of each class, and a box.

    ```
    "likelihood":  Σ_{anchors, classes} (p_ref log p + (1 − p_ref) log(1 − p))
                   − Σ_{anchors with p_ref > threshold} |box − box_ref|₁
    "hits":        Σ_{detections of the reference} σ((p_d − threshold) / s)
                   − Σ_{anchors of none of them, classes} σ((p − sure) / s)
    ```

    where p_d is the best of the anchors whose boxes overlap detection d by more than a half, and s is 0.1. The first
    asks for the same output, the second for the same decisions: an object that is found for certain asks for nothing.

    Args:
        network: (b, …) inputs to raw outputs, with a gradient.
        preprocessing: of frames.
        answer: as the network, without a gradient, where that is faster.
        head: how raw outputs are read; `None`: as YOLOX's, (b, anchors, 5 + classes).
        score: `"likelihood"` or `"hits"`.
        threshold: least score of a detection.
        sure: score from which on a detection counts that the reference does not have.
        overlap: of two boxes of a class, above which the weaker one is dropped.

    Raises:
        UnknownName: another score.
    """

    def __init__(
        self,
        network: Callable[[Any], Any],
        preprocessing: Preprocessing,
        *,
        answer: Callable[[Any], Any] | None = None,
        head: Head | None = None,
        score: str = "likelihood",
        threshold: float = 0.3,
        sure: float = 0.5,
        overlap: float = 0.45,
    ):
        scores: dict[str, Callable[..., Any]] = {"likelihood": self._likelihood, "hits": self._hits}
        if score not in scores:
            raise UnknownName("score", score, scores)
        self.network, self.preprocessing, self.answer = network, preprocessing, answer or network
        self._score, self._of_hits = scores[score], score == "hits"
        self.threshold, self.sure, self.overlap = threshold, sure, overlap
        self.head = YoloxHead(preprocessing.size) if head is None else head

    def reference(self, frames: Any) -> Any:
        raw = self._answers(frames)
        return self._wanted(*raw) if self._of_hits else raw

    def score(self, frames: Any, reference: Any) -> Any:
        found = self._score(*self._raw(frames), *reference)
        return ops.sum(found, axis=-1) if self._of_hits else found

    def parts(self, frames: Any, reference: Any) -> Any:
        """Of the score "hits", whose sum it is: what each detection of the reference gives, and all that is none."""
        if not self._of_hits:
            raise WrongArgument('The score "likelihood" has no parts.', hint='Take score="hits".')
        return self._score(*self._raw(frames), *reference)

    def _raw(self, frames: Any) -> tuple[Any, Any]:
        return self.head.parts(self.network(self.preprocessing(frames)))

    def _answers(self, frames: Any) -> tuple[np.ndarray, np.ndarray]:
        """The same without a gradient."""
        found, places = self.head.parts(self.answer(self.preprocessing(frames)))
        return ops.convert_to_numpy(found), ops.convert_to_numpy(places)

    def _likelihood(self, found: Any, boxes: Any, wanted: Any, places: Any) -> Any:
        p = ops.clip(found, 1e-4, 1 - 1e-4)
        likelihood = ops.sum(wanted * ops.log(p) + (1 - wanted) * ops.log(1 - p), axis=(1, 2))
        sure = ops.cast(ops.max(wanted, axis=-1) > self.threshold, "float32")
        return likelihood - ops.sum(sure * ops.sum(ops.abs(boxes - places), axis=-1), axis=-1)

    def _hits(self, found: Any, boxes: Any, anchors: Any, classes: Any, free: Any) -> Any:
        """Of each detection, and of what is none: (b, d + 1).

        `anchors` (b, d, a): which are of each detection; `classes` (b, d, c) of it; `free` (b, a): of none."""
        of_class = ops.einsum("bac,bdc->bda", found, classes)
        best = ops.max(of_class * anchors, axis=-1)
        hits = ops.sigmoid((best - self.threshold) / SOFTNESS) * ops.max(classes, axis=-1)
        others = ops.sum(ops.sigmoid((found - self.sure) / SOFTNESS), axis=-1) * free
        return ops.concatenate([hits, -ops.sum(others, axis=-1, keepdims=True)], axis=-1)

    def _wanted(self, p: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_hits` is told of a reference; detections are filled up to a multiple of 16 with such of no class."""
        size = self.preprocessing.size[::-1]
        found = [self._detections(*one, np.ones(2, "float32"), size) for one in zip(p, box, strict=True)]
        count = -(-max(map(len, found), default=0) // 16) * 16 or 16
        anchors = np.zeros((len(p), count, p.shape[1]), "float32")
        classes = np.zeros((len(p), count, p.shape[2]), "float32")
        for row, detections in enumerate(found):
            boxes = self.head.boxes(box[row], slice(None))
            for number, (one, kind) in enumerate(zip(detections.boxes, detections.classes, strict=True)):
                anchors[row, number] = intersection_over_union(one, boxes) > 0.5
                classes[row, number, kind] = 1.0
        return anchors, classes, 1.0 - anchors.max(axis=1)

    def predict(self, frames: Any) -> list[Detections]:
        found, places = self._answers(frames)
        height, width = np.shape(frames)[1:3]
        ratio = np.array(self.preprocessing.ratio(height, width)[::-1], "float32")
        return [self._detections(p, box, ratio, (width, height)) for p, box in zip(found, places, strict=True)]

    def _detections(self, p: np.ndarray, box: np.ndarray, ratio: np.ndarray, size: tuple[int, int]) -> Detections:
        classes = p.argmax(axis=-1)
        scores = p[np.arange(len(p)), classes]
        kept = np.flatnonzero(scores > self.threshold)
        boxes = self.head.boxes(box, kept) / np.tile(ratio, 2)
        boxes = boxes.clip(0, np.array([*size, *size], "float32"))
        best = suppressed(boxes, scores[kept], classes[kept], self.overlap)
        return Detections(boxes[best], scores[kept][best], classes[kept][best].astype("int32"))


def suppressed(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, overlap: float) -> np.ndarray:
    """Which boxes stay, the best first: none overlaps a better one of its class by more than that."""
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[(intersection_over_union(boxes[best], boxes[left]) <= overlap) | (classes[left] != classes[best])]
    return np.array(kept, int)


def intersection_over_union(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of one box (4,) with others (n, 4): (n,)."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return shared / np.maximum(areas - shared, 1e-9)

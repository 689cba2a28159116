"""How well what a server finds in coded frames agrees with what it finds in a reference.

A measure gives a few sums for each frame, and turns sums over frames into one number. Whatever is asked of a clip, of a
part of it, or of frames drawn by lot, is then a matter of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.video.servers import Detections, DetectionServer, KeypointServer, SegmentationServer
from keras_efficient.video.servers.detection import intersection_over_union

__all__ = ["FrameF1", "KeypointShare", "MeanIoU", "Measure", "PooledF1", "measures_of"]


class Measure(Protocol):
    """An accuracy of results against those of a reference."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def sums(self, reference: Any, found: Any) -> Sequence[float] | np.ndarray:
        """(m,) of one frame, m always the same, from two results of `Server.predict`."""
        ...

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        """(…, m) summed over frames to (…), from 0 to 1."""
        ...


def measures_of(server: Any) -> list[Measure]:
    """What a server is judged by: its own attribute `measures`, or what is usual for its kind; the first one decides.

    Raises:
        WrongArgument: a server of another kind without `measures`.
    """
    own = getattr(server, "measures", None)
    if own:
        return list(own)
    kinds: list[tuple[type, list[Measure]]] = [
        (DetectionServer, [PooledF1(), FrameF1()]),
        (SegmentationServer, [MeanIoU()]),
        (KeypointServer, [KeypointShare()]),
    ]
    for kind, measures in kinds:
        if isinstance(server, kind):
            return measures
    raise WrongArgument(
        f"It is not known how to judge a {type(server).__name__}.", hint="Give it an attribute `measures`: a list."
    )


@dataclass(frozen=True)
class PooledF1:
    """Detections, counted over all frames.

    ```
    F1 = 2 tp / (2 tp + fp + fn)
    ```

    The reference's detections with a score of `sure` or more, the best first, take the nearest free one of their class
    that overlaps by `overlap` or more. One that is left counts as false from `sure` on; weaker ones do not count, since
    the least noise moves scores over any one threshold.

    Args:
        sure: least score of the reference's, and of those that are false.
        possible: least score of one that is taken.
        overlap: intersection over union.
    """

    sure: float = 0.5
    possible: float = 0.3
    overlap: float = 0.5
    name: str = "F1"

    def sums(self, reference: Detections, found: Detections) -> np.ndarray:
        """tp, fp and fn."""
        wanted, found = reference.above(self.sure), found.above(self.possible)
        free = np.ones(len(found), bool)
        for index in np.argsort(-wanted.scores, kind="stable"):
            shared = intersection_over_union(wanted.boxes[index], found.boxes)
            shared = np.where(free & (found.classes == wanted.classes[index]), shared, 0.0)
            if len(shared) and shared.max() >= self.overlap:
                free[shared.argmax()] = False
        hits = int((~free).sum())
        return np.array([hits, (found.scores[free] >= self.sure).sum(), len(wanted) - hits], float)

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        hits, false, missed = np.moveaxis(np.asarray(sums, float), -1, 0)
        return _ratio(2 * hits, 2 * hits + false + missed)


@dataclass(frozen=True)
class FrameF1:
    """Detections as in AccMPEG's code: F1 of each frame at one threshold on both sides, then the mean over frames.

    A frame without any detection on both sides has 1, one with some on one side only has 0.

    Args:
        threshold: least score.
        overlap: intersection over union.
    """

    threshold: float = 0.3
    overlap: float = 0.5
    name: str = "mean F1 of frames"

    def sums(self, reference: Detections, found: Detections) -> np.ndarray:
        """F1 and 1."""
        pooled = PooledF1(self.threshold, self.threshold, self.overlap)
        return np.array([pooled.accuracy(pooled.sums(reference, found)), 1.0])

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        return _ratio(*np.moveaxis(np.asarray(sums, float), -1, 0))


@dataclass(frozen=True)
class MeanIoU:
    """Classes of pixels: intersection over union of each class over all frames, its mean over the reference's classes.

    Args:
        classes: more than any class's number.
        least: share of the reference's pixels above which a class counts: a network sees nearly all of its classes in
            some pixels of a long clip, and no two codings have the same ones.
    """

    classes: int = 256
    least: float = 0.01
    name: str = "mean IoU"

    def sums(self, reference: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Of each class pixels in both, in either, and in the reference: (3 · classes,)."""
        if max(reference.max(initial=0), found.max(initial=0)) >= self.classes:
            raise WrongArgument(f"The server finds classes beyond {self.classes}.", hint="Give MeanIoU more `classes`.")
        both, wanted, there = (
            np.bincount(some.ravel(), minlength=self.classes)
            for some in (reference[reference == found], reference, found)
        )
        return np.concatenate([both, wanted + there - both, wanted]).astype(float)

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        both, either, wanted = np.moveaxis(np.asarray(sums, float).reshape(*np.shape(sums)[:-1], 3, -1), -2, 0)
        counts = wanted > self.least * wanted.sum(axis=-1, keepdims=True)
        each = np.where(counts, both / np.maximum(either, 1), 0.0)
        return _ratio(each.sum(axis=-1), counts.sum(axis=-1))


@dataclass(frozen=True)
class KeypointShare:
    """Points of bodies: the share of the reference's points that are found near where they should be.

    People are paired by the mean distance of their points, those of the reference in their order. Points that nothing
    in the reference stands for do not count.

    Args:
        seen: least probability of a point of the reference.
        near: greatest distance, in diagonals of the box around a person's points.
    """

    seen: float = 0.5
    near: float = 0.1
    name: str = "points found"

    def sums(self, reference: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Points found and points in all."""
        free, hits, points = list(found), 0, 0
        for person in reference:
            known = person[:, 2] >= self.seen
            points += int(known.sum())
            if not known.any() or not free:
                continue
            apart = [np.linalg.norm(other[known, :2] - person[known, :2], axis=1) for other in free]
            nearest = int(np.argmin([distances.mean() for distances in apart]))
            size = np.linalg.norm(np.ptp(person[known, :2], axis=0))
            hits += int((apart[nearest] <= self.near * size).sum())
            del free[nearest]
        return np.array([hits, points], float)

    def accuracy(self, sums: np.ndarray) -> np.ndarray:
        return _ratio(*np.moveaxis(np.asarray(sums, float), -1, 0))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """1 where there was nothing to find."""
    found: np.ndarray = np.where(whole > 0, part / np.maximum(whole, 1e-12), 1.0)
    return found

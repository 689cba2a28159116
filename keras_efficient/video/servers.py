"""The networks at the server: what they find in frames, and how far from that they are, with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from keras import ops

__all__ = ["PREPROCESSING", "DetectionServer", "Detections", "Preprocessing", "Server"]


class Server(Protocol):
    """A network whose view of frames decides which bits are worth sending.

    Frames are (b, h, w, 3), RGB, 0 to 255, of integers or floats.
    """

    def predict(self, frames: Any) -> list[Any]:
        """What is found in each frame."""
        ...

    def reference(self, frames: Any) -> Any:
        """The network's raw output, for `score`."""
        ...

    def score(self, frames: Any, reference: Any) -> Any:
        """How well the output for frames agrees with a reference: (b,), larger is better, with a gradient in frames."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """How frames become a network's input.

    Attributes:
        size: height and width of the input.
        letterbox: whether the ratio of sides is kept, with `fill` at the bottom and at the right.
        fill: of what is left free.
        bgr: whether blue comes first.
        scale, offset: input = pixel · scale + offset.
        channels_first: whether channels are the second axis.
    """

    size: tuple[int, int]
    letterbox: bool = False
    fill: float = 114.0
    bgr: bool = False
    scale: float = 1.0
    offset: float = 0.0
    channels_first: bool = False

    def ratio(self, height: int, width: int) -> tuple[float, float]:
        """What rows and columns of a frame are multiplied with."""
        down, across = self.size[0] / height, self.size[1] / width
        return (min(down, across),) * 2 if self.letterbox else (down, across)

    def __call__(self, frames: Any) -> Any:
        """Frames to inputs; the resize smooths before it leaves pixels out, so that none is without a gradient."""
        x = ops.cast(frames, "float32")
        height, width = x.shape[1:3]
        down, across = self.ratio(height, width)
        inner = (round(height * down), round(width * across))
        if inner != (height, width):
            x = ops.image.resize(x, inner, antialias=True, data_format="channels_last")
        if inner != self.size:
            free = [(0, self.size[0] - inner[0]), (0, self.size[1] - inner[1])]
            x = ops.pad(x, [(0, 0), *free, (0, 0)], constant_values=self.fill)
        x = ops.flip(x, axis=-1) if self.bgr else x
        x = x * self.scale + self.offset
        return ops.transpose(x, (0, 3, 1, 2)) if self.channels_first else x


PREPROCESSING = {
    "yolox": Preprocessing((416, 416), letterbox=True, bgr=True, channels_first=True),
}


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
    """A detector whose raw output is (b, anchors, 5 + classes), as YOLOX has it.

    ```
    p = objectness · class probability
    score = Σ_{anchors, classes} p_ref log p + (1 − p_ref) log(1 − p) − Σ_{anchors, p_ref > threshold} |box − box_ref|₁
    ```

    Args:
        network: (b, …) inputs to raw outputs, with a gradient.
        preprocessing: of frames.
        strides: of the grids whose cells the anchors are, in their order.
        threshold: least score of a detection.
        overlap: of two boxes of a class, above which the weaker one is dropped.
    """

    def __init__(
        self,
        network: Callable[[Any], Any],
        preprocessing: Preprocessing,
        *,
        strides: Sequence[int] = (8, 16, 32),
        threshold: float = 0.3,
        overlap: float = 0.45,
    ):
        self.network, self.preprocessing = network, preprocessing
        self.threshold, self.overlap = threshold, overlap
        cells, steps = [], []
        for stride in strides:
            rows, columns = preprocessing.size[0] // stride, preprocessing.size[1] // stride
            grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
            cells.append(grid)
            steps.append(np.full((len(grid), 1), stride))
        self._cells = np.concatenate(cells).astype("float32")
        self._steps = np.concatenate(steps).astype("float32")
        self._compiled: Any = None

    def _raw(self, frames: Any) -> tuple[Any, Any]:
        """Probabilities (b, anchors, classes), and boxes in cells: centre, logarithm of the size (b, anchors, 4)."""
        raw = self.network(self.preprocessing(frames))
        return raw[..., 4:5] * raw[..., 5:], raw[..., :4]

    def reference(self, frames: Any) -> Any:
        return self._raw(frames)

    def score(self, frames: Any, reference: Any) -> Any:
        wanted, places = reference
        found, boxes = self._raw(frames)
        p = ops.clip(found, 1e-4, 1 - 1e-4)
        likelihood = ops.sum(wanted * ops.log(p) + (1 - wanted) * ops.log(1 - p), axis=(1, 2))
        sure = ops.cast(ops.max(wanted, axis=-1) > self.threshold, "float32")
        return likelihood - ops.sum(sure * ops.sum(ops.abs(boxes - places), axis=-1), axis=-1)

    def predict(self, frames: Any) -> list[Detections]:
        found, places = (ops.convert_to_numpy(x) for x in self._raw(frames))
        height, width = np.shape(frames)[1:3]
        ratio = np.array(self.preprocessing.ratio(height, width)[::-1], "float32")
        return [self._detections(p, box, ratio, (width, height)) for p, box in zip(found, places, strict=True)]

    def _detections(self, p: np.ndarray, box: np.ndarray, ratio: np.ndarray, size: tuple[int, int]) -> Detections:
        classes = p.argmax(axis=-1)
        scores = p[np.arange(len(p)), classes]
        kept = np.flatnonzero(scores > self.threshold)
        centre = (box[kept, :2] + self._cells[kept]) * self._steps[kept]
        half = np.exp(box[kept, 2:]) * self._steps[kept] / 2
        boxes = np.concatenate([(centre - half) / ratio, (centre + half) / ratio], axis=1)
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

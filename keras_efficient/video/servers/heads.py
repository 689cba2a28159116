"""How the raw output of a detector is read: probabilities of anchors, and their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument

__all__ = ["AnchorHead", "Head", "QueryHead", "YoloxHead"]


class Head(Protocol):
    """Of detectors of one kind."""

    def parts(self, raw: Any) -> tuple[Any, Any]:
        """Probabilities (b, anchors, classes), and what boxes are made of (b, anchors, 4), of a raw output; with a
        gradient in it."""
        ...

    def boxes(self, places: np.ndarray, kept: Any) -> np.ndarray:
        """Left, top, right and bottom in pixels of the network's input, of some anchors of one frame.

        Args:
            places: (anchors, 4) of that frame.
            kept: which of them: their numbers, or a slice.
        """
        ...


class YoloxHead:
    """(b, anchors, 5 + classes): centre in cells, logarithm of the size in cells, objectness, classes.

    Args:
        size: (height, width) of the network's input.
        strides: of the grids whose cells the anchors are, in their order.

    Raises:
        WrongArgument: (from `parts`) an output of another shape.
    """

    def __init__(self, size: tuple[int, int], strides: Sequence[int] = (8, 16, 32)):
        self._size = size
        cells, steps = [], []
        for stride in strides:
            rows, columns = size[0] // stride, size[1] // stride
            grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
            cells.append(grid)
            steps.append(np.full((len(grid), 1), stride))
        self._cells = np.concatenate(cells).astype("float32")
        self._steps = np.concatenate(steps).astype("float32")

    def parts(self, raw: Any) -> tuple[Any, Any]:
        shape = tuple(raw.shape)
        # Compiled for a batch of any size, TensorFlow does not know the number of anchors.
        if len(shape) != 3 or shape[1] not in (None, len(self._cells)) or shape[2] < 6:
            size = "×".join(map(str, self._size))
            raise WrongArgument(
                f"YOLOX gives (batch, {len(self._cells)}, 5 + classes) for inputs of {size}, not {shape}."
            )
        return raw[..., 4:5] * raw[..., 5:], raw[..., :4]

    def boxes(self, places: np.ndarray, kept: Any) -> np.ndarray:
        centre = (places[kept, :2] + self._cells[kept]) * self._steps[kept]
        return _corners(centre, np.exp(places[kept, 2:]) * self._steps[kept])


class AnchorHead:
    """Logits of classes, and what is between anchors and boxes, as KerasHub's RetinaNet has them.

    Args:
        model: with `anchor_generator`.
        size: (height, width) of its input.
        of_logits: whether classes are logits.
    """

    def __init__(self, model: Any, size: tuple[int, int], *, of_logits: bool = True):
        self._format = model.anchor_generator.bounding_box_format
        anchors = model.anchor_generator(np.zeros((1, *size, 3), "float32"))
        self._anchors = np.concatenate([ops.convert_to_numpy(one) for one in anchors.values()])
        self._size, self._of_logits = size, of_logits

    def parts(self, raw: Any) -> tuple[Any, Any]:
        classes = raw["cls_logits"]
        return ops.sigmoid(classes) if self._of_logits else classes, raw["bbox_regression"]

    def boxes(self, places: np.ndarray, kept: Any) -> np.ndarray:
        from keras.utils import bounding_boxes

        if not len(places[kept]):
            return np.zeros((0, 4), "float32")
        found = bounding_boxes.decode_deltas_to_boxes(
            anchors=ops.convert_to_tensor(self._anchors[kept]),
            boxes_delta=ops.convert_to_tensor(places[kept]),
            anchor_format=self._format,
            encoded_format="center_xywh",
            box_format="xyxy",
            image_shape=(*self._size, 3),
        )
        return np.asarray(ops.convert_to_numpy(found))


class QueryHead:
    """Logits of classes, and boxes as shares of the picture (centre, width, height), as KerasHub's D-FINE has them.

    Args:
        size: (height, width) of the network's input.
    """

    def __init__(self, size: tuple[int, int]):
        self._size = np.array(size[::-1], "float32")

    def parts(self, raw: Any) -> tuple[Any, Any]:
        return ops.sigmoid(raw["logits"]), raw["pred_boxes"]

    def boxes(self, places: np.ndarray, kept: Any) -> np.ndarray:
        return _corners(places[kept, :2] * self._size, places[kept, 2:] * self._size)


def _corners(centre: np.ndarray, sides: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - sides / 2, centre + sides / 2], axis=1)

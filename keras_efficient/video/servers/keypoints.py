"""Networks that find the points of a body, run on the people that a detector finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument
from keras_efficient.video.servers.base import Preprocessing
from keras_efficient.video.servers.detection import DetectionServer

__all__ = ["KeypointServer"]


class KeypointServer:
    """A network from a square picture of one person to heat maps and points.

    ```
    score = − Σ_{people of the reference} ‖heat maps − heat maps_ref‖²
    ```

    Args:
        network: (n, s, s, 3) inputs to outputs by name, with a gradient.
        preprocessing: of the squares; its size is theirs.
        answer: as the network, without a gradient, where that is faster.
        people: finds the people; of the reference only, where scores are taken.
        person: class of a person.
        heat: name of the heat maps (n, rows, columns, points).
        points: name of the points (n, points · 5) or (n, points, 5): x, y and z in pixels of the square, and logits of
            being visible and of being there.
        enlarge: side of a square over the longer side of a box.
        least: score of a person.
        most: people in a frame, the best ones.

    A network that gives something else is refused, with `WrongArgument`, at its first frame.
    """

    def __init__(
        self,
        network: Callable[[Any], Mapping[str, Any]],
        preprocessing: Preprocessing,
        people: DetectionServer,
        *,
        answer: Callable[[Any], Mapping[str, Any]] | None = None,
        person: int = 0,
        heat: str = "Identity_3",
        points: str = "Identity",
        enlarge: float = 1.25,
        least: float = 0.5,
        most: int = 8,
    ):
        self.network, self.preprocessing, self.answer = network, preprocessing, answer or network
        self.people, self.person = people, person
        self.heat, self.points = heat, points
        self.enlarge, self.least, self.most = enlarge, least, most

    def predict(self, frames: Any) -> list[np.ndarray]:
        """The points of each person: (people, points, 3): x and y in pixels of the frame, probability of being seen."""
        squares, there = self._squares(frames)
        outputs = self.answer(self._cut(frames, squares))
        found = ops.convert_to_numpy(outputs[self.points])
        if found[0].size % 5:
            raise WrongArgument(f"Key points, output {self.points!r}, are (n, points · 5), not {found.shape}.")
        found = found.reshape(*squares.shape[:2], -1, 5)
        scale = (squares[..., 2] - squares[..., 0])[..., None, None] / self.preprocessing.size[0]
        places = found[..., :2] * scale + squares[:, :, None, :2]
        seen = 1 / (1 + np.exp(-found[..., 3:4].clip(-50, 50)))
        both = np.concatenate([places, seen], axis=-1).astype(np.float32)
        return [people[known] for people, known in zip(both, there, strict=True)]

    def reference(self, frames: Any) -> Any:
        squares, there = self._squares(frames)
        heat = ops.convert_to_numpy(self._heat(self.answer, frames, squares))
        return squares, there.astype(np.float32), heat

    def score(self, frames: Any, reference: Any) -> Any:
        return ops.sum(self.parts(frames, reference), axis=1)

    def parts(self, frames: Any, reference: Any) -> Any:
        """Of each person: (b, people)."""
        squares, there, wanted = reference
        return -there * ops.sum(ops.square(self._heat(self.network, frames, squares) - wanted), axis=(2, 3, 4))

    def _squares(self, frames: Any) -> tuple[np.ndarray, np.ndarray]:
        """Squares around the people of each frame, (b, most, 4), and which of them there are, (b, most)."""
        found = self.people.predict(frames)
        squares = np.tile(np.array([0, 0, 16, 16], np.float32), (len(found), self.most, 1))
        there = np.zeros((len(found), self.most), bool)
        for row, detections in enumerate(found):
            boxes = detections.boxes[(detections.classes == self.person) & (detections.scores >= self.least)][
                : self.most
            ]
            middle = (boxes[:, :2] + boxes[:, 2:]) / 2
            half = self.enlarge * (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
            squares[row, : len(boxes)] = np.concatenate([middle - half, middle + half], axis=1)
            there[row, : len(boxes)] = True
        return squares, there

    def _heat(self, network: Callable[[Any], Mapping[str, Any]], frames: Any, squares: Any) -> Any:
        found = network(self._cut(frames, squares))[self.heat]
        if len(found.shape) != 4:
            raise WrongArgument(
                f"Heat maps, output {self.heat!r}, are (n, rows, columns, points), not {tuple(found.shape)}."
            )
        return ops.reshape(found, (-1, self.most, *found.shape[1:]))

    def _cut(self, frames: Any, squares: Any) -> Any:
        """(b · most, s, s, 3): what is in each square, black outside of the frame; pixels are smoothed before some are
        left out, so that none is without a gradient."""
        x, size = ops.cast(frames, "float32"), self.preprocessing.size[0]
        squares = ops.convert_to_tensor(squares)
        down = _samples(squares[..., 1], squares[..., 3], size, x.shape[1])
        across = _samples(squares[..., 0], squares[..., 2], size, x.shape[2])
        cut = ops.einsum("bmrh,bhwc->bmrwc", down, x)
        cut = ops.einsum("bmsw,bmrwc->bmrsc", across, cut)
        return self.preprocessing(ops.reshape(cut, (-1, size, size, 3)))


def _samples(start: Any, end: Any, count: int, size: int) -> Any:
    """(b, m, count, size): what each of some samples between two places takes of each pixel."""
    step = (end - start)[..., None, None] / count
    places = start[..., None, None] + (np.arange(count, dtype=np.float32)[:, None] + 0.5) * step - 0.5
    reach = ops.maximum(step, 1.0)
    return ops.relu(1.0 - ops.abs(np.arange(size, dtype=np.float32) - places) / reach) / reach

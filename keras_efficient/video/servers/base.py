"""What every network at a server does, and how frames become its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from keras import ops

__all__ = ["PREPROCESSING", "Preprocessing", "Server"]


class Server(Protocol):
    """A network whose view of frames decides which bits are worth sending.

    Frames are (b, h, w, 3), RGB, 0 to 255, of integers or floats. A server whose score is a sum over what is seen may
    also have `parts(frames, reference)`, (b, parts), whose sum is the score: see `accuracy_gradient(each=True)`.
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
        scale, offset: input = pixel · scale + offset; of each channel, where they are several.
        channels_first: whether channels are the second axis.
    """

    size: tuple[int, int]
    letterbox: bool = False
    fill: float = 114.0
    bgr: bool = False
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0
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
        x = x * np.array(self.scale, "float32") + np.array(self.offset, "float32")
        return ops.transpose(x, (0, 3, 1, 2)) if self.channels_first else x


PREPROCESSING = {
    "yolox": Preprocessing((416, 416), letterbox=True, bgr=True, channels_first=True),
    "deeplab": Preprocessing((257, 257), scale=1 / 127.5, offset=-1.0),
    "openvino-road": Preprocessing((512, 896), bgr=True),
    "mediapipe-pose": Preprocessing((256, 256), scale=1 / 255),
}

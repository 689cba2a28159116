"""A part of a network that one kernel computes: convolutions and products of matrices, and what comes behind each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import mul
from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["ACTIVATIONS", "Activate", "Add", "Layer", "Region", "Step", "geometry", "size_of"]

ACTIVATIONS = ("relu", "prelu", "clip", "gelu", "gelu_tanh", "silu", "hard_swish", "softplus", "sigmoid", "tanh")


@dataclass(frozen=True, eq=False)
class Activate:
    """A function of each number.

    Attributes:
        kind: one of `ACTIVATIONS`.
        slopes: of `prelu`, (channels,) or (1,).
        low, high: of `clip`.
    """

    kind: str
    slopes: np.ndarray | None = None
    low: float = float("-inf")
    high: float = float("inf")

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS or (self.kind == "prelu") != (self.slopes is not None):
            raise WrongArgument(f"No activation: {self}.")


@dataclass(frozen=True)
class Add:
    """Another value is added.

    Attributes:
        value: its number, as of `Region`; of the same sizes, and of as many channels or one.
    """

    value: int


Step = Activate | Add


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution with a bias, and steps behind it, in their order. A product of matrices has a 1×1 kernel.

    Attributes:
        value: what it reads, a number as of `Region`.
        weights: (height, width, channels, filters) float32; of a depthwise one (height, width, channels, 1).
        bias: (filters,) float32.
        stride, dilation: (vertical, horizontal).
        padding: zeros at (top, left, bottom, right).
        depthwise: each channel has a kernel of its own.
        steps: what happens to each number behind the bias.
        name: of its node in the ONNX file; for reports.
    """

    value: int
    weights: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    depthwise: bool = False
    steps: tuple[Step, ...] = ()
    name: str = ""

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weights.shape[0], self.weights.shape[1]

    @property
    def channels(self) -> int:
        """Of its input."""
        return int(self.weights.shape[2])

    @property
    def filters(self) -> int:
        """Channels of its output."""
        return int(self.weights.shape[2] if self.depthwise else self.weights.shape[3])

    @property
    def is_same(self) -> bool:
        """Whether its output has the size of its input, centred: odd kernels, a stride of 1, and zeros all around."""
        reach = [(size - 1) * step for size, step in zip(self.kernel, self.dilation, strict=True)]
        wanted = (reach[0] // 2, reach[1] // 2, reach[0] // 2, reach[1] // 2)
        return self.stride == (1, 1) and self.padding == wanted and not any(one % 2 for one in reach)

    def size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Height and width of its output."""
        return size_of(geometry(self), height, width)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for each place of its output."""
        return prod(self.weights.shape)


def geometry(layer: Layer) -> list[int]:
    """What an output's size hangs on: reach of the kernel, stride, and padding above, left, below and right."""
    reach = [(size - 1) * step for size, step in zip(layer.kernel, layer.dilation, strict=True)]
    return [*reach, *layer.stride, *layer.padding]


def size_of(shape: Sequence[int], height: Any, width: Any) -> tuple[Any, Any]:
    """Height and width of an output; below 1 where the input is smaller than the kernel.

    Args:
        shape: as of `geometry`.
        height, width: of the input: integers, or expressions that know + and // with an integer on their right.
    """
    down, beside, stride, step, top, left, bottom, right = shape
    return (
        (height + (top + bottom - down - 1)) // stride + 1,
        (width + (left + right - beside - 1)) // step + 1,
    )


@dataclass(frozen=True, eq=False)
class Region:
    """Layers, of which the last one's output is the region's.

    Values have numbers: first the inputs, from 0 on, then the outputs of the layers. Only the first input is read by
    layers; the others are added. Images are (N, H, W, C); rows (M, C) are an image (1, 1, M, C).

    Attributes:
        layers: each reads a value before its own.
        channels: of each input.
        shuffle: of the output, blocks of so many rows and columns are made from channels (depth to space, the block's
            place outermost, as TensorFlow and ONNX's DCR have it); 1: none.
        rows: whether inputs and outputs are (M, C).
        names: of inputs, then of the output, in the ONNX graph; for reports.
    """

    layers: tuple[Layer, ...]
    channels: tuple[int, ...]
    shuffle: int = 1
    rows: bool = False
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        known = list(self.channels)
        for number, layer in enumerate(self.layers):
            limit = len(self.channels) + number
            reads = (layer.value, *(step.value for step in layer.steps if isinstance(step, Add)))
            if not all(0 <= one < limit for one in reads) or known[layer.value] != layer.channels:
                raise WrongArgument(f"Layer {number} of a region reads what there is not: values {reads} of {known}.")
            known.append(layer.filters)
        if not self.layers or known[-1] % self.shuffle**2:
            raise WrongArgument(
                f"A region of {len(self.layers)} layers, {known[-1:]} channels, shuffle {self.shuffle}."
            )

    @property
    def macs(self) -> int:
        """Multiply-accumulates for each place of the output before the shuffle, if no layer strides."""
        return sum(layer.macs for layer in self.layers)

    def image(self, shape: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Images, height and width of a first input of this shape; rows, of however many axes, are one image's row."""
        return (1, 1, reduce(mul, shape[:-1])) if self.rows else (shape[0], shape[1], shape[2])

    def sizes(self, height: Any, width: Any) -> list[tuple[Any, Any]]:
        """Height and width of each value, from those of the first input."""
        found = [(height, width)] * len(self.channels)
        for layer in self.layers:
            size = layer.size(*found[layer.value])
            for step in layer.steps:
                if isinstance(step, Add) and 0 < step.value < len(self.channels):
                    found[step.value] = size  # an input that is only added
            found.append(size)
        return found

    def input_shapes(self, n: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Shapes of all inputs, from images, height and width of the first one."""
        sizes = self.sizes(height, width)[: len(self.channels)]
        pairs = zip(sizes, self.channels, strict=True)
        return [(size[1], channels) if self.rows else (n, *size, channels) for size, channels in pairs]

    def output_shape(self, n: Any, height: Any, width: Any) -> tuple[Any, ...]:
        """The output's shape; sizes are integers, or expressions as of `size_of`."""
        down, across = self.sizes(height, width)[-1]
        filters = self.layers[-1].filters // self.shuffle**2
        return (across, filters) if self.rows else (n, down * self.shuffle, across * self.shuffle, filters)

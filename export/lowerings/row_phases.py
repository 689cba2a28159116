"""A depth-to-space out of convolutions that only move numbers, and a concatenation: no Ethos-U has the operator itself.

Depth-to-space with block r lays row phase p of every pixel, r·C numbers, into output row ``r·y + p``. In memory the
output row is row phase 0 of the whole row, or 1, …: so r tensors of one row phase each, concatenated along the width,
*are* the image. The NPU moves whole groups of 16 numbers fast and fewer ones slowly, hence the views as 16 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

from keras_efficient.export.graph import Builder, Graph, Op

__all__ = ["ELEMENTWISE", "Box", "PhaseMethod", "RowPhases", "Shuffle", "find_shuffle", "phase_methods"]

GROUP = 16  # int8 channels that the NPU's memory layout holds together
MAX_STRIDE = 3  # along the width; Vela takes a larger one apart into hundreds of operators

# Operators that treat every number of their input alike, wherever it lies.
UNARY = (
    "RELU",
    "RELU6",
    "RELU_N1_TO_1",
    "RELU_0_TO_1",
    "LEAKY_RELU",
    "LOGISTIC",
    "TANH",
    "HARD_SWISH",
    "QUANTIZE",
    "ABS",
)
BINARY = ("ADD", "SUB", "MUL", "MINIMUM", "MAXIMUM", "SQUARED_DIFFERENCE")
ELEMENTWISE = (*UNARY, *BINARY)


@dataclass(frozen=True)
class Shuffle:
    """A depth-to-space in a graph: the tensor that it reads, the one that it makes, its block r and channels C."""

    source: int
    result: int
    block: int
    channels: int

    @property
    def run(self) -> int:
        """Numbers of one row phase of one pixel: r·C, side by side in the input's channels and in the output's row."""
        return self.block * self.channels


@dataclass(frozen=True)
class PhaseMethod:
    """One way to take a row phase out of a tensor.

    Args:
        name: as the report shows it.
        pixels: that lie side by side in one position of the view that a convolution reads.
        positions: width and stride of that convolution.
        early: whether elementwise operators before the shuffle are done after it, on 16 channels.
        split: whether the convolution that makes the tensor is split into one a row phase instead.
    """

    name: str
    pixels: int = 1
    positions: int = 1
    early: bool = False
    split: bool = False

    def alignment(self, run: int) -> int:
        """The columns of a tile's edge, its margin included, must be multiples of this."""
        return group_pixels(run) if self.split else self.pixels


def group_pixels(run: int) -> int:
    """The least number of pixels whose row phases, `run` numbers each, fill groups of 16."""
    return GROUP // gcd(GROUP, run)


def phase_methods(graph: Graph, shuffle: Shuffle) -> Iterator[PhaseMethod]:
    """The methods that this graph allows, at least one."""
    width = graph.tensor(shuffle.source).shape[2]
    full = group_pixels(shuffle.run)
    waits = _waits(graph, shuffle.source)
    splits = (producer := graph.producers.get(shuffle.source)) is not None and producer.name == "CONV_2D"
    for early in (False, True) if waits else (False,):
        label = "-early" if early else ""
        if width % full == 0:
            for positions in range(1, min(MAX_STRIDE, full) + 1):
                if full % positions == 0:
                    pixels = full // positions
                    yield PhaseMethod(f"row-phases-{pixels}x{positions}{label}", pixels, positions, early)
        else:
            yield PhaseMethod(f"row-phases-1x1{label}", early=early)
    if splits:
        yield PhaseMethod("split-convolution", split=True)


def _waits(graph: Graph, index: int) -> bool:
    """Whether an elementwise operator makes the tensor, so that it can wait until after the shuffle."""
    op = graph.producers.get(index)
    return op is not None and op.name in ELEMENTWISE and _movable(graph, op)


def _movable(graph: Graph, op: Op) -> bool:
    """Whether an elementwise operator gives the same when all its operands are permuted in the same way."""
    shape = graph.tensor(op.output).shape
    if len(graph.consumers(op.output)) != 1:
        return False
    for index in op.inputs:
        tensor = graph.tensor(index)
        if graph.is_constant(index):
            if np.prod(tensor.shape, dtype=int) != 1:
                return False
        elif tensor.shape[:3] != shape[:3] or tensor.shape[3] not in (1, shape[3]):
            return False
    return True


def find_shuffle(graph: Graph, op: Op) -> Shuffle | None:
    """The depth-to-space that ends in `op`: the operator itself, or reshape, transpose, reshape to the same effect."""
    if op.name == "DEPTH_TO_SPACE":
        block = int(op.options.blockSize)
        return Shuffle(op.inputs[0], op.output, block, graph.tensor(op.output).shape[3])
    if op.name != "RESHAPE":
        return None
    transpose = graph.producers.get(op.inputs[0])
    first = (
        graph.producers.get(transpose.inputs[0]) if transpose is not None and transpose.name == "TRANSPOSE" else None
    )
    if transpose is None or first is None or first.name != "RESHAPE":
        return None
    order = graph.tensor(transpose.inputs[1]).data
    source, middle, result = (graph.tensor(index) for index in (first.inputs[0], first.output, op.output))
    if order is None or list(order) != [0, 2, 1, 3] or len(source.shape) != 4 or len(result.shape) != 4:
        return None
    batch, height, width, depth = source.shape
    block = middle.shape[2]
    channels = depth // (block * block)
    fits = middle.shape == (batch * height, width, block, block * channels)
    if not fits or result.shape != (batch, height * block, width * block, channels):
        return None
    return Shuffle(source.index, op.output, block, channels)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: its first row and column, and its size."""

    top: int
    left: int
    height: int
    width: int


class RowPhases:
    """Builds the row phases of one shuffle on one tile.

    Args:
        builder: that writes the new graph.
        shuffle: of the old graph.
        method: how to take the phases out.
        value: gives the new index of an old tensor, on the tile with its margin.
        inner: the tile in `value`'s tensors.
        outer: the same tile in the graph's inputs.
    """

    def __init__(
        self,
        builder: Builder,
        shuffle: Shuffle,
        method: PhaseMethod,
        value: Callable[[int], int],
        inner: Box,
        outer: Box,
    ):
        self.builder, self.graph, self.shuffle, self.method = builder, builder.source, shuffle, method
        self.value, self.inner, self.outer = value, inner, outer
        numbers = inner.width * shuffle.run
        whole = graph_width_of(self.graph, shuffle) * shuffle.run
        deep = GROUP if numbers % GROUP == 0 and whole % GROUP == 0 else shuffle.run
        self.shape = (1, inner.height, numbers // deep, deep)
        self._spreads: dict[int, int] = {}
        self._views: dict[tuple[int, int, Box], int] = {}

    def all(self) -> list[int]:
        """The r row phases, each 1×H×(W·r·C/16)×16 (or ×r·C where groups of 16 do not fit)."""
        return [self._phase(self.shuffle.source, phase) for phase in range(self.shuffle.block)]

    def _phase(self, index: int, phase: int) -> int:
        op = self.graph.producers.get(index)
        depth = self.graph.tensor(index).shape[3]
        if self.method.early and op is not None and op.name in ELEMENTWISE and _movable(self.graph, op):
            parts = {operand: self._phase(operand, phase) for operand in self.graph.operands(op)}
            return self.builder.copy(op, parts, self.shape)
        if depth == 1 and self.shuffle.block > 1:
            return self._spread(index)
        if self.method.split and op is not None:
            return self._split(op, phase)
        return self._select(index, phase)

    def _select(self, index: int, phase: int) -> int:
        """Row phase out of a tensor with all of them: view W/pixels × (pixels·r²·C), a convolution over `positions`."""
        builder, method, run = self.builder, self.method, self.shuffle.run
        depth = self.graph.tensor(index).shape[3]
        view = self._view(self.value(index), method.pixels, self.inner)
        kernel = np.zeros((method.positions * method.pixels * run, 1, method.positions, method.pixels * depth), bool)
        for position, pixel, number in np.ndindex(method.positions, method.pixels, run):
            output = (position * method.pixels + pixel) * run + number
            kernel[output, 0, position, pixel * depth + phase * run + number] = True
        return builder.reshape(builder.select(view, kernel), self.shape)

    def _spread(self, index: int) -> int:
        """The row phase, the same for each p, of a one-channel tensor that was broadcast to all channels."""
        if index in self._spreads:
            return self._spreads[index]
        builder, run = self.builder, self.shuffle.run
        whole = index in self.graph.inputs  # its view needs no copy; a view of a tile would
        tensor, box = (builder.input(index), self.outer) if whole else (self.value(index), self.inner)
        width = builder.shapes[tensor][2]
        pixels = next(n for n in (16, 8, 4, 2, 1) if width % n == 0 and box.left % n == 0 and box.width % n == 0)
        kernel = np.zeros((pixels * run, 1, 1, pixels), bool)
        for pixel in range(pixels):
            kernel[pixel * run : (pixel + 1) * run, 0, 0, pixel] = True
        spread = builder.select(self._view(tensor, pixels, box), kernel)
        self._spreads[index] = builder.reshape(spread, self.shape)
        return self._spreads[index]

    def _view(self, tensor: int, pixels: int, box: Box) -> int:
        """The tile's part of 1×H×W×C as 1×h×(w/pixels)×(pixels·C). Two views of one tensor would cost a copy of it."""
        key = (tensor, pixels, box)
        if key not in self._views:
            self._views[key] = self._new_view(tensor, pixels, box)
        return self._views[key]

    def _new_view(self, tensor: int, pixels: int, box: Box) -> int:
        _, height, width, depth = self.builder.shapes[tensor]
        view = self.builder.reshape(tensor, (1, height, width // pixels, pixels * depth))
        size = (1, box.height, box.width // pixels, pixels * depth)
        return self.builder.crop(view, (0, box.top, box.left // pixels, 0), size)

    def _split(self, op: Op, phase: int) -> int:
        """The convolution with the filters of one row phase only."""
        builder, run = self.builder, self.shuffle.run
        own = slice(phase * run, (phase + 1) * run)
        parts = {}
        for position, old in enumerate(op.inputs[1:], 1):
            tensor = self.graph.tensor(old) if old >= 0 else None
            if tensor is not None and tensor.data is not None:
                scales = tensor.scales[own] if len(tensor.scales) > 1 else tensor.scales
                parts[position] = builder.array(tensor.data[own], scales, name=tensor.name)
        source = self.value(op.inputs[0])
        _, height, width, _ = builder.shapes[source]
        made = builder.copy(op, {op.inputs[0]: source}, (1, height, width, run), others=parts)
        deep = self.shape[3] // run if self.shape[3] % run == 0 else group_pixels(run)
        if self.inner.left % deep or width % deep:
            deep = 1
        return builder.reshape(self._view(made, deep, self.inner), self.shape)


def graph_width_of(graph: Graph, shuffle: Shuffle) -> int:
    """Columns of the whole image before the shuffle."""
    return graph.tensor(shuffle.source).shape[2]

"""The whole image in one inference, but tile by tile inside: what is between two layers then stays in SRAM.

Every tile is computed with a margin as wide as the network sees, and cropped: the same integers as in one pass. With
tiles as high as the image, Vela chains all layers of a tile in SRAM, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from keras_efficient.export.graph import Builder, Graph, Op, rebuild
from keras_efficient.export.lowerings.row_phases import (
    ELEMENTWISE,
    Box,
    PhaseMethod,
    RowPhases,
    Shuffle,
    find_shuffle,
)

__all__ = ["ImageNetwork", "find_image_network", "in_tiles", "margin", "with_row_phases"]

_WINDOWED = ("CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "AVERAGE_POOL_2D")


@dataclass(frozen=True)
class ImageNetwork:
    """A graph that works on one image at one size: every pixel is made from its neighbourhood.

    Attributes:
        source: index of the input, 1×H×W×C.
        result: index of the output; before the last shuffle, if there is one.
        shuffle: the depth-to-space at the end, or `None`.
        reach: how many pixels above, below, left and right of an output pixel it reads.
    """

    source: int
    result: int
    shuffle: Shuffle | None
    reach: tuple[int, int, int, int]


def find_image_network(graph: Graph) -> ImageNetwork | None:
    """The graph as an `ImageNetwork`, or `None` where it is something else."""
    if not graph.single or len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return None
    last = graph.producers.get(graph.outputs[0])
    shuffle = find_shuffle(graph, last) if last is not None else None
    result = shuffle.source if shuffle else graph.outputs[0]
    size = graph.tensor(graph.inputs[0]).shape
    if len(size) != 4 or size[0] != 1:
        return None
    reach = {graph.inputs[0]: (0, 0, 0, 0)}
    for op in graph.ops:
        own = _reach(graph, op, size)
        operands = graph.operands(op)
        if own is None or any(index not in reach for index in operands):
            continue
        widest = [max(reach[index][side] for index in operands) for side in range(4)]
        reach[op.output] = tuple(a + b for a, b in zip(widest, own, strict=True))  # type: ignore[assignment]
    return ImageNetwork(graph.inputs[0], result, shuffle, reach[result]) if result in reach else None


def _reach(graph: Graph, op: Op, size: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Rows above and below, columns left and right that an operator reads; `None` where it is no local one."""
    operands = graph.operands(op)
    if not operands or len(op.outputs) != 1:
        return None
    if any(len(graph.tensor(i).shape) != 4 or graph.tensor(i).shape[:3] != size[:3] for i in (*operands, op.output)):
        return None
    if op.name in (*ELEMENTWISE, "PRELU", "CONCATENATION"):
        constants = [graph.tensor(index) for index in op.inputs if index not in operands and index >= 0]
        if op.name == "CONCATENATION":
            return (0, 0, 0, 0) if op.options.axis in (3, -1) and not constants else None
        return (0, 0, 0, 0) if all(set(c.shape[:-1]) <= {1} for c in constants) else None
    options = op.options
    if op.name not in _WINDOWED or (options.strideH, options.strideW) != (1, 1):
        return None
    if "POOL" in op.name:
        height, width = options.filterHeight, options.filterWidth
    else:
        _, height, width, _ = graph.tensor(op.inputs[1]).shape
        height, width = (height - 1) * options.dilationHFactor + 1, (width - 1) * options.dilationWFactor + 1
    if options.padding != 0 and (height, width) != (1, 1):  # VALID: the size would change
        return None
    above, left = (height - 1) // 2, (width - 1) // 2
    return above, height - 1 - above, left, width - 1 - left


def with_row_phases(graph: Graph, choose: Callable[[Shuffle], PhaseMethod]) -> Graph | None:
    """Every depth-to-space, wherever it is, as row phases; `None` where there is none."""

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        shuffle = find_shuffle(graph, op)
        if shuffle is None or graph.tensor(shuffle.source).shape[0] != 1:
            return None
        method = choose(shuffle)
        if method.split and len(graph.consumers(shuffle.source)) > 1:
            return None
        _, height, width, _ = graph.tensor(shuffle.source).shape
        box = Box(0, 0, height, width)
        phases = RowPhases(builder, shuffle, method, values.__getitem__, box, box)
        return builder.reshape(builder.concatenate(phases.all(), 2), graph.tensor(shuffle.result).shape)

    made = rebuild(graph, rule)
    return None if made is None else made.without_unused()


def in_tiles(graph: Graph, network: ImageNetwork, tile: tuple[int, int], method: PhaseMethod | None) -> Graph:
    """The network tile by tile.

    Args:
        graph: an image network.
        network: what `find_image_network` said of it.
        tile: height and width in input pixels, without the margin; the last ones may be smaller.
        method: for the shuffle at the end; `None` where there is none.
    """
    builder = Builder(graph)
    _, height, width, _ = graph.tensor(network.source).shape
    rows, columns = min(tile[0], height), min(tile[1], width)
    bands = []
    for top in range(0, height, rows):
        parts = [
            _tile(builder, network, Box(top, left, min(rows, height - top), min(columns, width - left)), method)
            for left in range(0, width, columns)
        ]
        # All of row phase 0 first, then all of row phase 1: that is how the rows of the result lie.
        bands.append(builder.concatenate([part[p] for p in range(len(parts[0])) for part in parts], 2))
    joined = builder.concatenate(bands, 1)
    result = builder.reshape(joined, graph.tensor(graph.outputs[0]).shape)
    return builder.finish({graph.outputs[0]: result})


def margin(network: ImageNetwork, method: PhaseMethod | None) -> int:
    """Columns that a tile reads beyond its own on either side."""
    step = method.alignment(network.shuffle.run) if method and network.shuffle else 1
    return ceil(max(network.reach[2:]) / step) * step


def _tile(builder: Builder, network: ImageNetwork, box: Box, method: PhaseMethod | None) -> list[int]:
    """The row phases of one tile, or the tile itself where no shuffle follows."""
    graph = builder.source
    _, height, width, depth = graph.tensor(network.source).shape
    above, below = network.reach[:2]
    side = margin(network, method)
    top, left = max(0, box.top - above), max(0, box.left - side)
    bottom, right = min(height, box.top + box.height + below), min(width, box.left + box.width + side)
    size = (1, bottom - top, right - left, depth)
    values = {network.source: builder.crop(builder.input(network.source), (0, top, left, 0), size)}

    def value(index: int) -> int:
        """The tensor on this tile; its operators are written when it is first asked for."""
        pending = [index]
        while pending:
            op = graph.producers.get(pending[-1])
            if pending[-1] in values or op is None:
                pending.pop()
                continue
            missing = [operand for operand in graph.operands(op) if operand not in values]
            if missing:
                pending.extend(reversed(missing))
                continue
            values[op.output] = builder.copy(op, values, (*size[:3], graph.tensor(op.output).shape[3]))
        return values[index]

    inner = Box(box.top - top, box.left - left, box.height, box.width)
    if network.shuffle is None or method is None:
        tensor = value(network.result)
        return [
            builder.crop(tensor, (0, inner.top, inner.left, 0), (1, box.height, box.width, builder.shapes[tensor][3]))
        ]
    return RowPhases(builder, network.shuffle, method, value, inner, box).all()

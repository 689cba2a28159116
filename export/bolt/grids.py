"""Launch rules: from the sizes of a region's input to a grid of blocks, as values that a file can hold.

A rule has a `kind`, the template's name, and integers; what launches kernels in other languages computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from keras_efficient.errors import WrongArgument
from keras_efficient.export.bolt.region import Layer

__all__ = ["Launch", "geometry", "launch", "output_size"]

Launch = tuple[tuple[int, int, int], tuple[int, ...]]

LIMIT = 2**31
MOST_IMAGES = 65535  # blocks along a grid's third axis


def geometry(layer: Layer) -> list[int]:
    """What an output's size hangs on: reach of the kernel, stride, and padding above, left, below and right."""
    reach = [(size - 1) * step for size, step in zip(layer.kernel, layer.dilation, strict=True)]
    return [*reach, *layer.stride, *layer.padding]


def output_size(structure: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """Height and width of a region's output, by its structure as of `spec.spec`."""
    sizes = {0: (height, width)}
    for number, layer in enumerate(structure["layers"], len(structure["channels"])):
        top, left, bottom, right = layer["padding"]
        found = []
        for axis, (size, padding) in enumerate(zip(sizes[layer["value"]], (top + bottom, left + right), strict=True)):
            reach = (layer["kernel"][axis] - 1) * layer["dilation"][axis]
            found.append((size + padding - reach - 1) // layer["stride"][axis] + 1)
        sizes[number] = (found[0], found[1])
    out = sizes[max(sizes)]
    return out[0] * structure["shuffle"], out[1] * structure["shuffle"]


def launch(rule: Mapping[str, Any], n: int, height: int, width: int, processors: int) -> Launch:
    """The grid, and the integers that a kernel takes behind height and width.

    Args:
        rule: of a `Source`.
        n, height, width: of the first input; of rows 1, 1 and their number.
        processors: multiprocessors of the device.

    Raises:
        WrongArgument: a size of 0, or more numbers than 32 bits count.
    """
    if min(n, height, width) < 1:
        raise WrongArgument(f"{n} images of {height} × {width} have nothing to compute.")
    if rule["kind"] == "strip":
        out = (height, width)
    else:
        down, beside, stride, step, top, left, bottom, right = rule["geometry"]
        out = ((height + top + bottom - down - 1) // stride + 1, (width + left + right - beside - 1) // step + 1)
        if min(out) < 1:
            raise WrongArgument(f"Images of {height} × {width} are smaller than the kernel.")
    if n * max(height * width, out[0] * out[1]) * rule["channels"] >= LIMIT:
        raise WrongArgument(f"{n} images of {height} × {width} have 2³¹ numbers or more.")
    return _KINDS[rule["kind"]](rule, n, out, processors)


def _strip(rule: Mapping[str, Any], n: int, out: Sequence[int], processors: int) -> Launch:
    """As many bands of rows as end soonest: waves of blocks, times the steps that each takes."""
    height, width = out
    if n > MOST_IMAGES:
        raise WrongArgument(f"{n} images are more than {MOST_IMAGES}, the most of a launch.")
    strips, rows, slots = ceil(width / rule["useful"]), rule["rows"], processors * rule["blocks"]

    def cost(bands: int) -> int:
        return ceil(strips * n * bands / slots) * ceil((ceil(height / bands) + rule["extra"]) / rows)

    band = ceil(height / min(range(1, ceil(height / rows) + 1), key=cost))
    return (strips, ceil(height / band), n), (band,)


def _tile(rule: Mapping[str, Any], n: int, out: Sequence[int], processors: int) -> Launch:
    places = n * out[0] * out[1]
    together = rule.get("together", 1)  # blocks of a cluster, of which a grid has whole ones
    return (ceil(places / rule["places"] / together) * together, rule["across"], 1), (places, *out)


def _depthwise(rule: Mapping[str, Any], n: int, out: Sequence[int], processors: int) -> Launch:
    work = n * out[0] * ceil(out[1] / rule["places"]) * rule["groups"]
    return (ceil(work / rule["threads"]), 1, 1), (n, *out)


_KINDS = {"strip": _strip, "tile": _tile, "depthwise": _depthwise}

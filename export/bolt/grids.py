"""Launch rules: from the sizes of a region's input to a grid of blocks, as values that a file can hold.

A rule has a `kind`, the template's name, and integers; what launches kernels in other languages computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from keras_efficient.errors import WrongArgument
from keras_efficient.export.bolt.region import geometry, size_of

__all__ = ["Launch", "arguments", "geometry", "launch"]

Launch = tuple[tuple[int, int, int], tuple[int, ...]]

LIMIT = 2**31
MOST_IMAGES = 65535  # blocks along a grid's third axis


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
        out = size_of(rule["geometry"], height, width)
        if min(out) < 1:
            raise WrongArgument(f"Images of {height} × {width} are smaller than the kernel.")
    if n * max(height * width, out[0] * out[1]) * rule["channels"] >= LIMIT:
        raise WrongArgument(f"{n} images of {height} × {width} have 2³¹ numbers or more.")
    return _KINDS[rule["kind"]](rule, n, out, processors)


def arguments(
    inputs: Sequence[Any], weights: Any, height: Any, width: Any, integers: Sequence[Any], out: Any
) -> list[Any]:
    """What a kernel takes, in its order, which is TensorRT's.

    Args:
        inputs, weights, out: arrays, in whatever form a launch takes them; weights packed as a `Source` has them.
        height, width: of the first input.
        integers: as of `launch`.
    """
    return [*inputs, weights, height, width, *integers, out]


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
    return (ceil(places / rule["places"]), rule["across"], 1), (places, *out)


def _depthwise(rule: Mapping[str, Any], n: int, out: Sequence[int], processors: int) -> Launch:
    work = n * out[0] * ceil(out[1] / rule["places"]) * rule["groups"]
    return (ceil(work / rule["threads"]), 1, 1), (n, *out)


_KINDS = {"strip": _strip, "tile": _tile, "depthwise": _depthwise}

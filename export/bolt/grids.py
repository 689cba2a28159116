"""Launch rules: from the sizes of a region's input to a grid of blocks, as values that a file can hold.

A rule has a `kind`, the template's name, and integers; what launches kernels in other languages computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keras_efficient.errors import WrongArgument
from keras_efficient.export.bolt.region import geometry, size_of

__all__ = ["Launch", "arguments", "band", "formulas", "geometry", "launch"]

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
    if rule["kind"] == "strip" and n > MOST_IMAGES:
        raise WrongArgument(f"{n} images are more than {MOST_IMAGES}, the most of a launch.")
    return formulas(rule, n, height, width, band(rule, n, height, width, processors))


def band(rule: Mapping[str, Any], n: int, height: int, width: int, processors: int) -> int:
    """Rows of a band of the kind `strip`, so that all bands end soonest; other kinds have none.

    That is waves of blocks, times the steps that each takes.
    """
    if rule["kind"] != "strip":
        return 0
    strips, rows, slots = quotient(width, rule["useful"]), rule["rows"], processors * rule["blocks"]

    def cost(bands: int) -> int:
        return quotient(strips * n * bands, slots) * quotient(quotient(height, bands) + rule["extra"], rows)

    return quotient(height, min(range(1, quotient(height, rows) + 1), key=cost))


def formulas(rule: Mapping[str, Any], n: Any, height: Any, width: Any, band: int) -> Launch:
    """What `launch` gives for bands of so many rows: of integers, or of expressions of sizes, such as TensorRT's.

    Expressions know + - × ÷, and stand first in each; of rows only the width is one.
    """
    if rule["kind"] == "strip":
        return (quotient(width, rule["useful"]), quotient(height, band), n), (band,)
    rows, columns = size_of(rule["geometry"], height, width)
    if rule["kind"] == "tile":
        places = columns * rows * n
        together = rule.get("together", 1)  # blocks of a cluster, of which a grid has whole ones
        blocks = quotient(places, rule["places"] * together) * together
        return (blocks, rule["across"], 1), (places, rows, columns)
    work = quotient(columns, rule["places"]) * rows * n * rule["groups"]
    return (quotient(work, rule["threads"]), 1, 1), (n, rows, columns)


def quotient(size: Any, part: int) -> Any:
    """Rounded up."""
    return (size + (part - 1)) // part


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

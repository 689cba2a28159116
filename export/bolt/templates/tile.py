"""Convolutions and products of matrices of any size, alone or in pairs, as tiles of one product: see `tile.cuh`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any, Literal

import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.grids import geometry, launch
from keras_efficient.export.bolt.region import Add, Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates import implicit
from keras_efficient.export.bolt.templates.implicit import Places
from keras_efficient.export.bolt.templates.packing import Packed, fragments, table, up
from keras_efficient.export.bolt.templates.results import Sums

__all__ = ["Tile", "candidates", "emit", "one_by_one", "refusal", "seconds"]

LOADS_PER_CYCLE = 32  # of a multiprocessor, whatever their width
FETCH, STORE = 12, 4  # instructions for a number that moves by itself: its address, whether it is there, the move


@dataclass(frozen=True)
class Tile:
    """Parameters of the template.

    Attributes:
        heights: of 16 output places that a warp computes.
        widths: of 8 filters that a warp computes.
        down, across: warps of a block, along the places and along the filters.
        inner: numbers of the inner axis in one stage; a multiple of 16.
        stages: of the pipeline.
        blocks: on a multiprocessor at once.
        second: where a pair keeps the first product: in "registers", for which a warp must compute all its filters, or
            in "shared" memory.
    """

    heights: int = 4
    widths: int = 8
    down: int = 2
    across: int = 1
    inner: int = 32
    stages: int = 3
    blocks: int = 1
    second: Literal["registers", "shared"] = "registers"

    @property
    def places(self) -> int:
        """Of a block's tile."""
        return 16 * self.heights * self.down

    @property
    def filters(self) -> int:
        """Of a block's tile."""
        return 8 * self.widths * self.across

    @property
    def threads(self) -> int:
        return 32 * self.down * self.across


def refusal(region: Region) -> str | None:
    """Why the template does not serve a region, or `None`."""
    inputs = len(region.channels)
    if len(region.layers) > 2:
        return "it has more than two layers"
    if any(layer.depthwise for layer in region.layers):
        return "a layer is depthwise"
    if region.layers[0].value != 0:
        return "its first layer reads another value than the first input"
    if len(region.layers) == 2:
        second = region.layers[1]
        if second.value != inputs or second.kernel != (1, 1) or second.stride != (1, 1) or any(second.padding):
            return "its second layer is not a 1×1 convolution of the first one's output"
    if any(isinstance(step, Add) and step.value >= inputs for layer in region.layers for step in layer.steps):
        return "a layer's output is added to a later one"
    return implicit.refusal(region.layers[0])


def emit(region: Region, tile: Tile) -> Source:
    """The kernel of a region.

    Raises:
        UnsupportedLayer: the template does not serve it, or not with these parameters.
    """
    reason = refusal(region) or _misfit(region, tile)
    if reason is not None:
        raise UnsupportedLayer(region.names[-1] if region.names else "region", f"no tiles: {reason}.")
    writer = _Writer(region, tile)
    kernel, text = complete("tile", writer.text(), ("primitives", "epilogue", "strip", "tile"))
    return Source(
        text=text,
        kernel=kernel,
        threads=tile.threads,
        blocks=tile.blocks,
        shared_bytes=writer.shared_bytes,
        packed=writer.packed.data,
        rule=_rule(region, tile),
    )


def _misfit(region: Region, tile: Tile) -> str | None:
    if tile.inner % 16 or tile.stages < 2 or tile.threads % (tile.inner // 8):
        return f"{tile} has no whole stages"
    if len(region.layers) == 2:
        filters = region.layers[0].filters
        if tile.filters < filters or tile.filters % 16:
            return (
                f"a tile of {tile.filters} filters does not hold all {filters} of the first layer, in whole fragments"
            )
        if tile.second == "registers" and tile.across != 1:
            return "registers hold the first product only where a warp computes all its filters"
    return None


def _rule(region: Region, tile: Tile) -> dict[str, Any]:
    first = region.layers[0]
    across = ceil(first.filters / tile.filters) if len(region.layers) == 1 else 1
    channels = max(*region.channels, *(layer.filters for layer in region.layers))
    sizes = {"places": tile.places, "across": across, "channels": channels}
    return {"kind": "tile", **sizes, "geometry": geometry(first)}


class _Writer:
    """The part of the source that is the region's own, and its weights."""

    def __init__(self, region: Region, tile: Tile):
        self.region, self.tile = region, tile
        self.inputs = len(region.channels)
        self.first, self.last = region.layers[0], region.layers[-1]
        self.is_pair = len(region.layers) == 2
        height, width, channels, filters = self.first.weights.shape
        inner = height * width * channels
        self.parts = ceil(inner / tile.inner)
        padded = np.zeros((self.parts * tile.inner, filters), np.float32)
        padded[:inner] = self.first.weights.reshape(inner, filters)
        weights = [fragments(padded, tile.filters)]
        # Of the second product: tiles of a warp, whose columns of warps share all.
        self.second_widths = ceil(self.last.filters / 8 / tile.across)
        columns = [up(filters, tile.filters)]
        if self.is_pair:
            columns.append(8 * self.second_widths * tile.across)
            matrix = np.zeros((tile.filters, self.last.filters), np.float32)
            matrix[:filters] = self.last.weights.reshape(filters, self.last.filters)
            weights.append(fragments(matrix, columns[1]))
        tables = [table(layer, size) for layer, size in zip(region.layers, columns, strict=True)]
        self.columns, self.packed = columns, Packed(weights, tables)

    @property
    def _stage_bytes(self) -> tuple[int, int]:
        """Of one stage: places, and filters."""
        return 2 * self.tile.places * self.tile.inner, 2 * self.tile.inner * self.tile.filters

    @property
    def _first_bytes(self) -> int:
        """Of a pair's first product, where it is kept in shared memory."""
        return 2 * self.tile.places * self.tile.filters if self.is_pair and self.tile.second == "shared" else 0

    @property
    def shared_bytes(self) -> int:
        out = self._sums(len(self.region.layers) - 1).out_bytes(self.tile.places)
        return max(self.tile.stages * sum(self._stage_bytes), self._first_bytes + out)

    def _sums(self, number: int) -> Sums:
        tile, widths = self.tile, (self.tile.widths, self.second_widths)[number]
        return Sums(
            self.region,
            number,
            ("sums", "others")[number],
            heights=tile.heights,
            widths=widths,
            rise=16,
            before=f"across * {widths}",
            block="0" if self.is_pair else "block",
            filters=self.columns[1] if number else tile.filters,
            columns=self.columns[number],
            table=self.packed.tables[number] // 4,
        )

    def text(self) -> str:
        tile = self.tile
        inputs = "".join(f"const half* input_{one}, " for one in range(self.inputs))
        a, b = self._stage_bytes
        places = Places(self.first, tile.places, tile.inner, tile.threads)
        lines = [
            "using namespace bolt;",
            "",
            f"BOLT_KERNEL({tile.threads}, {tile.blocks})",
            f"KERNEL_NAME({inputs}const unsigned char* packed, int height, int width, int places, int out_height, "
            "int out_width, half* output) {",
            "BOLT_SHARED(shared);",
            f"const Ring<{tile.inner}, {tile.stages}, {tile.places}> stages{{reinterpret_cast<half*>(shared)}};",
            f"unsigned char* const stages_of_weights = shared + {tile.stages * a};",
            "const float* const numbers = reinterpret_cast<const float*>(packed);",
            f"const int begin_of_block = block_x() * {tile.places}, block = block_y();",
            f"const int down = warp() / {tile.across} * {16 * tile.heights};  // first place of this warp",
            f"const int across = warp() % {tile.across};",
            *places.sources(),
            "const auto fetch = [&](int part, int stage) {",
            *places.fetch(),
            f"const unsigned char* from = packed + (int64_t(block) * {self.parts} + part) * {b};",
            f"for (int i = thread(); i < {b // 16}; i += {tile.threads})",
            f"copy_async(stages_of_weights + stage * {b} + 16 * i, from + 16 * i, true);",
            "};",
            "",
            f"float sums[{tile.heights}][{tile.widths}][4];",
            f"begin(sums, numbers + {self.packed.tables[0] // 4} + block * {tile.filters} + "
            f"across * {8 * tile.widths});",
            "BOLT_UNROLL",
            f"for (int part = 0; part < {tile.stages - 1}; ++part) {{",
            f"if (part < {self.parts}) fetch(part, part);",
            "copy_commit();",
            "}",
            "BOLT_LOOP",
            f"for (int part = 0; part < {self.parts}; ++part) {{",
            f"copy_wait<{tile.stages - 2}>();",
            "barrier();",
            f"const int next = part + {tile.stages - 1};",
            f"if (next < {self.parts}) fetch(next, next % {tile.stages});",
            "copy_commit();",
            f"const unsigned char* from = stages_of_weights + part % {tile.stages} * {b};",
            f"product(sums, stages, part % {tile.stages}, down, reinterpret_cast<const Words2*>(from) + across * "
            f"{32 * tile.widths}, {tile.widths * tile.across});",
            "}",
            "barrier();  // stages are free for results",
            *(self._second() if self.is_pair else []),
            *self._sums(len(self.region.layers) - 1).out(
                places=tile.places, threads=tile.threads, start=self._first_bytes
            ),
        ]
        return indented([*lines, "}", ""])

    def _second(self) -> list[str]:
        """The product of the first one's results."""
        tile, first = self.tile, self._sums(0)
        weights = f"reinterpret_cast<const Words2*>(packed + {self.packed.weights[1]})"
        lines = first.epilogue()
        if tile.second == "shared":
            ring = f"Ring<{tile.filters}, 1, {tile.places}>"
            lines = [f"const {ring} first{{reinterpret_cast<half*>(shared)}};", *lines, *first.into_ring("first")]
            lines.append("barrier();")
        else:
            lines += ["sums[i][tile][2 * side] = a, sums[i][tile][2 * side + 1] = b;", *["}"] * 3]
        lines += [
            f"float others[{tile.heights}][{self.second_widths}][4];",
            f"begin(others, numbers + {self.packed.tables[1] // 4} + across * {8 * self.second_widths});",
        ]
        if tile.second == "shared":
            return [
                *lines,
                f"product_of_shared(others, first, down, {weights} + across * {32 * self.second_widths}, "
                f"{self.second_widths * tile.across});",
            ]
        return [*lines, f"product_of_registers(others, sums, {weights});"]


def candidates(region: Region, arch: Architecture) -> Iterator[Tile]:
    """Parameters that fit into registers and shared memory, and do not compute much more than is asked for."""
    first, last, is_pair = region.layers[0], region.layers[-1], len(region.layers) == 2
    inner_axis = prod(first.weights.shape[:3])
    for heights, widths, down, across in product((1, 2, 4), (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8), (1, 2, 4)):
        filters = 8 * widths * across
        second = ceil(last.filters / 8 / across) if is_pair else 0
        if not 64 <= 32 * down * across <= 512 or heights * (widths + second) > 32:
            continue
        if filters - 8 >= up(first.filters, 16 if is_pair else 8):
            continue
        for inner, stages, place in product((16, 32, 64), (2, 3, 4), ("registers", "shared")):
            if inner > up(inner_axis, 16) or (not is_pair and place == "shared"):
                continue
            tile = Tile(heights, widths, down, across, inner, stages, 1, place)  # type: ignore[arg-type]
            if _misfit(region, tile) or tile.places * inner // 8 % tile.threads:
                continue
            shared = _Writer(region, tile).shared_bytes if is_pair else _stages(tile)
            sums = 4 * heights * (widths + second)
            # Beside its sums a thread needs 50 registers at the very least, and makes good use of 90.
            if arch.holds(shared) and (sums + 50) * tile.threads <= arch.registers:
                registers = sums + 90
                at_once = min(
                    (arch.shared_bytes + 1024) // (shared + 1024), arch.registers // (registers * tile.threads), 4
                )
                yield replace(tile, blocks=max(at_once, 1))


def _stages(tile: Tile) -> int:
    return max(tile.stages * 2 * tile.inner * (tile.places + tile.filters), 2 * tile.places * tile.filters)


def seconds(region: Region, tile: Tile, arch: Architecture, n: int, height: int, width: int) -> float:
    """How long a launch takes, by an estimate: see `Architecture.seconds`."""
    grid, (places, *_) = launch(_rule(region, tile), n, height, width, arch.processors)
    first, last = region.layers[0], region.layers[-1]
    inner_axis = prod(first.weights.shape[:3])
    steps, warps = ceil(inner_axis / tile.inner) * tile.inner // 16, tile.down * tile.across
    products = warps * steps * tile.heights * tile.widths
    shared = steps * (warps * (512 * tile.heights + 256 * tile.widths) + 32 * (tile.places + tile.filters))
    if len(region.layers) == 2:
        products += warps * ceil(tile.filters / 16) * tile.heights * ceil(last.filters / 8 / tile.across)
        shared += 4 * tile.places * tile.filters if tile.second == "shared" else 0
    numbers = n * height * width * region.channels[0] + places * (sum(region.channels[1:]) + last.filters)
    weights = sum(layer.weights.size for layer in region.layers)
    found = arch.seconds(
        blocks=prod(grid),
        at_once=tile.blocks,
        products=products,
        shared=float(shared),
        memory=2.0 * (numbers + weights),
        cache=float(places * grid[1] * implicit.fetched(first) + prod(grid) * steps * 32 * tile.filters),
        barriers=ceil(inner_axis / tile.inner) + 4,
    )
    waited, issued = one_by_one(region, tile, arch, places)
    return max(found + issued / 2, waited)


def one_by_one(region: Region, tile: Tile, arch: Architecture, places: int) -> tuple[float, float]:
    """Seconds for numbers that move one by one, since 16 bytes would hold another place's.

    Their loads and stores at least are waited for; at most all instructions for them come on top of everything else.
    """
    first, last = region.layers[0], region.layers[-1]
    loads = stores = 0
    if first.channels % 8:
        across = ceil(first.filters / tile.filters) if len(region.layers) == 1 else 1
        loads = places * across * ceil(prod(first.weights.shape[:3]) / tile.inner) * tile.inner
    if last.filters % 8 and region.shuffle == 1:
        stores = places * last.filters
    waited = arch.launch if loads + stores else 0.0
    waited += (loads + stores) / (LOADS_PER_CYCLE * arch.processors * arch.clock)
    return waited, (FETCH * loads + STORE * stores) / (arch.lanes * arch.processors * arch.clock)

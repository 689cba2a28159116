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
from keras_efficient.export.bolt.region import Add, Layer, Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates.epilogue import activation
from keras_efficient.export.bolt.templates.packing import Packed, fragments, table, up

__all__ = ["Tile", "candidates", "emit", "refusal", "seconds"]


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
    return None


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
    def _out_columns(self) -> int:
        return self.columns[1] if self.is_pair else self.tile.filters

    @property
    def _first_bytes(self) -> int:
        """Of a pair's first product, where it is kept in shared memory."""
        return 2 * self.tile.places * self.tile.filters if self.is_pair and self.tile.second == "shared" else 0

    @property
    def shared_bytes(self) -> int:
        out = 2 * self.tile.places * self._out_columns if self.region.shuffle == 1 else 0
        return max(self.tile.stages * sum(self._stage_bytes), self._first_bytes + out)

    def text(self) -> str:
        tile = self.tile
        inputs = "".join(f"const half* input_{one}, " for one in range(self.inputs))
        a, b = self._stage_bytes
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
            *self._sources(),
            "const auto fetch = [&](int part, int stage) {",
            *self._fetch_places(),
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
        ]
        lines += self._second() if self.is_pair else self._results(0, "sums", tile.widths, "block")
        return indented([*lines, "}", ""])

    def _sources(self) -> list[str]:
        """Where the places are that this thread fetches: of one chunk of every part."""
        tile, layer = self.tile, self.first
        chunks = tile.inner // 8
        self.fetched = tile.places * chunks // tile.threads
        if tile.places * chunks % tile.threads:
            raise UnsupportedLayer("region", f"no tiles: {tile} shares places out unevenly.")
        top, left, _, _ = layer.padding
        is_plain = layer.kernel == (1, 1) and layer.stride == (1, 1) and not any(layer.padding)
        self.is_plain = is_plain
        lines = [f"const int chunk = thread() % {chunks};", f"int64_t sources[{self.fetched}];"]
        lines += [] if is_plain else [f"int rows[{self.fetched}], columns[{self.fetched}];"]
        lines += [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self.fetched}; ++i) {{",
            f"const int place = begin_of_block + thread() / {chunks} + i * {tile.threads // chunks};",
        ]
        if is_plain:
            return [*lines, "sources[i] = place < places ? int64_t(place) : int64_t(-1);", "}"]
        return [
            *lines,
            "const int x = place % out_width, y = place / out_width % out_height, n = place / out_width / out_height;",
            # Of a place that there is not, no row is inside of the image.
            f"rows[i] = place < places ? y * {layer.stride[0]} - {top} : -(1 << 28);",
            f"columns[i] = x * {layer.stride[1]} - {left};",
            "sources[i] = (int64_t(n) * height + rows[i]) * width + columns[i];",
            "}",
        ]

    def _fetch_places(self) -> list[str]:
        tile, layer = self.tile, self.first
        chunks, channels = tile.inner // 8, layer.channels
        to = f"stages.row(stage) + stages.place(thread() / {chunks} + i * {tile.threads // chunks}, chunk)"
        loop = ["BOLT_UNROLL", f"for (int i = 0; i < {self.fetched}; ++i) {{"]
        if channels % 8 == 0:
            own = channels // 8
            total = layer.kernel[0] * layer.kernel[1] * own
            lines = [f"const int inner = part * {chunks} + chunk;"]
            tap, channel = ("0", "inner * 8") if self.is_plain else (f"inner / {own}", f"inner % {own} * 8")
            lines += [f"const int channel = {channel};"]
            there = f"inner < {total} && sources[i] >= 0"
            where = f"sources[i] * {channels} + channel"
            if not self.is_plain:
                lines += self._tap(tap)
                there = f"inner < {total} && inside(rows[i] + dy, columns[i] + dx)"
                where = f"(sources[i] + int64_t(dy) * width + dx) * {channels} + channel"
            return [
                *lines,
                *self._inside(),
                *loop,
                f"const bool there = {there};",
                f"copy_async({to}, input_0 + (there ? {where} : 0), there);",
                "}",
            ]
        # Numbers one by one: chunks hold channels of several taps.
        total = layer.kernel[0] * layer.kernel[1] * channels
        lines = [*self._inside(), *loop, "half eight[8];", "BOLT_UNROLL", "for (int k = 0; k < 8; ++k) {"]
        lines += [f"const int inner = part * {tile.inner} + chunk * 8 + k, channel = inner % {channels};"]
        if self.is_plain:
            there, where = f"inner < {total} && sources[i] >= 0", f"sources[i] * {channels} + channel"
        else:
            lines += self._tap(f"inner / {channels}")
            there = f"inner < {total} && inside(rows[i] + dy, columns[i] + dx)"
            where = f"(sources[i] + int64_t(dy) * width + dx) * {channels} + channel"
        return [
            *lines,
            f"eight[k] = {there} ? load_global(input_0 + {where}) : to_half(0.0f);",
            "}",
            f"*reinterpret_cast<Words*>({to}) = Words{{join(eight[0], eight[1]), join(eight[2], eight[3]), "
            "join(eight[4], eight[5]), join(eight[6], eight[7])};",
            "}",
        ]

    def _tap(self, tap: str) -> list[str]:
        layer = self.first
        width, (down, right) = layer.kernel[1], layer.dilation
        return [f"const int tap = {tap}, dy = tap / {width} * {down}, dx = tap % {width} * {right};"]

    def _inside(self) -> list[str]:
        if self.is_plain:
            return []
        return [
            "const auto inside = [&](int y, int x) { return y >= 0 && y < height && x >= 0 && x < width; };",
        ]

    def _second(self) -> list[str]:
        tile = self.tile
        weights = f"reinterpret_cast<const Words2*>(packed + {self.packed.weights[1]})"
        columns = 8 * self.second_widths
        lines = self._epilogue(0, "sums", tile.widths, "0")
        if tile.second == "shared":
            ring = f"Ring<{tile.filters}, 1, {tile.places}>"
            lines += [
                "half* to = first.data + first.place(down + 16 * i + 8 * side + lane() / 4, across * "
                f"{tile.widths} + tile) + 2 * (lane() & 3);",
                "*reinterpret_cast<uint32_t*>(to) = pack(a, b);",
                *["}"] * 3,
                "barrier();",
            ]
            lines = [f"const {ring} first{{reinterpret_cast<half*>(shared)}};", *lines]
        else:
            lines += ["sums[i][tile][2 * side] = a, sums[i][tile][2 * side + 1] = b;", *["}"] * 3]
        lines += [
            f"float others[{tile.heights}][{self.second_widths}][4];",
            f"begin(others, numbers + {self.packed.tables[1] // 4} + across * {columns});",
        ]
        if tile.second == "shared":
            lines.append(
                f"product_of_shared(others, first, down, {weights} + across * {32 * self.second_widths}, "
                f"{self.second_widths * tile.across});"
            )
        else:
            lines.append(f"product_of_registers(others, sums, {weights});")
        return lines + self._results(1, "others", self.second_widths, "0")

    def _epilogue(self, number: int, sums: str, widths: int, block: str) -> list[str]:
        """Loops over this thread's pairs of results, left open."""
        layer, columns = self.region.layers[number], self.columns[number]
        per_block = self.tile.filters if number == 0 else columns
        lines = [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self.tile.heights}; ++i) {{",
            "BOLT_UNROLL",
            "for (int side = 0; side < 2; ++side) {",
            "const int place = begin_of_block + down + 16 * i + 8 * side + lane() / 4;",
            "BOLT_UNROLL",
            f"for (int tile = 0; tile < {widths}; ++tile) {{",
            f"float a = {sums}[i][tile][2 * side], b = {sums}[i][tile][2 * side + 1];",
            f"const int filter = {block} * {per_block} + across * {8 * widths} + 8 * tile + 2 * (lane() & 3);",
        ]
        slopes = 0
        for step in layer.steps:
            if isinstance(step, Add):
                lines += self._add(step.value, layer)
                continue
            table = ""
            if step.kind == "prelu":
                slopes += 1
                table = f"numbers + {self.packed.tables[number] // 4 + slopes * columns} + filter"
            lines += activation(step, table)
        return lines

    def _add(self, value: int, layer: Layer) -> list[str]:
        channels = self.region.channels[value]
        if channels == 1:
            one = f"const float one = to_float(load_global(input_{value} + place));"
            return ["if (place < places) {", one, "a += one, b += one;", "}"]
        where = f"input_{value} + int64_t(place) * {channels} + filter"
        if channels % 2 == 0:
            both = f"const uint32_t both = load_global(reinterpret_cast<const uint32_t*>({where}));"
            return [f"if (place < places && filter < {channels}) {{", both, "a += low(both), b += high(both);", "}"]
        return [
            f"if (place < places && filter + {ahead} < {channels}) {name} += to_float(load_global({where} + {ahead}));"
            for name, ahead in (("a", 0), ("b", 1))
        ]

    def _results(self, number: int, sums: str, widths: int, block: str) -> list[str]:
        """The epilogue of the last layer, and its results on their way out."""
        filters, shuffle = self.last.filters, self.region.shuffle
        columns = self._out_columns
        lines = self._epilogue(number, sums, widths, block)
        if shuffle > 1:
            return [*lines, *self._shuffled(filters, shuffle), *["}"] * 3]
        ring = f"Ring<{columns}, 1, {self.tile.places}>"
        start = f"shared + {self._first_bytes}"
        lines = [f"const {ring} results{{reinterpret_cast<half*>({start})}};", *lines]
        lines += [
            "half* to = results.data + results.place(down + 16 * i + 8 * side + lane() / 4, across * "
            f"{widths} + tile) + 2 * (lane() & 3);",
            "*reinterpret_cast<uint32_t*>(to) = pack(a, b);",
            *["}"] * 3,
            "barrier();",
            f"for (int i = thread(); i < {self.tile.places * columns // 8}; i += {self.tile.threads}) {{",
            f"const int chunk = i % {columns // 8}, place = i / {columns // 8};",
            f"const int filter = {block} * {columns} + 8 * chunk;",
            f"if (begin_of_block + place < places && filter < {filters}) {{",
            f"half* to = output + int64_t(begin_of_block + place) * {filters} + filter;",
            "const half* from = results.data + results.place(place, chunk);",
        ]
        if filters % 8 == 0:
            lines.append("*reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from);")
        else:
            lines.append(f"for (int k = 0; k < 8 && filter + k < {filters}; ++k) to[k] = from[k];")
        return [*lines, "}", "}"]

    def _shuffled(self, filters: int, block: int) -> list[str]:
        colours = filters // block**2
        lines = [
            "const int x = place % out_width, y = place / out_width % out_height, n = place / out_width / out_height;"
        ]
        for name, ahead in (("a", 0), ("b", 1)):
            row = f"((int64_t(n) * out_height + y) * {block} + f / {block * colours})"
            pixel = f"({row} * out_width * {block} + int64_t(x) * {block} + f / {colours} % {block})"
            lines.append(
                f"if (const int f = filter + {ahead}; place < places && f < {filters}) "
                f"output[{pixel} * {colours} + f % {colours}] = to_half({name});"
            )
        return lines


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
            if shared <= arch.shared_bytes:
                registers = 4 * heights * (widths + second) + 90
                at_once = min(arch.shared_bytes // (shared + 1024), arch.registers // (registers * tile.threads), 4)
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
    return arch.seconds(
        blocks=prod(grid),
        at_once=tile.blocks,
        products=products,
        shared=float(shared),
        memory=2.0 * (numbers + weights),
        barriers=ceil(inner_axis / tile.inner) + 4,
    )

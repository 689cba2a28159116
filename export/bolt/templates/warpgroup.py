"""Convolutions and products of matrices with many channels, by the products of warpgroups that Hopper has: see
`warpgroup.cuh`. Not verified: it ran on no GPU yet, only on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.grids import geometry, launch
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates import implicit, tile
from keras_efficient.export.bolt.templates.implicit import Places
from keras_efficient.export.bolt.templates.packing import Packed, rows_in_chunks, table, up
from keras_efficient.export.bolt.templates.results import Sums

__all__ = ["Warpgroup", "candidates", "emit", "refusal", "seconds"]

MOST_FILTERS = 256  # of a product of a warpgroup
INNER = 64  # numbers of the inner axis in a stage: rows of 128 bytes, which the products' matrices have


@dataclass(frozen=True)
class Warpgroup:
    """Parameters of the template.

    Attributes:
        heights: of 64 output places that a warpgroup computes.
        widths: of 8 filters that it computes: all of the block's.
        down: warpgroups of a block.
        stages: of the pipeline, of which one is multiplied, one waits to be free, and the others are on their way.
        together: blocks of a cluster: neighbours along the places, who fetch their common weights once.
        blocks: on a multiprocessor at once.
    """

    heights: int = 1
    widths: int = 16
    down: int = 2
    stages: int = 4
    together: int = 1
    blocks: int = 1

    @property
    def places(self) -> int:
        """Of a block's tile."""
        return 64 * self.heights * self.down

    @property
    def filters(self) -> int:
        """Of a block's tile."""
        return 8 * self.widths

    @property
    def threads(self) -> int:
        return 128 * self.down


def refusal(region: Region) -> str | None:
    """Why the template does not serve a region, or `None`."""
    if region.layers[0].channels % 8:
        return "its channels are no multiple of 8"
    return tile.refusal(region)  # it serves the same, of any channels


def _misfit(region: Region, parameters: Warpgroup) -> str | None:
    if parameters.stages < 3 or not 1 <= parameters.widths <= 32:
        return f"there are no products of {parameters}"
    if len(region.layers) == 2:
        first, second = (layer.filters for layer in region.layers)
        if parameters.filters < first or parameters.widths % 2:
            return f"{parameters.filters} filters do not hold all {first} of the first layer, in whole fragments"
        if second > MOST_FILTERS:
            return f"its second layer has more than {MOST_FILTERS} filters"
    return None


def emit(region: Region, parameters: Warpgroup) -> Source:
    """The kernel of a region.

    Raises:
        UnsupportedLayer: the template does not serve it, or not with these parameters.
    """
    reason = refusal(region) or _misfit(region, parameters)
    if reason is not None:
        raise UnsupportedLayer(region.names[-1] if region.names else "region", f"no warpgroups: {reason}.")
    writer = _Writer(region, parameters)
    headers = ("primitives", "epilogue", "strip", "tile", "warpgroup")
    kernel, text = complete("warpgroup", writer.text(), headers)
    return Source(
        text=text,
        kernel=kernel,
        threads=parameters.threads,
        blocks=parameters.blocks,
        shared_bytes=_shared_bytes(region, parameters),
        packed=writer.packed.data,
        rule=_rule(region, parameters),
    )


def _second_widths(region: Region) -> int:
    """Of a pair's second layer: tiles of 8 filters."""
    return ceil(region.layers[1].filters / 8) if len(region.layers) == 2 else 0


def _second_bytes(region: Region, parameters: Warpgroup) -> int:
    """Of a pair's second layer's weights, which wait in shared memory."""
    return 2 * up(parameters.filters, INNER) * 8 * _second_widths(region)


def _shared_bytes(region: Region, parameters: Warpgroup) -> int:
    results = 2 * parameters.places * (8 * _second_widths(region) or parameters.filters)
    stages = parameters.stages * 2 * INNER * (parameters.places + parameters.filters)
    arrivals = 2 * 8 * parameters.stages if parameters.together > 1 else 0
    second = _second_bytes(region, parameters)
    return up(max(stages + second + arrivals, results), 1024)


def _rule(region: Region, parameters: Warpgroup) -> dict[str, Any]:
    layer = region.layers[0]
    across = ceil(layer.filters / parameters.filters)
    channels = max(*region.channels, *(one.filters for one in region.layers))
    sizes = {"places": parameters.places, "across": across, "channels": channels}
    together = {"together": parameters.together} if parameters.together > 1 else {}
    return {"kind": "tile", **sizes, **together, "geometry": geometry(layer)}


def _parts(region: Region) -> int:
    return ceil(prod(region.layers[0].weights.shape[:3]) / INNER)


class _Writer:
    """The part of the source that is the region's own, and its weights."""

    def __init__(self, region: Region, parameters: Warpgroup):
        self.region, self.parameters = region, parameters
        self.layer, self.parts = region.layers[0], _parts(region)
        inner = prod(self.layer.weights.shape[:3])
        matrix = self.layer.weights.reshape(inner, self.layer.filters)
        weights = [rows_in_chunks(matrix, INNER, parameters.filters)]
        self.is_pair, self.second_widths = len(region.layers) == 2, _second_widths(region)
        self.columns = [up(self.layer.filters, parameters.filters)]
        if self.is_pair:
            last = region.layers[1]
            second = np.zeros((parameters.filters, last.filters), np.float32)
            second[: self.layer.filters] = last.weights.reshape(self.layer.filters, last.filters)
            self.columns.append(8 * self.second_widths)
            weights.append(rows_in_chunks(second, INNER, self.columns[1]))
        tables = [table(layer, size) for layer, size in zip(region.layers, self.columns, strict=True)]
        self.packed = Packed(weights, tables)

    def text(self) -> str:
        own, parts = self.parameters, self.parts
        whole = parts // own.stages * own.stages
        inputs = "".join(f"const half* input_{one}, " for one in range(len(self.region.channels)))
        a, b = 2 * own.places * INNER, 2 * own.filters * INNER
        places = Places(self.layer, own.places, INNER, own.threads)
        clustered = own.together > 1
        ahead = own.stages - 2  # stages on their way: of the other two products may not be done
        sums = self._sums(0)
        end, second = own.stages * (a + b), _second_bytes(self.region, own)
        lines = [
            *dict.fromkeys(_instruction(one) for one in (own.widths, self.second_widths) if one),
            "",
            "using namespace bolt;",
            "",
            f"BOLT_KERNEL({own.threads}, {own.blocks}){f' BOLT_CLUSTER({own.together})' if clustered else ''}",
            f"KERNEL_NAME({inputs}const unsigned char* packed, int height, int width, int places, int out_height, "
            "int out_width, half* output) {",
            "BOLT_SHARED(shared);",
            f"const Ring<{INNER}, {own.stages}, {own.places}> stages{{reinterpret_cast<half*>(shared)}};",
            f"unsigned char* const stages_of_weights = shared + {own.stages * a};",
            "const float* const numbers = reinterpret_cast<const float*>(packed);",
            f"const int begin_of_block = block_x() * {own.places}, block = block_y();",
            f"const int group = warp() / 4 * {64 * own.heights};  // first place of this warpgroup",
            "const int down = group + warp() % 4 * 16;  // and of this warp",
            *places.sources(),
            *(self._begin_arrivals(end + second) if clustered else []),
            "const auto fetch = [&](int part, int stage) {",
            *places.fetch(),
            f"const unsigned char* from = packed + (int64_t(block) * {parts} + part) * {b};",
            *self._fetch_weights(b),
            "};",
            "",
            f"float sums[{own.heights}][{own.widths}][4];",
            f"begin(sums, numbers + {sums.table} + block * {own.filters});",
            *(self._fetch_second(end, second) if self.is_pair else []),
            "BOLT_UNROLL",
            f"for (int part = 0; part < {ahead}; ++part) {{",
            f"if (part < {parts}) fetch(part, part);",
            "copy_commit();",
            "}",
            "const auto turn = [&](int part, int stage) {",
            f"copy_wait<{ahead - 1}>();",
            "publish_copies();",
            "barrier();  // this part is there, and all products but the latest are done",
            *([f"late = late || !arrival_wait(filled + stage, part / {own.stages} & 1);"] * clustered),
            f"begin_product(sums, stages.row(stage) + group * {INNER}, stages_of_weights + stage * {b});",
            f"if (part + {ahead} < {parts}) fetch(part + {ahead}, (stage + {ahead}) % {own.stages});",
            "copy_commit();",
            "group_wait<1>();",
            *(self._release() if clustered else []),
            "};",
            # Stages are constants, so that no sums move from one register to another while products are under way.
            "BOLT_LOOP",
            f"for (int part = 0; part < {whole}; part += {own.stages}) {{",
            "BOLT_UNROLL",
            f"for (int stage = 0; stage < {own.stages}; ++stage) turn(part + stage, stage);",
            "}",
            "BOLT_UNROLL",
            f"for (int stage = 0; stage < {parts - whole}; ++stage) turn({whole} + stage, stage);",
            "group_wait<0>();",
            "settle(sums);",
            *(["if (late) spoil(sums);"] * clustered),
            *(self._second() if self.is_pair else []),
            f"{'cluster_' * clustered}barrier();  // stages are free for results",
            *self._sums(len(self.columns) - 1).out(places=own.places, threads=own.threads, start=0),
        ]
        return indented([*lines, "}", ""])

    def _fetch_weights(self, size: int) -> list[str]:
        own = self.parameters
        if own.together > 1:
            to = f"stages_of_weights + stage * {size}"
            return [
                "if (thread() == 0) {",
                # Another block's share must not come where its neighbour still multiplies.
                f"if (part >= {own.stages}) late = late || !arrival_wait(freed + stage, part / {own.stages} - 1 & 1);",
                f"copy_bulk<{own.together}, {size}>({to}, from, filled + stage);",
                "}",
                "warp_barrier();  // products are of whole warps again",
            ]
        return [
            f"for (int i = thread(); i < {size // 16}; i += {own.threads})",
            f"copy_async(stages_of_weights + stage * {size} + 16 * i, from + 16 * i, true);",
        ]

    def _begin_arrivals(self, start: int) -> list[str]:
        """Of each stage: when its weights have come, and when all warpgroups of the cluster are done with them."""
        own = self.parameters
        return [
            f"Arrival* const filled = reinterpret_cast<Arrival*>(shared + {start});",
            f"Arrival* const freed = filled + {own.stages};",
            "if (thread() == 0) {",
            f"for (int stage = 0; stage < {own.stages}; ++stage) {{",
            "arrival_begin(filled + stage, 1);",
            f"arrival_begin(freed + stage, {own.down} * cluster_blocks({own.together}));",
            "}",
            "arrivals_visible();",
            "}",
            "cluster_barrier();",
            "bool late = false;",
        ]

    def _release(self) -> list[str]:
        own = self.parameters
        return [
            "if (part > 0 && thread() % 128 == 0)",
            f"arrival_signal<{own.together}>(freed + (stage + {own.stages - 1}) % {own.stages});",
        ]

    def _fetch_second(self, start: int, size: int) -> list[str]:
        """The second layer's weights, on their way with the first part."""
        return [
            f"unsigned char* const second = shared + {start};",
            f"for (int i = thread(); i < {size // 16}; i += {self.parameters.threads})",
            f"copy_async(second + 16 * i, packed + {self.packed.weights[1]} + 16 * i, true);",
        ]

    def _second(self) -> list[str]:
        """The product of the first one's results."""
        return [
            *self._sums(0).epilogue(),
            "sums[i][tile][2 * side] = a, sums[i][tile][2 * side + 1] = b;",
            *["}"] * 3,
            f"float others[{self.parameters.heights}][{self.second_widths}][4];",
            f"begin(others, numbers + {self.packed.tables[1] // 4});",
            "second_product(others, sums, second);",
        ]

    def _sums(self, number: int) -> Sums:
        own = self.parameters
        return Sums(
            self.region,
            number,
            ("sums", "others")[number],
            heights=own.heights,
            widths=(own.widths, self.second_widths)[number],
            rise=64,
            before="0",
            block="0" if self.is_pair else "block",
            filters=self.columns[1] if number else own.filters,
            columns=self.columns[number],
            table=self.packed.tables[number] // 4,
        )


def _instruction(widths: int) -> str:
    """`multiply_group` of the device, for so many times 8 filters: its operands are counted in its text."""
    count = 4 * widths
    sums = ", ".join(f"%{one}" for one in range(count))
    outputs = ", ".join(f'"+f"(sums[{tile}][{k}])' for tile in range(widths) for k in range(4))
    registers = ", ".join(f"%{count + one}" for one in range(4))
    given = ", ".join(f'"r"(a[{one}])' for one in range(4))
    # Whether A and B are transposed stands last; of A only where it is in shared memory.
    forms = (
        ("uint64_t a", f"%{count}, %{count + 1}, add, 1, 1, 0, 0", '"l"(a), "l"(b)'),
        ("const uint32_t (&a)[4]", f"{{{registers}}}, %{count + 4}, add, 1, 1, 0", f'{given}, "l"(b)'),
    )
    functions = [
        f"""template <>
BOLT_DEVICE void multiply_group<{widths}>(float (&sums)[{widths}][4], {argument}, uint64_t b) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n{8 * widths}k16.f32.f16.f16 {{{sums}}}, {operands}; }}"
        : {outputs}
        : {inputs});
}}"""
        for argument, operands, inputs in forms
    ]
    return "\n".join(["#ifndef BOLT_HOST", "namespace bolt {", *functions, "}  // namespace bolt", "#endif"])


def candidates(region: Region, arch: Architecture) -> Iterator[Warpgroup]:
    """Parameters that fit into registers and shared memory, and do not compute much more than is asked for."""
    if arch.group_cycles is None:
        return
    layer, second = region.layers[0], _second_widths(region)
    tiles = product((1, 2, 4), (4, 8, 12, 16, 24, 32), (1, 2, 3, 4))
    for (heights, widths, down), stages, together in product(tiles, (4, 6, 3), (1, 2, 4)):
        if heights * (widths + second) > (40 if second else 32) or (
            8 * widths - 8 >= up(layer.filters, 8) and widths > 4
        ):
            continue
        if stages > max(_parts(region), 2) + 1:
            continue
        one = Warpgroup(heights, widths, down, stages, together)
        shared = _shared_bytes(region, one)
        if _misfit(region, one) or one.places * INNER // 8 % one.threads or not arch.holds(shared):
            continue
        registers = 4 * heights * (widths + second) + 56
        room = (arch.shared_bytes + 1024) // (shared + 1024)
        at_once = min(room, arch.registers // (registers * one.threads), 4)
        if at_once:
            yield replace(one, blocks=at_once)


def seconds(region: Region, parameters: Warpgroup, arch: Architecture, n: int, height: int, width: int) -> float:
    """How long a launch takes, by an estimate: see `Architecture.seconds`."""
    grid, (places, *_) = launch(_rule(region, parameters), n, height, width, arch.processors)
    layer, last, parts, blocks = region.layers[0], region.layers[-1], _parts(region), prod(grid)
    second, steps = _second_widths(region), ceil(parameters.filters / 16)
    stage = 2 * INNER * (parameters.places + parameters.filters)
    weights = 2 * INNER * parameters.filters / parameters.together
    # Each of a warpgroup's products reads its own places, and all filters.
    read = 2 * INNER * (parameters.places + parameters.heights * parameters.down * parameters.filters)
    numbers = n * height * width * region.channels[0] + places * (sum(region.channels[1:]) + last.filters)
    groups = parameters.heights * parameters.down  # of 64 places
    fetched = parts * weights + _second_bytes(region, parameters)  # by each block
    return arch.seconds(
        blocks=blocks,
        at_once=parameters.blocks,
        products=4.0 * groups * (4 * parts * parameters.widths + steps * second),
        product_cycles=arch.group_cycles,
        shared=float(parts * (read + stage) + groups * steps * 256 * second),
        memory=2.0 * (numbers + sum(one.weights.size for one in region.layers)),
        cache=places * grid[1] * implicit.fetched(layer) + blocks * fetched,
        # Blocks of a cluster wait for each other too.
        barriers=parts * (1 + (parameters.together > 1)) + 4.0,
    )

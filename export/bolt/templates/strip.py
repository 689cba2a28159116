"""Chains of convolutions with few channels, whole networks of them too, as one kernel: see `strip.cuh`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.grids import launch
from keras_efficient.export.bolt.region import Activate, Add, Layer, Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates.epilogue import steps
from keras_efficient.export.bolt.templates.packing import Packed, fragments, fragments_by_tap, table, up

__all__ = ["Plan", "Strip", "candidates", "emit", "refusal", "seconds"]

GATHERED = 64  # taps times channels of a first layer, at most, whose fragments are gathered


@dataclass(frozen=True)
class Strip:
    """Parameters of the template.

    Attributes:
        warps: of a block.
        segments: of 16 pixels that a warp computes; a strip is warps · segments · 16 pixels wide, halo included.
        rows: that each layer computes in a step.
        blocks: on a multiprocessor at once.
        keep: whether weights are copied to shared memory; else they are read through the L1 cache.
    """

    warps: int = 8
    segments: int = 1
    rows: int = 4
    blocks: int = 1
    keep: bool = False

    @property
    def width(self) -> int:
        return 16 * self.warps * self.segments


def refusal(region: Region) -> str | None:
    """Why the template does not serve a region, or `None`."""
    first = region.layers[0]
    if region.rows:
        return "rows of a matrix have no neighbours; another template serves them"
    if not all(layer.is_same and layer.dilation == (1, 1) and not layer.depthwise for layer in region.layers):
        return "a layer strides, dilates, is depthwise or changes the size"
    if first.value != 0 or any(layer.value < len(region.channels) for layer in region.layers[1:]):
        return "another layer than the first one reads the region's input"
    read = {layer.value for layer in region.layers} | {one for layer in region.layers for one in _added(layer)}
    if not set(range(len(region.channels), len(region.channels) + len(region.layers) - 1)) <= read:
        return "a layer's output is read by nothing"
    if first.channels % 8 and prod(first.weights.shape[:3]) > GATHERED:
        return f"the first layer has {first.channels} channels, no multiple of 8, and more than {GATHERED} taps"
    return None


class Plan:
    """Where everything is: which rows a layer computes when, how long they are kept, and what lies beside a strip.

    Rows are numbered from a moving base, which goes down by `rows` at each step.

    Attributes:
        gathers: whether the first layer gathers its fragments.
        offsets: of each value, from the base to the first row that is computed (or loaded) in a step; ≤ 0.
        reach: of each value, (vertical, horizontal): how far beyond an output place it must be right.
        rings: of each value that is kept, (rows, columns of padding on either side, channels).
    """

    def __init__(self, region: Region, strip: Strip):
        self.region, self.strip = region, strip
        inputs = len(region.channels)
        self.gathers = bool(region.layers[0].channels % 8)
        self.offsets, self.reach, radii = {0: 0}, {inputs + len(region.layers) - 1: (0, 0)}, {}
        for number, layer in enumerate(region.layers):
            value = inputs + number
            radii[value] = (layer.kernel[0] // 2, layer.kernel[1] // 2)
            fresh = 0 if value == inputs and self.gathers else radii[value][0]
            added = [self.offsets[one] for one in _added(layer) if one >= inputs]
            self.offsets[value] = min([self.offsets[layer.value] - fresh, *added])
        for number in reversed(range(len(region.layers))):
            layer, value = region.layers[number], inputs + number
            here = self.reach.setdefault(value, (0, 0))
            wanted = [(layer.value, radii[value]), *((one, (0, 0)) for one in _added(layer) if one >= inputs)]
            for other, (down, beside) in wanted:
                before = self.reach.get(other, (0, 0))
                self.reach[other] = (max(before[0], here[0] + down), max(before[1], here[1] + beside))
        self.rings: dict[int, tuple[int, int, int]] = {}
        for number, layer in enumerate(region.layers):
            value = inputs + number
            down, beside = radii[value]
            if not (value == inputs and self.gathers):
                self._keep(layer.value, self.offsets[value] - down, beside)
            for one in _added(layer):
                if one >= inputs:
                    self._keep(one, self.offsets[value], 0)
        self.radii = radii

    def _keep(self, value: int, oldest: int, beside: int) -> None:
        """A value is read from its row `oldest` on, with so many columns beside it."""
        rows = self.offsets[value] + self.strip.rows - oldest
        rows += self.strip.rows if value == 0 else 0  # into which the next step's are copied meanwhile
        before = self.rings.get(value, (0, 0, 0))
        channels = self.region.channels[0] if value == 0 else self.layer(value).filters
        self.rings[value] = (max(before[0], rows), max(before[1], beside), up(channels, 16))

    def layer(self, value: int) -> Layer:
        return self.region.layers[value - len(self.region.channels)]

    def together(self, number: int) -> int:
        """Rows of a layer's output that one tile of 8 filters has side by side: two of a last layer of few filters.

        Their kernels, one above the other, are one that is a row taller: of K rows, two take K + 1 products, not 2 K.
        """
        few = number == len(self.region.layers) - 1 and self.region.layers[number].filters <= 4
        return 2 if few and self.strip.rows % 2 == 0 and not (number == 0 and self.gathers) else 1

    @property
    def first(self) -> int:
        """The value whose rows begin at the base: the first layer's where it gathers, else the input."""
        return len(self.region.channels) if self.gathers else 0

    @property
    def last(self) -> int:
        return len(self.region.channels) + len(self.region.layers) - 1

    @property
    def halo(self) -> int:
        """Columns on either side of a strip that its neighbours compute too."""
        return self.reach[self.first][1]

    @property
    def useful(self) -> int:
        """Columns of a strip that it gives."""
        return self.strip.width - 2 * self.halo

    @property
    def extra(self) -> int:
        """Rows of steps beyond those that a strip gives."""
        return self.reach[self.first][0] - self.offsets[self.last]

    @property
    def raw(self) -> tuple[int, int]:
        """Rows, and numbers in a row, of the input of a gathering layer for one step."""
        layer = self.region.layers[0]
        down, beside = self.radii[len(self.region.channels)]
        return self.strip.rows + 2 * down, (self.strip.width + 2 * beside) * layer.channels

    @property
    def ring_bytes(self) -> dict[int, int]:
        width = self.strip.width
        return {value: 2 * rows * (width + 2 * pad) * channels for value, (rows, pad, channels) in self.rings.items()}

    @property
    def shared_bytes(self) -> int:
        weights = _packed(self).weight_bytes if self.strip.keep else 0
        raw = up(2 * 2 * prod(self.raw), 128) if self.gathers else 0
        return sum(self.ring_bytes.values()) + weights + raw


def emit(region: Region, strip: Strip) -> Source:
    """The kernel of a region.

    Raises:
        UnsupportedLayer: the template does not serve it, or a strip is too narrow for its halo.
    """
    reason = refusal(region)
    if reason is not None:
        raise UnsupportedLayer(region.names[-1] if region.names else "region", f"no strips: {reason}.")
    plan = Plan(region, strip)
    if plan.useful < 16:
        raise UnsupportedLayer("region", f"strips of {strip.width} columns have a halo of {plan.halo} on either side.")
    packed = _packed(plan)
    kernel, text = complete("strip", _Writer(plan, packed).text(), ("primitives", "epilogue", "strip"))
    return Source(
        text=text,
        kernel=kernel,
        threads=32 * strip.warps,
        blocks=strip.blocks,
        shared_bytes=plan.shared_bytes,
        packed=packed.data,
        rule=_rule(plan),
    )


def _rule(plan: Plan) -> dict[str, Any]:
    strip = plan.strip
    sizes = {"useful": plan.useful, "extra": plan.extra, "rows": strip.rows, "blocks": strip.blocks}
    channels = max(*plan.region.channels, *(layer.filters for layer in plan.region.layers))
    return {"kind": "strip", **sizes, "channels": channels}


def _added(layer: Layer) -> list[int]:
    return [step.value for step in layer.steps if isinstance(step, Add)]


def _packed(plan: Plan) -> Packed:
    weights, layers = [], list(plan.region.layers)
    for number, layer in enumerate(plan.region.layers):
        if number == 0 and plan.gathers:
            matrix = layer.weights.reshape(-1, layer.filters)
            weights.append(fragments(matrix, up(layer.filters, 8)))
        elif plan.together(number) == 2:
            layer = layers[number] = _two_rows(layer)
            weights.append(fragments_by_tap(layer.weights))
        else:
            weights.append(fragments_by_tap(layer.weights))
    return Packed(weights, [table(layer, up(layer.filters, 8)) for layer in layers])


def _two_rows(layer: Layer) -> Layer:
    """A layer of 8 filters that computes two rows of one with up to 4; the lower row's weights are a row down."""
    tall, wide, channels, filters = layer.weights.shape
    weights = np.zeros((tall + 1, wide, channels, 8), np.float32)
    weights[:tall, ..., :filters], weights[1:, ..., 4 : 4 + filters] = layer.weights, layer.weights

    def twice(values: np.ndarray) -> np.ndarray:
        return np.tile(np.pad(np.broadcast_to(values, (filters,)), (0, 4 - filters)), 2)

    steps = tuple(
        replace(step, slopes=twice(step.slopes)) if isinstance(step, Activate) and step.slopes is not None else step
        for step in layer.steps
    )
    return replace(layer, weights=weights, bias=twice(layer.bias), steps=steps)


class _Writer:
    """The part of the source that is the region's own."""

    def __init__(self, plan: Plan, packed: Packed):
        self.plan, self.region, self.strip, self.packed = plan, plan.region, plan.strip, packed
        self.inputs = len(plan.region.channels)

    def text(self) -> str:
        inputs = "".join(f"const half* input_{one}, " for one in range(self.inputs))
        threads = 32 * self.strip.warps
        lines = [
            "using namespace bolt;",
            "",
            f"BOLT_KERNEL({threads}, {self.strip.blocks})",
            f"KERNEL_NAME({inputs}const unsigned char* packed, int height, int width, int band, half* output) {{",
            "BOLT_SHARED(shared);",
            *self._rings(),
            f"const int left = block_x() * {self.plan.useful} - {self.plan.halo};  // column 0 of the strip",
            "const int top = block_y() * band, bottom = top + band < height ? top + band : height;",
            "const int64_t image = int64_t(block_z()) * height * width;",
            f"const int column = warp() * {16 * self.strip.segments};  // first one of this warp",
            *self._clear(),
            *self._keep(),
            *self._prepare(),
            f"const int steps = (bottom - top + {self.plan.extra + self.strip.rows - 1}) / {self.strip.rows};",
            "BOLT_LOOP",
            "for (int step = 0; step < steps; ++step) {",
            f"const int base = top - {self.plan.reach[self.plan.first][0]} + step * {self.strip.rows};",
            *self._fetch(),
        ]
        for number in range(len(self.region.layers)):
            lines += self._layer(number)
        lines += [*self._advance(), "}", "}", ""]
        return indented(lines)

    def _rings(self) -> list[str]:
        lines, place = [], 0
        for value, (rows, pad, channels) in self.plan.rings.items():
            kind = f"Ring<{channels}, {rows}, {self.strip.width + 2 * pad}>"
            lines.append(f"const {kind} ring_{value}{{reinterpret_cast<half*>(shared + {place})}};")
            lines.append(f"int at_{value} = 0;  // slot of the first row of this step")
            place += self.plan.ring_bytes[value]
        if self.plan.gathers:
            lines.append(f"half* const raw = reinterpret_cast<half*>(shared + {place});")
            place += up(4 * prod(self.plan.raw), 128)
        source = f"shared + {place}" if self.strip.keep else "packed"
        lines.append(f"const unsigned char* const weights = {source};")
        lines.append("const float* const numbers = reinterpret_cast<const float*>(packed);")
        return lines

    def _clear(self) -> list[str]:
        """What no layer writes is 0, not what was there: columns beside a strip, and channels behind the last one."""
        lines = []
        for value, (rows, pad, channels) in self.plan.rings.items():
            columns = self.strip.width + 2 * pad
            filters = channels if value == 0 else up(self.plan.layer(value).filters, 8)
            if value == 0:
                continue  # copied whole
            chunks = channels // 8
            if filters < channels:
                lines += [
                    f"for (int i = thread(); i < {rows * columns * chunks}; i += {32 * self.strip.warps})",
                    f"reinterpret_cast<Words*>(ring_{value}.data)[i] = Words{{0, 0, 0, 0}};",
                ]
            elif pad:
                lines += [
                    f"for (int i = thread(); i < {rows * 2 * pad * chunks}; i += {32 * self.strip.warps}) {{",
                    f"const int row = i / {2 * pad * chunks}, chunk = i % {chunks};",
                    f"int side = i / {chunks} % {2 * pad};",
                    f"side = side < {pad} ? side : side + {self.strip.width};",
                    f"reinterpret_cast<Words*>(ring_{value}.row(row))[side * {chunks} + chunk] = Words{{0, 0, 0, 0}};",
                    "}",
                ]
        return lines

    def _keep(self) -> list[str]:
        if not self.strip.keep:
            return []
        return [
            f"for (int i = thread(); i < {self.packed.weight_bytes // 16}; i += {32 * self.strip.warps})",
            "reinterpret_cast<Words*>(const_cast<unsigned char*>(weights))[i] = "
            "load_global(reinterpret_cast<const Words*>(packed) + i);",
        ]

    def _prepare(self) -> list[str]:
        """The input of the first step."""
        if not self.plan.gathers:
            return ["{", f"const int base = top - {self.plan.reach[0][0]};", *self._copies(0), "copy_commit();", "}",
                    "copy_wait<0>();", "barrier();"]  # fmt: skip
        layer = self.region.layers[0]
        taps, line = prod(layer.weights.shape[:3]), self.plan.raw[1]
        row = layer.kernel[1] * layer.channels
        steps = up(taps, 16) // 16
        return [
            f"int taps[{4 * steps}];",
            "BOLT_UNROLL",
            f"for (int i = 0; i < {4 * steps}; ++i) {{",
            "const int k = i / 4 * 16 + (i / 2 % 2) * 8 + (lane() & 3) * 2 + i % 2;",
            f"taps[i] = k < {taps} ? k / {row} * {line} + k % {row} : 0;",
            "}",
            f"half staged[{self._staged}];",
            "{",
            f"const int base = top - {self.plan.reach[self.inputs][0]};",
            *self._stage(0),
            *self._unstage("raw"),
            "}",
            "barrier();",
        ]

    @property
    def _staged(self) -> int:
        return ceil(prod(self.plan.raw) / (32 * self.strip.warps))

    def _stage(self, ahead: int) -> list[str]:
        """The rows of a gathering layer's input into registers."""
        layer = self.region.layers[0]
        down, beside = self.plan.radii[self.inputs]
        rows, line = self.plan.raw
        channels = layer.channels
        return [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self._staged}; ++i) {{",
            f"const int place = thread() + i * {32 * self.strip.warps}, row = place / {line}, number = place % {line};",
            f"const int y = base + row - {down - ahead}, x = left - {beside} + number / {channels};",
            f"const bool there = place < {rows * line} && y >= 0 && y < height && x >= 0 && x < width;",
            f"const int64_t from = (image + int64_t(y) * width + x) * {channels} + number % {channels};",
            "staged[i] = there ? load_global(input_0 + from) : to_half(0.0f);",
            "}",
        ]

    def _unstage(self, raw: str) -> list[str]:
        rows, line = self.plan.raw
        return [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self._staged}; ++i) {{",
            f"const int place = thread() + i * {32 * self.strip.warps};",
            f"if (place < {rows * line}) ({raw})[place] = staged[i];",
            "}",
        ]

    def _copies(self, ahead: int) -> list[str]:
        """Rows of the input on their way into its ring."""
        rows, pad, channels = self.plan.rings[0]
        columns, chunks, given = self.strip.width + 2 * pad, channels // 8, self.region.channels[0]
        return [
            f"for (int i = thread(); i < {self.strip.rows * columns * chunks}; i += {32 * self.strip.warps}) {{",
            f"const int chunk = i % {chunks}, place = i / {chunks} % {columns}, row = i / {chunks * columns};",
            f"const int y = base + row + {ahead}, x = left - {pad} + place;",
            f"const bool there = y >= 0 && y < height && x >= 0 && x < width && chunk < {given // 8};",
            f"const int64_t from = there ? (image + int64_t(y) * width + x) * {given} + chunk * 8 : 0;",
            f"copy_async(ring_0.row(wrapped(at_0 + row + {ahead}, {rows})) + ring_0.place(place, chunk), "
            "input_0 + from, there);",
            "}",
        ]

    def _fetch(self) -> list[str]:
        """The next step's input, on its way while this one is computed."""
        if self.plan.gathers:
            return self._stage(self.strip.rows)
        return [*self._copies(self.strip.rows), "copy_commit();"]

    def _advance(self) -> list[str]:
        lines = []
        if self.plan.gathers:
            lines += self._unstage(f"raw + (step + 1) % 2 * {prod(self.plan.raw)}")
        else:
            lines += ["copy_wait<0>();"]
        lines += [
            f"at_{value} = wrapped(at_{value} + {self.strip.rows}, {rows});"
            for value, (rows, _, _) in self.plan.rings.items()
        ]
        return [*lines, "barrier();"]

    def _layer(self, number: int) -> list[str]:
        layer, value = self.region.layers[number], self.inputs + number
        rows, segments, tiles = self.strip.rows, self.strip.segments, up(layer.filters, 8) // 8
        offset, reach = self.plan.offsets[value], self.plan.reach[value][0]
        together = self.plan.together(number)
        fragments = f"reinterpret_cast<const Words2*>(weights + {self.packed.weights[number]})"
        lines = [
            f"// Layer {number}: {layer.kernel[0]}×{layer.kernel[1]}, {layer.channels} to {layer.filters}.",
            f"if (const int first = base - {-offset}; first + {rows} > top - {reach} && first < bottom + {reach}) {{",
            f"float sums[{rows // together}][{segments}][{tiles}][4];",
            f"begin(sums, numbers + {self.packed.tables[number] // 4});",
        ]
        if number == 0 and self.plan.gathers:
            steps = up(prod(layer.weights.shape[:3]), 16) // 16
            lines.append(
                f"gather<{steps}>(sums, raw + step % 2 * {prod(self.plan.raw)}, {self.plan.raw[1]}, {layer.channels}, "
                f"column, taps, {fragments});"
            )
        else:
            down, beside = self.plan.radii[value]
            ring_rows, pad, _ = self.plan.rings[layer.value]
            back = self.plan.offsets[layer.value] - offset + down
            lines.append(
                f"sweep<{layer.kernel[0] + together - 1}, {layer.kernel[1]}, {together}>(sums, ring_{layer.value}, "
                f"wrapped(at_{layer.value} - {back}, {ring_rows}), column + {pad - beside}, {fragments});"
            )
        return [*lines, *self._epilogue(number), "}", *(["barrier();"] if value != self.plan.last else [])]

    def _epilogue(self, number: int) -> list[str]:
        layer, value = self.region.layers[number], self.inputs + number
        is_last = value == self.plan.last
        tiles, together = up(layer.filters, 8) // 8, self.plan.together(number)
        lines = [
            "BOLT_UNROLL",
            f"for (int at = 0; at < {self.strip.rows // together}; ++at) {{",
            f"const int row = {'at' if together == 1 else '2 * at + (lane() >> 1 & 1)'}, y = first + row;",
            "BOLT_UNROLL",
            f"for (int part = 0; part < {2 * self.strip.segments}; ++part) {{",
            "const int place = column + 8 * part + lane() / 4, x = left + place;",
            "const bool there = y >= 0 && y < height && x >= 0 && x < width;",
        ]
        if is_last:
            inside = f"place >= {self.plan.halo} && place < {self.strip.width - self.plan.halo}"
            lines.append(f"const bool mine = there && y >= top && y < bottom && {inside};")
        lines += [
            "BOLT_UNROLL",
            f"for (int tile = 0; tile < {tiles}; ++tile) {{",
            "float a = sums[at][part / 2][tile][part % 2 * 2], b = sums[at][part / 2][tile][part % 2 * 2 + 1];",
            f"const int filter = 8 * tile + 2 * (lane() & {3 // together});",
        ]
        table = self.packed.tables[number] // 4
        lines += steps(
            layer,
            lambda other: self._add(other, value),
            lambda row: f"numbers + {table + row * 8 * tiles} + filter",
        )
        lines += self._store(layer) if is_last else self._into_ring(value)
        if value == self.plan.last and value in self.plan.rings:
            raise AssertionError("The last value is read by nothing.")
        return [*lines, "}", "}", "}"]

    def _add(self, other: int, value: int) -> list[str]:
        filters = self.plan.layer(value).filters
        if other >= self.inputs:
            rows, pad, _ = self.plan.rings[other]
            back = self.plan.offsets[other] - self.plan.offsets[value]
            if self.plan.layer(other).filters == 1 < filters:  # one number for all filters
                line = f"ring_{other}.row(wrapped(wrapped(at_{other} - {back}, {rows}) + row, {rows}))"
                one = f"const float one = to_float({line}[ring_{other}.place(place + {pad}, 0)]);"
                return ["{", one, "a += one, b += one;", "}"]
            return [
                "{",
                f"const half* from = ring_{other}.row(wrapped(wrapped(at_{other} - {back}, {rows}) + row, {rows})) + "
                f"ring_{other}.place(place + {pad}, tile) + filter % 8;",
                "const uint32_t both = *reinterpret_cast<const uint32_t*>(from);",
                "a += low(both), b += high(both);",
                "}",
            ]
        guard = "mine" if value == self.plan.last else "there"
        channels = self.region.channels[other]
        where = f"input_{other} + (image + int64_t(y) * width + x)"
        if channels == 1:
            lines = [f"const float one = to_float(load_global({where}));", "a += one, b += one;"]
            return [f"if ({guard}) {{", *lines, "}"]
        lines = []
        for name, ahead in (("a", 0), ("b", 1)):
            limit = f" && filter + {ahead} < {filters}" if filters % 8 else ""
            lines.append(
                f"if ({guard}{limit}) {name} += to_float(load_global({where} * {channels} + filter + {ahead}));"
            )
        return lines

    def _into_ring(self, value: int) -> list[str]:
        rows, pad, _ = self.plan.rings[value]
        return [
            f"half* to = ring_{value}.row(wrapped(at_{value} + row, {rows})) + "
            f"ring_{value}.place(place + {pad}, tile) + 2 * (lane() & 3);",
            # Outside of the image a layer's input is 0, not what the layer before would give there.
            "*reinterpret_cast<uint32_t*>(to) = there ? pack(a, b) : 0u;",
        ]

    def _store(self, layer: Layer) -> list[str]:
        block = self.region.shuffle
        colours = layer.filters // block**2
        row = f"((int64_t(block_z()) * height + y) * {block} + f / {block * colours})"
        pixel = f"({row} * width * {block} + int64_t(x) * {block} + f / {colours} % {block})"
        place = f"{pixel} * {colours} + f % {colours}"
        if layer.filters % 2 == 0 and (block * colours) % 2 == 0:
            return [
                f"if (const int f = filter; mine && f < {layer.filters})",
                f"*reinterpret_cast<uint32_t*>(output + {place}) = pack(a, b);",
            ]
        return [
            f"if (const int f = filter; mine && f < {layer.filters}) output[{place}] = to_half(a);",
            f"if (const int f = filter + 1; mine && f < {layer.filters}) output[{place}] = to_half(b);",
        ]


def candidates(region: Region, arch: Architecture) -> Iterator[Strip]:
    """Parameters that fit into shared memory."""
    shapes = product(range(3, 17), (1, 2), (1, 2, 3, 4, 6), (1, 2, 3, 4), (False, True))
    for warps, segments, rows, blocks, keep in shapes:
        strip = Strip(warps, segments, rows, blocks, keep)
        most = max(up(layer.filters, 8) // 8 for layer in region.layers)
        registers = 4 * rows * segments * most + max(2 * layer.kernel[0] for layer in region.layers) * most
        if registers > 160 or 32 * warps * blocks > 2048 or registers * 32 * warps * blocks > arch.registers:
            continue
        plan = Plan(region, strip)
        if plan.useful >= 16 and arch.holds(plan.shared_bytes, blocks):
            yield strip


def seconds(region: Region, strip: Strip, arch: Architecture, n: int, height: int, width: int) -> float:
    """How long a launch takes, by an estimate: see `Architecture.seconds`."""
    plan = Plan(region, strip)
    grid, (band,) = launch(_rule(plan), n, height, width, arch.processors)
    rows, segments = strip.rows, strip.warps * strip.segments
    products = shared = 0.0
    for number, layer in enumerate(region.layers):
        tall, wide, channels, filters = layer.weights.shape
        tiles, together, computed = up(filters, 8) // 8, plan.together(number), rows
        steps = ceil((band + 2 * plan.reach[len(region.channels) + number][0]) / rows)
        if number == 0 and plan.gathers:
            inner = up(tall * wide * channels, 16) // 16
            reads, weights = rows * inner * 8 * arch.shared_rate, inner * tiles * 256
        else:
            inner = tall * wide * up(channels, 16) // 16
            reads = (rows + tall - 1) * inner // tall * 512
            inner, computed = inner // tall * (tall + together - 1), rows // together
            weights = inner * tiles * 256
        products += steps * computed * segments * inner * tiles
        shared += steps * (segments * (reads + computed * tiles * 256) + strip.warps * weights)
    places = n * height * width
    # Warps are shared out among a multiprocessor's quarters.
    uneven = ceil(strip.warps * strip.blocks / 4) * 4 / (strip.warps * strip.blocks)
    return arch.seconds(
        blocks=prod(grid),
        at_once=strip.blocks,
        products=products * uneven,
        shared=shared,
        memory=2.0 * places * (sum(region.channels) + region.layers[-1].filters),
        barriers=ceil((band + plan.extra) / rows) * (len(region.layers) + 1),
    )

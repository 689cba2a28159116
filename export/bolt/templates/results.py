"""What is done with a warp's sums of a large product, and how they get into memory."""

from __future__ import annotations

from dataclasses import dataclass

from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.templates.epilogue import steps

__all__ = ["Sums"]


@dataclass(frozen=True)
class Sums:
    """A warp's sums in registers: fragments of 16 places × 8 filters, as `multiply` of primitives.cuh leaves them.

    Attributes:
        region: what is computed.
        number: of the layer whose sums these are.
        name: of the array [heights][widths][4].
        heights, widths: fragments.
        rise: places from one height's first to the next one's.
        before: an expression: fragments of other warps that are left of these.
        block: an expression: the number of the block of filters.
        filters: of a block.
        columns: of the layer's table.
        table: where that begins, in floats.
    """

    region: Region
    number: int
    name: str
    heights: int
    widths: int
    rise: int
    before: str
    block: str
    filters: int
    columns: int
    table: int

    def epilogue(self) -> list[str]:
        """Loops over this thread's pairs of results, `a` and `b`, left open: three braces."""
        lines = [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self.heights}; ++i) {{",
            "BOLT_UNROLL",
            "for (int side = 0; side < 2; ++side) {",
            f"const int place = begin_of_block + down + {self.rise} * i + 8 * side + lane() / 4;",
            "BOLT_UNROLL",
            f"for (int tile = 0; tile < {self.widths}; ++tile) {{",
            f"float a = {self.name}[i][tile][2 * side], b = {self.name}[i][tile][2 * side + 1];",
            f"const int filter = {self.block} * {self.filters} + 8 * ({self.before} + tile) + 2 * (lane() & 3);",
        ]
        layer = self.region.layers[self.number]
        return lines + steps(layer, self._add, lambda row: f"numbers + {self.table + row * self.columns} + filter")

    def _add(self, value: int) -> list[str]:
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

    def into_ring(self, ring: str) -> list[str]:
        """Closes the loops of `epilogue`: results go to a ring in shared memory, whose pixels are places."""
        to = f"{ring}.place(down + {self.rise} * i + 8 * side + lane() / 4, {self.before} + tile)"
        return [
            f"half* to = {ring}.data + {to} + 2 * (lane() & 3);",
            "*reinterpret_cast<uint32_t*>(to) = pack(a, b);",
            *["}"] * 3,
        ]

    def out(self, *, places: int, threads: int, start: int) -> list[str]:
        """The epilogue of a region's last layer, and its results on their way out.

        Args:
            places: of a block.
            threads: of a block.
            start: of shared memory that is free for results, in bytes.
        """
        filters, shuffle = self.region.layers[-1].filters, self.region.shuffle
        if shuffle > 1:
            return [*self.epilogue(), *self._shuffled(filters, shuffle), *["}"] * 3]
        ring = f"Ring<{self.filters}, 1, {places}>"
        lines = [
            f"const {ring} results{{reinterpret_cast<half*>(shared + {start})}};",
            *self.epilogue(),
            *self.into_ring("results"),
            "barrier();",
            f"for (int i = thread(); i < {places * self.filters // 8}; i += {threads}) {{",
            f"const int chunk = i % {self.filters // 8}, place = i / {self.filters // 8};",
            f"const int filter = {self.block} * {self.filters} + 8 * chunk;",
            f"if (begin_of_block + place < places && filter < {filters}) {{",
            f"half* to = output + int64_t(begin_of_block + place) * {filters} + filter;",
            "const half* from = results.data + results.place(place, chunk);",
        ]
        if filters % 8 == 0:
            lines.append("*reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from);")
        else:
            lines.append(f"for (int k = 0; k < 8 && filter + k < {filters}; ++k) to[k] = from[k];")
        return [*lines, "}", "}"]

    def out_bytes(self, places: int) -> int:
        """Of shared memory that `out` takes."""
        return 2 * places * self.filters if self.region.shuffle == 1 else 0

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

"""A convolution as one product of matrices: how a block gets its output places' numbers of the inner axis, which runs
over taps and channels, into a stage of its pipeline."""

from __future__ import annotations

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.region import Layer

__all__ = ["Places"]


class Places:
    """Lines of source that fetch one part of the inner axis.

    Args:
        layer: whose input is fetched.
        places: of a block.
        inner: numbers of the inner axis in a part.
        threads: of a block.

    Raises:
        UnsupportedLayer: threads cannot share the places out evenly.
    """

    def __init__(self, layer: Layer, places: int, inner: int, threads: int):
        self.layer, self.inner, self.chunks = layer, inner, inner // 8
        self.own, rest = divmod(places * self.chunks, threads)
        if rest:
            raise UnsupportedLayer("region", f"{threads} threads share {places} places out unevenly.")
        self.at_once = threads // self.chunks  # places that all threads fetch a chunk of
        self.is_plain = layer.kernel == (1, 1) and layer.stride == (1, 1) and not any(layer.padding)

    def sources(self) -> list[str]:
        """Where the places are that this thread fetches: of one chunk of every part."""
        layer = self.layer
        top, left, _, _ = layer.padding
        lines = [f"const int chunk = thread() % {self.chunks};", f"int64_t sources[{self.own}];"]
        lines += [] if self.is_plain else [f"int rows[{self.own}], columns[{self.own}];"]
        lines += [
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self.own}; ++i) {{",
            f"const int place = begin_of_block + thread() / {self.chunks} + i * {self.at_once};",
        ]
        if self.is_plain:
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

    def fetch(self) -> list[str]:
        """Fetches part `part` into stage `stage` of the ring `stages`."""
        channels, chunks = self.layer.channels, self.chunks
        to = f"stages.row(stage) + stages.place(thread() / {chunks} + i * {self.at_once}, chunk)"
        loop = ["BOLT_UNROLL", f"for (int i = 0; i < {self.own}; ++i) {{"]
        if channels % 8 == 0:
            own = channels // 8
            total = self.layer.kernel[0] * self.layer.kernel[1] * own
            lines = [f"const int inner = part * {chunks} + chunk;"]
            tap, channel = ("0", "inner * 8") if self.is_plain else (f"inner / {own}", f"inner % {own} * 8")
            lines += [f"const int channel = {channel};", *([] if self.is_plain else self._tap(tap))]
            there, where = self._where(f"inner < {total}", "channel")
            return [
                *lines,
                *self._inside(),
                *loop,
                f"const bool there = {there};",
                f"copy_async({to}, input_0 + (there ? {where} : 0), there);",
                "}",
            ]
        # Numbers one by one: chunks hold channels of several taps.
        total = self.layer.kernel[0] * self.layer.kernel[1] * channels
        lines = [*self._inside(), *loop, "half eight[8];", "BOLT_UNROLL", "for (int k = 0; k < 8; ++k) {"]
        lines += [f"const int inner = part * {self.inner} + chunk * 8 + k, channel = inner % {channels};"]
        lines += [] if self.is_plain else self._tap(f"inner / {channels}")
        there, where = self._where(f"inner < {total}", "channel")
        return [
            *lines,
            f"eight[k] = {there} ? load_global(input_0 + {where}) : to_half(0.0f);",
            "}",
            f"*reinterpret_cast<Words*>({to}) = Words{{join(eight[0], eight[1]), join(eight[2], eight[3]), "
            "join(eight[4], eight[5]), join(eight[6], eight[7])};",
            "}",
        ]

    def _where(self, within: str, channel: str) -> tuple[str, str]:
        """Whether there is a number, and its place in the input."""
        channels = self.layer.channels
        if self.is_plain:
            return f"{within} && sources[i] >= 0", f"sources[i] * {channels} + {channel}"
        there = f"{within} && inside(rows[i] + dy, columns[i] + dx)"
        return there, f"(sources[i] + int64_t(dy) * width + dx) * {channels} + {channel}"

    def _tap(self, tap: str) -> list[str]:
        width, (down, right) = self.layer.kernel[1], self.layer.dilation
        return [f"const int tap = {tap}, dy = tap / {width} * {down}, dx = tap % {width} * {right};"]

    def _inside(self) -> list[str]:
        if self.is_plain:
            return []
        return ["const auto inside = [&](int y, int x) { return y >= 0 && y < height && x >= 0 && x < width; };"]

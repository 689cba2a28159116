"""A convolution as one product of matrices: how a block gets its output places' numbers of the inner axis, which runs
over taps and channels, into a stage of its pipeline."""

from __future__ import annotations

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.region import Layer

__all__ = ["Places", "fetched", "refusal"]

MOST_TAPS = 16  # of a kernel's side: bits of a mask


def refusal(layer: Layer) -> str | None:
    """Why a layer cannot be fetched so, or `None`."""
    if any(layer.padding) and max(layer.kernel) > MOST_TAPS:
        return f"its kernel has more than {MOST_TAPS} rows or columns, and there is padding"
    return None


def fetched(layer: Layer) -> int:
    """Bytes that the L2 cache gives for each output place, by an estimate.

    Taps beside each other are fetched soon one after the other, and neighbouring places see the same numbers by them:
    these come from the L1 cache. Those of rows above each other do not.
    """
    return 2 * layer.channels * layer.kernel[0] * min(layer.kernel[1], layer.stride[1])


class Places:
    """Lines of source that fetch one part of the inner axis.

    Where there is padding, each place has a mask that says which rows (lower half) and columns (upper half) of the
    kernel are inside of the image. Places are counted in 32 bits, as launches see to.

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
        self.is_padded = any(layer.padding)

    def sources(self) -> list[str]:
        """Where the places begin that this thread fetches, of one chunk of every part."""
        top, left, _, _ = self.layer.padding
        masks = [f"uint32_t masks[{self.own}];"] if self.is_padded else []
        lines = [
            f"const int chunk = thread() % {self.chunks};",
            f"int sources[{self.own}];",
            *masks,
            "BOLT_UNROLL",
            f"for (int i = 0; i < {self.own}; ++i) {{",
            f"const int place = begin_of_block + thread() / {self.chunks} + i * {self.at_once};",
        ]
        if self.is_plain:
            return [*lines, "sources[i] = place < places ? place : -1;", "}"]
        lines += [
            "const int n = place / out_width / out_height;",
            f"const int y = place / out_width % out_height * {self.layer.stride[0]} - {top};",
            f"const int x = place % out_width * {self.layer.stride[1]} - {left};",
        ]
        if not self.is_padded:
            return [*lines, "sources[i] = place < places ? (n * height + y) * width + x : -1;", "}"]
        return [
            *lines,
            "sources[i] = place < places ? (n * height + y) * width + x : 0;",
            "masks[i] = 0;",
            *self._mask("y", "height", 0),
            *self._mask("x", "width", 1),
            "if (place >= places) masks[i] = 0;",
            "}",
        ]

    def _mask(self, position: str, size: str, axis: int) -> list[str]:
        at = f"{position} + tap * {self.layer.dilation[axis]}"
        return [
            "BOLT_UNROLL",
            f"for (int tap = 0; tap < {self.layer.kernel[axis]}; ++tap)",
            f"masks[i] |= uint32_t({at} >= 0 && {at} < {size}) << (tap + {16 * axis});",
        ]

    def fetch(self) -> list[str]:
        """Fetches part `part` into stage `stage` of the ring `stages`."""
        channels, chunks = self.layer.channels, self.chunks
        to = f"stages.row(stage) + stages.place(thread() / {chunks} + i * {self.at_once}, chunk)"
        loop = ["BOLT_UNROLL", f"for (int i = 0; i < {self.own}; ++i) {{"]
        taps = self.layer.kernel[0] * self.layer.kernel[1]
        if channels % 8 == 0:
            own = channels // 8
            return [
                f"const int inner = part * {chunks} + chunk, channel = inner % {own} * 8;",
                *self._tap(f"inner / {own}"),
                *loop,
                f"const bool there = inner < {taps * own} && {self._there()};",
                f"const int from = (sources[i] + ahead) * {channels} + channel;",
                # Neighbouring places see the same numbers by other taps.
                f"copy_async{'_again' if taps > 1 else ''}({to}, input_0 + (there ? from : 0), there);",
                "}",
            ]
        # Numbers one by one: chunks hold channels of several taps.
        return [
            *loop,
            "half eight[8];",
            "BOLT_UNROLL",
            "for (int k = 0; k < 8; ++k) {",
            f"const int inner = part * {self.inner} + chunk * 8 + k, channel = inner % {channels};",
            *self._tap(f"inner / {channels}"),
            f"const bool there = inner < {taps * channels} && {self._there()};",
            f"const int from = (sources[i] + ahead) * {channels} + channel;",
            "eight[k] = there ? load_global(input_0 + from) : to_half(0.0f);",
            "}",
            f"*reinterpret_cast<Words*>({to}) = Words{{join(eight[0], eight[1]), join(eight[2], eight[3]), "
            "join(eight[4], eight[5]), join(eight[6], eight[7])};",
            "}",
        ]

    def _tap(self, tap: str) -> list[str]:
        """Row and column of the kernel, and how far ahead in the image they are."""
        if self.layer.kernel == (1, 1):
            return ["const int down = 0, beside = 0, ahead = 0;"] if self.is_padded else ["const int ahead = 0;"]
        wide, (rows, columns) = self.layer.kernel[1], self.layer.dilation
        return [
            f"const int tap = {tap}, down = tap / {wide}, beside = tap % {wide};",
            f"const int ahead = down * {rows} * width + beside * {columns};",
        ]

    def _there(self) -> str:
        return "(masks[i] >> down & masks[i] >> (16 + beside) & 1) != 0" if self.is_padded else "sources[i] >= 0"

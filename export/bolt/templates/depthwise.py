"""Depthwise convolutions: a thread computes some channels of some neighbouring places, without matrix products.

They are bound by memory: each number that is loaded is multiplied by as many weights as the kernel has. Neighbours in
a row share what they read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.grids import geometry, launch
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates.epilogue import steps
from keras_efficient.export.bolt.templates.packing import table

__all__ = ["Depthwise", "candidates", "emit", "refusal", "seconds"]


@dataclass(frozen=True)
class Depthwise:
    """Parameters of the template.

    Attributes:
        places: neighbours in a row that a thread computes.
        threads: of a block.
        blocks: on a multiprocessor at once.
    """

    places: int = 2
    threads: int = 128
    blocks: int = 4


def refusal(region: Region) -> str | None:
    """Why the template does not serve a region, or `None`."""
    if len(region.layers) != 1 or not region.layers[0].depthwise:
        return "it is not one depthwise layer"
    if region.shuffle != 1 or region.rows:
        return "its output is no plain image"
    return None


def emit(region: Region, parameters: Depthwise) -> Source:
    """The kernel of a region.

    Raises:
        UnsupportedLayer: the template does not serve it.
    """
    reason = refusal(region)
    if reason is not None:
        raise UnsupportedLayer(region.names[-1] if region.names else "region", f"no depthwise kernel: {reason}.")
    code = _text(region, parameters)
    kernel, text = complete("depthwise", code, ("primitives", "epilogue"))
    layer = region.layers[0]
    weights = layer.weights[..., 0].reshape(-1, layer.channels).astype(np.float32)
    return Source(
        text=text,
        kernel=kernel,
        threads=parameters.threads,
        blocks=parameters.blocks,
        shared_bytes=0,
        packed=weights.tobytes() + table(layer, layer.filters),
        rule=_rule(region, parameters),
    )


def _together(channels: int) -> int:
    """Channels that a thread computes."""
    return next(one for one in (8, 4, 2, 1) if channels % one == 0)


def _rule(region: Region, parameters: Depthwise) -> dict[str, Any]:
    layer = region.layers[0]
    sizes = {"places": parameters.places, "threads": parameters.threads, "channels": layer.channels}
    groups = layer.channels // _together(layer.channels)
    return {"kind": "depthwise", **sizes, "groups": groups, "geometry": geometry(layer)}


def _text(region: Region, parameters: Depthwise) -> str:
    layer, places = region.layers[0], parameters.places
    channels, (height, width), (down, right) = layer.channels, layer.kernel, layer.stride
    together = _together(channels)
    groups, taps = channels // together, height * width
    top, left, _, _ = layer.padding
    kind = {8: "Words", 4: "Words2", 2: "uint32_t", 1: "half"}[together]
    inputs = "".join(f"const half* input_{one}, " for one in range(len(region.channels)))
    seen = (places - 1) * right + (width - 1) * layer.dilation[1] + 1  # columns of the input that the places read
    lines = [
        "using namespace bolt;",
        "",
        f"BOLT_KERNEL({parameters.threads}, {parameters.blocks})",
        f"KERNEL_NAME({inputs}const unsigned char* packed, int height, int width, int images, int out_height, "
        "int out_width, half* output) {",
        "const float* const weights = reinterpret_cast<const float*>(packed);",
        f"const int across = (out_width + {places - 1}) / {places};",
        f"int64_t place = int64_t(block_x()) * {parameters.threads} + thread();",
        f"const int channel = int(place % {groups}) * {together};",
        f"place /= {groups};",
        f"const int left = int(place % across) * {places}, y = int(place / across % out_height);",
        "const int64_t image = place / across / out_height;",
        "if (image >= images) return;",
        f"float sums[{places}][{together}];",
        "BOLT_UNROLL",
        f"for (int k = 0; k < {together}; ++k) {{",
        f"const float bias = load_global(weights + {taps * channels} + channel + k);",
        "BOLT_UNROLL",
        f"for (int i = 0; i < {places}; ++i) sums[i][k] = bias;",
        "}",
        "BOLT_LOOP",
        f"for (int dy = 0; dy < {height}; ++dy) {{",
        f"const int row = y * {down} - {top} + dy * {layer.dilation[0]};",
        "if (row < 0 || row >= height) continue;",
        f"float own[{width}][{together}];",
        "BOLT_UNROLL",
        f"for (int dx = 0; dx < {width}; ++dx) {{",
        "BOLT_UNROLL",
        f"for (int k = 0; k < {together}; ++k)",
        f"own[dx][k] = load_global(weights + (dy * {width} + dx) * {channels} + channel + k);",
        "}",
        "BOLT_UNROLL",
        f"for (int read = 0; read < {seen}; ++read) {{",
        f"const int column = left * {right} - {left} + read;",
        "if (column < 0 || column >= width) continue;",
        f"const half* from = input_0 + ((image * height + row) * width + column) * {channels} + channel;",
        f"const {kind} numbers = load_global(reinterpret_cast<const {kind}*>(from));",
        f"float values[{together}];",
        *_unpacked(together),
        "BOLT_UNROLL",
        f"for (int i = 0; i < {places}; ++i) {{",
        "BOLT_UNROLL",
        f"for (int dx = 0; dx < {width}; ++dx) {{",
        f"if (i * {right} + dx * {layer.dilation[1]} == read) {{",
        "BOLT_UNROLL",
        f"for (int k = 0; k < {together}; ++k) sums[i][k] += values[k] * own[dx][k];",
        *["}"] * 5,
        "BOLT_UNROLL",
        f"for (int i = 0; i < {places}; ++i) {{",
        "if (left + i >= out_width) continue;",
        "const int64_t to = (image * out_height + y) * out_width + left + i;",
        f"float results[{max(together, 2)}];",
        "BOLT_UNROLL",
        f"for (int k = 0; k < {max(together, 2)}; k += 2) {{",
        f"float a = sums[i][k], b = {'sums[i][k + 1]' if together > 1 else '0.0f'};",
        f"const int filter = channel + {'k' if together > 1 else '0'};",
    ]

    def add(value: int) -> list[str]:
        given, found = region.channels[value], []
        for name, ahead in (("a", 0), ("b", 1))[: min(together, 2)]:
            where = "to" if given == 1 else f"to * {given} + filter + {ahead}"
            found.append(f"{name} += to_float(load_global(input_{value} + {where}));")
        return found

    lines += steps(layer, add, lambda row: f"weights + {(taps + row) * channels} + filter", pair=together > 1)
    lines += ["results[k] = a, results[k + 1] = b;", "}"]
    start = f"output + to * {channels} + channel"
    if together == 1:
        lines.append(f"*({start}) = to_half(results[0]);")
    else:
        packs = ", ".join(f"pack(results[{k}], results[{k + 1}])" for k in range(0, together, 2))
        value = packs if together == 2 else f"{kind}{{{packs}}}"
        lines.append(f"*reinterpret_cast<{kind}*>({start}) = {value};")
    return indented([*lines, "}", "}", ""])


def _unpacked(together: int) -> list[str]:
    if together == 1:
        return ["values[0] = to_float(numbers);"]
    words = {8: ("numbers.x", "numbers.y", "numbers.z", "numbers.w"), 4: ("numbers.x", "numbers.y"), 2: ("numbers",)}
    return [
        f"values[{2 * k}] = low({word}), values[{2 * k + 1}] = high({word});" for k, word in enumerate(words[together])
    ]


def candidates(region: Region, arch: Architecture) -> Iterator[Depthwise]:
    """All there are."""
    for places, threads in product((1, 2, 4), (64, 128, 256)):
        yield Depthwise(places, threads, min(512 // threads, 4))


def seconds(region: Region, parameters: Depthwise, arch: Architecture, n: int, height: int, width: int) -> float:
    """How long a launch takes, by an estimate: memory, and the loads of neighbours that caches give."""
    layer = region.layers[0]
    out = n * prod(layer.size(height, width))
    read = layer.kernel[0] * ((parameters.places - 1) * layer.stride[1] + layer.kernel[1]) / parameters.places
    grid, _ = launch(_rule(region, parameters), n, height, width, arch.processors)
    return arch.seconds(
        blocks=prod(grid),
        at_once=parameters.blocks,
        products=0.0,
        shared=2.0 * layer.channels * out * read / prod(grid),
        memory=2.0 * layer.channels * (n * height * width + out * len(region.channels)),
    )

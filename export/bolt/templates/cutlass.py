"""Large convolutions and products of matrices by the main loop of CUTLASS: see `cutlass.cuh`.

It multiplies by `mma.sync`, of compute capability 8.0, which later GPUs have too. CUTLASS is no part of this package:
the wheel `nvidia-cutlass`, or a checkout that `CUTLASS_PATH` names, has the headers, and nvcc with g++ compiles them.

Not verified on a GPU: none was at hand yet. The CPU's interpreter does not take these kernels as they are; tests run
them in it with stand-ins for what CUTLASS writes as PTX: copies, loads of matrices and products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.bolt import build
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.grids import geometry, launch
from keras_efficient.export.bolt.region import Add, Layer, Region
from keras_efficient.export.bolt.source import Source, complete, indented
from keras_efficient.export.bolt.templates.epilogue import steps
from keras_efficient.export.bolt.templates.packing import Packed, table, up

__all__ = ["PREFERENCE", "Cutlass", "candidates", "emit", "missing", "refusal", "seconds"]

LEAST_FILTERS = 64  # a block's tile has no fewer
LEAST_INNER = 128  # else the pipeline is hardly full before it ends
LARGEST_KERNEL = 32  # CUTLASS keeps a bit of 32 for each row and column of the kernel
TABLE_BYTES = 128  # cutlass_table_bytes
# Places and filters of a block's tile, and its warps along both: the published ones, whose warps have tiles of 64 × 64
# or, in small blocks, of 64 × 32, 32 × 64 and 32 × 32.
TILES = (
    *((256, 128, 4, 2), (128, 256, 2, 4), (256, 64, 4, 1), (64, 256, 1, 4)),
    *((128, 128, 2, 2), (128, 64, 2, 2), (64, 128, 2, 2), (64, 64, 2, 2)),
)
# Inner numbers of a stage, and stages: deep ones first, since estimates do not tell them apart.
PIPELINES = ((32, 4), (32, 5), (64, 3), (64, 4), (32, 3))
# Estimates take every main loop for perfect. This one was tuned and measured by many, ours by nobody yet: what it loses
# against them by so much is within what estimates do not know. Judgement, not measurement.
PREFERENCE = 0.9


@dataclass(frozen=True)
class Cutlass:
    """Parameters of the template.

    Attributes:
        places, filters: of a block's tile.
        down, across: warps of a block, along the places and along the filters.
        inner: numbers of the inner axis in one stage.
        stages: of the pipeline, at least 3.
        blocks: on a multiprocessor at once.
    """

    places: int = 128
    filters: int = 128
    down: int = 2
    across: int = 2
    inner: int = 32
    stages: int = 4
    blocks: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.down * self.across

    @property
    def stage_bytes(self) -> int:
        """Of all stages."""
        return 2 * self.stages * self.inner * (self.places + self.filters)

    @property
    def sums(self) -> int:
        """That a thread has in registers."""
        return self.places * self.filters // self.threads


def missing() -> str | None:
    """What this machine lacks to compile the template's kernels, or `None`."""
    return build.missing_for_cutlass()


def refusal(region: Region) -> str | None:
    """Why the template does not serve a region, or `None`."""
    layer = region.layers[0]
    if len(region.layers) > 1 or layer.depthwise:
        return "it is not one layer that is a product of matrices"
    if region.shuffle != 1:
        return "its output is shuffled"
    if layer.channels % 8 or layer.filters % 8:
        return f"{layer.channels} channels or {layer.filters} filters are no multiple of 8"
    if layer.filters < LEAST_FILTERS or _inner_axis(layer) < LEAST_INNER:
        return f"it is small: {layer.filters} filters of {_inner_axis(layer)} numbers"
    if max(layer.kernel) > LARGEST_KERNEL:
        return f"its kernel is larger than {LARGEST_KERNEL}"
    adds = [step for step in layer.steps if isinstance(step, Add)]
    if len(adds) > 1 or any(region.channels[step.value] != layer.filters for step in adds):
        return "more than one value is added, or one of other channels"
    return None


def _inner_axis(layer: Layer) -> int:
    return prod(layer.weights.shape[:3])


def _is_plain(layer: Layer) -> bool:
    """Whether it is a product of the input's rows, each once."""
    return layer.kernel == (1, 1) and layer.stride == (1, 1) and not any(layer.padding)


def _misfit(parameters: Cutlass) -> str | None:
    one = parameters
    warp = one.places // one.down, one.filters // one.across
    whole = (warp[0] * one.down, warp[1] * one.across) == (one.places, one.filters)
    if not whole or warp[0] % 32 or warp[1] % 32 or one.filters % 64 or one.inner not in (32, 64) or one.stages < 3:
        return f"{one} are no tiles of CUTLASS"
    return None


def emit(region: Region, parameters: Cutlass) -> Source:
    """The kernel of a region.

    Raises:
        UnsupportedLayer: the template does not serve it, or not with these parameters.
    """
    reason = refusal(region) or _misfit(parameters)
    if reason is not None:
        raise UnsupportedLayer(region.names[-1] if region.names else "region", f"no CUTLASS kernel: {reason}.")
    packed = _packed(region.layers[0], parameters)
    kernel, text = complete("cutlass", _text(region, parameters, packed), ("primitives", "epilogue", "cutlass"))
    return Source(
        text=text,
        kernel=kernel,
        threads=parameters.threads,
        blocks=parameters.blocks,
        shared_bytes=_shared_bytes(region.layers[0], parameters),
        packed=packed.data,
        rule=_rule(region, parameters),
        compiler="nvcc",
    )


def _packed(layer: Layer, parameters: Cutlass) -> Packed:
    """Weights (filters, height, width, channels), which both main loops read, and tables for whole tiles of filters."""
    weights = np.ascontiguousarray(layer.weights.transpose(3, 0, 1, 2)).astype(np.float16)
    return Packed([weights.tobytes()], [table(layer, up(layer.filters, parameters.filters))])


def _shared_bytes(layer: Layer, parameters: Cutlass) -> int:
    """Of the stages, which are more than results take on their way out."""
    return parameters.stage_bytes + (0 if _is_plain(layer) else TABLE_BYTES)


def _rule(region: Region, parameters: Cutlass) -> dict[str, Any]:
    layer = region.layers[0]
    across = ceil(layer.filters / parameters.filters)
    sizes = {"places": parameters.places, "across": across, "channels": max(*region.channels, layer.filters)}
    return {"kind": "tile", **sizes, "geometry": geometry(layer)}


def _text(region: Region, parameters: Cutlass, packed: Packed) -> str:
    layer, one = region.layers[0], parameters
    inputs = "".join(f"const bolt::half* input_{number}, " for number in range(len(region.channels)))
    block = f"cutlass::gemm::GemmShape<{one.places}, {one.filters}, {one.inner}>"
    warp = f"cutlass::gemm::GemmShape<{one.places // one.down}, {one.filters // one.across}, {one.inner}>"
    tiles = ceil(layer.filters / one.filters)
    added = next((f"input_{step.value}" for step in layer.steps if isinstance(step, Add)), None)
    lines = [
        "using namespace bolt;",
        "",
        f"BOLT_KERNEL({one.threads}, {one.blocks})",
        f"KERNEL_NAME({inputs}const unsigned char* packed, int height, int width, int places, int out_height, "
        "int out_width, bolt::half* output) {",
        "BOLT_SHARED(shared);",
        f"using Mma = {'Rows' if _is_plain(layer) else 'Images'}Mma<{block}, {warp}, {one.stages}>;",
        f'static_assert(sizeof(stages_of<Mma>(shared)) == {one.stage_bytes}, "as the launch has it");',
        f"const float* const numbers = reinterpret_cast<const float*>(packed + {packed.tables[0]});",
        "// Blocks that run at a time are neighbours in both directions, so that they share what they read.",
        "const int number = block_y() * grid_x() + block_x();",
        f"const int down = number / {tiles} * {one.places}, across = number % {tiles} * {one.filters};",
        "typename Mma::FragmentC sums;",
        "begin<Mma>(sums, numbers + across);",
        *_product(layer),
        "const auto step = [&](float (&four)[4], int filter, const Words2& more) {",
        *_steps(layer, up(layer.filters, one.filters)),
        "};",
        f"finish<Mma, {'false' if added is None else 'true'}>(sums, shared, {added or 'nullptr'}, output, places, "
        f"{layer.filters}, down, across, step);",
        "}",
        "",
    ]
    return indented(lines)


def _product(layer: Layer) -> list[str]:
    if _is_plain(layer):
        sizes = f"places, {layer.channels}, {layer.filters}"
        return [f"multiply_rows<Mma>(sums, input_0, packed, {sizes}, down, across, shared);"]
    # Zeros below and to the right follow from the output's sizes.
    numbers = [*layer.kernel, "out_height", "out_width", *layer.padding[:2], *layer.stride, *layer.dilation]
    return [
        f"const cutlass::conv::Conv2dProblemSize problem(places / (out_height * out_width), height, width, "
        f"{layer.channels}, {layer.filters}, {', '.join(map(str, numbers))}, cutlass::conv::Mode::kCrossCorrelation);",
        "multiply_images<Mma>(sums, input_0, packed, problem, down, across, shared);",
    ]


def _steps(layer: Layer, columns: int) -> list[str]:
    """What follows the bias, for two pairs `a` and `b` of four neighbouring filters."""

    def two(first: int, word: str) -> list[str]:
        added = [f"a += low({word}), b += high({word});"]
        behind = steps(layer, lambda _: added, lambda row: f"numbers + {row * columns + first} + filter")
        return ["{", f"float &a = four[{first}], &b = four[{first + 1}];", *behind, "}"]

    return [*two(0, "more.x"), *two(2, "more.y")]


def candidates(region: Region, arch: Architecture) -> Iterator[Cutlass]:
    """Parameters that fit into registers and shared memory, and have no more tiles of filters than are needed."""
    layer = region.layers[0]
    for (places, filters, down, across), (inner, stages) in product(TILES, PIPELINES):
        one = Cutlass(places, filters, down, across, inner, stages)
        if filters >= 2 * up(layer.filters, 64) or not (_is_plain(layer) or _holds_addresses(layer, one)):
            continue
        shared = _shared_bytes(layer, one)
        if arch.holds(shared):
            registers = min(one.sums + 110, 255)
            at_once = min((arch.shared_bytes + 1024) // (shared + 1024), arch.registers // (registers * one.threads))
            yield replace(one, blocks=max(at_once, 1))


def _holds_addresses(layer: Layer, one: Cutlass) -> bool:
    """Whether stages are no longer than an image's channels, and registers hold what a thread must know of its places:
    16 addresses with their masks spill (nvcc 13)."""
    return one.inner < 2 * up(layer.channels, 32) and one.places * one.inner // 8 // one.threads < 16


def seconds(region: Region, parameters: Cutlass, arch: Architecture, n: int, height: int, width: int) -> float:
    """How long a launch takes, by an estimate: see `Architecture.seconds`.

    Products cost as much as `tile`'s. Barriers of the main loop cost nothing here: what is multiplied next is in
    registers before a warp waits.
    """
    layer, one = region.layers[0], parameters
    grid, (places, *_) = launch(_rule(region, one), n, height, width, arch.processors)
    # Stages hold channels of one tap.
    steps = prod(layer.kernel) * ceil(layer.channels / one.inner) * one.inner // 16
    warps, heights, widths = one.down * one.across, one.places // one.down // 16, one.filters // one.across // 8
    numbers = n * height * width * region.channels[0] + places * (sum(region.channels[1:]) + layer.filters)
    return arch.seconds(
        blocks=prod(grid),
        at_once=one.blocks,
        products=warps * steps * heights * widths,
        shared=float(steps * (warps * (512 * heights + 256 * widths) + 32 * (one.places + one.filters))),
        memory=2.0 * (numbers + layer.weights.size),
        cache=float(prod(grid) * steps * 32 * (one.places + one.filters)),
        barriers=4,
    )

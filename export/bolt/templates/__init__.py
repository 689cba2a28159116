"""CUDA sources for regions, written from parameters; each template is a Python file, most with a `.cuh` beside it."""

from __future__ import annotations

from types import ModuleType

from keras_efficient.export.bolt.templates import cutlass, depthwise, strip, tile, warpgroup

__all__ = ["TEMPLATES"]

# Each has `refusal(region)`, `candidates(region, arch)`, `seconds(region, parameters, arch, n, height, width)` and
# `emit(region, parameters)`; and a dataclass of parameters, named as it is. Some have `missing()`, the reason why this
# machine cannot compile their kernels, or `None`; and `PREFERENCE`, which their estimates are multiplied by for ranks.
TEMPLATES: dict[str, ModuleType] = {
    "strip": strip,
    "tile": tile,
    "warpgroup": warpgroup,
    "depthwise": depthwise,
    "cutlass": cutlass,
}

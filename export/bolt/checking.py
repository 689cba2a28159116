"""A kernel's result beside what its region means: run on the CPU, thread by thread, at small sizes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np

from keras_efficient.errors import VerificationError
from keras_efficient.export.bolt import host
from keras_efficient.export.bolt.grids import arguments, launch
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.source import Source

__all__ = ["TOLERANCE", "compare", "is_possible", "problem", "random_inputs"]

SCALES = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)  # of random inputs, until all numbers fit into float16
TOLERANCE = 1e-3  # relative, of random numbers, where layers' outputs are rounded to half precision alike


def is_possible() -> bool:
    """Whether this machine can compile for its CPU."""
    return shutil.which("g++") is not None


def random_inputs(region: Region, *shape: int, seed: int = 0) -> list[np.ndarray]:
    """Float16 arrays for all inputs of a region.

    Args:
        region: that takes them.
        shape: images, height, width of the first one; of rows their number.
        seed: of chance.
    """
    random = np.random.default_rng(seed)
    n, height, width = (1, 1, *shape) if region.rows else shape
    return [random.normal(size=one).astype(np.float16) for one in region.input_shapes(n, height, width)]


def compare(
    region: Region,
    source: Source,
    inputs: Sequence[np.ndarray],
    *,
    seed: int = 0,
    processors: int = 4,
    rounded: type | None = None,
) -> tuple[float, host.Run]:
    """Relative error of a kernel's output, which is NaN at first, and what the interpreter counted.

    Args:
        region, source: what is meant, and the kernel.
        inputs: as of `random_inputs`.
        seed: of the order in which warps run.
        processors: that the launch is shared out for.
        rounded: as of `computed`.

    Raises:
        VerificationError: the kernel reads or writes where it must not, or its threads wait for each other.
    """
    wanted = computed(region, inputs, rounded=rounded)
    out = np.full(wanted.shape, np.nan, np.float16)
    n, height, width = region.image(inputs[0].shape)
    grid, integers = launch(source.rule, n, height, width, processors)
    counted = host.run(
        source.text,
        source.kernel,
        grid=grid,
        threads=source.threads,
        shared_bytes=source.shared_bytes,
        arguments=arguments(inputs, np.frombuffer(source.packed, np.uint8), height, width, integers, out),
        seed=seed,
    )
    norm = float(np.linalg.norm(wanted)) or 1.0
    return float(np.linalg.norm(out.astype(np.float64) - wanted)) / norm, counted


def _within_range(region: Region, inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Inputs so small that nothing overflows, which would tell nothing of a kernel; `None`: there are none.

    Whether a network's own inputs make it overflow is another question, which `ranges` answers.
    """
    for factor in SCALES:
        small = [(one * factor).astype(np.float16) for one in inputs]
        with np.errstate(over="ignore", invalid="ignore"):
            found = computed(region, small, rounded=np.float16).astype(np.float16)
        if np.isfinite(found).all():
            return small
    return None


def problem(region: Region, source: Source) -> str | None:
    """Why a kernel is wrong, or `None`: at an odd size, of more than one block where that is small."""
    if region.rows:
        shape: tuple[int, ...] = (37,)
    else:
        down = max(layer.kernel[0] * layer.stride[0] for layer in region.layers)
        shape = (1, down + 4, max(source.rule.get("useful", 0), down) + 5)
    inputs = _within_range(region, random_inputs(region, *shape))
    if inputs is None:
        return f"its numbers go beyond {np.finfo(np.float16).max:.0f} (float16) whatever it reads"
    try:
        error, _ = compare(region, source, inputs, rounded=np.float16)
    except VerificationError as err:
        return err.message
    return None if error < TOLERANCE else f"its relative error on the CPU is {error:.2g}"

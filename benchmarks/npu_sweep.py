"""Every layout that the Ethos-U target tries for a network: ways to shuffle × tiles, with Vela's estimate of each.

    python -m benchmarks.npu_sweep [--quick] [--json PATH]

The numbers are compiler estimates, so the machine does not matter; nor do the weights, but for their zeros. Networks
that are not in the zoo yet are swept with the weights that they start from.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from benchmarks import harness
from benchmarks.harness import Row

ACCELERATOR = "ethos-u85-2048"  # in its default system: Ethos_U85_SYS_DRAM_High, Dedicated_Sram_512KB


def networks() -> dict[str, Any]:
    """What is swept, by the name that the tables have."""
    from keras_efficient import models

    return {
        "SESR-M5 as published, ReLU": models.SESR(2, "m5", activation="relu"),
        "SESR-NPU, depth 3, 2:4 sparse": models.SESRNPU(2, 3, sparsity="2:4"),
        "SESR-NPU, depth 5": models.SESRNPU(2, 5),
        "SESR-NPU, depth 6": models.SESRNPU(2, 6),
        "SESR-NPU, depth 7": models.SESRNPU(2, 7),
        "FSRCNN": models.FSRCNN(2),
    }


def tried(model: Any, shape: tuple[int, int], accelerator: str = ACCELERATOR) -> list[dict[str, Any]]:
    """One row for each layout of one network, the fastest first.

    Args:
        model: a Keras model with one image input of one channel.
        shape: height and width of the input.
        accelerator: in its default system.

    Returns:
        Rows of plain values: `lowerings, tiles, tile, margin, ms, npu_ms, dram_mb, sram_kib, cpu_ops`; a layout that
        Vela refused has `error` in the place of the figures.
    """
    from keras_efficient.deploy import deploy
    from keras_efficient.export import targets, vela
    from keras_efficient.export.calibration import calibration_from
    from keras_efficient.export.graph import Graph
    from keras_efficient.export.signature import input_specs, resolve_shapes
    from keras_efficient.export.targets import Request, ethos_u

    deployed = deploy(model)
    specs = tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in resolve_shapes(input_specs(deployed), shape))
    pictures = np.random.default_rng(0).random((2, 256, 256, 1), dtype=np.float32)
    target = targets[accelerator]
    request = Request(target, "int8", specs, calibration_from(pictures, specs))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, candidate in enumerate(ethos_u.lower(deployed, request)):
            place = Path(folder) / str(number)
            place.mkdir()
            file = place / "model.tflite"
            ethos_u.convert(candidate.model, request, file)
            system = vela.check_system(accelerator)
            for trial in ethos_u.search(Graph.from_bytes(file.read_bytes()), system, place / "layouts"):
                rows.append(_row(candidate.lowerings, trial))
    return sorted(rows, key=lambda row: (row.get("cpu_ops", 9), row.get("ms", float("inf"))))


def _row(lowerings: tuple[str, ...], trial: Any) -> dict[str, Any]:
    layout, result = trial.layout, trial.result
    row = {
        "lowerings": [*lowerings, *layout.lowerings],
        "tiles": layout.tiles,
        "tile": layout.tile and list(layout.tile),
        "margin": layout.margin,
    }
    if isinstance(result, str):
        return {**row, "error": result}
    return {
        **row,
        "ms": round(result.ms, 3),
        "npu_ms": round(result.npu_cycles / result.clock_mhz / 1e3, 3),
        "dram_mb": round(result.dram_bytes / 1e6, 1),
        "sram_kib": round(result.sram_kib, 1),
        "cpu_ops": result.cpu_ops,
    }


def as_published(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest layout that keeps the network's own transposed convolutions and PReLUs."""
    from keras_efficient.export.lowerings.doubled_convolution import DOUBLED_CONVOLUTION
    from keras_efficient.export.lowerings.phase_convolution import PHASE_CONVOLUTION
    from keras_efficient.export.lowerings.prelu import PRELU_AS_RELU

    rewrites = {PHASE_CONVOLUTION.name, DOUBLED_CONVOLUTION.name, PRELU_AS_RELU.name}
    return next(row for row in rows if not rewrites & set(row["lowerings"]))


def npu_sweep(quick: bool) -> Iterator[Row]:
    """A row for each network: its fastest layout against the whole image at once; all that was tried in `details`."""
    shape = (108, 384) if quick else (1080, 1920)
    for name, model in networks().items():
        rows = tried(model, shape)
        best, plain = rows[0], next(row for row in rows if row["tile"] is None and row.get("cpu_ops") == 0)
        yield Row(
            f"{name}, {shape[0]}×{shape[1]} ×2, {ACCELERATOR}, Vela's estimate; peer: the whole image at once",
            best["ms"],
            "ms/frame",
            plain["ms"],
            round(plain["ms"] / best["ms"], 2),
            details={"parameters": model.count_params(), "as_published": as_published(rows), "tried": rows},
        )


if __name__ == "__main__":
    harness.main("npu_sweep", {"npu_sweep": npu_sweep})

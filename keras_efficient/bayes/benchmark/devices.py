"""A posterior's files: written, run on test inputs, and what they take; kept as arrays beside its predictions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.bayes.exporting import export_posterior
from keras_efficient.bayes.posterior import Posterior
from keras_efficient.errors import KerasEfficientError

if TYPE_CHECKING:
    from keras_efficient.bayes.datasets import Splits

__all__ = ["FIGURES", "files"]

FIGURES = ("bytes", "latency_ms", "memory_bytes", "npu_ms")  # of a file; NaN: not known
CALIBRATED = 200  # training inputs from which an int8 file takes its ranges


def files(
    posterior: Posterior,
    splits: Splits,
    modes: Sequence[str] = ("ensemble",),
    targets: Sequence[str] = ("tflite",),
    precision: str = "float32",
    members: int | None = None,
    examples: int = 1000,
) -> Iterator[tuple[str, np.ndarray]]:
    """Exports a posterior in each mode for each target, and runs the files that run here.

    A mode that the posterior does not have, such as the mean of an ensemble, and a file that its checks refuse, are
    given with their reason.

    Args:
        posterior, splits: what is exported, and the data.
        modes, targets, precision, members: of `export_posterior`; of members the first so many, at most.
        examples: test inputs that a file is run on, the first so many.

    Yields:
        `file/<target>/<precision>/<mode>/figures`, as `FIGURES` names them, and for files that run on this machine
        `…/probabilities`, (examples, classes); or `…/refused`, a text.
    """
    from keras_efficient import export

    count = None if members is None else min(members, posterior.count)
    x = splits.test.x[:examples]
    for target in targets:
        for mode in modes:
            options: dict[str, Any] = {}
            if precision in export.targets[target].calibrated:
                options["calibration"] = splits.train.x[:CALIBRATED]
            if mode in ("ensemble", "sample"):
                options["members"] = count
            with tempfile.TemporaryDirectory(prefix="keras_efficient-") as folder:
                path = Path(folder) / f"posterior{export.targets[target].suffix}"
                name = f"file/{target}/{precision}/{mode}"
                try:
                    report = export_posterior(posterior, path, mode=mode, target=target, precision=precision, **options)
                except KerasEfficientError as err:  # what was trained is worth more than one of its files
                    yield f"{name}/refused", np.array(str(err).splitlines()[0])
                    continue
                yield f"{name}/figures", _figures(report)
                # Of one draw for each example there is no mean that could be compared.
                if report.npu is None and mode not in ("sample", "noise_input"):
                    run = export.load(path)
                    found = [np.asarray(run(one[None]), np.float32).reshape(1, -1) for one in x]
                    yield f"{name}/probabilities", np.concatenate(found)


def _figures(report: Any) -> np.ndarray:
    npu: Mapping[str, Any] = report.npu or {}
    sram = npu.get("sram_kib")
    known = {
        "bytes": report.bytes,
        "latency_ms": report.latency_ms,
        "memory_bytes": None if sram is None else 1024 * sram,
        "npu_ms": npu.get("ms_per_frame"),
    }
    return np.array([np.nan if known[name] is None else known[name] for name in FIGURES], np.float64)

"""Posteriors in files: what is left of them in integers, on an NPU, and what each form costs. Part of
`benchmarks.ursabench`.

Networks are trained for minutes, and kept in runs/ursabench/exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.harness import Row, data_folder, medians
from keras_efficient import export, models
from keras_efficient.bayes import Data, Posterior, datasets, load_posterior, tasks
from keras_efficient.bayes.exporting import draw_noise, export_posterior
from keras_efficient.bayes.inference import SWAG, DeepEnsemble, Distillation

__all__ = ["exports"]

FOLDER = Path("runs/ursabench/exports")
NPU = "ethos-u55-128"
CALIBRATION = 500
RUNS = 64  # of a file that draws, whose mean is judged


@dataclass(frozen=True)
class Form:
    """A file: of which posterior, and how."""

    posterior: str
    mode: str
    precision: str = "float32"
    suffix: str = ".tflite"

    @property
    def name(self) -> str:
        return f"{self.mode} of {self.posterior}, {self.precision} {self.suffix}"


FORMS = (
    Form("8 networks", "ensemble"),
    Form("8 networks", "ensemble", "int8"),
    Form("8 networks", "ensemble", suffix=".onnx"),
    Form("8 networks", "sample"),
    Form("student", "distilled"),
    Form("student", "distilled", "int8"),
    Form("SWAG", "mean"),
    Form("SWAG", "mean", "int8"),
    Form("SWAG", "noise_input"),
    Form("SWAG", "noise_input", "int8"),
)


def mlp200() -> keras.Model:
    return models.MLP(200, 2, input_shape=(784,))


def exports(quick: bool) -> Iterator[Row]:
    """Eight members of MLP200 on MNIST in one int8 file, and every other form beside it."""
    data, test = _mnist(quick)
    posteriors = _posteriors(data, quick)
    folder = FOLDER / ("quick" if quick else "mnist")
    found = {form: _measured(form, posteriors[form.posterior], data, test, folder) for form in FORMS}
    rounds = 20 if quick else 300
    times = medians({form.name: run for form, (_, _, run) in found.items()}, rounds=rounds)
    plain, whole = (found[Form("8 networks", "ensemble", precision)][0] for precision in ("float32", "int8"))
    points, ratio = 100 * abs(whole["error"] - plain["error"]), whole["nll"] / plain["nll"]
    what = f"baked ensemble of 8, int8, MLP200, MNIST, {len(test)} test images"
    details = {"int8": whole, "float32": plain}
    yield Row(
        f"{what}: accuracy, points from float",
        round(points, 3),
        "points",
        bar="≤ 0.2",
        reached=points <= 0.2,
        details=details,
    )
    yield Row(
        f"{what}: NLL over that of float", round(ratio, 4), "×", bar="≤ 1.05", reached=ratio <= 1.05, details=details
    )
    for form in FORMS:
        if form.precision == "int8":
            yield _on_npu(form, posteriors[form.posterior], data, folder)
    for form, (scores, size, _) in found.items():
        details = {"bytes": size, **scores}
        what = f"{form.name}: one image, one thread of this CPU"
        yield Row(what, round(1e6 * times[form.name], 1), "µs", details=details)


def _mnist(quick: bool) -> tuple[Data, Data]:
    limits = {"limit": 2000, "test_limit": 200} if quick else {}
    splits = datasets.load({"name": "mnist", "path": str(data_folder() / "cls"), **limits})
    return tuple(Data(one.x.reshape(len(one), -1), one.y, 10) for one in (splits.train, splits.test))  # type: ignore[return-value]


def _posteriors(data: Data, quick: bool) -> dict[str, Posterior]:
    folder = FOLDER / ("quick" if quick else "mnist")
    folder.mkdir(parents=True, exist_ok=True)
    short, long = (1, 2) if quick else (5, 10)
    ensemble = _kept(folder / "ensemble.zip", lambda: DeepEnsemble(epochs=short).fit(mlp200, data, 0))
    swag = SWAG(epochs=short, averaging_epochs=long, rank=min(long, 10), draws=8)
    distillation = Distillation(epochs=long)
    return {
        "8 networks": ensemble,
        "SWAG": _kept(folder / "swag.zip", lambda: swag.fit(mlp200, data, 0)),
        "student": _kept(folder / "student.zip", lambda: distillation.distil(ensemble, mlp200, data, 0)),
    }


def _kept(path: Path, make: Callable[[], Posterior]) -> Posterior:
    if not path.exists():
        make().save(path)
    return load_posterior(path)


def _measured(
    form: Form, posterior: Posterior, data: Data, test: Data, folder: Path
) -> tuple[dict[str, float], int, Callable[[], Any]]:
    """Scores of the test set as the file gives them, its bytes, and a function that runs it on one image."""
    path = folder / f"{form.mode}-{form.precision}{form.suffix}"
    report = export_posterior(
        posterior,
        path,
        mode=form.mode,
        precision=form.precision,
        overwrite=True,
        **({"calibration": data.x[:CALIBRATION]} if form.precision == "int8" else {}),
    )
    run, random = export.load(path), np.random.default_rng(0)

    def asked(x: np.ndarray) -> np.ndarray:
        given = [x, draw_noise(run.metadata, len(x), random)] if form.mode == "noise_input" else x
        found = run(given)
        return np.asarray(found[0] if isinstance(found, list) else found)

    runs = RUNS if form.mode in ("sample", "noise_input") else 1
    probabilities = np.mean([asked(test.x) for _ in range(runs)], axis=0)
    scores = tasks.prediction(probabilities, test.y)
    one = test.x[:1]
    given = [one, draw_noise(run.metadata, 1, random)] if form.mode == "noise_input" else one
    wanted = {name: round(scores[name], 5) for name in ("error", "nll", "nll_smoothed", "ece")}
    return wanted, report.bytes, lambda: run(given)


def _on_npu(form: Form, posterior: Posterior, data: Data, folder: Path) -> Row:
    path = folder / f"{form.mode}-{NPU}.tflite"
    report = export_posterior(
        posterior,
        path,
        mode=form.mode,
        precision="int8",
        target=NPU,
        overwrite=True,
        calibration=data.x[:CALIBRATION],
        allow_cpu=True,
    )
    npu = report.npu or {}
    part = 100 * npu["npu_ops"] / (npu["npu_ops"] + npu["cpu_ops"])
    details = {"bytes": report.bytes, "ms by Vela's estimate": npu["ms_per_frame"], "operators": npu["npu_ops"]}
    return Row(
        f"{form.mode} of {form.posterior}, operators on {NPU}",
        part,
        "%",
        bar="100" if form.mode != "noise_input" else "",
        reached=part == 100 if form.mode != "noise_input" else None,
        details=details,
    )

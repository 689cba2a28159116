"""Cells are run, here or on a cluster, and each finished one is kept at once."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import keras_efficient
from keras_efficient.bayes.benchmark.results import Outcome, Results
from keras_efficient.bayes.benchmark.suites import Cell, Suite, method_of, model_of
from keras_efficient.bayes.training import TrainingFailed

__all__ = ["Benchmark", "Engine", "in_process", "run_cell"]

Engine = Callable[[list[Cell]], Iterator[tuple[Cell, Outcome]]]


def run_cell(spec: dict[str, Any]) -> Outcome:
    """Fits a method to a suite's data and measures it; what goes wrong is the outcome, not an error."""
    import keras

    versions = {
        "keras-efficient": keras_efficient.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "numpy": np.__version__,
    }
    try:
        return _measured(spec, versions)
    except Exception as err:
        lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [""]
        line = lines[-1] if lines[0].startswith(("in user code", "Graph execution error")) else lines[0]
        return Outcome(failed=f"{type(err).__name__}: {line}"[:500], versions=versions)
    finally:
        gc.collect()  # compiled programs hold one another


def _measured(spec: dict[str, Any], versions: dict[str, str]) -> Outcome:
    from keras_efficient.bayes import datasets
    from keras_efficient.bayes.benchmark import devices, scores

    splits = datasets.load(spec["data"])
    classes = splits.train.num_classes
    assert classes is not None  # `Data` counts them
    scores.rehearse(spec["tasks"], classes)
    began = time.perf_counter()
    shapes = {"input_shape": splits.train.x.shape[1:], "num_classes": splits.train.num_classes}
    model_fn = model_of({**shapes, **spec["model"]})
    posterior = method_of(spec["method"]).fit(model_fn, splits.train, spec["seed"])
    fitted = time.perf_counter()
    predictions: dict[str, np.ndarray] = {"labels": splits.test.y}
    for name, x in scores.inputs(spec["tasks"], splits, spec["seed"]):
        logits = posterior.logits(x)
        if not np.isfinite(logits).all():
            raise TrainingFailed("There are predictions that are not finite.")
        # Corrupted test sets are many: what is measured of them is in the members' mean.
        predictions[f"logits/{name}"] = scores.averaged(logits) if name.startswith("shift/") else logits
    predicted = time.perf_counter()
    if "export" in spec["tasks"]:
        predictions |= devices.files(posterior, splits, **spec["tasks"]["export"])
    rows = scores.rows(spec["tasks"], predictions, spec["seed"])
    seconds = {"fit": fitted - began, "predict": predicted - fitted}
    diagnostics = {name: scores.plain(value) for name, value in posterior.diagnostics.items()}
    own = {"seconds": seconds["fit"], **diagnostics}
    rows += [{"split": "train", "metric": name, "value": value} for name, value in own.items()]
    return Outcome(rows, predictions, seconds, diagnostics, None, versions, _fingerprint(splits))


def _fingerprint(splits: Any) -> str:
    """Of inputs and labels."""
    found = hashlib.sha256()
    for part in (splits.train, splits.test):
        for values in (part.x, part.y):
            found.update(repr((values.shape, str(values.dtype))).encode())
            found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def in_process(cells: list[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """One after the other, in this process."""
    for cell in cells:
        yield cell, run_cell(cell.spec)


@dataclass(frozen=True)
class Benchmark:
    """A suite, run into a folder.

    Attributes:
        suite: what is compared.
        folder: of results; those that are there already are not made again.
        engine: what runs cells: `in_process`, or `on_ray(…)`.
    """

    suite: Suite
    folder: str | Path
    engine: Engine = in_process

    def run(
        self, *, retry_failed: bool = False, progress: Callable[[int, int, str], None] | None = None
    ) -> list[dict[str, Any]]:
        """Runs the cells that have no result yet.

        It may be killed at any moment: finished cells stay, the one under way is begun anew next time.

        Args:
            retry_failed: whether cells that failed are run again.
            progress: is called with cells done, cells in all, and what was done last.

        Returns:
            Rows of all results in the folder: `method, seed, split, metric, value`.

        Raises:
            FileProblem: results of another suite, or what cannot be written.
        """
        results = Results(self.folder, self.suite)
        cells = self.suite.cells()
        left = [cell for cell in cells if not _is_done(results.outcome(cell.name), retry_failed)]
        done = len(cells) - len(left)
        if progress is not None:
            progress(done, len(cells), "")
        for cell, outcome in self.engine(left):
            if outcome.failed is not None and progress is not None:
                progress(done, len(cells), "")  # raises where an interruption came up as another error
            results.keep(cell, outcome)
            done += 1
            if progress is not None:
                what = f"{cell.label}, seed {cell.seed}"
                progress(done, len(cells), what if outcome.failed is None else f"{what}: {outcome.failed}")
        return results.rows()


def _is_done(outcome: dict[str, Any] | None, retry_failed: bool) -> bool:
    return outcome is not None and not (retry_failed and outcome["failed"] is not None)

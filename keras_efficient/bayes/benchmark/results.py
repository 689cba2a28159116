"""Results in a folder: a file for each finished cell, whole or not there."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.atomic import replacing
from keras_efficient.bayes.benchmark import scores
from keras_efficient.bayes.benchmark.suites import Cell, Suite
from keras_efficient.errors import FileProblem

__all__ = ["Outcome", "Results"]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a cell.

    Attributes:
        rows: `{"split", "metric", "value"}` each.
        predictions: arrays by name, such as probabilities of a split and its labels.
        seconds: of fitting and of predicting.
        diagnostics: of the method.
        failed: why it has no rows; `None`: it has.
        versions: of what it ran on.
        data: fingerprint of what it was trained and measured on.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    diagnostics: Mapping[str, float | None] = field(default_factory=dict)
    failed: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None


class Results:
    """A folder of one suite's results.

    Args:
        folder: made if it is missing, where `suite` is given.
        suite: whose cells they are; `None`: what is there is only read.

    Raises:
        FileProblem: the folder holds results of another suite, none at all, or cannot be written.
    """

    def __init__(self, folder: str | Path, suite: Suite | None = None):
        self.folder = Path(folder)
        self._index = self.folder / "suite.json"
        if suite is not None:
            self._begin(suite)
        if not self.folder.is_dir():
            raise FileProblem(self.folder, "no such folder.")
        found = _read(self._index, f"holds no results: {self._index.name} is missing.")
        self.name, self._suite = str(found["name"]), str(found["fingerprint"])
        self.labels = {str(name): str(label) for name, label in found["cells"].items()}  # cell to method

    def _begin(self, suite: Suite) -> None:
        labels = {cell.name: cell.label for cell in suite.cells()}
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            (self.folder / "predictions").mkdir(exist_ok=True)
        except OSError as err:
            raise FileProblem(self.folder, f"cannot be made: {err.strerror}.") from err
        if self._index.exists():
            found = _read(self._index, "")
            if found["fingerprint"] != suite.fingerprint:
                raise FileProblem(
                    self.folder,
                    f"holds results of another suite ({found['name']}), or of other data, network or tasks.",
                    hint="Take another folder.",
                )
            # What was measured with labels and methods of before stays.
            labels = {**found["cells"], **labels}
            known = {"data": found["data"]} if "data" in found else {}
        else:
            known = {}
        index = {"format": FORMAT, "name": suite.name, "fingerprint": suite.fingerprint, "cells": labels, **known}
        _write(self._index, index)

    def outcome(self, name: str) -> dict[str, Any] | None:
        """What is kept of a cell; `None` where it is not finished."""
        path = self.folder / "cells" / f"{name}.json"
        if not path.exists():
            return None
        found = _read(path, "")
        missing = [one for one in ("suite", "spec", "failed", "rows") if one not in found]
        if missing:
            raise FileProblem(path, f"is damaged: it lacks `{missing[0]}`.", hint="Remove it, and run again.")
        if found["suite"] != self._suite:
            raise FileProblem(path, "is a result of another suite.", hint="Remove it.")
        return found

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """Writes predictions, then the cell, which says that they are whole.

        Raises:
            FileProblem: it was measured on other data than the cells before, or cannot be written.
        """
        if outcome.data is not None:
            self._check_data(outcome.data)
        if outcome.predictions:
            with replacing(self.predictions_path(cell.name), overwrite=True) as temporary, temporary.open("wb") as file:
                np.savez(file, **outcome.predictions)  # type: ignore[arg-type]
        kept = {
            "format": FORMAT,
            "suite": cell.suite,
            "spec": cell.spec,
            "failed": outcome.failed,
            "rows": outcome.rows,
            "seconds": outcome.seconds,
            "diagnostics": outcome.diagnostics,
            "versions": outcome.versions,
            "data": outcome.data,
        }
        _write(self.folder / "cells" / f"{cell.name}.json", kept)

    def _check_data(self, data: str) -> None:
        """Files may lie elsewhere than before, but what they hold must be the same."""
        found = _read(self._index, "")
        known = found.setdefault("data", data)
        if known != data:
            raise FileProblem(
                self.folder, "holds results on other data.", hint="Take another folder, or the data of before."
            )
        _write(self._index, found)

    def predictions_path(self, name: str) -> Path:
        return self.folder / "predictions" / f"{name}.npz"

    def predictions(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of a cell by name; empty where it kept none."""
        path = self.predictions_path(name)
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as file:
                return {one: file[one] for one in file.files}
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as err:
            raise FileProblem(path, f"is damaged: {err}.", hint="Remove it and its cell, and run again.") from err

    def cells(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Name, method and content of each finished cell."""
        for name, label in self.labels.items():
            found = self.outcome(name)
            if found is not None:
                yield name, label, found

    def rows(self) -> list[dict[str, Any]]:
        """Tidy: `method, seed, split, metric, value` each; a failed cell has one whose metric is `failed`."""
        cells = list(self.cells())
        references = self._references(cells)
        found = []
        for name, label, cell in cells:
            own = {"method": label, "seed": cell["spec"]["seed"]}
            if cell["failed"] is not None:
                found.append({**own, "split": None, "metric": "failed", "value": 1.0, "reason": cell["failed"]})
                continue
            found += [{**own, **row} for row in cell["rows"]]
            reference = references.get(own["seed"])
            if reference is not None and label != scores.reference_of(cell["spec"]["tasks"]):
                found += [{**own, **row} for row in scores.fidelity_rows(self.predictions(name), reference)]
        return found

    def _references(self, cells: list[tuple[str, str, dict[str, Any]]]) -> dict[int, dict[str, np.ndarray]]:
        """By seed, predictions of the method that the others are held against."""
        return {
            cell["spec"]["seed"]: self.predictions(name)
            for name, label, cell in cells
            if label == scores.reference_of(cell["spec"]["tasks"]) and cell["failed"] is None
        }


def _write(path: Path, value: Any) -> None:
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + os.linesep, "utf-8")


def _read(path: Path, missing: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as err:
        raise FileProblem(path.parent, missing or f"lacks {path.name}.") from err
    except (OSError, ValueError) as err:
        raise FileProblem(path, f"is damaged: {err}.", hint="Remove it, and run again.") from err
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileProblem(path, f"is none of format {FORMAT}.", hint="Take another folder.")
    return found

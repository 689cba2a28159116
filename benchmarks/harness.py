"""What every benchmark shares: rows, paired timing, and the JSON file with machine, versions and commit."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Row", "data_folder", "main", "medians", "memory", "write"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("tensorflow", "keras", "jax", "numpy", "ai-edge-litert", "ethos-u-vela", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: what was measured, with its conditions.
        ours, peer: the two numbers; `peer` is `None` where there is nothing to compare with.
        unit: of both.
        ratio: peer over ours, or ours over peer, as `what` says; `None` where it has no meaning.
        bar: the number to reach, in words.
        reached: `True`, `False`, or `None` where it was not measured.
        why: where `reached` is not `True`.
        details: anything that helps to judge the number.
    """

    what: str
    ours: float | None
    unit: str
    peer: float | None = None
    ratio: float | None = None
    bar: str = ""
    reached: bool | None = None
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def data_folder() -> Path:
    """Folder of the real data sets: KERAS_EFFICIENT_DATA, else `../shared/data` beside the checkout."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("KERAS_EFFICIENT_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder. Set KERAS_EFFICIENT_DATA to the folder of the data sets.")
    return folder


def medians(runs: dict[str, Callable[[], Any]], *, rounds: int, warmups: int = 3) -> dict[str, float]:
    """Median seconds of each function; they take turns (A B A B …), so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmups):
        for run in runs.values():
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory(kind: str = "VmRSS") -> float:
    """Megabytes of this process now: VmRSS of all kinds, RssAnon of those that no file stands behind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(fields[kind].split()[0]) / 1e3


def main(name: str, sections: dict[str, Callable[[bool], Iterable[Row]]]) -> None:
    """Command line of a benchmark: all sections or some, into one JSON file whose other sections stay as they are.

    The file is written after each row, so that a run that is killed loses none; until a section has ended, rows of an
    earlier run stay that it has not come to.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and pictures; never written over results")
    parser.add_argument("--json", type=Path, help="where the results go (default: benchmarks/results)")
    parser.add_argument("--only", nargs="+", choices=sorted(sections), help="measure these sections")
    arguments = parser.parse_args()
    path = arguments.json or (None if arguments.quick else RESULTS / f"{name}.json")
    for section in arguments.only or sections:
        print(f"== {section}", file=sys.stderr, flush=True)
        rows: list[Row] = []
        for row in sections[section](arguments.quick):
            rows.append(_finite(row))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
            if path is not None:
                write(path, name, section, rows, ended=False)
        if path is not None:
            write(path, name, section, rows)
    if path is None:
        print("(--quick without --json: nothing written)", file=sys.stderr)


def write(path: Path, name: str, section: str, rows: list[Row], *, ended: bool = True) -> None:
    """Puts one section's rows into the file, keeping those of the other sections.

    Args:
        path: of the file.
        name: of the benchmark.
        section: whose rows these are.
        rows: all that there are so far.
        ended: whether these are all; else the section is marked as unfinished, and its earlier rows stay behind them.
    """
    known = json.loads(path.read_text()) if path.exists() else {"benchmark": name, "sections": {}, "rows": []}
    known["sections"][section] = {
        "measured": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": f"python -m benchmarks.{name} --only {section}",
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {package: _version(package) for package in ("keras-efficient", *_PACKAGES)},
    }
    if not ended:
        known["sections"][section]["unfinished"] = True
    kept = [row for row in known["rows"] if row["section"] != section]
    new = {row.what for row in rows}
    older = [row for row in known["rows"] if row["section"] == section and row["what"] not in new and not ended]
    known["rows"] = kept + [{"section": section, **asdict(row)} for row in rows] + older
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _finite(row: Row) -> Row:
    """The row as JSON can hold it: `None` for numbers that are none, which is then its reason."""
    numbers = {name: getattr(row, name) for name in ("ours", "peer", "ratio")}
    strange = {name: one for name, one in numbers.items() if one is not None and not math.isfinite(one)}
    if strange:
        told = ", ".join(f"{name} is {one}" for name, one in strange.items())
        row = replace(row, **dict.fromkeys(strange), reached=None, why="; ".join(filter(None, (row.why, told))))
    return replace(row, details=_finite_all(row.details))


def _finite_all(value: Any) -> Any:
    match value:
        case dict():
            return {name: _finite_all(one) for name, one in value.items()}
        case list() | tuple():
            return [_finite_all(one) for one in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f", ratio {row.ratio:.2f}"
    verdict = {True: "reached", False: "MISSED", None: "-"}[row.reached]
    return f"{row.what}: {row.ours} {row.unit} (peer {row.peer}{ratio}; bar {row.bar}) {verdict} {row.why}"


@cache
def commit() -> str:
    """The commit of the code that runs, and whether it was changed since; `unknown` where there is no git."""
    changes = ["git", "status", "--porcelain", "--", "*.py"]
    try:
        run, dirty = (
            subprocess.run(command, capture_output=True, text=True, check=False)
            for command in (["git", "rev-parse", "--short", "HEAD"], changes)
        )
    except OSError:
        return "unknown"
    return (run.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

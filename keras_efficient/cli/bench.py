"""`keras-efficient bench`: how long inference takes, models side by side on the same inputs, in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.cli import parse
from keras_efficient.cli.output import out
from keras_efficient.errors import WrongArgument

if TYPE_CHECKING:
    from keras_efficient.export.runtime import ExportedModel

__all__ = ["bench"]

_WARM_UPS = 3
_COLUMNS = {
    "model": "model",
    "runtime": "runtime",
    "latency_ms": "median ms",
    "ratio": "of first",
    "macs": "MACs",
    "operators": "operators",
    "neurons": "neurons",
    "bytes_read": "bytes read",
    "bytes": "bytes",
    "input": "input",
    "threads": "threads",
}


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL|FILE...", help="Zoo models, .keras, .tflite or .onnx files.")
    ],
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="SIZE", help="Where a size is free: 360x640, 64 or a=64,b=8.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="That the runtime may use.", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", help="Timed runs of each model.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Measure latency, operators and size; several models take turns (A B A B …)."""
    shape = parse.shape(input_shape)
    out.begin(as_json=as_json)
    with tempfile.TemporaryDirectory(prefix="keras_efficient-", ignore_cleanup_errors=True) as folder:
        entries = [
            _Entry(model, _as_file(model, number, shape, Path(folder)), shape, threads)
            for number, model in enumerate(models)
        ]
        _take_turns(entries, runs)
        first = entries[0].median
        rows = [entry.row(first) for entry in entries]
        told = {key for row in rows for key, value in row.items() if value is not None}
        out.rows(rows, {key: heading for key, heading in _COLUMNS.items() if key in told})


class _Entry:
    """A model in its runtime, with its input set and its times."""

    def __init__(self, model: str, path: Path, shape: parse.Shape | None, threads: int):
        from keras_efficient.cli.models import open_exported
        from keras_efficient.export.targets import registry

        self.model, self.path = model, path
        self.seconds: list[float] = []
        self.run = open_exported(path, threads)
        self.inputs = _inputs(model, self.run, shape)
        shapes = {name: array.shape for name, array in self.inputs.items()}
        self.facts = registry.find(None, path).inspect(path, shapes)
        with out.hushed():  # LiteRT speaks when it prepares a model for a size
            self.run.run(self.inputs)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, first: float) -> dict[str, Any]:
        """`ratio` is this median over the first model's."""
        ordered = sorted(self.seconds)
        ops = {name: dict(dtypes) for name, dtypes in self.facts["ops"].items()}
        return {
            "model": self.model,
            "runtime": "LiteRT" if self.path.suffix.lower() == ".tflite" else "ONNX Runtime",
            "latency_ms": round(1e3 * self.median, 4),
            "latency_ms_p10": round(1e3 * ordered[len(ordered) // 10], 4),
            "latency_ms_p90": round(1e3 * ordered[(9 * len(ordered)) // 10], 4),
            "ratio": round(self.median / first, 4),
            "runs": len(ordered),
            "threads": self.run.threads,
            "macs": self.facts["macs"],
            "operators": sum(count for dtypes in ops.values() for count in dtypes.values()),
            "ops": ops,
            "neurons": _neurons(self.run),
            "bytes_read": self.facts.get("bytes_read"),
            "bytes": self.path.stat().st_size,
            "input_shapes": {name: list(array.shape) for name, array in self.inputs.items()},
            "input": ", ".join("×".join(map(str, array.shape)) for array in self.inputs.values()),
        }


def _neurons(run: ExportedModel) -> str | None:
    """Of an output layer that answers from candidates: those that one answer looks at, of all."""
    layers = run.metadata.get("candidates") or {}
    return ", ".join(f"{layer['neurons']} of {layer['of']}" for layer in layers.values()) or None


def _as_file(model: str, number: int, shape: parse.Shape | None, folder: Path) -> Path:
    """The file itself, or a Keras model as a float32 `.tflite`."""
    from keras_efficient.cli.models import EXPORTED, open_keras

    if Path(model).suffix.lower() in EXPORTED:
        return Path(model)
    from keras_efficient import export

    network = open_keras(model)
    path = folder / f"{number}.tflite"
    with out.stages(f"exporting {model}") as show, out.hushed():
        export.save(network, path, target="tflite", input_shape=shape, on_progress=show)
    return path


def _inputs(model: str, run: ExportedModel, shape: parse.Shape | None) -> dict[str, Any]:
    """Random inputs in [0, 1], seeded; a free batch is 1, other free axes come from `shape`."""
    import numpy as np

    from keras_efficient.export.signature import InputSpec, resolve_shapes

    specs = tuple(InputSpec(name, run.input_shapes[name], run.input_dtypes[name]) for name in run.input_names)
    if isinstance(shape, dict) or (shape is not None and any(None in spec.shape[1:] for spec in specs)):
        specs = resolve_shapes(specs, shape)
    random = np.random.default_rng(0)
    inputs = {}
    for spec in specs:
        sizes = [size for size in (spec.shape[0] or 1, *spec.shape[1:]) if size is not None]
        if len(sizes) < len(spec.shape):
            size = "360x640" if len(spec.shape) == 4 else "x".join(["64"] * (len(spec.shape) - 1))
            size = size if len(specs) == 1 else ",".join(f"{one.name}={size}" for one in specs)
            raise WrongArgument(
                f"{model}: input {spec.name!r} has the shape {spec.shape}.",
                hint=f"Say at which size it is to be measured: --input-shape {size}.",
            )
        if isinstance(shape, tuple) and len(shape) == 2 and len(sizes) == 4 and tuple(sizes[1:3]) != shape:
            own = "×".join(map(str, sizes[1:3]))
            raise WrongArgument(
                f"{model}: has the fixed size {own}.",
                hint="Models are compared at one size: give this one as --input-shape, or export the file anew.",
            )
        numbers = random.random(sizes)
        text = spec.dtype == "object"  # words that no vocabulary has
        inputs[spec.name] = (numbers.astype(str) if text else numbers).astype(spec.dtype)
    return inputs


def _take_turns(entries: list[_Entry], runs: int) -> None:
    with out.progress("measuring") as show:
        for turn in range(_WARM_UPS + runs):
            for entry in entries:
                started = time.perf_counter()
                entry.run.invoke()
                if turn >= _WARM_UPS:
                    entry.seconds.append(time.perf_counter() - started)
            show(turn + 1, _WARM_UPS + runs)

"""Conversion in a child process that runs Keras on TensorFlow, for callers whose Keras runs on JAX or torch.

The parent saves the deployed model, which any process can open since it holds stock layers only, and the calibration
data; the child lowers, converts and compiles; the parent verifies the file. Run as
``python -m keras_efficient.export._worker JOB.json``: one JSON line on stdout, everything else on stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient import errors
from keras_efficient.errors import ConversionError, KerasEfficientError

if TYPE_CHECKING:
    import keras

    from keras_efficient.export.targets import Built, Request

__all__ = ["build_in_child"]


def build_in_child(deployed: keras.Model, request: Request, folder: Path) -> Built:
    """What `pipeline.build` does, in a child process with the TensorFlow backend.

    Raises:
        KerasEfficientError: the child's own error, of the same type.
        ConversionError: the child ended without an answer, or the model holds layers that it cannot open.
    """
    from keras_efficient.deploy import foreign_layers

    model_path, job_path = folder / "deployed.keras", folder / "job.json"
    deployed.save(model_path)
    modules = _modules_of(deployed, foreign_layers(deployed))
    job_path.write_text(json.dumps(_job(request, folder, model_path, modules)))
    # The child finds this package and the user's modules where the parent found them.
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {"TF_ENABLE_ONEDNN_OPTS": "0", **os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": paths}
    command = [sys.executable, "-m", __spec__.name, str(job_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    try:
        answer = json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1])
    except (ValueError, IndexError) as err:
        raise ConversionError(
            f"The conversion process ended with status {done.returncode} and gave no answer.",
            hint="Its messages are on stderr; is there enough memory?",
        ) from err
    if "error" in answer:
        raise _error_from(answer["error"])
    return _built_from(answer["built"])


def _modules_of(model: keras.Model, foreign: tuple[str, ...]) -> list[str]:
    """Modules that the child must import to know the user's own layers."""
    if not foreign:
        return []
    modules = {type(layer).__module__ for layer in model._flatten_layers()}
    if "__main__" in modules:
        raise ConversionError(
            f"Layer {foreign[0]!r} is defined in the running script, so the conversion process cannot open it.",
            hint="Move its class into a module, or run on the TensorFlow backend.",
        )
    return sorted(module for module in modules if module.partition(".")[0] not in ("keras", "keras_efficient"))


def _job(request: Request, folder: Path, model_path: Path, modules: list[str]) -> dict[str, Any]:
    return {
        "model": str(model_path),
        "modules": modules,
        "folder": str(folder),
        "target": request.target.name,
        "precision": request.precision,
        "inputs": [asdict(spec) for spec in request.inputs],
        "options": dict(request.options),
        "metadata": dict(request.metadata),
        "calibration": _save_calibration(request, folder),
    }


def _save_calibration(request: Request, folder: Path) -> dict[str, Any] | None:
    import numpy as np

    if request.calibration is None:
        return None
    path = folder / "calibration"
    path.mkdir()
    for index, sample in enumerate(request.calibration):
        # By place: savez has keywords of its own, which an input may be called.
        np.savez(path / f"{index}.npz", *(sample[spec.name] for spec in request.inputs))
    return {"folder": str(path), "count": len(request.calibration), "source": request.calibration.source}


def _request_from(job: Mapping[str, Any]) -> Request:
    import numpy as np

    from keras_efficient.export.calibration import Calibration
    from keras_efficient.export.signature import InputSpec
    from keras_efficient.export.targets import Request, registry

    calibration = None
    if job["calibration"] is not None:
        stored = Path(job["calibration"]["folder"])

        def load(index: int) -> dict[str, np.ndarray]:
            with np.load(stored / f"{index}.npz") as arrays:
                return {spec["name"]: arrays[f"arr_{place}"] for place, spec in enumerate(job["inputs"])}

        calibration = Calibration(job["calibration"]["count"], load, job["calibration"]["source"])
    return Request(
        target=registry[job["target"]],
        precision=job["precision"],
        inputs=tuple(InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in job["inputs"]),
        calibration=calibration,
        options=job["options"],
        metadata=job["metadata"],
    )


def _built_from(values: Mapping[str, Any]) -> Built:
    from keras_efficient.export.targets import Built

    paths = {key: Path(values[key]) for key in ("path", "runnable")}
    lists = {key: tuple(values[key]) for key in ("lowerings", "notes")}
    return Built(**{**values, **paths, **lists})


def _error_values(error: KerasEfficientError) -> dict[str, Any]:
    fields = {key: value for key, value in vars(error).items() if isinstance(value, (str, int, float, list, tuple))}
    return {"type": type(error).__name__, "message": error.message, "hint": error.hint, "fields": fields}


def _error_from(values: Mapping[str, Any]) -> KerasEfficientError:
    """The child's error again; its constructor is passed by, since each type's takes other arguments."""
    kind = getattr(errors, values["type"], ConversionError)
    error = kind.__new__(kind)
    KerasEfficientError.__init__(error, values["message"], hint=values["hint"])
    vars(error).update(values["fields"])
    return error


def main(job_path: str) -> int:
    """Does the job in the file, and prints one JSON line: ``{"built": …}`` or ``{"error": …}``."""
    answer_to = os.dup(1)
    os.dup2(2, 1)  # converters and compilers print to descriptor 1
    try:
        answer = {"built": _do(json.loads(Path(job_path).read_text()))}
    except KerasEfficientError as err:
        answer = {"error": _error_values(err)}
    except Exception as err:  # the parent must get an answer in any case
        traceback.print_exc()
        wrapped = ConversionError(f"The conversion process failed: {type(err).__name__}: {err}")
        answer = {"error": _error_values(wrapped)}
    with os.fdopen(answer_to, "w", encoding="utf-8") as out:
        out.write(json.dumps(answer, default=str) + "\n")
    return 1 if "error" in answer else 0


def _do(job: Mapping[str, Any]) -> dict[str, Any]:
    import importlib

    import keras

    from keras_efficient.export.pipeline import build

    for module in job["modules"]:
        importlib.import_module(module)
    model = keras.saving.load_model(job["model"], compile=False)
    return asdict(build(model, _request_from(job), Path(job["folder"])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

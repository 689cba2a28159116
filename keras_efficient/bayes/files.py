"""Posteriors in files: a zip of the architecture as JSON and of plain arrays, in which nothing can be executed."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from numpy.lib import format as npy

from keras_efficient.atomic import replacing
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import Posterior, StackedPosterior, StochasticPosterior
from keras_efficient.errors import FileProblem

__all__ = ["load_posterior", "write"]

FORMAT = 1
MOST_JSON = 2**26  # bytes
MOST_DRAWS = 100_000
HEADER = "posterior.json"


def write(posterior: Posterior, path: str | Path, *, overwrite: bool = False) -> None:
    """Of `Posterior.save`."""
    header = {
        "format": FORMAT,
        "kind": posterior.kind,
        "model": json.loads(posterior.model.to_json()),
        "count": posterior.count,
        "seed": getattr(posterior, "seed", None),
        "diagnostics": posterior.diagnostics,
    }
    with replacing(Path(path), overwrite=overwrite) as temporary, zipfile.ZipFile(temporary, "w") as file:
        file.writestr(HEADER, json.dumps(header))
        for name, arrays in posterior.arrays().items():
            for number, array in enumerate(arrays):
                with file.open(f"{name}/{number}.npy", "w", force_zip64=True) as entry:
                    npy.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)


def load_posterior(path: str | Path) -> StackedPosterior | StochasticPosterior:
    """Opens what `Posterior.save` wrote.

    The file is data: no `Lambda`, no class that is not registered, no array of another size than its part of the file,
    no network of other weights than the file holds.

    Raises:
        FileProblem: missing, damaged, or not such a file.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            header = _header(file)
            model = _model(header["model"], file, header["kind"] == "stacked")
            parts = {
                name: [_array(file, f"{name}/{number}.npy") for number in range(len(variables))]
                for name, variables in _variables(model).items()
            }
    except FileNotFoundError as err:
        raise FileProblem(path, "no such file.") from err
    except FileProblem as err:
        raise FileProblem(path, err.reason, hint=err.hint) from err
    except Exception as err:  # of zip, JSON, arrays and Keras' own reading of configurations: anything
        raise FileProblem(path, f"is no posterior, or is damaged: {err}") from err
    if header["kind"] == "stacked":
        return StackedPosterior(Members(model, **parts), diagnostics=header["diagnostics"])
    for name, variables in _variables(model).items():
        for variable, value in zip(variables, parts[name], strict=True):
            variable.assign(value)
    return StochasticPosterior(model, header["count"], seed=header["seed"], diagnostics=header["diagnostics"])


def _variables(model: keras.Model) -> dict[str, list[Any]]:
    return {"trainable": model.trainable_variables, "non_trainable": model.non_trainable_variables}


def _header(file: zipfile.ZipFile) -> dict[str, Any]:
    for entry in file.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:  # what is packed can be of any size
            raise FileProblem(file.filename, f"is no posterior: {entry.filename!r} is packed.")
    if file.getinfo(HEADER).file_size > MOST_JSON:
        raise FileProblem(file.filename, f"has a header of over {MOST_JSON} bytes.")
    found = json.loads(file.read(HEADER))
    if found["format"] != FORMAT:
        raise FileProblem(
            file.filename, f"has format {found['format']!r}, this version reads {FORMAT}.", hint="Install a newer one."
        )
    kind, count, seed = found["kind"], found["count"], found["seed"]
    whole = all(type(one) is int for one in (count, seed)) and 1 <= count <= MOST_DRAWS and 0 <= seed < 2**64
    right = kind == "stacked" or (kind == "stochastic" and whole)
    if not right or not isinstance(found["diagnostics"], dict):
        raise FileProblem(file.filename, f"is of an unknown kind: {kind!r}.")
    return dict(found)


def _model(config: dict[str, Any], file: zipfile.ZipFile, stacked: bool) -> keras.Model:
    """The network, whose weights are made only if the file holds as many."""
    # Keras remembers variables that have no value yet, and would give them one with the next model.
    waiting = "uninitialized_variables"
    before = list(global_state.get_global_attribute(waiting, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            # A copy: reading empties it.
            planned = keras.saving.deserialize_keras_object(copy.deepcopy(config), safe_mode=True)
    finally:
        global_state.set_global_attribute(waiting, before)
    for name, variables in _variables(planned).items():
        for number, variable in enumerate(variables):
            with file.open(f"{name}/{number}.npy") as entry:
                shape, _ = _shape(entry)
            if shape[stacked:] != tuple(variable.shape) or len(shape) != stacked + len(variable.shape):
                wanted = tuple(variable.shape)
                raise FileProblem(file.filename, f"{name}/{number} is {shape}, its network has {wanted} there.")
    model: keras.Model = keras.saving.deserialize_keras_object(config, safe_mode=True)
    return model


def _array(file: zipfile.ZipFile, name: str) -> np.ndarray:
    size = file.getinfo(name).file_size
    with file.open(name) as entry:
        shape, dtype = _shape(entry)
        length = int(np.prod([*shape, dtype.itemsize], dtype=object))
        content = entry.read(size)
    if len(content) != length:
        raise FileProblem(file.filename, f"{name} should hold {length} bytes, and holds {len(content)}.")
    return np.frombuffer(content, dtype).reshape(shape)


def _shape(entry: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, fortran, dtype = readers[npy.read_magic(entry)](entry)
    if fortran or dtype.kind not in "fiub":
        raise FileProblem(entry, f"{dtype} is no plain array.")
    return tuple(shape), dtype

"""The program in a process of its own, and files that several tests share (each conversion costs seconds)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PHOTOS = Path(__file__).parents[2] / "examples" / "data"

# Runs the program and tells on the last line of stderr which packages were imported.
_SPY = """
import sys
from keras_efficient.cli import main
try:
    main()
finally:
    print("IMPORTED", *sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def program(*arguments, cwd=None, spy=False, **environment):
    """Runs `keras-efficient` and returns the finished process; spied on, with the attribute `imported`."""
    command = [sys.executable, "-P", "-c", _SPY] if spy else [sys.executable, "-P", "-m", "keras_efficient.cli"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "KERAS_BACKEND": "tensorflow", **environment},
        check=False,
    )
    if spy:
        done.imported = set(done.stderr.splitlines()[-1].split()[1:])
    return done


@pytest.fixture(scope="session")
def keras_file(tmp_path_factory):
    """A super-resolution model, x2, of few weights."""
    import keras

    from keras_efficient import models

    keras.utils.set_random_seed(5)
    path = tmp_path_factory.mktemp("cli") / "tiny.keras"
    models.SESR(2, "m3", activation="relu", expansion=4).save(path)
    return path


@pytest.fixture(scope="session")
def int8_export(keras_file):
    """The `.tflite` of the program's own making, and the JSON that it printed."""
    path = keras_file.with_name("tiny.tflite")
    done = program(
        *("export", keras_file, "-o", path, "--target", "tflite", "--precision", "int8"),
        *("--calibration", PHOTOS, "--input-shape", "64x96", "--json"),
    )
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout)

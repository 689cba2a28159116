"""Compression leaves `tf.keras` and the environment of the process as they were: each case in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
touch, train = sys.argv[1], sys.argv[2] == "train"
import tensorflow as tf
names = lambda: [tf.keras.Model.__module__.split(".")[0], tf.compat.v1.keras.Model.__module__.split(".")[0]]
before = names() if touch == "before" else None
import keras
from keras_efficient import compress
from keras_efficient.compress._tfmot import import_tfmot
import_tfmot()
after, sparsity = names(), None
if train:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(8)(inputs))
    session = compress.prune(model)
    session.compile("sgd", "mse")
    session.fit(tf.ones((4, 4)), tf.ones((4, 8)), verbose=0)
    sparsity = compress.measure(session.strip()).sparsity
    after = names()
    # Both frameworks go on working side by side.
    model.compile("sgd", "mse")
    model.fit(tf.ones((4, 4)), tf.ones((4, 8)), verbose=0)
print(json.dumps({
    "before": before, "after": after, "variable": os.environ.get("TF_USE_LEGACY_KERAS"),
    "sparsity": sparsity, "keras": keras.__version__,
    "losses": [tf.keras.losses.MeanSquaredError.__module__.split(".")[0],
               tf.losses.MeanSquaredError.__module__.split(".")[0]],
}))
"""


@pytest.mark.parametrize(
    ("variable", "touch", "expected"),
    [
        (None, "after", "keras"),
        ("1", "before", "tf_keras"),
        ("0", "after", "keras"),
        pytest.param(None, "before", "keras", marks=pytest.mark.slow),
        pytest.param("1", "after", "tf_keras", marks=pytest.mark.slow),
        pytest.param("0", "before", "keras", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_keeps_its_tf_keras(variable, touch, expected, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    if variable is not None:
        environment["TF_USE_LEGACY_KERAS"] = variable
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, touch, "train" if variable is None and touch == "after" else "import"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["variable"] == variable
    assert found["after"] == [expected, expected]
    assert found["before"] in (None, found["after"])
    assert found["losses"] == [expected, expected]
    assert found["keras"].startswith("3.")
    assert found["sparsity"] in (None, 0.5)


def test_importing_the_package_imports_no_framework(tmp_path):
    script = (
        "import sys, keras_efficient.compress; print(sorted({'keras', 'tensorflow', 'tf_keras'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr

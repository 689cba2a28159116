"""`keras-efficient export` and `bench` on a small model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from keras_efficient.cli.export import _show
from keras_efficient.export import Report

from .conftest import PHOTOS, program

KEYS = {
    "target",
    "precision",
    "bytes",
    "parameters",
    "macs",
    "ops",
    "sqnr_db",
    "max_error",
    "latency_ms",
    "lowerings",
    "notes",
}


def test_export_prints_the_report_as_json(int8_export):
    path, report = int8_export
    assert report.keys() >= KEYS
    assert (report["target"], report["precision"]) == ("tflite", "int8")
    assert report["bytes"] == path.stat().st_size
    assert set(report["ops"]["CONV_2D"]) == {"int8"}


def test_the_file_knows_how_it_is_to_be_used(int8_export):
    from keras_efficient import export

    metadata = export.load(int8_export[0]).metadata
    # SESR-M3: first and last convolution 5×5, three of 3×3 between: 2 + 3 + 2
    assert (metadata["scale"], metadata["halo"], metadata["multiple"]) == (2, 7, 1)


def test_an_existing_file_is_kept(int8_export, keras_file):
    path = int8_export[0]
    before = path.read_bytes()
    done = program("export", keras_file, "-o", path)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert path.read_bytes() == before


def test_options_of_a_target_and_units_of_its_report(keras_file, tmp_path, capsys):
    path = tmp_path / "m.onnx"
    done = program("export", keras_file, "-o", path, "--option", "opset=17", "--option", "layout=nchw", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["notes"][0] == "ONNX opset 17."
    assert done.stderr == "", "no warnings of others"
    kernel = {
        "template": "tile",
        "names": ["a"],
        "layers": 1,
        "registers": 40,
        "shared_bytes": 48064,
        "spills": 0,
        "measured_ms": None,
    }
    second = {**kernel, "template": "strip", "names": ["a", "b", "c"], "layers": 3, "spills": 8, "measured_ms": 1.5}
    report = Report("cuda-sm80", "float16", 1, 1, kernels=[{**kernel, "estimated_ms": 0.0088441}, second])
    _show(report)
    words = " ".join(capsys.readouterr().out.split())
    sizes = "40 registers a thread, 48,064 bytes shared a block"
    assert f"tile: a, {sizes}, no spills, 0.00884 ms estimated" in words
    assert f"strip: a … c (3 layers), {sizes}, 8 bytes spilled, 1.5 ms measured" in words


def test_bench_of_an_exported_file(int8_export):
    path = int8_export[0]
    done = program("bench", path, path, "--runs", "3", "--json", spy=True)
    rows = json.loads(done.stdout)
    assert [row["model"] for row in rows] == [str(path)] * 2
    assert rows[0]["ratio"] == 1
    assert all(row["latency_ms"] > 0 and row["runs"] == 3 for row in rows)
    # 8,912 weights, each used once for each of the 64×96 pixels
    assert rows[0]["macs"] == 8_912 * 64 * 96
    assert rows[0]["bytes"] == path.stat().st_size
    assert not {"keras", "tensorflow"} & done.imported
    other = program("bench", path, "--input-shape", "32x32")
    assert other.returncode == 2
    assert "fixed size 64×96" in other.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_behind(keras_file, tmp_path):
    command = [sys.executable, "-P", "-m", "keras_efficient.cli", "-v", "export", str(keras_file)]
    command += ["-o", str(tmp_path / "a.tflite"), "--precision", "int8", "--calibration", str(PHOTOS)]
    command += ["--input-shape", "512x512"]
    # A background job's children inherit an ignored SIGINT, which Python would keep.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path), **heeding) as process:
        for line in process.stderr:
            if "converting" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert "Traceback" not in rest
    assert not (tmp_path / "a.tflite").exists()
    # What TensorFlow generates of Python functions is its own to remove, and stays if it is just at it.
    left = [one.name for one in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if not name.startswith("__autograph_generated")] == []


def _environment(tmp_path):
    import os

    (tmp_path / "temporary").mkdir()
    return {**os.environ, "KERAS_BACKEND": "tensorflow", "TMPDIR": str(tmp_path / "temporary")}


@pytest.fixture(scope="module")
def posterior_file(tmp_path_factory):
    import keras

    from keras_efficient.bayes import Members, StackedPosterior

    def network():
        inputs = keras.Input((4,))
        return keras.Model(inputs, keras.layers.Dense(3)(inputs))

    path = tmp_path_factory.mktemp("posterior") / "three.zip"
    StackedPosterior(Members.new(network, 3, seed=0)).save(path)
    return path


def test_a_posterior_is_exported(posterior_file, tmp_path):
    import numpy as np

    from keras_efficient import export
    from keras_efficient.bayes import load_posterior

    path = tmp_path / "two.tflite"
    done = program("export", posterior_file, "-o", path, "--members", "2", "--json")
    assert json.loads(done.stdout)["bytes"] == path.stat().st_size, done.stderr
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    expected = load_posterior(posterior_file).predict(x, members=2, reduce="mean")
    np.testing.assert_allclose(export.load(path)(x), expected, atol=1e-5)


def test_what_is_of_a_posterior_is_of_no_other_file(posterior_file, keras_file, tmp_path):
    done = program("export", keras_file, "-o", tmp_path / "m.tflite", "--mode", "mean")
    assert done.returncode == 2
    assert "--mode is of a posterior" in done.stderr
    done = program("export", posterior_file, "-o", tmp_path / "m.tflite", "--mode", "men")
    assert done.returncode == 2
    assert "mean" in done.stderr
    done = program("export", tmp_path / "none.zip", "-o", tmp_path / "m.tflite")
    assert "no such file" in done.stderr

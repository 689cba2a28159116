"""The road from model to file: arguments, calibration data, verification, and what is on the disk afterwards."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import EntryPoint

import keras
import numpy as np
import pytest

from keras_efficient import export
from keras_efficient.errors import (
    CalibrationError,
    ConversionError,
    FileProblem,
    UnknownName,
    UnsupportedLayer,
    VerificationError,
    WrongArgument,
)
from keras_efficient.export import pipeline
from keras_efficient.export.calibration import calibration_from
from keras_efficient.export.report import Report
from keras_efficient.export.signature import InputSpec, resolve_shapes
from keras_efficient.export.targets import Target, Targets
from keras_efficient.export.targets import registry as target_registry

IMAGE = (InputSpec("y", (None, None, None, 1), "float32"),)


# --- arguments ---------------------------------------------------------------------------------------------------


def test_importing_export_imports_neither_keras_nor_tensorflow():
    code = """
        import sys
        from keras_efficient import export
        export.targets, export.load, export.save, export.Report
        print(sorted(m for m in ("keras", "tensorflow", "jax", "onnx") if m in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_targets_is_a_listing():
    assert {"tflite", "onnx"} <= set(export.targets)
    assert all(isinstance(target, Target) for target in export.targets.values())
    assert "int8" in export.targets["tflite"].precisions


@pytest.mark.parametrize(
    ("path", "arguments", "kind", "words"),
    [
        ("m.tflite", {"target": "tflit"}, UnknownName, "Did you mean 'tflite'"),
        ("m.tflite", {"precision": "int9"}, UnknownName, "Did you mean 'int8'"),
        ("m.tflite", {"target": "onnx"}, WrongArgument, "m.onnx"),
        ("m.xyz", {}, WrongArgument, "no target writes '.xyz'"),
        ("m.onnx", {"opsett": 17}, UnknownName, "Did you mean 'opset'"),
        ("m.onnx", {"opset": 3}, WrongArgument, "15, 16, 17, 18"),
        ("m.onnx", {"precision": "int8"}, UnknownName, "float32"),
        ("m.tflite", {"precision": "int8"}, CalibrationError, "none was given"),
        ("m.tflite", {"precision": "int8", "calibration": np.zeros((0, 8, 8, 1))}, CalibrationError, "empty"),
        ("m.tflite", {"precision": "int8", "calibration": []}, CalibrationError, "empty"),
        ("m.tflite", {"precision": "int8", "calibration": np.zeros((4, 8, 8, 3))}, CalibrationError, "shape"),
        ("m.tflite", {"samples": []}, CalibrationError, "empty"),
        ("m.tflite", {"input_shape": (8, 8, 3)}, WrongArgument, "does not fit"),
        ("m.tflite", {"input_shape": (0, 8)}, WrongArgument, "no size"),
        ("m.tflite", {"metadata": {"x": object()}}, WrongArgument, "JSON"),
        ("missing/m.tflite", {}, FileProblem, "no such folder"),
        (".", {"target": "tflite"}, WrongArgument, "tflite"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(small_model, tmp_path, path, arguments, kind, words, monkeypatch):
    monkeypatch.setattr(pipeline, "_build", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(kind, match=words):
        export.save(small_model, tmp_path / path, **arguments)
    assert not list(tmp_path.iterdir())


def test_model_without_symbolic_inputs_is_refused(tmp_path):
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(UnsupportedLayer, match="no symbolic inputs"):
        export.save(Mine(name="mine"), tmp_path / "m.tflite")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, (None, None, None, 1)),
        ((6, 8), (1, 6, 8, 1)),
        ((6, 8, 1), (1, 6, 8, 1)),
        ((2, 6, 8, 1), (2, 6, 8, 1)),
        ((None, 6, 8, 1), (None, 6, 8, 1)),
        ({"y": (6, 8)}, (1, 6, 8, 1)),
    ],
)
def test_input_shape_forms(given, want):
    assert resolve_shapes(IMAGE, given)[0].shape == want


# --- calibration data --------------------------------------------------------------------------------------------


def _forms(images):
    import tensorflow as tf

    return {
        "array": images,
        "list of samples": list(images),
        "generator of samples": (image for image in images),
        "generator of batches": (images[i : i + 4] for i in range(0, 12, 4)),
        "pairs": [(image[None], np.zeros(1)) for image in images],
        "dict": {"y": images},
        "dicts": [{"y": image[None]} for image in images],
        "tf.data": tf.data.Dataset.from_tensor_slices(images).batch(5),
    }


def test_calibration_forms_are_equal(images):
    for name, data in _forms(images).items():
        calibration = calibration_from(data, IMAGE)
        assert len(calibration) == 12, name
        for sample, image in zip(calibration, images, strict=True):
            np.testing.assert_array_equal(sample["y"], image[None], err_msg=name)
        assert len(list(calibration)) == 12, f"{name}: a second pass gives the same"


def test_calibration_folder(tmp_path, images):
    from PIL import Image

    spec = (InputSpec("y", (1, 40, 20, 3), "float32"),)
    with pytest.raises(FileProblem, match="no such folder"):
        calibration_from(tmp_path / "none", spec)
    with pytest.raises(CalibrationError, match="no image"):
        calibration_from(tmp_path, spec)
    picture = np.tile((images[0] * 255).astype("uint8"), (1, 1, 3))
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (sample,) = calibration_from(tmp_path, spec)
    assert sample["y"].shape == (1, 40, 20, 3)
    # Higher than the picture: its mirror image continues it. Narrower: its centre is taken.
    np.testing.assert_allclose(sample["y"][0, :32], picture[:, 6:26] / 255, atol=1e-6)
    np.testing.assert_allclose(sample["y"][0, 32:], picture[:-9:-1, 6:26] / 255, atol=1e-6)
    (tmp_path / "b.png").write_bytes(b"damaged")
    with pytest.raises(FileProblem, match=r"b\.png: not a readable image"):
        list(calibration_from(tmp_path, spec))


def test_calibration_of_differing_sizes_is_refused(images):
    with pytest.raises(CalibrationError, match="sample 1"):
        calibration_from([images[0], images[1, :16]], IMAGE)


def test_calibration_for_several_inputs():
    specs = (InputSpec("a", (None, 4), "float32"), InputSpec("b", (None, 2), "int32"))
    a, b = np.ones((3, 4)), np.arange(6).reshape(3, 2)
    for data in ([a, b], {"b": b, "a": a}, ((x, y) for x, y in zip(a, b, strict=True))):
        samples = list(calibration_from(data, specs))
        assert len(samples) == 3
        np.testing.assert_array_equal(samples[2]["b"], [[4, 5]])
        assert samples[0]["b"].dtype == np.int32
    with pytest.raises(CalibrationError, match="'b' is missing"):
        calibration_from({"a": a}, specs)
    with pytest.raises(CalibrationError, match="one array was given"):
        calibration_from(a, specs)


# --- the report --------------------------------------------------------------------------------------------------


def test_report_is_json(saved):
    path, report = saved("float32")
    values = json.loads(report.to_json())
    assert values["target"] == "tflite"
    assert values["bytes"] == path.stat().st_size
    assert values["parameters"] == 3076
    assert values["macs"] == 32 * 32 * (9 * 16 + 9 * 16 * 16 + 9 * 16 * 4)
    assert values["latency_ms"] > 0
    assert any("thread" in note for note in values["notes"])


def test_infinite_sqnr_is_no_json_number():
    report = Report("tflite", "float32", 1, 1, sqnr_db=float("inf"))
    assert json.loads(report.to_json())["sqnr_db"] is None
    assert "last bit" in json.loads(report.to_json())["notes"][-1]


def test_model_is_not_changed(small_model, saved):
    before = [np.array(w) for w in small_model.get_weights()]
    saved("int8")
    for a, b in zip(before, small_model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- verification ------------------------------------------------------------------------------------------------


def _sabotage(monkeypatch, change):
    """Lets the converter write another model than the one it is given."""
    target = target_registry["tflite"]
    convert = target.convert

    def wrong(model, request, path):
        twin = keras.models.clone_model(model)
        twin.set_weights([change(w) for w in model.get_weights()])
        return convert(twin, request, path)

    monkeypatch.setitem(target_registry._targets, "tflite", _replaced(target, convert=wrong))


def _replaced(target, **changes):
    from dataclasses import replace

    return replace(target, **changes)


def test_a_wrong_file_is_not_moved_into_place(small_model, images, tmp_path, monkeypatch):
    _sabotage(monkeypatch, lambda w: w * 1.01)
    with pytest.raises(VerificationError, match=r"SQNR .* dB"):
        export.save(small_model, tmp_path / "m.tflite", samples=images)
    assert not list(tmp_path.iterdir())
    report = export.save(small_model, tmp_path / "m.tflite", samples=images, verify=False)
    assert (tmp_path / "m.tflite").exists()
    assert report.sqnr_db < 60
    assert any("MISSES ITS TOLERANCE" in note for note in report.notes)


def test_a_file_that_is_not_finite_is_refused(small_model, images, tmp_path, monkeypatch):
    _sabotage(monkeypatch, lambda w: w * np.nan)
    with pytest.raises(ConversionError, match="not finite"):
        export.save(small_model, tmp_path / "m.tflite", samples=images, verify=False)


def test_a_model_that_is_not_finite_itself_is_told_apart(tmp_path, images):
    inputs = keras.Input((32, 32, 1))
    layer = keras.layers.Conv2D(2, 1)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(np.full((1, 1, 1, 2), np.nan))
    with pytest.raises(VerificationError, match="model itself is not finite"):
        export.save(model, tmp_path / "m.tflite", samples=images)


def test_synthetic_samples_are_announced(small_model, tmp_path):
    report = export.save(small_model, tmp_path / "m.tflite", input_shape=(8, 8))
    assert any("synthetic" in note for note in report.notes)


# --- the disk ----------------------------------------------------------------------------------------------------


def test_an_existing_file_stays(small_model, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_text("precious")
    with pytest.raises(FileProblem, match="exists already"):
        export.save(small_model, path)
    assert path.read_text() == "precious"
    export.save(small_model, path, input_shape=(8, 8), overwrite=True)
    assert export.load(path).input_shapes == {"y": (1, 8, 8, 1)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_stays(tmp_path):
    source, path = tmp_path / "source", tmp_path / "m.tflite"
    source.write_bytes(b"new")
    path.write_bytes(b"other")
    with pytest.raises(FileProblem, match="exists already"):
        pipeline._place(source, path, overwrite=False)
    assert path.read_bytes() == b"other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tflite", "source"]


def test_full_disk(tmp_path):
    """The limit of file sizes stands for a full disk: the write fails half-way."""
    source, path = tmp_path / "source", tmp_path / "m.tflite"
    source.write_bytes(b"x" * 200_000)
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(FileProblem, match="cannot be written"):
            pipeline._place(source, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tflite", "source"]


def test_full_disk_of_temporary_files(small_model, tmp_path, monkeypatch):
    def full(model, precision):
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(pipeline, "_deploy", full)
    with pytest.raises(FileProblem, match=r"/somewhere: cannot be written: No space left on device\."):
        export.save(small_model, tmp_path / "m.tflite", input_shape=(8, 8))
    assert not list(tmp_path.iterdir())


def test_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(FileProblem, match="cannot be written"):
        pipeline._place(tmp_path / "s", tmp_path / "m.tflite", overwrite=False)


def test_killed_while_moving_leaves_the_old_file(tmp_path):
    """SIGKILL at the last moment before the rename: the old file is whole."""
    code = """
        import os, sys, time
        from pathlib import Path
        from keras_efficient.export import pipeline
        os.fsync = lambda fd: (print("here", flush=True), time.sleep(60))
        folder = Path(sys.argv[1])
        pipeline._place(folder / "source", folder / "m.tflite", True)
    """
    (tmp_path / "source").write_bytes(b"new" * 1000)
    (tmp_path / "m.tflite").write_bytes(b"old")
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == b"here"
    child.kill()
    child.wait()
    assert (tmp_path / "m.tflite").read_bytes() == b"old"


def test_interrupt_leaves_nothing(small_model, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.save(small_model, tmp_path / "m.tflite", input_shape=(8, 8))
    assert not list(tmp_path.iterdir())


# --- progress and plug-ins ---------------------------------------------------------------------------------------


def test_stdout_is_silent_and_progress_is_told(small_model, images, tmp_path, capfd):
    lines = []
    export.save(small_model, tmp_path / "m.tflite", precision="int8", calibration=images, on_progress=lines.append)
    assert capfd.readouterr().out == ""
    assert any("convert" in line for line in lines)
    assert any("verify" in line for line in lines)


@pytest.fixture
def plug(monkeypatch):
    def install(*entries):
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
        return Targets()

    return install


def test_plugin_adds_a_target(plug, monkeypatch):
    mine = _replaced(target_registry["tflite"], name="mine", default=False)
    entry = EntryPoint("mine", "json:dumps", "keras_efficient.targets")
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda: [mine])
    targets = plug(entry)
    assert targets["mine"] is mine
    assert not targets.broken


def test_broken_plugin_is_reported_and_not_fatal(plug):
    targets = plug(EntryPoint("bad", "no_such_module_at_all:x", "keras_efficient.targets"))
    with pytest.warns(UserWarning, match="'bad'.*broken"):
        assert "tflite" in targets
    assert "no_such_module_at_all" in targets.broken["bad"]


# --- other backends ----------------------------------------------------------------------------------------------


@pytest.mark.jax
def test_jax_backend_exports_through_a_child(small_model, images, tmp_path, capfd):
    report = export.save(small_model, tmp_path / "m.tflite", precision="int8", calibration=images)
    assert report.sqnr_db > 20
    assert "MAXIMUM" in report.ops
    assert capfd.readouterr().out == ""
    inputs = keras.Input((8, 8, 1), name="y")
    sinus = keras.Model(inputs, keras.ops.erf(keras.layers.Conv2D(2, 3, name="before")(inputs)))
    with pytest.raises(ConversionError, match="Erf"):
        export.save(sinus, tmp_path / "n.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]


def test_child_process_gives_errors_back_as_they_were():
    from keras_efficient.export import _worker

    for error in (
        UnsupportedLayer("a/b", "has no kernel.", hint="Do this."),
        FileProblem("x.tflite", "is bad."),
        UnknownName("target", "tflit", ["tflite"]),
        CalibrationError("none.", hint="give some."),
    ):
        again = _worker._error_from(json.loads(json.dumps(_worker._error_values(error))))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error) or again.hint == error.hint


def test_time_is_not_wasted_on_slow_models():
    """Few runs where one lasts long: two seconds of measuring, not twenty runs of a second."""
    from keras_efficient.export.verify import measure_latency

    class Slow:
        threads = 1
        count = 0

        def _named(self, x):
            return x

        def run(self, x):
            pass

        def invoke(self):
            self.count += 1
            time.sleep(0.5)

    slow = Slow()
    milliseconds, note = measure_latency(slow, {"x": np.zeros((1, 2))})
    assert slow.count <= 8
    assert 450 < milliseconds < 2000
    assert "1×2" in note

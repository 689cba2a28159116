"""The road from model to file: arguments, calibration data, verification, and what is on the disk afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_efficient import export
from keras_efficient.deploy import deploy
from keras_efficient.errors import (
    CalibrationError,
    ConversionError,
    FileProblem,
    UnknownName,
    UnsupportedLayer,
    VerificationError,
    WrongArgument,
)
from keras_efficient.export import pipeline, verify
from keras_efficient.export.calibration import Calibration, calibration_from
from keras_efficient.export.report import Report
from keras_efficient.export.signature import InputSpec, input_specs, resolve_shapes, rounded_outputs
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


def spoilt(value: float) -> np.ndarray:
    """Images of which number 3 holds `value` once."""
    data = np.random.default_rng(0).random((5, 8, 8, 1), dtype=np.float32)
    data[3, 2, 2] = value
    return data


ETHOS = {"target": "ethos-u55-128", "precision": "int8", "input_shape": (8, 8), "calibration": spoilt(0)}


@pytest.mark.parametrize(
    ("path", "arguments", "kind", "words"),
    [
        ("m.tflite", {"target": "tflit"}, UnknownName, r"Did you mean 'tflite'.*export --list-targets"),
        ("m.tflite", {"precision": "int9"}, UnknownName, "Did you mean 'int8'"),
        ("m.tflite", {"target": "onnx"}, WrongArgument, "m.onnx"),
        ("m.xyz", {}, WrongArgument, "no target writes '.xyz'"),
        ("m", {}, WrongArgument, "no target writes files without a suffix"),
        ("m.tflite", {"calibratoin": None}, UnknownName, "Did you mean 'calibration'"),
        ("m.onnx", {"opset": {17}}, WrongArgument, "opset must hold JSON"),
        ("m.tflite", ETHOS | {"tile": "banana"}, WrongArgument, "no tile"),
        ("m.tflite", ETHOS | {"memory_mode": "Dedicated_Sram_512KB"}, WrongArgument, "choose one|cannot have"),
        ("m.onnx", {"opsett": 17}, UnknownName, "Did you mean 'opset'"),
        ("m.onnx", {"opset": 3}, WrongArgument, "15, 16, 17, 18"),
        ("m.onnx", {"precision": "int8"}, UnknownName, "float32"),
        ("m.tflite", {"precision": "int8"}, CalibrationError, "none was given"),
        ("m.tflite", {"precision": "int8", "calibration": np.zeros((0, 8, 8, 1))}, CalibrationError, "empty"),
        ("m.tflite", {"precision": "int8", "calibration": []}, CalibrationError, "empty"),
        ("m.tflite", {"precision": "int8", "calibration": np.zeros((4, 8, 8, 3))}, CalibrationError, "shape"),
        ("m.tflite", {"precision": "int8", "calibration": spoilt(np.inf)}, CalibrationError, "sample 3: 1 of 64"),
        ("m.tflite", {"precision": "int8", "calibration": iter(spoilt(np.nan))}, CalibrationError, "sample 3: 1 of 64"),
        ("m.tflite", {"precision": "int8", "calibration": np.zeros((9, 8, 8, 1))}, CalibrationError, "all the same"),
        ("m.tflite", {"calibration": "no/such/folder"}, FileProblem, "no such folder"),
        ("m.tflite", {"samples": spoilt(np.nan)}, CalibrationError, "Number 3"),
        ("m.tflite", {"samples": []}, CalibrationError, "empty"),
        ("m.tflite", {"input_shape": (8, 8, 3)}, WrongArgument, "does not fit"),
        ("m.tflite", {"input_shape": (0, 8)}, WrongArgument, "no size"),
        ("m.tflite", {"metadata": {"x": object()}}, WrongArgument, "JSON"),
        ("m.tflite", {"metadata": [1]}, WrongArgument, "must be a dict"),
        ("missing/m.tflite", {}, FileProblem, "no such folder"),
        (".", {"target": "tflite"}, WrongArgument, "tflite"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(small_model, tmp_path, path, arguments, kind, words, monkeypatch):
    monkeypatch.setattr(pipeline, "_build", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(kind, match=words):
        export.save(small_model, tmp_path / path, **arguments)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_taken():
    options = pipeline._options(target_registry["ethos-u55-128"], {"tile": (np.int64(8), np.int32(16))})
    assert json.dumps(options["tile"]) == "[8, 16]"
    assert pipeline._options(target_registry["onnx"], {"opset": np.int64(17)})["opset"] == 17


def test_text_is_refused(tmp_path):
    inputs = keras.Input((2,), dtype="string", name="words")
    model = keras.Model(inputs, keras.layers.Identity()(inputs))
    with pytest.raises(UnsupportedLayer, match=r"'words': this input takes text"):
        export.save(model, tmp_path / "m.tflite")


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


def test_calibration_from_files_of_arrays(tmp_path, images):
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "images.npz", y=images)
    for name in ("images.npy", "images.npz"):
        calibration = calibration_from(tmp_path / name, IMAGE)
        assert len(calibration) == 12
        np.testing.assert_array_equal(calibration.sample(3)["y"], images[3:4])
    np.save(tmp_path / "objects.npy", np.array([{}]))
    (tmp_path / "short.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:200])
    told = {"none.npy": "no such file", "objects.npy": "no file of numbers", "short.npz": "no file of numbers"}
    for name, words in told.items():
        with pytest.raises(FileProblem, match=words):
            calibration_from(tmp_path / name, IMAGE)


def test_calibration_with_fractions_for_integers():
    with pytest.raises(CalibrationError, match="takes integers"):
        calibration_from(np.array([[0.5, 1.0]]), (InputSpec("ids", (1, 2), "int32"),))
    assert len(calibration_from(np.array([[2.0, 1.0]]), (InputSpec("ids", (1, 2), "int32"),))) == 1


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


def test_a_sample_of_ones_own_calibration_that_is_not_finite_ends_no_process(small_model, tmp_path):
    """TFLite's calibrator dies of it."""
    data = spoilt(np.inf)
    mine = Calibration(5, lambda index: {"y": data[index : index + 1]}, "mine")
    with pytest.raises(CalibrationError, match="sample 3"):
        export.save(small_model, tmp_path / "m.tflite", precision="int8", calibration=mine)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_damaged_is_told_as_such(small_model, images, tmp_path):
    """It is read in the middle of the conversion."""
    from PIL import Image

    for name in "ab":
        Image.fromarray((images[0, ..., 0] * 255).astype("uint8")).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:50])
    with pytest.raises(FileProblem, match=r"b\.png: not a readable image"):
        export.save(small_model, tmp_path / "m.tflite", precision="int8", calibration=tmp_path, samples=images[:1])


def test_calibration_serves_as_samples(small_model, images, tmp_path):
    report = export.save(small_model, tmp_path / "m.tflite", calibration=images)
    assert "Verified on 12 of the calibration samples." in report.notes


def test_samples_of_another_size_are_told():
    pictures = np.random.default_rng(0).random((3, 6, 9, 1))
    spec = InputSpec("y", (1, 8, 8, 1), "float32")
    assert "3 of them cropped, or continued" in calibration_from(pictures, (spec,)).source
    assert "cropped" not in calibration_from(pictures, (InputSpec("y", (1, 6, 9, 1), "float32"),)).source


def test_verified_samples_are_spread_over_the_calibration():
    calibration = calibration_from(np.arange(100.0).reshape(100, 1, 1, 1), IMAGE)
    assert [int(sample["y"][0, 0, 0, 0]) for sample in calibration.spread(4)] == [0, 25, 50, 75]
    assert len(calibration.spread(1000)) == 100


def test_calibration_of_differing_sizes_is_refused(images):
    with pytest.raises(CalibrationError, match="sample 1"):
        calibration_from([images[0], images[1, :16]], IMAGE)


def test_calibration_for_several_inputs():
    specs = (InputSpec("a", (None, 4), "float32"), InputSpec("b", (None, 2), "int32"))
    a, b = np.ones((3, 4)), np.arange(6).reshape(3, 2)
    pairs = list(zip(a, b, strict=True))
    forms = (
        [a, b],
        {"b": b, "a": a},
        (pair for pair in pairs),
        [(pair, 0) for pair in pairs],
        [(list(pair), 0, 1) for pair in pairs],
        [({"b": y, "a": x}, 0) for x, y in pairs],
    )
    for data in forms:
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


def compare(precision: str, expected, found, step: float | None = None):
    """The verdict on one output, sample by sample."""
    compared = verify._Comparison(verify.TOLERANCES[precision], lambda name: step)
    for want, have in zip(expected, found, strict=True):
        compared.add({"y": np.asarray(want)}, {"y": np.asarray(have)})
    return compared.result()


def on_grid(values: np.ndarray, step: float) -> np.ndarray:
    return np.round(values / step) * step


def test_an_outlier_in_the_calibration_is_found_out():
    """A scale a million times too wide: everything becomes 0, within half a step."""
    values = np.random.default_rng(0).normal(0, 1, (9, 50))
    assert compare("int8", values, on_grid(values, 0.03), 0.03).problem is None
    assert "too coarse" in compare("int8", values, on_grid(values, 1e4), 1e4).problem
    # Also where the outlier is among the verified samples, and its size alone makes 40 dB.
    values[4] *= 1e6
    result = compare("int8", values, on_grid(values, 3e4), 3e4)
    assert result.sqnr_db > 30
    assert "too coarse" in result.problem


def test_dark_images_are_no_problem():
    """Less than 12 dB, but no more than a step off, on a grid that is fine enough for the others."""
    values = np.repeat([[0.001], [0.001], [0.9], [0], [0], [0]], 4, axis=1)
    assert compare("int8", values, on_grid(values, 1 / 255), 1 / 255).problem is not None
    values[0] = 0.5
    assert compare("int8", values, on_grid(values, 1 / 255), 1 / 255).problem is None


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 0.01), ("int8", 0.25), ("int4-weights", 0.5)])
def test_integers_are_judged_in_every_precision(precision, allowed):
    want = np.zeros((1, 200), "int32")
    for part, fine in ((allowed, True), (allowed + 0.01, False)):
        have = want.copy()
        have[:, : round(200 * part)] = 1
        result = compare(precision, want, have)
        assert (result.problem is None) == fine
        assert f"({part:.1%}) differ" in result.notes[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "least", "most"),
    [
        ((1, 64, 64, 3), "uint8", 0, 255),
        ((1, 64, 64, 3), "int32", 0, 255),
        ((1, 64, 64, 3), "int8", 0, 127),
        ((1, 5000), "int8", -128, 127),
        ((1, 5000), "uint16", 0, 255),
        ((1, 5000), "int64", 0, 9),
    ],
)
def test_synthetic_integers_cover_their_range(shape, dtype, least, most):
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.ReLU()(inputs))
    (sample,) = verify.synthetic_samples(model, [InputSpec("x", shape, dtype)], 1)
    assert (sample["x"].dtype, sample["x"].min(), sample["x"].max()) == (dtype, least, most)


def test_casts_inside_of_a_model_need_not_round(tmp_path):
    """A converter leaves out the way to float16 and back; the file is then finer than the model."""
    inputs = keras.Input((8, 8, 3))
    x = keras.ops.cast(keras.layers.Conv2D(8, 3, activation="relu")(inputs), "float16")
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3)(keras.ops.cast(x, "float32")))
    assert verify.reduced_policy(model) is None
    assert verify.casts_to_half(model)
    report = export.save(model, tmp_path / "m.onnx")
    assert 40 < report.sqnr_db < 110


def test_pixels_may_be_one_apart(tmp_path):
    """A cast of floats to integers rounds; class numbers and masks are not rounded."""
    inputs = keras.Input((4,))
    pixels = keras.ops.cast(inputs * 255, "uint8")
    classes = keras.ops.cast(keras.ops.argmax(inputs, axis=-1), "int32")
    mask = keras.ops.cast(inputs > 0.5, "uint8")
    model = keras.Model(inputs, {"pixels": pixels, "classes": classes, "mask": mask})
    assert rounded_outputs(model) == {"pixels"}
    assert rounded_outputs(keras.Model(inputs, keras.Model(inputs, pixels)(inputs))) == frozenset()
    for names, by, wrong in ((["pixels"], 1, 0), (["pixels"], 2, 3), ([], 1, 3)):
        compared = verify._Comparison(verify.TOLERANCES["float16"], lambda name: None, rounded=set(names))
        want = np.array([0, 254, 9], "uint8")
        compared.add({"pixels": want}, {"pixels": want + np.array([by, -by, by]).astype("uint8")})
        result = compared.result()
        assert (result.problem is None) is (wrong == 0)
        assert f"{wrong} of 3 integers" in result.notes[0]
        assert ("by more than 1" in result.notes[0]) is bool(names)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_of_half_precision_is_compared_with_its_float32_form(policy, tmp_path, monkeypatch):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3), dtype="float32")
    x = keras.layers.Conv2D(64, 3, activation="relu", dtype=policy)(inputs)
    model = keras.Model(inputs, keras.layers.Conv2D(4, 3, dtype=policy)(x))
    report = export.save(model, tmp_path / "m.tflite")
    assert report.sqnr_db > 75
    (note,) = (note for note in report.notes if "computes in" in note)
    assert 40 < float(note.split("SQNR ")[1].split()[0]) < 75  # half precision it is

    def other(model, precision):
        twin = deploy(model)
        twin.layers[-1].kernel.assign(-twin.layers[-1].kernel)
        return twin

    monkeypatch.setattr(pipeline, "_deploy", other)
    with pytest.raises(VerificationError, match="float32 form differs"):
        export.save(model, tmp_path / "n.tflite")


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


@contextlib.contextmanager
def file_size_limit(size: int):
    """Stands for a full disk: a write beyond it fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_full_disk(tmp_path):
    source, path = tmp_path / "source", tmp_path / "m.tflite"
    source.write_bytes(b"x" * 200_000)
    path.write_bytes(b"old")
    with file_size_limit(100_000), pytest.raises(FileProblem, match="cannot be written"):
        pipeline._place(source, path, overwrite=True)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tflite", "source"]


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_full_disk_while_converting(tmp_path, suffix):
    inputs = keras.Input((64,))
    model = keras.Model(inputs, keras.layers.Dense(1000)(inputs))
    with file_size_limit(100_000), pytest.raises(FileProblem, match=r"cannot be written: .*File too large"):
        export.save(model, tmp_path / f"m{suffix}")
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_keep_their_text(small_model, tmp_path):
    def gone(line):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        export.save(small_model, tmp_path / "m.tflite", input_shape=(8, 8), on_progress=gone)


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
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(error).items()}
        assert vars(again) == {key: value for key, value in plain.items() if value is not None or key == "hint"}


def test_child_process_gets_samples_of_any_name_and_the_parents_path(monkeypatch, tmp_path, small_model):
    """np.savez has a keyword `file`; a module on a changed sys.path must be found by the child."""
    from keras_efficient.export import _worker
    from keras_efficient.export.targets import Request

    specs = (InputSpec("file", (1, 2), "float32"), InputSpec("args", (1, 2), "float32"))
    calibration = calibration_from({"file": np.eye(2), "args": np.ones((2, 2))}, specs)
    request = Request(target_registry["tflite"], "int8", specs, calibration)
    seen = {}

    def run(command, env, **_):
        seen.update(env, job=json.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, b"")

    monkeypatch.setattr(_worker.subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "mine")])
    with pytest.raises(ConversionError, match="no answer"):
        _worker.build_in_child(small_model, request, tmp_path)
    assert str(tmp_path / "mine") in seen["PYTHONPATH"].split(os.pathsep)
    again = _worker._request_from(seen["job"]).calibration.sample(1)
    np.testing.assert_array_equal(again["file"], [[0, 1]])
    np.testing.assert_array_equal(again["args"], [[1, 1]])


def test_a_candidate_that_cannot_be_built_does_not_stop_the_next(monkeypatch, tmp_path, small_model):
    from keras_efficient.export.targets import Built, Lowered, Request

    def build(candidate, request, folder):
        if candidate.lowerings == ("bad",):
            raise UnsupportedLayer("layer", "cannot run.")
        return Built(folder, folder, candidate.lowerings)

    monkeypatch.setattr(pipeline, "_build_candidate", build)
    two = [Lowered(small_model, ("bad",)), Lowered(small_model, ("good",))]
    request = Request(_replaced(target_registry["tflite"], lower=lambda model, request: iter(two)), "int8", IMAGE)
    assert pipeline.build(small_model, request, tmp_path).lowerings == ("good",)


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


# --- pictures from 0 to 255 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "white"),
    [
        ([keras.layers.Rescaling(1 / 255)], 255),
        ([keras.layers.AveragePooling2D(2), keras.layers.Rescaling(1 / 127.5, offset=-1.0)], 255),
        ([keras.layers.Normalization(mean=[123.0, 117.0, 104.0], variance=[3000.0] * 3)], 255),
        ([keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Rescaling(1 / 255)])], 255),
        ([keras.layers.Rescaling(2.0, offset=-1.0)], 1),
        ([keras.layers.Conv2D(4, 3)], 1),
    ],
)
def test_a_folder_of_pictures_has_the_range_that_the_model_scales(begin, white, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), (255, 128, 0)).save(tmp_path / "a.png")
    model = keras.Sequential([keras.Input((16, 16, 3)), *begin, keras.layers.Conv2D(2, 3)])
    specs = input_specs(model)
    calibration = calibration_from(tmp_path, specs)
    (sample,) = [next(iter(one.values())) for one in calibration]
    np.testing.assert_allclose(sample[0, 0, 0], np.array([255, 128, 0]) * white / 255)
    assert f"[0, {white}]" in calibration.source
    drawn = verify.synthetic_samples(model, specs, 1)[0][specs[0].name]
    assert white / 2 < drawn.max() <= white

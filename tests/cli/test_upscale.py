"""`keras-efficient upscale` with an exported file, which needs neither Keras nor TensorFlow."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from .conftest import program


@pytest.fixture
def model(int8_export):
    return int8_export[0]


@pytest.fixture
def photo(tmp_path):
    from PIL import Image

    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def size_of(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def test_a_picture_without_tensorflow(model, photo, tmp_path):
    done = program("upscale", photo, "-o", tmp_path / "large.png", "--model", model, spy=True)
    assert done.returncode == 0, done.stderr
    assert size_of(tmp_path / "large.png") == (200, 140)
    assert done.stdout == ""
    assert not {"keras", "tensorflow", "jax", "onnx", "onnxruntime", "scipy", "h5py", "av"} & done.imported
    lines = done.stderr.splitlines()
    assert len(lines) == 1, "nothing on stderr but the spy's line"


def test_the_files_fixed_size_becomes_tiles_with_the_same_pixels(model, photo, tmp_path):
    """70×100 pixels through a file of 64×96: by its own halo, as the same file resized does in one pass."""
    from ai_edge_litert.interpreter import Interpreter

    from keras_efficient import superres

    program("upscale", photo, "-o", tmp_path / "large.png", "--model", model, "--threads", "1")
    large = superres.read_image(tmp_path / "large.png").pixels
    interpreter = Interpreter(str(model), num_threads=1)
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(source["index"], (1, 70, 100, 1))
    interpreter.allocate_tensors()

    def whole(y):
        scale, zero = source["quantization"]
        interpreter.set_tensor(source["index"], np.clip(np.round(y / scale) + zero, -128, 127).astype(np.int8))
        interpreter.invoke()
        scale, zero = result["quantization"]
        return (interpreter.get_tensor(result["index"]).astype(np.float32) - zero) * np.float32(scale)

    expected = superres.upscale(superres.read_image(photo), whole, scale=2, tile=None).pixels
    np.testing.assert_array_equal(large, expected)


def test_a_folder(model, photo, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(photo, folder / "a.png")
    shutil.copy(photo, folder / "deep" / "b.png")
    (folder / "broken.png").write_bytes(photo.read_bytes()[:200])
    done = program("upscale", folder, "-o", tmp_path / "out", "--model", model, "--recursive", "--json")
    assert done.returncode == 1, "one picture is broken"
    rows = json.loads(done.stdout)
    assert sorted((row["status"]) for row in rows) == ["done", "done", "failed"]
    assert size_of(tmp_path / "out" / "deep" / "b.png") == (200, 140)
    assert "broken.png" in done.stderr
    again = json.loads(program("upscale", folder, "-o", tmp_path / "out", "--model", model, "-r", "--json").stdout)
    assert sorted(row["status"] for row in again) == ["failed", "kept", "kept"]


def test_several_files(model, photo, tmp_path):
    other = shutil.copy(photo, tmp_path / "other.png")
    done = program("upscale", photo, other, "-o", tmp_path / "out", "--model", model)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other.png", "photo.png"]


def test_existing_files_are_kept_without_force(model, photo, tmp_path):
    target = tmp_path / "large.png"
    target.write_text("mine")
    done = program("upscale", photo, "-o", target, "--model", model)
    assert (done.returncode, target.read_text()) == (1, "mine")
    assert program("upscale", photo, "-o", target, "--model", model, "--force").returncode == 0
    assert size_of(target) == (200, 140)


def test_a_full_disk_leaves_nothing_behind(model, photo, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "keras_efficient.cli", "upscale", photo, "-o", out / "a.png", "--model", model],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        check=False,
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert list(out.iterdir()) == []


def test_a_model_that_is_no_upscaler(tmp_path, photo):
    import keras

    from keras_efficient import export

    path = tmp_path / "dense.tflite"
    inputs = keras.Input((8,))
    export.save(keras.Model(inputs, keras.layers.Dense(3)(inputs)), path)
    done = program("upscale", photo, "-o", tmp_path / "a.png", "--model", path)
    assert done.returncode == 2
    assert "not one picture" in done.stderr


def test_several_results_are_kept_too_and_a_kind_that_cannot_be_written_becomes_png(model, photo, tmp_path):
    from PIL import Image

    other = tmp_path / "other.bmp"
    Image.open(photo).save(other)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.png").write_text("mine")
    done = program("upscale", photo, other, "-o", tmp_path / "out", "--model", model, "--json")
    assert done.returncode == 0, done.stderr
    assert [(row["input"], row["status"]) for row in json.loads(done.stdout)] == [
        (str(photo), "kept"),
        (str(other), "done"),
    ]
    assert (tmp_path / "out" / "photo.png").read_text() == "mine"
    assert size_of(tmp_path / "out" / "other.png") == (200, 140)


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are text")
def test_json_holds_names_that_are_no_utf8(model, photo, tmp_path):
    name = os.fsdecode(b"bad\xff.png")
    photo = photo.rename(tmp_path / name)
    done = program("upscale", photo, "-o", tmp_path / os.fsdecode(b"\xfe.png"), "--model", model, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert os.fsencode(row["input"]).endswith(b"bad\xff.png")
    assert os.fsencode(row["output"]).endswith(b"\xfe.png")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ending_it_in_the_middle_of_a_file_leaves_nothing_behind(model, tmp_path, number, status):
    """A video is written for as long as it is upscaled: seconds here."""
    av = pytest.importorskip("av", reason="needs the extra video")
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(500):
            file.mux(stream.encode(av.VideoFrame(320, 240, "yuv420p")))
        file.mux(stream.encode(None))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-P", "-m", "keras_efficient.cli", "upscale", tmp_path / "a.mkv", "-o", out / "b.mkv"]
    # A background job's children inherit an ignored SIGINT, which Python would keep.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([*command, "--model", model], stderr=subprocess.PIPE, text=True, **heeding)
    try:
        limit = time.monotonic() + 60
        while not any(out.iterdir()) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.1)
        assert process.poll() is None, "it is at work"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


def test_several_results_need_a_folder(model, photo, tmp_path):
    done = program("upscale", photo, photo, "-o", tmp_path / "one.jpg", "--model", model)
    assert done.returncode == 2
    assert "need a folder" in done.stderr
    assert not (tmp_path / "one.jpg").exists()


def test_quality_reaches_the_encoder(model, photo, tmp_path):
    from PIL import Image

    done = program("upscale", photo, "-o", tmp_path / "large.jpg", "--model", model, "--quality", "20")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "large.jpg") as image:
        assert image.quantization[0][0] > 20  # 2 at the default of 95

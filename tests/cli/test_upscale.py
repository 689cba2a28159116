"""`keras-efficient upscale` with an exported file, which needs neither Keras nor TensorFlow."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys

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


def test_the_files_fixed_size_becomes_tiles_with_the_same_pixels(model, keras_file, photo, tmp_path):
    """70×100 pixels through a file of 64×96: by its own halo, as the same model does in one pass."""
    from keras_efficient import export, superres

    program("upscale", photo, "-o", tmp_path / "large.png", "--model", model, "--threads", "1")
    large = superres.read_image(tmp_path / "large.png").pixels
    run = export.load(model)
    whole = superres.upscale(superres.read_image(photo), run, scale=2, tile=(64, 96), halo=20)
    np.testing.assert_array_equal(large, whole.pixels)


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

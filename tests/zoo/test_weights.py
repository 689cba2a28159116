"""Weights files: loaded whole and checked, or refused; downloads."""

from __future__ import annotations

import dataclasses
import pickle
import shutil

import numpy as np
import pytest

from keras_efficient import zoo
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.zoo import weights as files
from keras_efficient.zoo.golden import compare_with_golden, read_golden, write_golden

FILE = "weights/tiny-x2.weights.h5"


def test_load_gives_the_stored_weights_and_the_golden_outputs(zoo_folder):
    model = zoo.load("tiny-x2", folder=zoo_folder)
    assert model.name == "tiny_x2"
    # float32 sums in another order: some 1e-7 of values up to 1
    assert compare_with_golden(model, zoo_folder / "weights" / "tiny-x2.npz") <= 1e-5
    again = zoo.load("tiny-x2", weights=zoo_folder / FILE, folder=zoo_folder)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_saved_after_fit_load(zoo_folder, tmp_path):
    """The file of a compiled model holds its optimizer too."""
    tuned = zoo.load("tiny-x2", folder=zoo_folder)
    tuned.compile("adam", "mae")
    y = np.zeros((4, 8, 8, 1), "float32")
    tuned.fit(y, np.ones((4, 16, 16, 1), "float32"), verbose=0)
    tuned.save_weights(tmp_path / "tuned.weights.h5")
    again = zoo.load("tiny-x2", weights=tmp_path / "tuned.weights.h5", folder=zoo_folder)
    for a, b in zip(tuned.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_weights_miss_the_golden_outputs(zoo_folder):
    model = zoo.load("tiny-x2", weights=None, folder=zoo_folder)
    assert compare_with_golden(model, zoo_folder / "weights" / "tiny-x2.npz") > 1e-3


def test_fresh_weights_need_no_file(zoo_folder):
    (zoo_folder / FILE).unlink()
    zoo.load("tiny-x2", weights=None, folder=zoo_folder)
    with pytest.raises(FileProblem, match="no such file"):
        zoo.load("tiny-x2", folder=zoo_folder)


def test_weights_of_another_kind_are_refused(zoo_folder):
    with pytest.raises(WrongArgument, match="weights=True"):
        zoo.load("tiny-x2", weights=True, folder=zoo_folder)


def test_unknown_name(zoo_folder):
    with pytest.raises(UnknownName, match="Did you mean 'tiny-x2'"):
        zoo.load("tiny-x3", folder=zoo_folder)


@pytest.mark.parametrize("damage", ["truncated", "zero-byte", "flipped", "longer"])
def test_damaged_files_name_both_hashes(zoo_folder, damage):
    path = zoo_folder / FILE
    data = path.read_bytes()
    expected = files.sha256_of(path)
    path.write_bytes(
        {
            "truncated": data[:-100],
            "zero-byte": b"",
            "flipped": data[:500] + bytes([data[500] ^ 1]) + data[501:],
            "longer": data + b"x",
        }[damage]
    )
    with pytest.raises(FileProblem) as error:
        zoo.load("tiny-x2", folder=zoo_folder)
    assert expected in str(error.value)
    if damage == "longer":
        assert f"not computed for {len(data) + 1:,} bytes" in str(error.value)
    else:
        assert files.sha256_of(path) in str(error.value)


def test_the_weights_of_another_model_name_both_shapes(zoo_folder, tmp_path):
    from keras_efficient import models

    other = models.SESR(2, "m3", expansion=8)
    other.save_weights(tmp_path / "other.weights.h5")
    model = zoo.load("tiny-x2", folder=zoo_folder)
    before = model.get_weights()
    with pytest.raises(FileProblem, match=r"another model.*\n.*\(5, 5, 1, 8\) in the file, \(5, 5, 1, 4\) in the"):
        files.load_into(model, tmp_path / "other.weights.h5")
    models.SESR(2, "m5", expansion=4).save_weights(tmp_path / "deeper.weights.h5")
    with pytest.raises(FileProblem, match="not in the model"):
        files.load_into(model, tmp_path / "deeper.weights.h5")
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_written_to_compare_shapes(zoo_folder, monkeypatch):
    """h5py ends the process on a full disk."""
    monkeypatch.setattr("tempfile.tempdir", str(zoo_folder / "missing"))
    zoo.load("tiny-x2", folder=zoo_folder)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, pickle.dumps({"a": 1}), None])
def test_user_files_that_are_no_weights(zoo_folder, tmp_path, content):
    path = tmp_path / "mine.weights.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileProblem, match=r"mine\.weights\.h5"):
        zoo.load("tiny-x2", weights=path, folder=zoo_folder)


def test_a_truncated_user_file(zoo_folder, tmp_path):
    data = (zoo_folder / FILE).read_bytes()
    (tmp_path / "mine.weights.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileProblem, match="damaged or cut off"):
        zoo.load("tiny-x2", weights=tmp_path / "mine.weights.h5", folder=zoo_folder)


def test_links_and_objects_in_hdf5_are_refused(zoo_folder, tmp_path):
    import h5py

    model = zoo.load("tiny-x2", folder=zoo_folder)
    path = tmp_path / "bad.weights.h5"
    shutil.copy(zoo_folder / FILE, path)
    with h5py.File(path, "r+") as file:
        file["layers/extra"] = h5py.ExternalLink(str(zoo_folder / FILE), "/layers")
    with pytest.raises(FileProblem, match="is a link"):
        files.load_into(model, path)
    shutil.copy(zoo_folder / FILE, path)
    with h5py.File(path, "r+") as file:
        file.create_dataset("layers/text", data=[b"a"], dtype=h5py.string_dtype())
    with pytest.raises(FileProblem, match="no plain array"):
        files.load_into(model, path)


def test_golden_files_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", **{"random/input": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(FileProblem, match="no golden tensors"):
        read_golden(tmp_path / "a.npz")
    write_golden({"random/input": np.ones(3, np.float32)}, tmp_path / "b.npz")
    assert read_golden(tmp_path / "b.npz")["random/input"].tolist() == [1, 1, 1]
    (tmp_path / "c.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-30])
    with pytest.raises(FileProblem):
        read_golden(tmp_path / "c.npz")


class TestDownloads:
    """A card with a URL, and no file beside it."""

    @pytest.fixture
    def remote(self, zoo_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("KERAS_EFFICIENT_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("KERAS_EFFICIENT_OFFLINE", raising=False)
        card = zoo.card("tiny-x2", folder=zoo_folder)
        card = dataclasses.replace(card, weights=dataclasses.replace(card.weights, url="https://127.0.0.1:9/x"))
        zoo.write_card(card, zoo_folder / "cards" / "tiny-x2.yaml")
        (zoo_folder / FILE).rename(tmp_path / "served")
        return card

    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """Stands in for the network: a URL gives a file of this machine."""
        import pooch

        def fetch(self, url, output_file, _):
            shutil.copy(tmp_path / "served", output_file)

        monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fetch)

    def test_downloads_once_into_the_cache(self, remote, served, zoo_folder, tmp_path):
        path = files.find(remote, zoo_folder)
        assert path == tmp_path / "home" / "tiny-x2.weights.h5"
        (tmp_path / "served").unlink()
        assert files.find(remote, zoo_folder) == path

    def test_a_wrong_download_does_not_reach_the_cache(self, remote, served, zoo_folder, tmp_path):
        (tmp_path / "served").write_bytes(b"sorry")
        with pytest.raises(FileProblem, match=remote.weights.sha256):
            files.find(remote, zoo_folder)
        assert list((tmp_path / "home").iterdir()) == []

    def test_a_spoilt_cache_is_found_out(self, remote, served, zoo_folder):
        path = files.find(remote, zoo_folder)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FileProblem, match=remote.weights.sha256):
            files.find(remote, zoo_folder)

    def test_no_network(self, remote, zoo_folder):
        # Port 9 of this machine refuses connections.
        with pytest.raises(FileProblem, match=r"cannot be downloaded.*\n.*give weights= its path"):
            files.find(remote, zoo_folder)

    def test_offline(self, remote, served, zoo_folder, monkeypatch):
        monkeypatch.setenv("KERAS_EFFICIENT_OFFLINE", "1")
        with pytest.raises(FileProblem, match="forbids to download"):
            files.find(remote, zoo_folder)


def test_saving_takes_the_narrowest_numbers_that_lose_nothing(tmp_path):
    import h5py
    import keras

    random = np.random.default_rng(0)
    x = keras.Input((300,))
    model = keras.Model(x, keras.layers.Dense(400, name="halves")(keras.layers.Dense(300, name="floats")(x)))
    halves = model.get_layer("halves")
    kernel = random.normal(size=(300, 400)).astype("float16").astype("float32")
    halves.set_weights([kernel, halves.get_weights()[1]])
    plain, packed = tmp_path / "plain.weights.h5", tmp_path / "packed.weights.h5"
    model.save_weights(plain)
    files.save(model, packed)
    assert packed.stat().st_size < plain.stat().st_size - 300 * 400 * 2 + 4096
    with h5py.File(packed) as file:
        found = []
        file.visititems(lambda name, item: found.append(item.dtype) if isinstance(item, h5py.Dataset) else None)
        assert sorted(map(str, found)) == ["float16", "float32", "float32", "float32"]
    before = model.get_weights()
    model.set_weights([0 * value for value in before])
    files.load_into(model, packed)
    for left, right in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(left, right)
    assert list(tmp_path.iterdir()) in ([plain, packed], [packed, plain])

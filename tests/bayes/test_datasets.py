"""Data sets: read as they should be, and no file is believed before it was looked at."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from keras_efficient.bayes import datasets
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument

RNG = np.random.default_rng(0)


def idx(array):
    axes = array.ndim
    return bytes([0, 0, 8, axes]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with a small MNIST, one part packed, and the arrays."""
    found = {}
    for part, count in (("train", 300), ("t10k", 40)):
        x, y = RNG.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        pack, ending = (gzip.compress, ".gz") if part == "train" else (bytes, "")
        (tmp_path / f"{part}-images-idx3-ubyte{ending}").write_bytes(pack(idx(x)))
        (tmp_path / f"{part}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(y)))
        found[part] = x, y
    return tmp_path, found


def load(path, **arguments):
    return datasets.load({"name": "mnist", "path": str(path), **arguments})


def test_mnist(mnist):
    path, found = mnist
    splits = load(path)
    for data, part in ((splits.train, "train"), (splits.test, "t10k")):
        x, y = found[part]
        np.testing.assert_allclose(data.x, ((x / 255 - 0.1307) / 0.3081)[..., None], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(data.y, y)
        assert data.num_classes == 10


def test_the_folder_may_be_named_by_the_environment_or_lie_above(mnist, tmp_path_factory, monkeypatch):
    path, _ = mnist
    above = tmp_path_factory.mktemp("data")
    (above / "cls").mkdir()
    (above / "cls" / "mnist").symlink_to(path)
    monkeypatch.setenv(datasets.VARIABLE, str(above))
    assert len(datasets.load({"name": "mnist"}).train) == 300
    assert len(load(above / "cls").train) == 300


def test_limits_are_drawn_by_chance_and_the_same_each_time(mnist):
    path, _ = mnist
    first, again = load(path, limit=100, test_limit=7), load(path, limit=100, test_limit=7)
    assert len(first.train) == 100
    assert len(first.test) == 7
    np.testing.assert_array_equal(first.train.x, again.train.x)
    assert len(np.unique(first.train.y)) == 10
    with pytest.raises(WrongArgument, match="limit is 1 example or more, not 0"):
        load(path, limit=0)


def test_imbalanced_leaves_one_percent_of_the_dear_classes(mnist):
    path, _ = mnist
    counts = np.bincount(load(path, imbalanced=True).train.y)
    assert [counts[3], counts[7]] == [1, 1]
    assert all(counts[other] == 30 for other in (0, 1, 2, 4, 5, 6, 8, 9))
    assert len(load(path, imbalanced=True).test) == 40


def test_digits():
    splits = datasets.load({"name": "digits"})
    assert splits.train.x.shape == (1347, 8, 8, 1)
    assert splits.test.x.shape == (450, 8, 8, 1)
    assert abs(splits.train.x.mean()) < 0.01
    assert abs(splits.train.x.std() - 1) < 0.01
    # Not in the order of the files: people who wrote the last are not those who wrote the first.
    both = {one.tobytes() for one in splits.train.x} & {one.tobytes() for one in splits.test.x}
    assert len(both) < 5


def test_outside_inputs_have_size_channels_and_normalisation(mnist):
    path, _ = mnist
    for part in ("images-idx3", "labels-idx1"):
        (path / "notmnist").mkdir(exist_ok=True)
        (path / "notmnist" / f"t10k-{part}-ubyte").write_bytes((path / f"t10k-{part}-ubyte").read_bytes())
    splits = load(path)
    foreign = splits.outside({"name": "notmnist", "path": str(path)})
    np.testing.assert_allclose(foreign, splits.test.x, rtol=1e-5)  # the same pictures, by the same road
    for name in ("digits", "noise"):
        x = splits.outside({"name": name})
        assert x.shape[1:] == (28, 28, 1)
        assert x.dtype == np.float32
        assert (0 - 0.1307) / 0.3081 - 1e-5 <= x.min() < x.max() <= (1 - 0.1307) / 0.3081 + 1e-5
    assert abs(splits.outside({"name": "noise"}).std() - np.sqrt(1 / 12) / 0.3081) < 0.01


def test_other_sizes_keep_means_and_lines():
    ramp = np.broadcast_to(np.arange(16.0)[:, None, None], (2, 16, 16, 3)).astype(np.float32)
    half = datasets._fitted(ramp, (8, 8, 1))
    assert half.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(half[0, 1:-1, 0, 0], np.arange(8)[1:-1] * 2 + 0.5, rtol=1e-5)
    double = datasets._fitted(ramp, (32, 32, 3))
    np.testing.assert_allclose(np.diff(double[0, 1:-1, 5, 2]), 0.5, rtol=1e-4)


def test_corrupted_inputs_are_the_test_set_but_for_the_corruption(mnist):
    from keras_efficient.bayes.corruptions import corrupted

    path, found = mnist
    splits = load(path)
    expected = corrupted(found["t10k"][0][..., None] / 255, "contrast", 3, seed=0)
    np.testing.assert_allclose(splits.corrupted("contrast", 3, 0), (expected - 0.1307) / 0.3081, atol=1e-5)


def cifar_zip(path, part, count=2, size=(32, 32), names=("airplane", "truck"), kind="PNG"):
    pictures = []
    with zipfile.ZipFile(path / f"{part}.zip", "w") as archive:
        for name in names:
            for number in range(count):
                content, picture = io.BytesIO(), RNG.integers(0, 256, (*size, 3)).astype(np.uint8)
                Image.fromarray(picture).save(content, kind)
                archive.writestr(f"{part}/{name}/{number:04}.{kind.lower()}", content.getvalue())
                pictures.append(picture)
    return np.stack(pictures)


def test_cifar_as_pictures(tmp_path):
    x = [cifar_zip(tmp_path, part) for part in ("train", "test")]
    splits = datasets.load({"name": "cifar10", "path": str(tmp_path)})
    mixed = np.random.default_rng(0).permutation(4)  # an archive is sorted by class
    np.testing.assert_array_equal(splits.train.y, np.array([0, 0, 9, 9])[mixed])
    expected = (x[0][mixed] / 255 - (0.4914, 0.4822, 0.4465)) / (0.2023, 0.1994, 0.2010)
    np.testing.assert_allclose(splits.train.x, expected, atol=1e-5)


def test_cifar_in_batches(tmp_path):
    content = RNG.integers(0, 256, (3, 3073)).astype(np.uint8)
    content[:, 0] = [0, 5, 9]
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (tmp_path / f"{name}.bin").write_bytes(content.tobytes())
    splits = datasets.load({"name": "cifar10", "path": str(tmp_path)})
    assert splits.train.x.shape == (15, 32, 32, 3)
    np.testing.assert_array_equal(splits.test.y, [0, 5, 9])
    green = content[1, 1 + 1024 : 1 + 2048].reshape(32, 32) / 255
    np.testing.assert_allclose(splits.test.x[1, ..., 1], (green - 0.4822) / 0.1994, atol=1e-5)
    (tmp_path / "data_batch_3.bin").write_bytes(content.tobytes()[:-1])
    with pytest.raises(FileProblem, match=r"data_batch_3.bin: is no CIFAR-10 batch"):
        datasets.load({"name": "cifar10", "path": str(tmp_path)})


def refused(path, name, content, match):
    (path / name).write_bytes(content)
    with pytest.raises(FileProblem, match=match) as caught:
        load(path)
    assert name in str(caught.value)


def test_files_that_are_not_what_they_should_be(mnist):
    path, found = mnist
    x, y = found["train"]
    good = idx(x)
    for bad, match in (
        (b"", "is no idx file"),
        (b"\x00\x00\x0d\x03" + good[4:], "is no idx file"),
        (good[:5000], "ends after 4,984 of 235,200 bytes"),
        (good + b"\x00", "holds more than"),
        (idx(x[:, :27]), "holds 300 × 27 × 28 values"),
        # Says that it holds 4 billion pictures: nothing is allocated for them.
        (good[:4] + b"\xff\xff\xff\xff" + good[8:], "holds 4294967295 × 28 × 28"),
    ):
        refused(path, "train-images-idx3-ubyte.gz", gzip.compress(bad), match)
    packed = gzip.compress(good)
    refused(path, "train-images-idx3-ubyte.gz", packed[:3000], "cannot be read: .*end-of-stream")
    refused(path, "train-images-idx3-ubyte.gz", packed[:200] + b"\xff\x00\xff" + packed[203:], "cannot be read|CRC")
    (path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    refused(path, "train-labels-idx1-ubyte.gz", gzip.compress(idx(y[:-1])), "has 299 labels for 300 pictures")
    refused(path, "train-labels-idx1-ubyte.gz", gzip.compress(idx(y + 1)), "has the label 10 at place 9")


def test_zips_that_are_not_what_they_should_be(tmp_path):
    def is_refused(match):
        with pytest.raises(FileProblem, match=match):
            datasets.load({"name": "cifar10", "path": str(tmp_path)})

    cifar_zip(tmp_path, "test")
    is_refused(r"train.zip: no such file")
    cifar_zip(tmp_path, "train", size=(31, 32))
    is_refused("0000.png' is 32 × 31, not 32 × 32")
    cifar_zip(tmp_path, "train", names=("aeroplane",))
    is_refused("is in no folder of a class")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/truck/0.png", b"no picture")
    is_refused("'train/truck/0.png' is no picture")
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/truck/0.png", bytes(50_000_000))
    is_refused("holds over 1048576 bytes")
    (tmp_path / "train.zip").write_bytes(b"PK")
    is_refused("train.zip: cannot be read")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(
        FileProblem, match=r"is known\.\nSay `path` \(on the command line --data\), or set KERAS_EFFICIENT_"
    ):
        datasets.load({"name": "mnist"})
    with pytest.raises(FileProblem, match=r"is here\.\n`path`, or KERAS_EFFICIENT_DATA, is the folder with"):
        load(tmp_path)
    with pytest.raises(UnknownName, match="Did you mean 'mnist'"):
        datasets.load({"name": "mnits"})
    with pytest.raises(UnknownName):  # nothing to train on
        datasets.load({"name": "notmnist", "path": str(tmp_path)})
    with pytest.raises(WrongArgument, match="limits"):
        datasets.load({"name": "digits", "limits": 3})

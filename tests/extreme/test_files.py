"""Files of the Extreme Classification Repository's form: what is read, what is refused, batches."""

from __future__ import annotations

import gzip

import keras
import numpy as np
import pytest

from keras_efficient import extreme, models
from keras_efficient.errors import FileProblem, WrongArgument

TEXT = "4 10 6\n1,5 0:1 3:0.5 9:-2\n 2:1\n0\n3 1:1e-2 2:1 3:1 4:1 5:1\n"


def written(tmp_path, text=TEXT, packed=False):
    path = tmp_path / "points.txt"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_points_are_read(tmp_path, packed, ends, last):
    text = TEXT if last else TEXT[:-1]
    file = extreme.SparseFile(written(tmp_path, text.replace("\n", ends), packed))
    assert (len(file), file.num_features, file.num_labels) == (4, 10, 6)
    labels, features, values = file[0]
    assert labels.tolist() == [1, 5]
    assert features.tolist() == [0, 3, 9]
    assert values.tolist() == [1.0, 0.5, -2.0]
    assert file[1][0].size == 0
    assert file[2][1].size == 0
    assert file.label_counts().tolist() == [1, 1, 0, 1, 0, 1]
    with pytest.raises(IndexError):
        file[4]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("1,2 3:1\n", "line 1: should be 'points features labels'"),
        ("3 10 6\n1 0:1\n2 0:1\n", "is cut off, or has 2 points, its first line says 3"),
        ("1 10 6\n1 0:1\n2 0:1\n", "has 2 points, its first line says 1"),
    ],
)
def test_files_that_are_refused(tmp_path, text, reason):
    with pytest.raises(FileProblem, match=reason):
        extreme.SparseFile(written(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1,x 0:1", "line 2: is not 'label,label feature:value feature:value'"),
        ("1, 0:1", "line 2: is not"),
        ("1 0:1:2", "line 2: is not"),
        ("1 0 1", "line 2: is not"),
        ("-1 0:1", "line 2: is not"),
        ("1 0:one", "line 2: has a value that is no number: '1 0:one'"),
        ("1 0:nan", "line 2: has a value that is not finite"),
        ("6 0:1", "line 2: has label 6, the first line says 6 of them"),
        ("1 10:1", "line 2: has feature 10, the first line says 10 of them"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, reason):
    file = extreme.SparseFile(written(tmp_path, f"1 10 6\n{line}\n"))
    with pytest.raises(FileProblem, match=reason):
        file[0]


def test_damaged_and_missing_files(tmp_path):
    path = written(tmp_path, TEXT * 50, packed=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileProblem, match="is damaged"):
        extreme.SparseFile(path)
    with pytest.raises(FileProblem, match="no such file"):
        extreme.SparseFile(tmp_path / "none.txt")


def test_batches_of_all_labels(tmp_path):
    batches = extreme.SparseBatches(extreme.SparseFile(written(tmp_path)), batch_size=3, length=4)
    assert len(batches) == 2
    x, y = batches[0]
    assert x["ids"].tolist() == [[1, 4, 10, 0], [3, 0, 0, 0], [0, 0, 0, 0]]
    assert x["weights"].tolist() == [[1, 0.5, -2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert y.tolist() == [[1, 5], [-1, -1], [0, -1]]
    assert batches[1][0]["ids"].tolist() == [[3, 4, 5, 6, 0, 0, 0, 0]]  # the largest four values of five
    assert batches[1][1].tolist() == [[3]]


def test_batches_of_one_label(tmp_path):
    batches = extreme.SparseBatches(extreme.SparseFile(written(tmp_path)), batch_size=8, label=True, shuffle=True)
    seen = set()
    for _ in range(20):
        x, y = batches[0]
        assert x["ids"].shape[0] == 3
        assert sorted(y.tolist()) in ([0, 1, 3], [0, 3, 5])
        np.testing.assert_array_equal(batches[0][1], y)
        seen.add(tuple(y.tolist()))
        batches.on_epoch_end()
    assert len(seen) > 3
    with pytest.raises(WrongArgument, match="`batch_size` must be a whole number from 1"):
        extreme.SparseBatches(batches.file, batch_size=0)
    with pytest.raises(WrongArgument, match=r"SparseFile is needed, not str"):
        extreme.SparseBatches("points.txt")


@pytest.mark.parametrize("sampled", [False, True])
def test_batches_of_other_widths_are_fitted(tmp_path, sampled):
    lines = [f"{i % 5} " + " ".join(f"{j}:1" for j in range(1 + (i >= 6) * 8)) for i in range(12)]
    file = extreme.SparseFile(written(tmp_path, "12 10 6\n0,1 0:1\n" + "\n".join(lines[1:]) + "\n"))
    model = models.ExtremeClassifier(10, 6, hidden=4, output={"k": 2})
    if sampled:
        model = models.SampledSoftmax(model)
        model.compile("sgd")
        batches = extreme.SampledBatches(extreme.SparseBatches(file, batch_size=2), file.label_counts(), negatives=4)
    else:
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        batches = extreme.SparseBatches(file, batch_size=2, label=True)
    history = model.fit(batches, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_real_points(data_dir):
    file = extreme.SparseFile(data_dir / "xml" / "delicious" / "train.txt.gz")
    assert (len(file), file.num_features, file.num_labels) == (12920, 500, 983)
    assert sum(len(file[index][0]) == 0 for index in range(len(file))) == 10

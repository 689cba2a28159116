"""Training by drawn classes: batches, the loss of networks of several inputs, tied weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import extreme, models
from keras_efficient.errors import WrongArgument
from keras_efficient.layers import HALOSOutput

CLASSES = 40


class Points(keras.utils.PyDataset):
    """Words that name their class, in batches."""

    def __init__(self, labels):
        super().__init__()
        self.labels, self.epochs = labels, 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        y = random.random((16, CLASSES)).argsort(axis=1)[:, : self.labels].astype("int32")
        ids = np.concatenate([y + 1, y + 1], axis=1)
        y[:, 1:][random.random((16, self.labels - 1)) < 0.3] = -1
        x = {"ids": ids, "weights": np.ones(ids.shape, "float32")}
        return x, y if self.labels > 1 else y[:, 0]

    def on_epoch_end(self):
        self.epochs += 1


def classifier():
    keras.utils.set_random_seed(0)
    return models.ExtremeClassifier(CLASSES, CLASSES, hidden=16)


@pytest.mark.parametrize("labels", [1, 3])
def test_batches(labels):
    source = Points(labels)
    batches = extreme.SampledBatches(source, np.arange(CLASSES), negatives=7)
    (batch,) = batches[1]
    assert len(batches) == 5
    assert batch["targets"].shape == (16, labels)
    assert batch["negatives"].shape == batch["log_expected"].shape == (7,)
    weights = (np.arange(CLASSES) + 1) ** 0.5
    expected = np.log(7 * weights / weights.sum())[batch["negatives"]]
    np.testing.assert_allclose(batch["log_expected"], expected, rtol=1e-5)
    np.testing.assert_array_equal(batches[1][0]["negatives"], batch["negatives"])
    batches.on_epoch_end()
    assert source.epochs == 1
    assert not np.array_equal(batches[1][0]["negatives"], batch["negatives"])


def test_frequent_classes_are_drawn_more_often():
    counts = np.where(np.arange(CLASSES) < 4, 99, 0)
    (batch,) = extreme.SampledBatches(Points(1), counts, negatives=20_000)[0]
    assert (batch["negatives"] < 4).mean() == pytest.approx(4 * 10 / (4 * 10 + 36), abs=0.02)


@pytest.mark.contract
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_classifier_of_bags_learns(loss):
    model = classifier()
    training = models.SampledSoftmax(model, loss)
    training.compile(keras.optimizers.Adam(0.02))
    source = Points(1)
    training.fit(extreme.SampledBatches(source, np.ones(CLASSES), negatives=30), epochs=60, verbose=0)
    x, y = source[0]
    assert (ops.convert_to_numpy(model(x)).argmax(1) == y).mean() > 0.8


def test_tied_weights_are_trained_by_both_uses():
    keras.utils.set_random_seed(0)
    layer = HALOSOutput(CLASSES, dim=8)
    ids = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Dense(8)(keras.layers.GlobalAveragePooling1D()(layer(ids, embed=True)))
    model = keras.Model(ids, layer(hidden))
    training = models.SampledSoftmax(model)
    y = np.array([[4, -1], [5, 6]], "int32")
    batch = {"inputs": np.array([[1, 2, 3], [7, 7, 8]], "int32"), "targets": y, "weights": np.ones(2, "float32")}
    batch |= {"negatives": np.arange(CLASSES, dtype="int32"), "log_expected": np.zeros(CLASSES, "float32")}
    batch |= {"hits": np.ones((2, 2), "float32")}
    logits = ops.convert_to_numpy(model(batch["inputs"]))
    log_z = np.log(np.exp(logits).sum(1))
    terms = [log_z[0] - logits[0, 4], log_z[1] - logits[1, 5], log_z[1] - logits[1, 6]]
    assert float(training.compute_loss(x=batch, y_pred=training(batch))) == pytest.approx(sum(terms) / 3, rel=1e-5)


@pytest.mark.contract
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_loss_is_that_of_all_classes_where_each_is_drawn(loss):
    """And each may be drawn several times."""
    model = classifier()
    training = models.SampledSoftmax(model, loss)
    x, y = Points(3)[0]
    times = 3
    drawn = np.repeat(np.arange(CLASSES), times).astype("int32")
    hits = np.where(y >= 0, 1.0, 0.0).astype("float32")
    expected = np.full(len(drawn), np.log(times), "float32")
    batch = {"inputs": x, "targets": y, "weights": np.ones(16, "float32"), "hits": hits}
    batch |= {"negatives": drawn, "log_expected": expected}
    logits = ops.convert_to_numpy(model(x)).astype("float64")
    present = y >= 0
    if loss == "softmax":
        log_z = np.log(np.exp(logits).sum(1, keepdims=True))
        terms = (log_z - np.take_along_axis(logits, np.maximum(y, 0), axis=1))[present]
        wanted = terms.sum() / present.sum()
    else:
        right = np.zeros(logits.shape, bool)
        for row, some in zip(right, y, strict=True):
            row[some[some >= 0]] = True
        wanted = np.where(right, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).sum() / present.sum()
    assert float(training.compute_loss(x=batch, y_pred=training(batch))) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_targets_that_are_never_drawn_do_not_run_away(loss):
    model = classifier()
    training = models.SampledSoftmax(model, loss)
    training.compile(keras.optimizers.Adam(0.05))
    losses = training.fit(extreme.SampledBatches(Points(1), np.ones(CLASSES), negatives=2), epochs=60, verbose=0)
    assert min(losses.history["loss"]) >= 0
    assert np.abs(ops.convert_to_numpy(model(Points(1)[0][0]))).max() < 100


def test_weights_of_points_are_passed_on():
    class Weighted(Points):
        def __getitem__(self, index):
            return (*super().__getitem__(index), np.arange(16))

    (batch,) = extreme.SampledBatches(Weighted(1), np.ones(CLASSES))[0]
    np.testing.assert_array_equal(batch["weights"], np.arange(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"negatives": 0}, "`negatives` must be"), ({"power": -1}, "`power` must be"), ({"power": np.nan}, "`power`")],
)
def test_numbers_that_are_refused(options, message):
    with pytest.raises(WrongArgument, match=message):
        extreme.SampledBatches(Points(1), np.ones(CLASSES), **options)


@pytest.mark.parametrize("counts", [[1.0, np.nan], [1, -2], [], [[1]]])
def test_counts_that_are_refused(counts):
    with pytest.raises(WrongArgument, match="`counts` must be finite numbers"):
        extreme.SampledBatches(Points(1), np.array(counts))


def test_labels_of_other_forms_are_refused():
    class OneHot(Points):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, np.eye(CLASSES)[y]

    with pytest.raises(WrongArgument, match="Batch 0: labels are class numbers, got float64"):
        extreme.SampledBatches(OneHot(1), np.ones(CLASSES))[0]


def test_labels_out_of_range_are_refused():
    with pytest.raises(WrongArgument, match="Batch 0 has label"):
        extreme.SampledBatches(Points(1), np.ones(10))[0]


def test_what_is_no_batch_of_drawn_classes():
    source = Points(1)
    with pytest.raises(WrongArgument, match="PyDataset, not tuple"):
        extreme.SampledBatches(source[0], np.ones(CLASSES))
    training = models.SampledSoftmax(classifier())
    training.compile("sgd")
    for batches in (source, [source[0]], source[0]):
        with pytest.raises(WrongArgument, match="takes batches that hold hits, inputs, log_expected"):
            training.fit(*(batches if isinstance(batches, tuple) else (batches,)), verbose=0)
    with pytest.raises(WrongArgument, match=f"are of {CLASSES + 1} classes, the model has {CLASSES}"):
        training.fit(extreme.SampledBatches(source, np.ones(CLASSES + 1)))


class Ones(Points):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, np.eye(CLASSES, dtype="int32")[y]


def test_ones_and_zeros_are_no_class_numbers():
    with pytest.raises(WrongArgument, match=r"Batch 0: labels \(16, 40\) of ones and zeros"):
        extreme.SampledBatches(Ones(1), np.ones(CLASSES))[0]

"""Training of classifiers by sampled softmax: batches, the loss by hand, resuming, that it learns; both backends."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import models, recsys
from keras_efficient.errors import FileProblem, UnknownName, UnsupportedLayer, WrongArgument

pytestmark = pytest.mark.contract


def interactions(users=120, items=60, seed=0, times=False):
    """Items of a user lie in one of three groups, so that half of them tell the others."""
    random = np.random.default_rng(seed)
    group = random.integers(0, 3, users)
    rows = np.repeat(np.arange(users), 10)
    columns = np.concatenate([20 * g + random.permutation(20)[:10] for g in group])
    when = np.tile(np.arange(10), users) if times else None
    return recsys.Interactions(rows, columns, users, items, times=when)


def classifier(items=60, **options):
    keras.utils.set_random_seed(0)
    return models.SequenceClassifier(items + 1, items, dim=8, hidden=(8,), embedding={"compression": 2, **options})


SMALL = {"batch_size": 32, "negatives": 40, "learning_rate": 0.02}


def test_batches_hold_what_the_users_have():
    data = interactions()
    batches = recsys.HistoryBatches(data, batch_size=50, length=4, targets=6, negatives=7)
    assert len(batches) == 3
    (batch,) = batches[2]
    assert batch["inputs"].shape == (50, 4)
    assert batch["targets"].shape == (50, 6)
    np.testing.assert_allclose(batch["weights"], 10 / 6)
    groups = np.where(batch["inputs"] > 0, (batch["inputs"] - 1) // 20, -1).max(axis=1)
    assert (batch["targets"] // 20 == groups[:, None]).all()
    assert all(np.unique(row[row > 0]).size == (row > 0).sum() >= 1 for row in batch["inputs"])
    again = recsys.HistoryBatches(data, batch_size=50, length=4, targets=6, negatives=7)[2][0]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    batches.epoch = 1
    assert not np.array_equal(batches[2][0]["inputs"], batch["inputs"])


def test_with_times_the_target_comes_after_the_history():
    data = interactions(times=True)
    (batch,) = recsys.HistoryBatches(data, batch_size=120, length=5, negatives=3)[0]
    place = {(u, i): t for u, i, t in zip(data.users, data.items, data.times, strict=True)}
    owner = {tuple(sorted(data.items[data.users == u])): u for u in range(120)}
    assert len(owner) <= 120
    for ids, target in zip(batch["inputs"], batch["targets"][:, 0], strict=True):
        known = [i - 1 for i in ids if i > 0]
        assert 1 <= len(known) <= 5
        users = [u for u in range(120) if all((u, i) in place for i in (*known, target))]
        assert any(
            [place[u, i] for i in (*known, target)] == sorted(place[u, i] for i in (*known, target)) for u in users
        )


def test_the_loss_by_hand():
    model = classifier()
    trained = recsys.SampledSoftmax(model)
    batch = {
        "inputs": np.array([[1, 2], [3, 0]], "int32"),
        "targets": np.array([[4, 5], [6, -1]], "int32"),
        "weights": np.array([2.0, 1.0], "float32"),
        "negatives": np.arange(60, dtype="int32"),
        "log_expected": np.zeros(60, "float32"),
        "hits": np.ones((2, 2), "float32"),
    }
    logits = ops.convert_to_numpy(model(batch["inputs"]))
    log_z = np.log(np.exp(logits).sum(1))
    terms = [2 * (log_z[0] - logits[0, 4]), 2 * (log_z[0] - logits[0, 5]), log_z[1] - logits[1, 6]]
    found = trained.compute_loss(x=batch, y_pred=trained(batch))
    assert float(found) == pytest.approx(sum(terms) / 5, rel=1e-5)  # every class once: no estimate


def test_it_learns_and_is_found_by_the_evaluation():
    data = interactions()
    train, _, test = recsys.at_random(data, valid=0.0, test=0.3)
    model = classifier()
    before = recsys.evaluate(model.predict_on_batch, train, test, k=10)
    losses = recsys.train(model, train, epochs=25, **SMALL)["loss"]
    after = recsys.evaluate(model.predict_on_batch, train, test, k=10)
    assert losses[-1] < losses[0]
    assert after.ndcg > before.ndcg + 0.08
    assert after.users == before.users == 120


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    data = interactions()
    whole = classifier()
    recsys.train(whole, data, epochs=4, **SMALL)

    def stop(model):
        raise KeyboardInterrupt

    part = classifier()
    with pytest.raises(KeyboardInterrupt):
        recsys.train(part, data, epochs=4, folder=tmp_path / "run", validate=stop, validate_every=2, **SMALL)
    resumed = classifier()
    history = recsys.train(resumed, data, epochs=4, folder=tmp_path / "run", **SMALL)
    assert 1 <= len(history["loss"]) <= 3
    for left, right in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileProblem, match="another run: its interactions are others"):
        recsys.train(classifier(), interactions(seed=1), epochs=4, folder=tmp_path / "run", **SMALL)
    with pytest.raises(FileProblem, match="another run: its epochs is 4, not 5"):
        recsys.train(classifier(), data, epochs=5, folder=tmp_path / "run", **SMALL)
    with pytest.raises(FileProblem, match="another run: its classifier is another"):
        recsys.train(classifier(out_of_range="clip"), data, epochs=4, folder=tmp_path / "run", **SMALL)
    numbers = {name: np.int64(value) if isinstance(value, int) else value for name, value in SMALL.items()}
    assert not recsys.train(classifier(), data, epochs=np.int64(4), folder=tmp_path / "run", **numbers)
    timed = dataclasses.replace(data, times=np.arange(len(data.users)))
    recsys.train(classifier(), timed, epochs=1, folder=tmp_path / "timed", **SMALL)
    turned = dataclasses.replace(data, times=np.arange(len(data.users))[::-1].copy())
    with pytest.raises(FileProblem, match="another run: its interactions are others"):
        recsys.train(classifier(), turned, epochs=1, folder=tmp_path / "timed", **SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(FileProblem, match="other files"):
        recsys.train(classifier(), data, epochs=1, folder=tmp_path / "full", **SMALL)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "`epochs` must be a whole number from 1"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number"),
        ({"weight_decay": -1}, "`weight_decay` must be"),
        ({"targets": 0}, "`targets` must be"),
        ({"length": 2.5}, "`length` must be"),
        ({"negatives": 0}, "`negatives` must be"),
        ({"keep": 1.5}, "`keep` must be above 0"),
        ({"power": float("inf")}, "`power` must be a finite number"),
    ],
)
def test_numbers_that_cannot_be_trained_with(wrong, words):
    with pytest.raises(WrongArgument, match=words):
        recsys.train(classifier(), interactions(), **{"epochs": 1, **wrong})


def test_classifiers_of_other_items():
    with pytest.raises(WrongArgument, match="59 classes, the interactions 60 items"):
        recsys.train(classifier(59), interactions(), epochs=1)
    few = models.SequenceClassifier(60, 60, dim=8, hidden=(8,))
    with pytest.raises(WrongArgument, match=r"60 ids, the interactions 60 items and the padding.\n.*num_items \+ 1"):
        recsys.train(few, interactions(), epochs=1)
    short = models.SequenceClassifier(61, 60, dim=8, hidden=(8,), length=5)
    with pytest.raises(WrongArgument, match=r"takes 5 ids.\nGive length=5"):
        recsys.train(short, interactions(), epochs=1)


def test_what_cannot_be_trained():
    empty = recsys.Interactions(np.zeros(0, int), np.zeros(0, int), 3, 60)
    with pytest.raises(WrongArgument, match="No user"):
        recsys.train(classifier(), empty, epochs=1)
    with pytest.raises(WrongArgument, match="held-out"):
        recsys.evaluate(classifier().predict_on_batch, empty, empty)
    items = interactions().num_items
    for width in (items - 1, items + 1):
        with pytest.raises(WrongArgument, match=f"scores {width} items, the interactions have {items}"):
            recsys.evaluate(lambda ids, width=width: np.zeros((len(ids), width)), interactions(), interactions())
    with pytest.raises(UnknownName, match="Did you mean 'negatives'"):
        recsys.train(classifier(), interactions(), epochs=1, negative=5)
    with pytest.raises(WrongArgument, match="120 and 3 users"):
        recsys.evaluate(classifier().predict_on_batch, interactions(), empty)
    inputs = keras.Input((4,))
    with pytest.raises(UnsupportedLayer, match="EinsumDense"):
        recsys.SampledSoftmax(keras.Model(inputs, keras.layers.Dense(3)(inputs)))

"""learn_index: every method on a planted set, the dial and the target, what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import extreme, models
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnknownName, UnsupportedLayer, WrongArgument
from keras_efficient.layers import HALOSOutput

BUDGET = {"budget": 0.4}
METHODS = pytest.mark.parametrize("method", ["contexts", "cells", "hash", "inner_product", "random_hash"])


@METHODS
def test_every_method_finds_most_labels(planted, method):
    model = planted.model()
    learned = extreme.learn_index(model, planted.draw(6000), method=method, **BUDGET)
    assert learned.reached
    assert learned.measures.share <= 0.4
    assert learned.measures.label_recall > (0.6 if method == "random_hash" else 0.85)
    x, y = planted.draw(500, seed=9)
    logits, classes = map(keras.ops.convert_to_numpy, deploy(model)(x))
    assert logits.shape == (500, 5)
    full = keras.ops.convert_to_numpy(model(x)).argmax(1)
    assert (classes[:, 0] == y).mean() > 0.9 * (full == y).mean()


@METHODS
def test_the_same_seed_learns_the_same(planted, method):
    first, second = planted.model(), planted.model()
    for model in (first, second):
        extreme.learn_index(model, planted.draw(2000), method=method, seed=4, **BUDGET)
    for name, array in first.get_layer("out").index.arrays.items():
        np.testing.assert_array_equal(array, second.get_layer("out").index.arrays[name])


def test_weights_stay_as_they_are(planted):
    model = planted.model()
    before = [weight.copy() for weight in model.get_layer("out").get_weights()]
    extreme.learn_index(model, planted.draw(2000), **BUDGET)
    for old, new in zip(before, model.get_layer("out").get_weights(), strict=False):
        np.testing.assert_array_equal(old, new)


def test_labels_lead_better_than_weights(planted):
    recalls = {}
    for method in ("cells", "hash", "random_hash"):
        learned = extreme.learn_index(planted.model(), planted.draw(6000), method=method, budget=0.1)
        recalls[method] = learned.measures.label_recall
    assert recalls["hash"] > 1.1 * recalls["random_hash"]
    assert recalls["cells"] > 1.1 * recalls["random_hash"]


def test_learned_hashes_do_not_collapse(planted):
    model = planted.model()
    options = {"method": "hash", "rounds": 25, "guards": extreme.Guards(by_labels=False)}
    learned = extreme.learn_index(model, planted.draw(4000), **BUDGET, **options)
    assert len(learned.rounds) == 26
    assert learned.measures.label_recall >= max(learned.rounds) - 1e-9
    found = keras.ops.convert_to_numpy(model.get_layer("out").candidates(planted.draw(200)[0]))
    assert 20 < (found >= 0).sum(1).mean() < 0.4 * 400


@pytest.mark.parametrize("by_labels", [True, False])
def test_winners_take_all(planted, by_labels):
    """Places that are chosen find more labels than the first ones, in buckets of the same size."""
    options = {"budget": 0.2, "tables": 2, "ranges": 4, "guards": extreme.Guards(by_labels=by_labels)}
    data = planted.draw(6000)
    random = extreme.learn_index(planted.model(), data, method="random_hash", **options)
    model = planted.model()
    learned = extreme.learn_index(model, data, method="hash", rounds=20, **options)
    assert learned.measures.neurons == random.measures.neurons
    if by_labels:
        assert learned.measures.label_recall > random.measures.label_recall
    assert learned.rounds[1] == pytest.approx(learned.measures.label_recall)
    assert len(model.get_layer("out").index.reachable) > 390  # frequent labels lie in several buckets
    x, _ = planted.draw(300, seed=9)
    candidates = keras.ops.convert_to_numpy(model.get_layer("out").candidates(x))
    logits = keras.ops.convert_to_numpy(model(x))
    scores, classes = map(keras.ops.convert_to_numpy, deploy(model)(x))
    assert (classes[:, 0, None] == candidates).any(axis=1).all()
    np.testing.assert_allclose(scores, np.take_along_axis(logits, classes, axis=1), rtol=1e-4, atol=1e-4)
    before = learned.measures.label_recall
    again = extreme.reindex(model, data)
    assert again.label_recall > 0.9 * before


@pytest.mark.parametrize("ranges", [1, 17, 2.5, True])
def test_ranges_that_are_refused(planted, ranges):
    with pytest.raises(WrongArgument, match="`ranges` must be a whole number from 2 to 16"):
        extreme.learn_index(planted.model(), planted.draw(500), method="hash", ranges=ranges, **BUDGET)


def test_hashes_may_find_every_label(planted):
    """Then no pair pulls: labels that are found weigh nothing."""
    options = {"method": "hash", "rounds": 2, "tables": 1, "bits": 1, "guards": extreme.Guards(kept_positives=0.0)}
    x, _ = planted.draw(500)
    learned = extreme.learn_index(planted.model(), (x, np.zeros(500, int)), budget=0.9, **options)
    assert learned.measures.label_recall == 1.0


def test_labels_without_a_pattern_are_not_found(planted):
    """What is right for a query must not leak into its candidates."""
    x, y = planted.draw(4000)
    random = np.random.default_rng(0).integers(400, size=len(y))
    for method in ("contexts", "cells", "hash"):
        measures = extreme.learn_index(planted.model(), (x, random), method=method, **BUDGET).measures
        assert measures.label_recall < measures.share + 3 * np.sqrt(0.25 / measures.queries)


def test_a_target_takes_no_more_than_it_needs(planted):
    model = planted.model()
    learned = extreme.learn_index(model, planted.draw(6000), method="cells", budget=0.5, target=0.8)
    assert learned.reached
    assert learned.measures.kept() >= 0.8
    assert learned.measures.neurons == max(learned.dial)
    assert model.get_layer("out").plan.neurons == learned.measures.neurons < 0.5 * 400
    smaller = [found for neurons, found in learned.dial.items() if neurons < learned.measures.neurons]
    assert all(found.kept() < 0.8 for found in smaller)


def test_a_target_out_of_reach_is_told(planted):
    random = np.random.default_rng(0).normal(size=(500, 16)).astype("f"), np.arange(500) % 400
    learned = extreme.learn_index(planted.model(), random, method="random_hash", budget=0.1, target=1.0)
    assert not learned.reached
    assert learned.measures.share <= 0.1


def test_data_in_batches_is_the_same_data(planted):
    x, y = planted.draw(1500)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(500 * index, 500 * (index + 1))
            return x[part], y[part, None]

    one, other = planted.model(), planted.model()
    extreme.learn_index(one, (x, y), validation=planted.draw(100), **BUDGET)
    extreme.learn_index(other, Batches(), validation=planted.draw(100), **BUDGET)
    left, right = (model.get_layer("out").index.arrays["slots"] for model in (one, other))
    np.testing.assert_array_equal(left, right)


def test_classes_without_a_label_stay_reachable(planted):
    x, y = planted.draw(3000)
    seen = y < 200
    model = planted.model()
    extreme.learn_index(model, (x[seen], y[seen]), method="cells", **BUDGET)
    assert len(model.get_layer("out").index.reachable) > 390  # frequent labels lie in several buckets


def test_what_fails_leaves_the_old_index(planted, monkeypatch):
    model = planted.model()
    extreme.learn_index(model, planted.draw(2000), method="cells", **BUDGET)
    before = model.get_layer("out").index

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_efficient.extreme.learning.measure", fail)
    with pytest.raises(KeyboardInterrupt):
        extreme.learn_index(model, planted.draw(2000), method="contexts", **BUDGET)
    assert model.get_layer("out").plan == before.plan


def test_progress_is_told(planted):
    lines = []
    extreme.learn_index(planted.model(), planted.draw(1000), on_progress=lines.append, **BUDGET)
    assert "label recall" in lines[-1]


def test_what_is_refused(planted):
    model, data = planted.model(), planted.draw(300)
    for budget in (0, 1.5, "much"):
        with pytest.raises(WrongArgument, match="`budget` must be above 0"):
            extreme.learn_index(model, data, budget=budget)
    with pytest.raises(WrongArgument, match=r"A budget of 0\.001 leaves 0 of 400 neurons"):
        extreme.learn_index(model, data, budget=0.001)
    with pytest.raises(WrongArgument, match="`target` must be above 0"):
        extreme.learn_index(model, data, target=2.0)
    with pytest.raises(UnknownName, match=r"Unknown method: 'cell'\.\nDid you mean 'cells'"):
        extreme.learn_index(model, data, method="cell")
    with pytest.raises(UnknownName, match="Unknown option of method 'cells': 'tables'"):
        extreme.learn_index(model, data, method="cells", tables=3)
    with pytest.raises(WrongArgument, match="1 labelled inputs are too few"):
        extreme.learn_index(model, (data[0][:1], data[1][:1]))
    kernel = keras.ops.convert_to_numpy(model.get_layer("out").kernel).copy()
    kernel[17, 3] = np.nan
    model.get_layer("out").kernel.assign(kernel)
    with pytest.raises(WrongArgument, match="weights of class 17 are not finite"):
        extreme.learn_index(model, data, **BUDGET)
    inputs = keras.Input((16,))
    with pytest.raises(UnsupportedLayer, match="has 0 HALOSOutput layers"):
        extreme.learn_index(keras.Model(inputs, keras.layers.Dense(400)(inputs)), data)


def test_ones_and_zeros_are_not_class_numbers(planted):
    x, y = planted.draw(500)
    found = extreme.queries(planted.model(), (x, np.eye(400, dtype=np.int64)[y]))
    np.testing.assert_array_equal(found.labels, y)
    with pytest.raises(WrongArgument, match="labels for 600 inputs, and 500 inputs"):
        extreme.queries(planted.model(), (x, np.zeros(600, int)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cells", {"probes": 0}),
        ("cells", {"head": -5}),
        ("cells", {"head": 2.5}),
        ("hash", {"rounds": -1}),
        ("hash", {"tables": 2.5}),
        ("hash", {"bits": True}),
        ("hash", {"bits": 40}),
        ("hash", {"seed": 1.5}),
    ],
)
def test_options_that_are_refused(planted, method, options):
    with pytest.raises(WrongArgument, match=f"`{next(iter(options))}` must be a whole number"):
        extreme.learn_index(planted.model(), planted.draw(500), method=method, **BUDGET, **options)
    with pytest.raises(WrongArgument, match="`guards` must be an extreme"):
        extreme.learn_index(planted.model(), planted.draw(500), method="hash", guards=False, **BUDGET)


def test_very_few_classes():
    x = keras.Input((3,))
    model = keras.Model(x, HALOSOutput(4, 2)(x))
    random = np.random.default_rng(0)
    learned = extreme.learn_index(model, (random.normal(size=(300, 3)), random.integers(4, size=300)), budget=1.0)
    assert learned.measures.label_recall > 0.5


def test_models_that_are_refused(planted):
    data = planted.draw(500)
    training = models.SampledSoftmax(planted.model())
    with pytest.raises(UnsupportedLayer, match="it trains another model"):
        extreme.learn_index(training, data)
    with pytest.raises(UnsupportedLayer, match="it is not built"):
        extreme.learn_index(keras.Sequential([HALOSOutput(400)]), data)
    with pytest.raises(WrongArgument, match="Model is needed, not str"):
        extreme.learn_index("model.keras", data)
    inputs = keras.Input((16,))
    layer = HALOSOutput(400, name="out")
    with pytest.raises(UnsupportedLayer, match="its logits are no output of 'soft'"):
        extreme.learn_index(keras.Model(inputs, keras.layers.Softmax()(layer(inputs)), name="soft"), data)
    with pytest.raises(UnsupportedLayer, match="'two' calls it 2 times"):
        extreme.learn_index(keras.Model(inputs, [layer(inputs), layer(-inputs)], name="two"), data)


def test_forms_of_data(planted):
    from scipy import sparse

    x, y = planted.draw(500)
    matrix = sparse.csr_matrix((np.ones(500), (np.arange(500), y)), (500, 400))
    model = planted.model()
    plain = extreme.queries(model, (x, y))
    two = [(x[:200], y[:200]), (x[200:], y[200:])]
    for data in (
        (x, y, np.ones(500)),
        (x, matrix),
        (x, matrix.tocoo()),
        two,
        [(x[:200], matrix[:200]), (x[200:], y[200:]), (x[:0], y[:0])],
    ):
        found = extreme.queries(model, data)
        np.testing.assert_array_equal(found.labels, plain.labels)
        np.testing.assert_array_equal(found.offsets, plain.offsets)
    with pytest.raises(WrongArgument, match="Labels are one array"):
        extreme.queries(model, (x, {"a": y, "b": y}))
    with pytest.raises(WrongArgument, match="must come in batches"):
        extreme.queries(model, [(x[0], y[0])] * 3)
    with pytest.raises(WrongArgument, match=r"must be \(n, 400\), got \(500, 399\)"):
        extreme.queries(model, (x, matrix[:, :399]))


def test_too_few_candidates_for_the_answers_are_told(planted):
    inputs = keras.Input((16,))
    model = keras.Model(inputs, HALOSOutput(400, k=100)(inputs))
    with pytest.warns(UserWarning, match="100 answers are asked for and .* classes are looked at"):
        extreme.learn_index(model, planted.draw(500), budget=0.2)


def test_an_index_without_contents_is_not_used(planted):
    model = planted.model()
    extreme.learn_index(model, planted.draw(500), budget=0.4)
    clone = keras.models.clone_model(model)
    with pytest.raises(WrongArgument, match="The index of layer 'out' is empty"):
        deploy(clone)
    for change in (lambda: extreme.reindex(clone, planted.draw(500)), lambda: extreme.remove_classes(clone, [3])):
        with pytest.raises(WrongArgument, match="The index of layer 'out' is empty"):
            change()
    clone.set_weights(model.get_weights())
    x = planted.draw(20)[0]
    left, right = (keras.ops.convert_to_numpy(deploy(one)(x)[1]) for one in (clone, model))
    np.testing.assert_array_equal(left, right)


def test_what_follows_the_logits_is_no_matter_for_training(planted):
    inputs = keras.Input((16,))
    logits = HALOSOutput(400, name="out")(inputs)
    model = keras.Model(inputs, keras.layers.Activation("linear", dtype="float32")(logits))
    assert models.SampledSoftmax(model).last is model.get_layer("out")
    assert len(extreme.queries(model, planted.draw(50))) == 50


def test_an_index_of_a_head_alone_is_kept_in_files(planted, tmp_path):
    model = planted.model()
    extreme.learn_index(model, planted.draw(500), method="cells", budget=0.4)
    head = model.get_layer("out").index.arrays["head"]
    extreme.remove_classes(model, np.setdiff1d(np.arange(400), head))
    model.save(tmp_path / "model.keras")
    x = planted.draw(9)[0]
    left, right = (deploy(one)(x)[1] for one in (model, keras.saving.load_model(tmp_path / "model.keras")))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(left), keras.ops.convert_to_numpy(right))

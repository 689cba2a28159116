"""The parts of index learning by themselves: queries, groups, routing, measures, the gradient of the soft hash."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import extreme, ranking
from keras_efficient.errors import WrongArgument
from keras_efficient.extreme import cells as cells_module
from keras_efficient.extreme import hashes
from keras_efficient.extreme.clusters import balanced_groups, group_sums, k_means
from keras_efficient.extreme.placement import placed, preferences
from keras_efficient.extreme.queries import Queries
from keras_efficient.extreme.routing import class_means, discriminants
from keras_efficient.layers.halos import HashPlan, RouterPlan

RNG = np.random.default_rng(0)


def test_labels_in_every_form(planted):
    model, x = planted.model(), planted.draw(4)[0]
    single = extreme.queries(model, (x, np.array([3, 1, 399, 0])))
    assert single.labels.tolist() == [3, 1, 399, 0]
    padded = extreme.queries(model, (x, np.array([[3, -1], [-1, -1], [399, 5], [0, -1]])))
    assert padded.labels.tolist() == [3, 399, 5, 0]
    assert padded.offsets.tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(padded.vectors, x[[0, 2, 3]])
    dense = np.zeros((4, 400), "float32")
    dense[[0, 2, 2, 3], [3, 5, 399, 0]] = 1
    assert extreme.queries(model, (x, dense)).labels.tolist() == [3, 5, 399, 0]


def test_labels_that_are_refused(planted):
    model, x = planted.model(), planted.draw(3)[0]
    with pytest.raises(WrongArgument, match="Row 2 has the label 400; there are classes 0 to 399"):
        extreme.queries(model, (x, np.array([1, 2, 400])))
    with pytest.raises(WrongArgument, match="Row 0 has the label -2"):
        extreme.queries(model, (x, np.array([[-2], [1], [1]])))
    with pytest.raises(WrongArgument, match="Labels are class numbers"):
        extreme.queries(model, (x, np.ones((3, 7), "float32")))
    with pytest.raises(WrongArgument, match="has no label"):
        extreme.queries(model, (x, np.full((3, 1), -1)))
    with pytest.raises(WrongArgument, match="labels for 2 inputs, and 3 inputs"):
        extreme.queries(model, (x, np.array([1, 2])))
    with pytest.raises(WrongArgument, match="not finite for input 1"):
        extreme.queries(model, (np.where(np.arange(3)[:, None] == 1, np.nan, x).astype("f"), np.array([1, 2, 3])))
    with pytest.raises(WrongArgument, match=r"Data is \(x, y\)"):
        extreme.queries(model, 5)


@pytest.mark.parametrize(("points", "count", "capacity"), [(500, 7, 80), (500, 50, 10), (400, 90, 5), (3, 5, 1)])
def test_groups_keep_their_capacity(points, count, capacity):
    found = balanced_groups(RNG.normal(size=(points, 6)).astype("f"), count, capacity, np.random.default_rng(1))
    assert found.min() >= 0
    assert found.max() < count
    assert np.bincount(found).max() <= capacity


def test_groups_are_alike():
    centres = RNG.normal(size=(12, 8))
    truth = np.repeat(np.arange(12), 20)
    points = (centres[truth] + 0.05 * RNG.normal(size=(240, 8))).astype("f")
    found = balanced_groups(points, 12, 24, np.random.default_rng(0))
    together = [np.bincount(truth[found == group]).max() for group in range(12) if (found == group).any()]
    assert sum(together) > 0.9 * 240


def test_sums_of_groups():
    values, groups = RNG.normal(size=(1000, 3)), RNG.integers(-1, 5, size=1000)
    weights = RNG.random(1000)
    want = np.stack([(values * weights[:, None])[groups == group].sum(0) for group in range(6)])
    np.testing.assert_allclose(group_sums(values, groups, 6, weights), want, atol=1e-12)


def test_k_means_of_fewer_points_than_centres():
    centres, chosen = k_means(np.eye(3, dtype="f"), 5, np.random.default_rng(0))
    assert centres.shape == (5, 3)
    np.testing.assert_allclose(centres[chosen], np.eye(3), atol=1e-6)


def test_discriminants_are_those_of_scikit_learn(monkeypatch):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    monkeypatch.setattr("keras_efficient.extreme.routing.RIDGE", 1e-9)
    monkeypatch.setattr("keras_efficient.extreme.routing.PRIOR", 1e-6)
    means = RNG.normal(size=(12, 5))
    labels = RNG.integers(12, size=4000)
    x = (means[labels] + RNG.normal(size=(4000, 5)) @ RNG.normal(size=(5, 5))).astype("f")
    groups = np.arange(12) % 4
    queries = Queries(x, labels, np.arange(4001))
    rows, biases = discriminants(class_means(queries, np.zeros((12, 6), "f")), groups, 4)
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x, groups[labels])
    ours, theirs = x @ rows.T + biases, x @ peer.coef_.T + peer.intercept_
    # Scores are told apart up to what all groups have in common.
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], atol=2e-2)


def test_groups_without_a_class_are_never_chosen(planted):
    x, y = planted.draw(500)
    classes = class_means(Queries(x, y, np.arange(501)), np.zeros((400, 17), "f"))
    groups = np.where(np.arange(400) < 300, np.arange(400) % 3, -1)
    rows, biases = discriminants(classes, groups, 5)
    assert set((x @ rows.T + biases).argmax(1)) <= {0, 1, 2}


def test_measures_are_those_of_a_loop(planted):
    x, y = planted.draw(60)
    labels = np.stack([y, (y + 1) % 400], 1).ravel()
    queries = Queries(x, labels, np.arange(0, 121, 2))
    kernel, bias = planted.model().get_layer("out").get_weights()
    rows = np.concatenate([kernel, bias[:, None]], 1)
    chosen = RNG.permuted(np.tile(np.arange(400), (60, 1)), axis=1)[:, :90]
    chosen[:, 50:] = -1
    chosen[:, 0] = y
    found = extreme.measure(lambda v: chosen[[int(np.argmin(((x - q) ** 2).sum(1))) for q in v]], 90, rows, queries)
    logits = x @ kernel.T + bias
    inside = [set(row[row >= 0]) for row in chosen]
    assert found.label_recall == np.mean([label in inside[i // 2] for i, label in enumerate(labels)])
    best = [max(inside[i], key=lambda c, i=i: logits[i, c]) for i in range(60)]
    assert found.precision[1] == pytest.approx(np.mean([b in labels[2 * i : 2 * i + 2] for i, b in enumerate(best)]))
    full = logits.argmax(1)
    assert found.full_precision[1] == pytest.approx(
        np.mean([b in labels[2 * i : 2 * i + 2] for i, b in enumerate(full)])
    )
    assert (found.neurons, found.share, found.queries) == (90, 90 / 400, 60)


def test_the_gradient_of_the_soft_hash():
    plan = HashPlan(units=9, dim=5, capacity=4, tables=2, bits=3)
    theta = RNG.normal(size=(5, 6))
    q, w = (RNG.normal(size=(7, 5)) / 3 for _ in range(2))
    truth, weights = RNG.integers(2, size=7).astype(float), RNG.random(7)
    guards = extreme.Guards(unit_norm=False)

    def loss(theta):
        s = (np.tanh(q @ theta) * np.tanh(w @ theta)).reshape(7, 2, 3).sum(2)
        p = 1 / (1 + np.exp(-s))
        entropy = -(truth[:, None] * np.log(p) + (1 - truth[:, None]) * np.log(1 - p))
        spread = sum(np.square(t.T @ t - np.eye(3)).sum() for t in (theta[:, :3], theta[:, 3:]))
        return (entropy * weights[:, None]).sum() / weights.sum() / 2 + guards.orthogonal * spread

    found = hashes._gradient(plan, theta, q, w, truth, weights, guards)
    for place in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[place] = 1e-6
        assert found[place] == pytest.approx((loss(theta + step) - loss(theta - step)) / 2e-6, abs=1e-7)


def test_tables_hold_every_class_where_there_is_room(planted):
    x, y = planted.draw(800)
    queries = Queries(x, y, np.arange(801))
    rows = np.concatenate([*planted.model().get_layer("out").get_weights()[:1], np.zeros((400, 1))], 1).astype("f")
    plan = HashPlan(units=400, dim=16, capacity=60, tables=3, bits=3)
    index = hashes.random_hashes(plan, queries, rows, seed=0, guards=extreme.Guards(by_labels=False))
    for table in index.arrays["slots"].reshape(3, -1):
        assert np.sort(table[table >= 0]).tolist() == list(range(400))
    without = extreme.Guards(by_labels=False, spill=False)
    tight = HashPlan(units=400, dim=16, capacity=50, tables=3, bits=3)
    dropped = hashes.random_hashes(tight, queries, rows, seed=0, guards=without).arrays["slots"]
    assert (dropped >= 0).sum() < 3 * 400


def test_propensity_precision_by_hand():
    ranked, relevant = np.array([[2, 0, 1]]), (np.array([0, 1, 3]), np.array([0, 3]))
    p = np.array([0.5, 0.25, 0.1, 0.2])
    assert ranking.propensity_precision(ranked, relevant, 2, p)[0] == pytest.approx(2 / (5 + 4))
    assert ranking.precision(ranked, relevant, 2)[0] == 0.5
    rare, frequent = ranking.propensities(np.array([1, 1000]), 5000)
    assert 0 < rare < frequent < 1


def test_layers_without_biases(planted):
    inputs = keras.Input((16,))
    from keras_efficient.layers import HALOSOutput

    model = keras.Model(inputs, HALOSOutput(400, use_bias=False, name="out")(inputs))
    model.get_layer("out").set_weights([planted.means])
    assert extreme.learn_index(model, planted.draw(2000), budget=0.4).measures.label_recall > 0.5


def _tree(widths=(4, 5), capacity=3, seed=3):
    blocks = int(np.prod(widths))
    plan = RouterPlan(units=50, dim=6, capacity=capacity, widths=widths, beams=(1,) * len(widths))
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shelf in plan.shelves().items():
        arrays[name] = random.normal(size=(shelf.blocks, shelf.width, 6)).astype("f")
        arrays[f"{name}_bias"] = random.normal(size=(shelf.blocks, shelf.width)).astype("f")
    return plan, arrays, blocks


def test_preferences_are_the_best_blocks_of_the_kept_nodes():
    plan, arrays, blocks = _tree()
    points = RNG.normal(size=(40, 6)).astype("f")
    scores = points @ arrays["router_1"].reshape(blocks, 6).T + arrays["router_1_bias"].reshape(-1)
    found, values = preferences(plan, arrays, points, beam=4, count=7)
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1)[:, :7])
    np.testing.assert_allclose(values, -np.sort(-scores, axis=1)[:, :7], rtol=1e-5)
    found, _ = preferences(plan, arrays, points, beam=1, count=9)
    best = (points @ arrays["router_0"][0].T + arrays["router_0_bias"][0]).argmax(1)
    assert found.shape == (40, 5)  # a node has no more
    np.testing.assert_array_equal(found // 5, np.tile(best[:, None], 5))


def test_classes_are_placed_where_they_wish_as_far_as_there_is_room():
    plan, _, blocks = _tree()
    scores = RNG.normal(size=(60, blocks)).astype("f")
    order = np.argsort(-scores, axis=1)[:, :8]
    values = np.take_along_axis(scores, order, axis=1)
    masses = RNG.integers(1, 100, 60).astype("f")
    found = placed(order, values, masses, plan)
    assert np.bincount(found, minlength=blocks).tolist() == [3] * blocks  # 60 places for 60 classes
    few = placed(order[:2], values[:2], masses[:2], plan)
    np.testing.assert_array_equal(few, order[:2, 0])
    # All want one block: those that are asked for most have it.
    alike = placed(np.tile(order[:1], (60, 1)), np.tile(values[:1], (60, 1)), masses, plan)
    assert set(masses[alike == order[0, 0]]) == set(np.sort(masses)[-3:])


def test_a_group_that_was_cut_apart_is_brought_together(planted):
    """Balanced groups put what does not fit anywhere; moving classes finds more of them."""
    x, y = planted.draw(3000)
    recalls = {}
    for moves in (0, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cells_module, "MOVES", moves)
            recalls[moves] = extreme.learn_index(
                planted.model(), (x, y), method="cells", budget=0.2
            ).measures.label_recall
    assert recalls[2] >= recalls[0]


@pytest.mark.parametrize("duplicates", [False, True])
def test_measures_against_all_classes(duplicates):
    units, random = 40, np.random.default_rng(5)
    rows = random.normal(size=(units, 5)).astype("f")
    vectors = random.normal(size=(30, 4)).astype("f")
    labels = np.stack([random.choice(units, 2, replace=False) for _ in range(30)])
    found = Queries(vectors, labels.ravel().astype("int32"), np.arange(31) * 2)
    ids = np.stack([random.choice(units, 12, replace=False) for _ in range(30)]).astype("int32")
    ids[:, 3] = -1
    if duplicates:
        ids[:, 5] = ids[:, 6]
    measures = extreme.measure(lambda x: ids, 12, rows, found)
    logits = vectors @ rows[:, :-1].T + rows[:, -1]
    inside = np.zeros((30, units + 1), bool)
    np.put_along_axis(inside, ids, True, axis=1)
    some = np.argsort(-np.where(inside[:, :-1], logits, -np.inf), axis=1)[:, :5]
    full = np.argsort(-logits, axis=1)[:, :5]
    for k in (1, 5):
        for ranked, value in ((some, measures.precision[k]), (full, measures.full_precision[k])):
            hits = [len(set(ranked[i, :k]) & set(labels[i])) / k for i in range(30)]
            assert value == pytest.approx(np.mean(hits))
    there = [inside[i, label] for i in range(30) for label in labels[i]]
    assert measures.label_recall == pytest.approx(np.mean(there))

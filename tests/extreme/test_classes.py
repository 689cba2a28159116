"""An index that lives: classes come, go and change, and the model is trained on."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import extreme
from keras_efficient.deploy import deploy
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)
METHODS = pytest.mark.parametrize("method", ["cells", "contexts", "hash"])


def learned(planted, method="cells", budget=0.4):
    model = planted.model()
    extreme.learn_index(model, planted.draw(3000), method=method, budget=budget)
    return model


def everything(model):
    layer = model.get_layer("out")
    layer.plan = layer.plan.probing(layer.plan.blocks)
    return layer


def test_changes_give_what_a_dense_layer_of_live_classes_gives(planted):
    model = learned(planted)
    kernel = RNG.normal(size=(30, 16)).astype("f") * 4
    bigger, new = extreme.add_classes(model, kernel, np.full(30, -1.0))
    assert new.tolist() == list(range(400, 430))
    assert model.get_layer("out").units == 400
    gone = np.concatenate([RNG.choice(400, 60, replace=False), new[:5]])
    extreme.remove_classes(bigger, gone)
    changed = np.setdiff1d(np.arange(400), gone)[:50]
    extreme.set_classes(bigger, changed, RNG.normal(size=(50, 16)).astype("f"), RNG.normal(size=50))
    layer = everything(bigger)
    x = planted.draw(40)[0]
    full = keras.ops.convert_to_numpy(layer(x)).copy()
    full[:, gone] = -np.inf
    want = np.argsort(-full, axis=1)[:, :5]
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.top_k(x)[1]), want)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(deploy(bigger)(x)[1]), want)


@METHODS
def test_new_classes_are_found(planted, method):
    model = learned(planted, method)
    near = planted.means[:20] + 0.2 * RNG.normal(size=(20, 16)).astype("f")
    bigger, new = extreme.add_classes(model, near / 0.25, -0.5 * np.square(near).sum(1) / 0.25)
    classes = keras.ops.convert_to_numpy(deploy(bigger)(near)[1])
    assert (classes == new[:, None]).any(1).mean() >= 0.8


@METHODS
def test_removed_classes_are_no_answer(planted, method):
    model = learned(planted, method)
    x = planted.draw(50)[0]
    first = keras.ops.convert_to_numpy(deploy(model)(x)[1])[:, 0]
    extreme.remove_classes(model, np.unique(first))
    again = keras.ops.convert_to_numpy(deploy(model)(x)[1])
    assert not np.isin(again, first).any()


@METHODS
def test_a_model_that_was_trained_on_is_indexed_again(planted, method):
    model = learned(planted, method)
    layer = model.get_layer("out")
    turn = np.linalg.qr(np.eye(16) + 0.05 * RNG.normal(size=(16, 16)))[0].astype("f")
    turn *= np.sign(np.diag(turn))
    inputs = keras.Input((16,))
    rotation = keras.layers.Dense(16, use_bias=False, name="turn")
    turned = keras.Model(inputs, layer(rotation(inputs)))
    rotation.set_weights([turn])
    layer.kernel.assign(keras.ops.convert_to_numpy(layer.kernel) @ turn)
    with pytest.raises(WrongArgument, match="learned for other weights"):
        layer.set_index(layer.index)
    data = planted.draw(3000)
    measures = extreme.reindex(turned, data)
    assert measures.label_recall > 0.8
    assert layer.index.fingerprint == layer.fingerprint()


def test_what_is_refused(planted):
    model = planted.model()
    with pytest.raises(WrongArgument, match="has no index"):
        extreme.remove_classes(model, [1])
    with pytest.raises(WrongArgument, match="has no index"):
        extreme.reindex(model, planted.draw(100))
    model = learned(planted)
    with pytest.raises(WrongArgument, match="Classes are numbers from 0 to 399"):
        extreme.remove_classes(model, [400])
    with pytest.raises(WrongArgument, match=r"must be \(n, 16\) and \(n,\), got \(2, 3\)"):
        extreme.add_classes(model, np.zeros((2, 3)))
    with pytest.raises(WrongArgument, match="must be finite"):
        extreme.set_classes(model, [1], np.full((1, 16), np.nan))
    with pytest.raises(WrongArgument, match="weights for 2 classes, and 1 classes"):
        extreme.set_classes(model, [1], np.zeros((2, 16)))
    with pytest.raises(WrongArgument, match="each once"):
        extreme.set_classes(model, [1, 1], np.zeros((2, 16)))
    extreme.remove_classes(model, [])
    with pytest.raises(WrongArgument, match="free places, for 1000 new classes"):
        extreme.add_classes(model, np.ones((1000, 16)))


def test_new_classes_are_found_where_a_target_shortened_the_lists(planted):
    model = planted.model()
    options = {"method": "contexts", "budget": 0.5, "target": 0.7}
    extreme.learn_index(model, planted.draw(3000), **options)
    assert model.get_layer("out").plan.places
    near = planted.means[:20] + 0.2 * RNG.normal(size=(20, 16)).astype("f")
    bigger, new = extreme.add_classes(model, near / 0.25, -0.5 * np.square(near).sum(1) / 0.25)
    classes = keras.ops.convert_to_numpy(deploy(bigger)(near)[1])
    assert (classes == new[:, None]).any(1).mean() >= 0.8


@pytest.mark.parametrize("method", ["contexts", "hash"])
def test_too_many_alike_classes_are_refused(planted, method):
    model = learned(planted, method)
    alike = np.tile(planted.means[:1], (20_000, 1)) + 0.01 * RNG.normal(size=(20_000, 16)).astype("f")
    with pytest.raises(WrongArgument, match="new classes are too many"):
        extreme.add_classes(model, alike)


@METHODS
def test_removed_classes_stay_out_when_indexed_again(planted, method):
    model = learned(planted, method)
    gone = np.arange(0, 400, 3)
    extreme.remove_classes(model, gone)
    extreme.reindex(model, planted.draw(3000))
    classes = keras.ops.convert_to_numpy(deploy(model)(planted.draw(200)[0])[1])
    assert not np.isin(classes, gone).any()


@METHODS
def test_indexed_again_is_not_worse_than_left_as_it_is(planted, method):
    model, data = learned(planted, method), planted.draw(300, seed=5)  # few to learn from
    layer = model.get_layer("out")
    recalls = []
    for again in (False, True):
        if again:
            measures = extreme.reindex(model, data, validation=planted.draw(2000, seed=6))
            recalls.append(measures.precision[1])
        found = keras.ops.convert_to_numpy(layer.top_k(planted.draw(2000, seed=6)[0])[1])[:, 0]
        recalls.append((found == planted.draw(2000, seed=6)[1]).mean())
    before, measured, after = recalls
    assert measured == pytest.approx(after, abs=1e-3)
    assert after >= before


def test_random_tables_stay_what_they_are(planted):
    model, guards = planted.model(), extreme.Guards(by_labels=False)
    data = planted.draw(2000)
    extreme.learn_index(model, data, method="random_hash", budget=0.4, seed=0)
    before = model.get_layer("out").index.arrays["slots"].copy()
    extreme.reindex(model, data, guards=guards)
    assert (model.get_layer("out").index.arrays["slots"] == before).mean() > 0.7  # other queries were held out
    extreme.reindex(model, data)
    assert (model.get_layer("out").index.arrays["slots"] == before).mean() < 0.5


def test_biases_stay_where_none_are_given(planted):
    model = learned(planted)
    layer = model.get_layer("out")
    before = keras.ops.convert_to_numpy(layer.bias).copy()
    extreme.set_classes(model, [3, 5], planted.means[:2])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.bias), before)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.kernel)[[3, 5]], planted.means[:2])


def test_an_index_of_other_weights_is_not_used(planted):
    model = learned(planted)
    layer = model.get_layer("out")
    layer.kernel.assign(keras.ops.convert_to_numpy(layer.kernel)[::-1].copy())
    with pytest.raises(WrongArgument, match="learned for other weights"):
        deploy(model)
    with pytest.raises(WrongArgument, match="learned for other weights"):
        layer.answer()
    with pytest.raises(WrongArgument, match="learned for other weights"):
        extreme.set_classes(model, [1], planted.means[:1])
    with pytest.raises(WrongArgument, match="learned for other weights"):
        extreme.add_classes(model, planted.means[:1])
    with pytest.raises(WrongArgument, match=r"A budget of 0\.001 leaves 0 of 400"):
        extreme.learn_index(model, planted.draw(500), budget=0.001)
    assert layer.index is not None  # what was there is there again
    layer.set_index(None)
    deploy(model)

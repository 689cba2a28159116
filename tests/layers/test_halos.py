"""HALOSOutput: answers of candidates against a plain NumPy search, the dial, indexes that do not fit."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient.deploy import answering, deploy
from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos import HashPlan, Index, RouterPlan

UNITS, DIM = 60, 8
RNG = np.random.default_rng(0)
ROUTER = RouterPlan(units=UNITS, dim=DIM, capacity=6, head=7, widths=(3, 4), beams=(2, 3))
LISTS = RouterPlan(units=UNITS, dim=DIM, capacity=9, widths=(3, 4), beams=(2, 2), shared=True)
HASHES = HashPlan(units=UNITS, dim=DIM, capacity=10, tables=3, bits=3)
PLANS = pytest.mark.parametrize("plan", [ROUTER, LISTS, HASHES], ids=["router", "lists", "hashes"])


def layer_with(index=None, *, units=UNITS, **options):
    keras.utils.set_random_seed(3)
    layer = HALOSOutput(units, bias_initializer="normal", **options)
    layer.build((None, DIM))
    if index is not None:
        layer.set_index(index)
    return layer


def queries(number=9):
    return RNG.normal(size=(number, DIM)).astype("float32")


def numbers(*tensors):
    return [ops.convert_to_numpy(tensor) for tensor in tensors]


def blocks_of(index, x):
    """Written down anew: the blocks of one query."""
    plan, arrays = index.plan, index.arrays
    if isinstance(plan, HashPlan):
        bits = (arrays["projection"][0] @ x + arrays["projection_bias"][0] > 0).reshape(plan.built, plan.bits)
        return [t * 2**plan.bits + sum(2**k for k in range(plan.bits) if bits[t, k]) for t in range(plan.tables)]
    nodes = [0]
    for level, beam in enumerate(plan.beams):
        scores = {
            node * plan.widths[level] + child: arrays[f"router_{level}"][node, child] @ x
            + arrays[f"router_{level}_bias"][node, child]
            for node in nodes
            for child in range(plan.widths[level])
        }
        nodes = sorted(scores, key=lambda node: -scores[node])[:beam]
    return nodes


def expected(layer, index, x, k, exclude=()):
    """Logits and classes of the best candidates of one query."""
    found = {int(c) for block in blocks_of(index, x) for c in index.arrays["slots"][block][: index.plan.width]}
    found = (found | {int(c) for c in index.arrays["head"]}) - {-1, *map(int, exclude)}
    kernel, bias = numbers(layer.kernel, layer.bias)
    logits = {c: float(kernel[c] @ x + bias[c]) for c in found}
    best = sorted(found, key=lambda c: -logits[c])[:k]
    fill = k - len(best)
    return [logits[c] for c in best] + [-np.inf] * fill, best + [-1] * fill


@PLANS
def test_answers_are_those_of_a_plain_search(plan):
    index = Index.random(plan)
    layer = layer_with(index, k=6)
    x = queries()
    logits, classes = numbers(*layer.top_k(x))
    deployed = numbers(*layer.deploy()(x))
    for row, query in enumerate(x):
        want_logits, want = expected(layer, index, query, 6)
        assert classes[row].tolist() == deployed[1][row].tolist() == want
        np.testing.assert_allclose(logits[row], want_logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deployed[0][row], want_logits, rtol=1e-5, atol=1e-6)


@PLANS
def test_candidates_hold_each_class_once(plan):
    index = Index.random(plan)
    found = ops.convert_to_numpy(layer_with(index).candidates(queries()))
    assert found.shape == (9, plan.candidates)
    for row in found:
        real = row[row >= 0]
        assert len(np.unique(real)) == len(real)


@PLANS
def test_too_few_candidates_fill_up_with_none(plan):
    index = Index.random(plan)
    empty = Index(plan, {**index.arrays, "slots": np.full_like(index.arrays["slots"], -1)})
    layer = layer_with(empty, k=50)
    for logits, classes in (numbers(*layer.top_k(queries())), numbers(*layer.deploy()(queries()))):
        assert logits.shape == classes.shape == (9, 50)
        assert (classes[:, plan.head :] == -1).all()
        assert np.isneginf(logits[:, plan.head :]).all()
        assert np.isfinite(logits[:, : plan.head]).all()


def test_all_blocks_are_all_classes():
    index = Index.random(ROUTER)
    layer = layer_with(dataclasses.replace(index, plan=ROUTER.probing(12)), k=5)
    x = queries()
    full = ops.convert_to_numpy(layer(x))
    assert (numbers(*layer.top_k(x))[1] == np.argsort(-full, axis=1)[:, :5]).all()


def test_without_an_index_all_classes_are_looked_at():
    layer, x = layer_with(k=5), queries()
    full = ops.convert_to_numpy(layer(x))
    want = np.argsort(-full, axis=1)
    assert (numbers(*layer.top_k(x))[1] == want[:, :5]).all()
    assert (numbers(*layer.deploy()(x))[1] == want[:, :5]).all()
    exclude = np.concatenate([want[:, :3], np.full((9, 1), -1)], axis=1)
    assert (numbers(*layer.top_k(x, exclude=exclude))[1] == want[:, 3:8]).all()


@PLANS
def test_excluded_classes_are_not_answered(plan):
    index = Index.random(plan)
    layer, x = layer_with(index, k=4), queries()
    first = numbers(*layer.top_k(x))[1]
    found = numbers(*layer.top_k(x, exclude=first[:, :2]))[1]
    for row, query in enumerate(x):
        assert found[row].tolist() == expected(layer, index, query, 4, first[row, :2])[1]


def test_a_batch_in_parts_is_the_batch(monkeypatch):
    layer, x = layer_with(Index.random(HASHES)), queries()
    whole = numbers(*layer.top_k(x, exclude=np.zeros((9, 1), "int32")))
    monkeypatch.setattr("keras_efficient.layers.halos.layer.CHUNK", 4 * DIM * HASHES.neurons * 2)
    for part, all_of_it in zip(numbers(*layer.top_k(x, exclude=np.zeros((9, 1), "int32"))), whole, strict=True):
        np.testing.assert_allclose(part, all_of_it, rtol=1e-6)


def test_leading_axes_stay():
    layer, x = layer_with(Index.random(ROUTER), k=3), queries(6)
    logits, classes = numbers(*layer.top_k(x.reshape(2, 3, DIM)))
    assert logits.shape == classes.shape == (2, 3, 3)
    np.testing.assert_array_equal(classes.reshape(6, 3), numbers(*layer.top_k(x))[1])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_few_bits_are_those_of_the_deployed_form(bits):
    layer, x = layer_with(Index.random(ROUTER), bits=bits), queries()
    trained, deployed = numbers(*layer.top_k(x)), numbers(*layer.deploy()(x))
    np.testing.assert_array_equal(trained[1], deployed[1])
    np.testing.assert_allclose(trained[0], deployed[0], rtol=1e-5)
    kernel, bias = numbers(layer.kernel, layer.bias)
    exact = np.einsum("bkd,bd->bk", kernel[trained[1]], x) + bias[trained[1]]
    error = np.abs(trained[0] - exact).max()
    assert 0 < error < {16: 1e-3, 8: 0.05, 4: 0.7}[bits]


def test_the_dial_looks_at_no_more_than_it_is_told():
    layer = layer_with(Index.random(ROUTER))
    sizes = []
    for neurons in (25, 40, 60, 400):
        layer.set_neurons(neurons)
        assert layer.plan.neurons <= neurons
        assert layer.candidates(queries()).shape[1] == layer.plan.candidates
        sizes.append(layer.plan.neurons)
    assert sizes == sorted(set(sizes))
    assert layer.plan.probes == 12
    with pytest.raises(WrongArgument, match="10 neurons are too few: this index looks at 20 at least"):
        layer.set_neurons(10)


def test_the_dial_of_lists_and_tables():
    lists = layer_with(Index.random(LISTS))
    lists.set_neurons(LISTS.routed + 2 * 4 + 1)
    assert lists.plan.width == 4
    index = lists.index
    x = queries()
    for row, query in enumerate(x):
        assert numbers(*lists.top_k(x))[1][row].tolist() == expected(lists, index, query, 5)[1]
    np.testing.assert_array_equal(numbers(*lists.deploy()(x))[1], numbers(*lists.top_k(x))[1])
    hashes = layer_with(Index.random(HASHES))
    hashes.set_neurons(HASHES.routed + 2 * HASHES.capacity + 3)
    assert hashes.plan.tables == 2
    np.testing.assert_array_equal(numbers(*hashes.deploy()(x))[1], numbers(*hashes.top_k(x))[1])


def test_winner_takes_all_codes():
    plan = HashPlan(units=UNITS, dim=DIM, capacity=8, tables=2, bits=2, ranges=3)
    index = Index.random(plan)
    places = RNG.integers(DIM, size=12).astype("int32")
    index = Index(plan, {**index.arrays, "places": places})
    layer, x = layer_with(index), queries()
    digits = x[:, places].reshape(9, 2, 2, 3).argmax(-1)
    codes = digits @ np.array([1, 3]) + np.array([0, 9])
    for row, found in enumerate(numbers(layer.candidates(x))[0]):
        assert set(found) - {-1} == set(index.arrays["slots"][codes[row]].ravel()) - {-1}


def test_sign_hash_of_known_vectors():
    plan = HashPlan(units=4, dim=2, capacity=1, tables=1, bits=2)
    arrays = {
        "projection": np.eye(2, dtype="float32")[None],
        "projection_bias": np.zeros((1, 2), "float32"),
        "slots": np.arange(4, dtype="int32")[:, None],
        "head": np.zeros(0, "int32"),
    }
    layer = HALOSOutput(4, 1)
    layer.build((None, 2))
    layer.set_index(Index(plan, arrays))
    x = np.array([[1, 1], [1, -1], [-1, 1], [0, 0]], "float32")
    assert numbers(layer.candidates(x))[0].ravel().tolist() == [3, 1, 2, 0]


def test_saved_with_its_index(tmp_path):
    inputs = keras.Input((DIM,))
    model = keras.Model(inputs, HALOSOutput(UNITS, name="out")(inputs))
    layer = model.get_layer("out")
    layer.set_index(dataclasses.replace(Index.random(HASHES), fingerprint=layer.fingerprint()))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("out").plan == HASHES
    assert again.get_layer("out").index.fingerprint == layer.fingerprint()
    x = queries()
    for left, right in zip(numbers(*answering(again)(x)), numbers(*layer.top_k(x)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    np.testing.assert_array_equal(again.get_layer("out").index.arrays["slots"], layer.index.arrays["slots"])


def test_an_index_of_other_weights_is_refused():
    layer = layer_with()
    index = dataclasses.replace(Index.random(ROUTER), fingerprint=layer.fingerprint())
    layer.set_index(index)
    layer.kernel.assign_add(ops.ones_like(layer.kernel))
    with pytest.raises(WrongArgument, match="learned for other weights"):
        layer.set_index(index)
    with pytest.raises(WrongArgument, match=r"\(60, 8\) weights, layer .* has \(61, 8\)"):
        layer_with(units=61).set_index(index)


def test_indexes_that_make_no_sense():
    index = Index.random(ROUTER)
    arrays = dict(index.arrays)
    twice = arrays["slots"].copy()
    twice.flat[np.flatnonzero(twice.ravel() < 0)[0]] = arrays["head"][0]
    with pytest.raises(WrongArgument, match=rf"class {arrays['head'][0]} in 2 places"):
        Index(ROUTER, {**arrays, "slots": twice})
    with pytest.raises(WrongArgument, match="names class 60; there are 0 to 59"):
        Index(ROUTER, {**arrays, "slots": np.where(arrays["slots"] == 5, 60, arrays["slots"])})
    with pytest.raises(WrongArgument, match="'router_0' must be float32 of shape"):
        Index(ROUTER, {**arrays, "router_0": arrays["router_0"][:, :2]})
    with pytest.raises(WrongArgument, match="'router_0' is not finite"):
        Index(ROUTER, {**arrays, "router_0": np.full_like(arrays["router_0"], np.nan)})
    with pytest.raises(WrongArgument, match="has the arrays"):
        Index(ROUTER, {"slots": arrays["slots"]})
    with pytest.raises(WrongArgument, match="more than the 8 nodes"):
        dataclasses.replace(ROUTER, beams=(2, 9))


@pytest.mark.parametrize("kind", ["class", "twice", "nan"])
def test_files_of_indexes_that_make_no_sense(tmp_path, kind):
    import h5py

    layer = layer_with(Index.random(LISTS))
    x = keras.Input((DIM,))
    keras.Model(x, layer(x)).save_weights(tmp_path / "index.weights.h5")
    with h5py.File(tmp_path / "index.weights.h5", "r+") as file:
        found = {}
        file.visititems(lambda name, item: found.update({name.rpartition("/")[2]: item}))
        match kind:
            case "class":
                found["slots"][0, 0] = UNITS + 5
            case "twice":
                found["slots"][0] = 3
            case "nan":
                found["router_0"][0, 0, 0] = np.nan
    other = layer_with(Index.random(LISTS, seed=1))
    model = keras.Model(x, other(x))
    with pytest.raises(ValueError, match=r"class 65|twice in block 0|not finite"):
        model.load_weights(tmp_path / "index.weights.h5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 5}, "is of .5, 8. weights, layer"),
        ({"places": -2}, "places must be a whole number from 0"),
        ({"places": 100}, "of 9 places of a block 100 are looked at"),
        ({"head": 10**6}, "has a head of 1000000"),
        ({"capacity": 2.5}, "capacity must be a whole number"),
        ({"capacity": 2**30}, "12 blocks of 1073741824 places is too large"),
    ],
)
def test_plans_that_make_no_sense(changes, message):
    config = {**LISTS.to_config(), **changes}
    with pytest.raises(ValueError, match=message):
        HALOSOutput(UNITS, plan=config, name="out").build((None, DIM))


def test_a_clone_has_no_classes_in_its_blocks():
    x = keras.Input((DIM,))
    model = keras.Model(x, layer_with(Index.random(ROUTER))(x))
    clone = keras.models.clone_model(model)
    logits, classes = numbers(*clone.layers[-1].top_k(queries(2), 10))
    assert (np.sort(classes, axis=1)[:, :3] == -1).all()  # a head of seven is there
    assert clone.layers[-1].index.reachable.tolist() == list(range(7))
    assert np.isneginf(logits[:, 7:]).all()


def test_asked_in_other_models_by_other_ranks():
    steps = keras.Input((4, DIM))
    layer = HALOSOutput(UNITS, 3)
    keras.Model(steps, layer(steps))
    last = keras.Model(steps, layer(steps[:, -1]))
    x = RNG.normal(size=(2, 4, DIM)).astype("float32")
    for left, right in zip(numbers(*deploy(last)(x)), numbers(*layer.top_k(x[:, -1])), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)


def test_hashes_that_make_no_sense():
    with pytest.raises(WrongArgument, match="No hash has 3 of 3 tables of 40 digits"):
        dataclasses.replace(HASHES, bits=40)
    with pytest.raises(WrongArgument, match="is too large"):
        dataclasses.replace(HASHES, bits=31)
    with pytest.raises(WrongArgument, match="An `Index` is needed, or None, not str"):
        layer_with().set_index("index")


def test_no_queries_have_no_answers():
    for index in (None, Index.random(ROUTER), Index.random(HASHES)):
        logits, classes = numbers(*layer_with(index).top_k(queries(0)))
        assert logits.shape == classes.shape == (0, 5)


def test_removing_the_index():
    layer, x = layer_with(Index.random(ROUTER)), queries()
    layer.set_index(None)
    assert layer.index is None
    assert len(layer.weights) == 2
    with pytest.raises(WrongArgument, match="has no index"):
        layer.set_neurons(10)
    with pytest.raises(ValueError, match="has no index"):
        layer.candidates(x)


def test_wrong_numbers():
    with pytest.raises(ValueError, match="`k` must be an integer from 1 to 3"):
        HALOSOutput(3, 4)
    with pytest.raises(ValueError, match="`units` must be an integer from 1"):
        HALOSOutput(0)
    with pytest.raises(ValueError, match="`bits` must be one of 32, 16, 8, 4"):
        HALOSOutput(3, 1, bits=2)
    with pytest.raises(ValueError, match="You must build the layer"):
        HALOSOutput(3, 1).fingerprint()


def test_what_takes_the_logits_is_refused():
    inputs = keras.Input((DIM,))
    model = keras.Model(inputs, keras.layers.Softmax(name="soft")(HALOSOutput(UNITS, name="out")(inputs)))
    with pytest.raises(UnsupportedLayer, match="'soft': it takes the logits of 'out'"):
        deploy(model)
    steps = keras.Input((4, DIM))
    with pytest.raises(UnsupportedLayer, match=r"'out': its input has 3 axes"):
        deploy(keras.Model(steps, HALOSOutput(UNITS, name="out")(steps)))


def test_the_answering_form_has_no_second_kernel():
    x = keras.Input((8,))
    layer = HALOSOutput(300, 4)
    model = keras.Model(x, layer(x))
    answers = answering(model)
    assert answers.count_params() == 0
    layer.kernel.assign(-layer.kernel)
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    for left, right in zip(numbers(*answers(vectors)), numbers(*layer.top_k(vectors)), strict=True):
        assert np.array_equal(left, right)


def test_answers_among_other_outputs():
    inputs = keras.Input((DIM,))
    layer = HALOSOutput(UNITS, name="out")
    model = keras.Model(inputs, {"next": layer(inputs), "other": keras.layers.Dense(2, name="other")(inputs)})
    layer.set_index(Index.random(ROUTER))
    x = queries()
    found, wanted = deploy(model)(x), answering(model)(x)
    np.testing.assert_array_equal(*(numbers(answer["next"][1])[0] for answer in (found, wanted)))
    np.testing.assert_allclose(*(numbers(answer["other"])[0] for answer in (found, wanted)), rtol=1e-6)


def test_it_trains_as_a_dense_layer_does():
    x = queries(64)
    y = RNG.integers(UNITS, size=64)
    losses = []
    for make in (lambda: HALOSOutput(UNITS, name="out"), lambda: keras.layers.Dense(UNITS, name="out")):
        inputs = keras.Input((DIM,))
        model = keras.Model(inputs, make()(inputs))
        kernel = np.random.default_rng(5).normal(size=(DIM, UNITS)).astype("float32")
        model.get_layer("out").set_weights([kernel.T if not losses else kernel, np.zeros(UNITS)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss)
        history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_weights_shared_with_an_embedding(tmp_path):
    ids = keras.Input((5,), dtype="int32")
    layer = HALOSOutput(UNITS, dim=DIM, name="words")
    hidden = keras.layers.GlobalAveragePooling1D()(layer(ids, embed=True))
    model = keras.Model(ids, layer(keras.layers.Dense(DIM)(hidden)))
    assert len(layer.weights) == 2
    layer.set_index(Index.random(ROUTER))
    words = RNG.integers(UNITS, size=(7, 5)).astype("int32")
    first, second = numbers(*answering(model)(words)), numbers(*deploy(model)(words))
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5)
    deploy(model).save(tmp_path / "model.keras")
    third = numbers(*keras.saving.load_model(tmp_path / "model.keras")(words))
    np.testing.assert_array_equal(first[1], third[1])
    model.save(tmp_path / "trained.keras")
    again = keras.saving.load_model(tmp_path / "trained.keras")
    np.testing.assert_allclose(numbers(again(words))[0], numbers(model(words))[0], rtol=1e-6)
    before = numbers(layer.kernel)[0].copy()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(words, words[:, 0])
    assert (numbers(layer.kernel)[0] != before).any()
    with pytest.raises(ValueError, match="must be told `dim`"):
        HALOSOutput(UNITS)(ids, embed=True)

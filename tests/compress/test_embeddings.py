"""Advice about the embedding tables of a model, and the model with them compressed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import compress
from keras_efficient.compress import embeddings
from keras_efficient.errors import UnknownName, UnsupportedLayer, WrongArgument
from keras_efficient.layers import CompressedEmbedding, MEmComEmbedding

WIDTH = 16


def table(entities, width=WIDTH, name=None, **options):
    """A table of falling spectrum, as trained ones have."""
    rng = np.random.default_rng(entities)
    values = rng.normal(size=(entities, width)) * np.linspace(1, 0.1, width)
    return layers.Embedding(entities, width, weights=values.astype("float32"), name=name, **options)


@pytest.fixture(scope="module")
def model():
    """Two inputs that share a masked table, a second table in a nested model, a small and a narrow one."""
    keras.utils.set_random_seed(1)
    inner_ids = keras.Input((5,), dtype="int32")
    inner = keras.Model(inner_ids, table(1500, name="tags")(inner_ids), name="encoder")
    seen, asked = (keras.Input((5,), dtype="int32", name=name) for name in ("seen", "asked"))
    items = table(3000, mask_zero=True, name="items")
    x = [items(seen), items(asked), inner(asked), table(50, name="small")(asked)]
    x = [layers.GlobalAveragePooling1D()(part) for part in x]
    narrow = layers.Flatten()(table(20_000, 1, name="biases")(asked))
    return keras.Model([seen, asked], layers.Dense(3, name="out")(layers.Concatenate()([*x, narrow])), name="ranker")


IDS = np.random.default_rng(0).integers(0, 50, (2, 32, 5)).astype("int32")


def names_of(model):
    return {path: type(layer).__name__ for path, layer in embeddings._inner(model)}


def test_tables_are_found_once_with_their_share(model):
    advice = {item.path: item for item in compress.advise_embeddings(model, ratios=())}
    assert list(advice) == ["items", "encoder/tags", "small", "biases"]
    total = sum(4 * np.prod(weight.shape) for weight in model.weights)
    items = advice["items"]
    assert (items.entities, items.width, items.nbytes, items.settings) == (3000, 16, 3000 * 64, ())
    assert items.share == pytest.approx(items.nbytes / total)
    assert {path: item.worth_it for path, item in advice.items()} == {
        "items": True,
        "encoder/tags": True,
        "small": False,
        "biases": True,
    }


def test_settings_are_what_the_layer_would_be(model):
    said = []
    advice = {
        item.path: item for item in compress.advise_embeddings(model, ratios=(4, 12, 40), on_progress=said.append)
    }
    assert advice["small"].settings == ()
    assert any("encoder/tags" in line and "12×" in line for line in said)
    settings = {(s.form, s.bits, s.compression): s for s in advice["items"].settings}
    assert len(said) == 3 * len(settings)
    matrix = model.get_layer("items").get_weights()[0]
    layer = MEmComEmbedding.from_embedding(matrix, compression=12, form="subspace", bits=2)
    found = settings["subspace", 2, 12]
    assert found.nbytes == layer.nbytes
    error = np.square(matrix - layer.embeddings()).sum() / np.square(matrix).sum()
    assert found.table_error == pytest.approx(error, rel=1e-4)
    # the scaled form keeps a float for every entity: 16 columns cannot become 40 times smaller
    assert settings["scaled", 32, 40].nbytes is settings["scaled", 32, 40].table_error is None
    largest = settings["scaled", 32, 40].largest
    with pytest.raises(ValueError, match=f"largest possible here is {largest:g}"):
        MEmComEmbedding(3000, WIDTH, compression=40)
    MEmComEmbedding(3000, WIDTH, compression=largest)


def test_less_compression_loses_less(model):
    tried = next(iter(compress.advise_embeddings(model, ratios=(4, 12, 16)))).settings
    for form, bits in (("scaled", 32), ("subspace", 4)):
        errors = [s.table_error for s in tried if (s.form, s.bits) == (form, bits) and s.table_error is not None]
        assert len(errors) >= 2
        assert 0 < errors[0] < errors[1] < 1


@pytest.mark.parametrize(
    ("form", "bits", "most"), [("scaled", 32, 1000), ("subspace", 2, 1000), ("codebooks", 8, 5000)]
)
def test_a_sample_of_a_large_table_tells_its_error(monkeypatch, form, bits, most):
    layer = table(10_000)
    path = ("t", layer, form, bits, 12)
    whole = embeddings._setting(*path)
    monkeypatch.setattr(embeddings, "_MOST_ROWS", most)
    part = embeddings._setting(*path)
    assert part.nbytes == whole.nbytes
    assert (part.sampled, whole.sampled) == (pytest.approx(most, rel=0.1), 10_000)
    # over tables of random numbers the error of a part of the rows varies by a few per cent
    assert part.table_error == pytest.approx(whole.table_error, rel=0.1)
    assert part.table_error != whole.table_error


def test_two_bits_are_tried_where_they_are_best():
    """Of normal values, four scalars of two bits a column lose a sixth of what two of four bits do."""
    tried = {bits: embeddings._setting("t", table(4000), "subspace", bits, 4).table_error for bits in (2, 4)}
    assert tried[2] < 0.5 * tried[4]
    assert embeddings._sensible_bits(4) == [2]
    assert embeddings._sensible_bits(16) == [2, 4]
    assert embeddings._sensible_bits(40) == [1, 2]


@pytest.mark.parametrize("width", [64, 256])
def test_samples_are_as_large_as_a_form_needs(width):
    """Codebooks have 256 rows whatever the width; the subspace form's rows are as many as its scalars."""
    codebooks, subspace = (
        MEmComEmbedding(100_000, width, compression=16, form=form, bits=bits)
        for form, bits in (("codebooks", 8), ("subspace", 2))
    )
    assert embeddings._most_rows(codebooks) == 20_000
    assert 8 * subspace.hash_size <= embeddings._most_rows(subspace) < 20_000


@pytest.mark.parametrize(("entities", "ratio"), [(6000, 12), (6007, 12), (6000, 15.9)])
def test_a_sample_of_the_scaled_form_has_its_buckets(monkeypatch, entities, ratio):
    monkeypatch.setattr(embeddings, "_MOST_ROWS", 500)
    layer = MEmComEmbedding(entities, WIDTH, compression=ratio)
    ids, size = embeddings._sample(layer)
    assert 0 < len(ids) <= 500 + entities // layer.hash_size + 1
    old, new = ids % layer.hash_size, np.arange(len(ids)) % size
    if size > 1:
        assert len(set(zip(old, new, strict=True))) == size == len(set(old))


def test_the_compressed_model_is_near_and_small(model):
    near = {}
    for compression in (4, 16):
        small = compress.compress_embeddings(model, compression=compression, only=["items", "encoder/tags"])
        near[compression] = np.square(small.predict([*IDS], verbose=0) - model.predict([*IDS], verbose=0)).mean()
    variance = model.predict([*IDS], verbose=0).var()
    # The bound is far above the few per cent that are lost and far below the 1 of other vectors.
    assert 0 < near[4] < near[16] < 0.5 * variance
    assert names_of(small)["items"] == names_of(small)["encoder/tags"] == "MEmComEmbedding"
    assert names_of(small)["small"] == names_of(small)["biases"] == "Embedding"
    tables = sum(4 * np.prod(model.get_layer(name).get_weights()[0].shape) for name in ("small", "biases"))
    dense = sum(4 * np.prod(weight.shape) for weight in model.get_layer("out").weights)
    assert embeddings.weights_nbytes(small) <= tables + dense + 4500 * 64 / 16


def test_shared_stays_shared_masked_stays_masked_and_all_can_be_trained(model, tmp_path):
    small = compress.compress_embeddings(model)
    assert len(small.get_layer("items")._inbound_nodes) == 2
    assert small.get_layer("items").mask_zero
    assert not small.get_layer("items").frozen
    # narrow tables cannot be compressed 16 times: they are left alone, not an error
    assert names_of(small)["biases"] == "Embedding"
    small.save(tmp_path / "small.keras")
    before = small.predict([*IDS], verbose=0)
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(again.predict([*IDS], verbose=0), before, atol=1e-6)
    again.compile(keras.optimizers.Adam(0.01), "mse")
    weights = again.get_layer("items").get_weights()
    again.fit([*IDS], np.ones((32, 3)), verbose=0)
    assert all(np.any(old != new) for old, new in zip(weights, again.get_layer("items").get_weights(), strict=True))
    assert model.get_layer("items").get_weights()[0].shape == (3000, WIDTH)


def test_a_table_shared_by_nested_models_is_one_table():
    items, ids = table(2000, name="items"), keras.Input((3,), dtype="int32")
    towers = [
        keras.Sequential([ids, items, layers.Dense(2, name=f"to_{name}")], name=name) for name in ("user", "item")
    ]
    model = keras.Model(ids, layers.Add()([tower(ids) for tower in towers]))
    assert [item.path for item in compress.advise_embeddings(model, ratios=())] == ["user/items"]
    small = compress.compress_embeddings(model, only=["user/items"])
    assert len({id(small.get_layer(name).get_layer("items")) for name in ("user", "item")}) == 1
    assert names_of(small) == {
        path: "MEmComEmbedding" if kind == "Embedding" else kind for path, kind in names_of(model).items()
    }


def test_padding_is_left_out_of_means():
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, layers.GlobalAveragePooling1D()(table(2000, mask_zero=True)(ids)))
    small = compress.compress_embeddings(model)
    padded, plain = np.array([[5, 9, 0, 0]]), np.array([[5, 9]])
    np.testing.assert_allclose(small(padded), small(plain), atol=1e-6)


def test_ids_that_come_as_floats_still_do():
    """A Sequential without an Input hands floats to its Embedding, and `keras.Input` without a dtype does too."""
    model = keras.Sequential([table(2000, mask_zero=True, name="items"), layers.GlobalAveragePooling1D()], name="s")
    padded, plain = np.array([[5, 9, 0, 0]]), np.array([[5, 9]])
    model(padded)
    small = compress.compress_embeddings(model)
    np.testing.assert_allclose(small(padded), small(plain), atol=1e-6)
    np.testing.assert_allclose(small(plain), model(plain), atol=0.5)
    assert small.get_layer("items").trainable_weights
    ids = keras.Input((4,))
    model = keras.Model(ids, layers.Dense(2)(layers.Flatten()(table(2000)(ids))))
    assert compress.compress_embeddings(model)(padded.astype("float32")).shape == (1, 2)


def test_ids_that_come_as_floats_through_a_wrapper(tmp_path):
    ids = keras.Input((4, 3))
    model = keras.Model(ids, layers.TimeDistributed(table(2000))(ids))
    small = compress.compress_embeddings(model)
    values = np.arange(12, dtype="float32").reshape(1, 4, 3)
    small.save(tmp_path / "small.keras")
    for form in (small, keras.saving.load_model(tmp_path / "small.keras")):
        np.testing.assert_allclose(form(values), model(values), atol=1.5)


def test_penalties_of_whole_tables_are_not_taken_over():
    ids = keras.Input((4,), dtype="int32")
    items = table(2000, embeddings_regularizer="l2", embeddings_constraint="non_neg", name="items")
    small = compress.compress_embeddings(keras.Model(ids, items(ids)))
    assert small.get_layer("items").embeddings_regularizer is None
    small(np.ones((1, 4), "int32"), training=True)
    assert not small.losses


def test_our_whole_tables_keep_their_combiner():
    layer = CompressedEmbedding(2000, WIDTH, method="reduced", combiner="mean", mask_zero=True, out_of_range="clip")
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layer(ids))
    assert [item.nbytes for item in compress.advise_embeddings(model, ratios=())] == [2000 * 64]
    small = compress.compress_embeddings(model, form="scaled", compression=8)
    made = small.get_layer(layer.name)
    assert (made.form, made.bits, made.plan.scalar_bits) == ("scaled", 8, 8)
    assert (made.combiner, made.mask_zero, made.out_of_range) == ("mean", True, "clip")
    assert small(np.array([[1, 5000, 0, 0]])).shape == (1, WIDTH)


def test_what_is_compressed_or_quantized_or_of_another_class_is_no_table():
    class Reversible(layers.Embedding):
        pass

    ids = keras.Input((), dtype="int32")
    parts = [
        MEmComEmbedding(2000, WIDTH, compression=8),
        CompressedEmbedding(2000, WIDTH, method="reduced", size=4),
        CompressedEmbedding(2000, WIDTH, method="reduced", bits=8),
        Reversible(2000, WIDTH),
    ]
    model = keras.Model(ids, [part(ids) for part in parts])
    assert compress.advise_embeddings(model) == []
    with pytest.raises(WrongArgument, match="no embedding table"):
        compress.compress_embeddings(model)


def test_counts_draw_the_vectors_to_the_frequent(model):
    counts = np.full(3000, 1e-3)
    counts[:200] = 1
    options = {"form": "scaled", "compression": 8, "only": {"items"}}
    matrix = model.get_layer("items").get_weights()[0]
    lost = []
    for given in ({}, {"items": counts}):
        small = compress.compress_embeddings(model, counts=given, **options)
        lost.append(np.square(small.get_layer("items").embeddings() - matrix)[:200].sum())
    assert lost[1] < 0.8 * lost[0]


def test_tables_inside_other_peoples_layers_are_seen_but_not_replaced():
    @keras.saving.register_keras_serializable("test_embeddings")
    class Lookup(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.table = layers.Embedding(2000, WIDTH, name="inside")

        def call(self, ids):
            return self.table(ids)

    ids = keras.Input((), dtype="int32")
    model = keras.Model(ids, Lookup(name="lookup")(ids))
    assert [item.path for item in compress.advise_embeddings(model, ratios=())] == ["lookup/inside"]
    with pytest.raises(UnsupportedLayer, match="lookup/inside"):
        compress.compress_embeddings(model)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"compression": 1}, WrongArgument, "above 1"),
        ({"compression": "16"}, WrongArgument, "above 1"),
        ({"compression": float("nan")}, WrongArgument, "above 1"),
        ({"form": "subspaces"}, UnknownName, "Did you mean 'subspace'"),
        ({"bits": 3}, WrongArgument, "32, 16, 8, 4, 2, 1"),
        ({"only": ["item"]}, UnknownName, "Did you mean 'items'"),
        ({"only": []}, WrongArgument, "`only` is empty"),
        ({"only": ["items", "biases"]}, WrongArgument, "biases can be compressed 3.99× at most"),
        ({"counts": {"tags": np.ones(1500)}}, UnknownName, "Did you mean 'encoder/tags'"),
        ({"counts": {"items": np.ones(7)}}, WrongArgument, "'items'.*3000 entities"),
        ({"counts": np.ones(3000)}, WrongArgument, "are by layer(.|\n)*Paths: .*items"),
        ({"only": "item"}, UnknownName, "Did you mean 'items'"),
        ({"compression": 1000}, WrongArgument, "small is smaller than 64 KiB"),
    ],
)
def test_wrong_arguments(model, arguments, error, words):
    with pytest.raises(error, match=words):
        compress.compress_embeddings(model, **arguments)


def test_wrong_models_and_ratios(model):
    with pytest.raises(WrongArgument, match="built Keras model"):
        compress.advise_embeddings(keras.Sequential([layers.Embedding(9, 9)]))
    with pytest.raises(WrongArgument, match="above 1"):
        compress.advise_embeddings(model, ratios=(4, 0))
    ids = keras.Input((), dtype="int32")
    broken = keras.Model(ids, layers.Embedding(2000, WIDTH, weights=np.full((2000, WIDTH), np.nan), name="nan")(ids))
    with pytest.raises(WrongArgument, match=r"'nan'.*finite"):
        compress.advise_embeddings(broken)

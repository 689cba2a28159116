"""Large tables go around the converter: the file is the same as if it had seen them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import export
from keras_efficient.export import flatbuffer, large_tables, lowerings
from keras_efficient.layers import CompressedEmbedding, HALOSOutput, MEmComEmbedding
from keras_efficient.layers.halos import Index, RouterPlan


def _two_tables() -> keras.Model:
    ids = keras.Input((4,), dtype="int32", name="ids")
    table = keras.layers.Embedding(300, 16, name="items")
    pooled = keras.layers.Flatten()(table(ids)), keras.layers.Flatten()(keras.layers.Embedding(300, 16)(ids))
    return keras.Model(ids, keras.layers.Dense(3)(keras.layers.Concatenate()(pooled)))


def _candidates() -> keras.Model:
    x = keras.Input((32,), name="x")
    layer = HALOSOutput(500, 6, bits=8, name="out")
    model = keras.Model(x, layer(x))
    layer.set_index(Index.random(RouterPlan(units=500, dim=32, capacity=16, head=20, widths=(6, 6), beams=(2, 4))))
    return model


def _compressed() -> keras.Model:
    ids = keras.Input((4,), dtype="int32", name="ids")
    return keras.Model(ids, MEmComEmbedding(3000, 16, compression=8, bits=8, combiner="mean")(ids))


@pytest.mark.parametrize("precision", ["float32", "float16", "dynamic"])
@pytest.mark.parametrize("make", [_two_tables, _candidates, _compressed])
def test_files_are_the_same(make, precision, tmp_path, monkeypatch):
    keras.utils.set_random_seed(1)
    model = make()
    plain, around = (tmp_path / f"{name}.tflite" for name in ("plain", "around"))
    export.save(model, plain, precision=precision)
    seen = []
    put_back = large_tables.put_back

    def noted(data, tables):
        seen.extend(tables)
        return put_back(data, tables)

    monkeypatch.setattr(large_tables, "LARGE", 4096)
    monkeypatch.setattr(lowerings, "LARGE", 1024)  # from which on a table is not copied while a model is lowered
    monkeypatch.setattr(large_tables, "put_back", noted)
    export.save(model, around, precision=precision)
    assert bool(seen) == (precision != "dynamic" or make is not _two_tables)
    assert _contents(around) == _contents(plain)


def test_scales_and_biases_of_rows_are_not_rounded(tmp_path):
    """As they would be by precision dynamic, with one scale for all of them, from 1,024 numbers on."""
    keras.utils.set_random_seed(1)
    ids = keras.Input((4,), dtype="int32", name="ids")
    rows = CompressedEmbedding(5000, 32, method="reduced", bits=8, size=32)
    model = keras.Model(ids, rows(ids))
    rows._state["rows"].assign(rows._state["rows"] * 10.0 ** np.random.default_rng(0).uniform(-3, 1, (5000, 1)))
    assert export.save(model, tmp_path / "rows.tflite", precision="dynamic").sqnr_db > 100
    x = keras.Input((32,), name="x")
    layer = HALOSOutput(3000, 6, bits=8, bias_initializer=keras.initializers.RandomNormal(stddev=3), name="out")
    model = keras.Model(x, layer(x))
    layer.set_index(Index.random(RouterPlan(units=3000, dim=32, capacity=16, widths=(20, 10), beams=(4, 8))))
    export.save(model, tmp_path / "candidates.tflite", precision="dynamic")
    operators = flatbuffer.operators((tmp_path / "candidates.tflite").read_bytes())
    assert "DEQUANTIZE" not in {operator.name for operator in operators}


def test_a_table_that_the_converter_changed_is_not_put_back(tmp_path):
    export.save(_two_tables(), tmp_path / "model.tflite")
    absent = np.ones((large_tables.ROWS, 16), np.float32)
    assert large_tables.put_back((tmp_path / "model.tflite").read_bytes(), [(absent, np.ones((300, 16)))]) is None


def _contents(path) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Operators, and shapes and contents of all constants, in an order that does not matter."""
    model = flatbuffer.unpack(path.read_bytes())
    constants = [
        (tuple(tensor.shape), int(tensor.type), bytes(model.buffers[tensor.buffer].data))
        for tensor in model.subgraphs[0].tensors
        if model.buffers[tensor.buffer].data is not None
    ]
    return [*sorted(constants), *(operator.name for operator in flatbuffer.operators(path.read_bytes()))]

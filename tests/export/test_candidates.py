"""Files of output layers that answer from candidates: every plan, every width of numbers, any batch."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from keras_efficient import export
from keras_efficient.deploy import answering, deploy
from keras_efficient.errors import ConversionError, VerificationError, WrongArgument
from keras_efficient.export import flatbuffer
from keras_efficient.export.graph import Graph
from keras_efficient.export.lowerings.gathered_products import rounded_products
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos import HashPlan, Index, RouterPlan

UNITS, DIM, K = 500, 32, 6
PLANS = {
    "router": RouterPlan(units=UNITS, dim=DIM, capacity=16, head=20, widths=(6, 6), beams=(2, 4)),
    "lists": RouterPlan(units=UNITS, dim=DIM, capacity=60, widths=(4, 4), beams=(2, 1), shared=True),
    "hashes": HashPlan(units=UNITS, dim=DIM, capacity=40, tables=3, bits=4),
    "none": None,
}


def network(plan, bits: int = 32) -> keras.Model:
    keras.utils.set_random_seed(2)
    x = keras.Input((DIM,), name="x")
    layer = HALOSOutput(UNITS, K, bits=bits, bias_initializer="normal", name="out")
    model = keras.Model(x, layer(keras.layers.Dense(DIM, name="hidden")(x)))
    if plan is not None:
        layer.set_index(Index.random(plan))
    return model


def queries(number: int = 8) -> np.ndarray:
    return np.random.default_rng(6).normal(size=(number, DIM)).astype("float32")


def numbers(outputs) -> list[np.ndarray]:
    return [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize("plan", list(PLANS))
def test_files_answer_what_the_model_answers(plan, suffix, tmp_path):
    model = network(PLANS[plan])
    report = export.save(model, tmp_path / f"model{suffix}", samples=queries())
    run = export.load(tmp_path / f"model{suffix}")
    logits, classes = numbers(answering(model)(queries()))
    for found in (
        run(queries()),
        [np.concatenate(parts) for parts in zip(*map(run, np.split(queries(), 8)), strict=True)],
    ):
        np.testing.assert_array_equal(found[1], classes)
        np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-5)
    assert report.sqnr_db > 75


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_few_bits_stay_few(bits, tmp_path):
    sizes = {}
    for width in (32, bits):
        model = network(PLANS["router"], width)
        report = export.save(model, tmp_path / f"{width}.tflite", samples=queries(), input_shape=(1, DIM))
        sizes[width] = report.bytes
        classes = numbers(answering(model)(queries(1)))[1]
        np.testing.assert_array_equal(export.load(tmp_path / f"{width}.tflite")(queries(1))[1], classes)
    saved = (480 + 36) * DIM * (4 - bits / 8)  # of the blocks' classes and of the router's second level
    assert sizes[32] - sizes[bits] > 0.8 * saved


def test_answers_of_too_few_candidates(tmp_path):
    model = network(PLANS["router"])
    layer = model.get_layer("out")
    index = layer.index
    empty = {"slots": np.full_like(index.arrays["slots"], -1), "head": np.zeros(0, "int32")}
    layer.set_index(Index(dataclasses.replace(index.plan, head=0), {**index.arrays, **empty}))
    for suffix in (".tflite", ".onnx"):
        export.save(model, tmp_path / f"none{suffix}", samples=queries(), input_shape=(1, DIM))
        logits, classes = export.load(tmp_path / f"none{suffix}")(queries(1))
        assert (logits <= np.finfo("float32").min).all()
        assert (classes == -1).all()


def test_bytes_are_multiplied_as_they_are(tmp_path):
    model = network(PLANS["router"], 8)
    path = tmp_path / "model.tflite"
    report = export.save(model, path, precision="dynamic", input_shape=(1, DIM), samples=queries())
    assert any("multiplied as they are" in note for note in report.notes)
    assert 30 < report.sqnr_db < 75
    operators = flatbuffer.operators(path.read_bytes())
    assert not any(op.name in ("BATCH_MATMUL", "CAST") for op in operators)
    products = [op for op in operators if op.name == "FULLY_CONNECTED" and op.inputs[1].dtype == "int8"]
    assert [op.inputs[1].shape for op in products if not op.inputs[1].constant] == [(12, DIM), (64, DIM)]
    assert path.stat().st_size < 1.3 * (480 + 36) * DIM + 20 * DIM * 4 + DIM * DIM * 4 + 30_000
    logits, _ = numbers(answering(model)(queries(1)))
    found = export.load(path)(queries(1))[0]
    np.testing.assert_allclose(found, logits, atol=0.03 * np.abs(logits).max())


@pytest.mark.parametrize("bits", [32, 8])
def test_one_query_is_multiplied_by_fully_connected(bits, tmp_path):
    path = tmp_path / "model.tflite"
    report = export.save(network(PLANS["router"], bits), path, input_shape=(1, DIM), samples=queries())
    assert report.sqnr_db > 100
    names = [op.name for op in flatbuffer.operators(path.read_bytes())]
    assert "BATCH_MATMUL" not in names
    assert names.count("CAST") == (2 if bits == 8 else 0)
    assert rounded_products(Graph.from_bytes(path.read_bytes())) is None


def test_products_of_a_batch_stay(tmp_path):
    export.save(network(PLANS["router"], 8), tmp_path / "batch.tflite", precision="dynamic", samples=queries())
    assert "BATCH_MATMUL" in flatbuffer.count_ops((tmp_path / "batch.tflite").read_bytes())


def test_metadata_tells_of_both_outputs(tmp_path):
    model = network(PLANS["lists"])
    export.save(model, tmp_path / "model.tflite", samples=queries())
    run = export.load(tmp_path / "model.tflite")
    assert len(run.output_names) == 2
    assert [np.asarray(output).dtype.kind for output in run(queries(2))] == ["f", "i"]


def test_an_answer_that_is_another_is_no_file(tmp_path, monkeypatch):
    from keras_efficient.export import pipeline

    model = network(PLANS["router"])
    other = network(PLANS["router"])
    other.get_layer("out").kernel.assign(-other.get_layer("out").kernel)
    monkeypatch.setattr(pipeline, "_deploy", lambda model, precision: deploy(other))
    with pytest.raises(VerificationError, match="does not match"):
        export.save(model, tmp_path / "model.tflite", samples=queries())
    assert not (tmp_path / "model.tflite").exists()


@pytest.mark.parametrize("plan", [name for name, plan in PLANS.items() if plan is not None])
@pytest.mark.parametrize("precision", ["int8", "int16x8"])
def test_logits_are_not_rounded_to_choose_by(tmp_path, plan, precision):
    with pytest.raises(WrongArgument, match=f"'out' finds its candidates by scores, which {precision} would round"):
        export.save(network(PLANS[plan]), tmp_path / "a.tflite", precision=precision, calibration=queries())


def test_all_classes_may_be_rounded(tmp_path):
    kinds = {"precision": "int8", "calibration": queries(), "samples": queries(), "input_shape": (DIM,)}
    report = export.save(network(None), tmp_path / "a.tflite", **kinds)
    assert report.sqnr_db > 25


def test_infinite_outputs_must_be_where_the_model_has_them():
    from keras_efficient.export.verify import TOLERANCES, _Comparison

    compared = _Comparison(TOLERANCES["float32"], lambda name: None)
    want = np.array([[1.0, -np.inf]], "float32")
    compared.add({"x": want}, {"x": want.copy()})
    assert compared.result().problem is None
    with pytest.raises(ConversionError, match="is not finite"):
        compared.add({"x": want}, {"x": np.array([[-np.inf, 1.0]], "float32")})


def test_equally_good_answers_may_change_places():
    from keras_efficient.export.verify import TOLERANCES, _Comparison

    def differing(scores, classes):
        compared = _Comparison(TOLERANCES["dynamic"], lambda name: None, {"ids": "scores"})
        want = {"scores": np.array([[4.0, 3.0, 2.95, 1.0]], "float32"), "ids": np.array([[7, 5, 6, 2]])}
        compared.add(want, {"scores": np.array([scores], "float32"), "ids": np.array([classes])})
        return compared.integers["ids"][0]

    assert differing([4.0, 3.03, 2.97, 1.0], [7, 6, 5, 2]) == 0
    assert differing([4.0, 3.03, 2.97, 1.0], [5, 7, 6, 2]) == 2  # one apart
    assert differing([4.0, 3.0, 2.95, 1.0], [7, 6, 5, 2]) == 2  # their scores are right, and not theirs
    assert differing([4.0, 3.03, 2.97, 1.0], [7, 6, 6, 9]) == 1  # another one


def test_one_rows_error_excuses_no_other_row():
    from keras_efficient.export.verify import TOLERANCES, _Comparison

    compared = _Comparison(TOLERANCES["dynamic"], lambda name: None, {"ids": "scores"})
    scores, ids = np.tile(np.arange(5.0, 0, -1, "float32"), (64, 1)), np.tile(np.arange(5), (64, 1))
    worse = scores + np.float32(1e-4)
    worse[0] += 1.5
    compared.add({"scores": scores, "ids": ids}, {"scores": worse, "ids": ids[:, ::-1]})
    assert compared.integers["ids"][0] >= 63 * 4


def test_what_names_the_best_ones():
    from keras_efficient.export.signature import ranked_outputs

    x = keras.Input((9,))
    best, places = keras.ops.top_k(x, 3)
    assert ranked_outputs(keras.Model(x, {"b": best, "p": places})) == {"p": "b"}
    inner = keras.Model(x, [x * 2.0, keras.ops.greater(x, 0.0)])
    assert ranked_outputs(keras.Model(x, inner(x))) == {}
    assert ranked_outputs(answering(network(PLANS["router"]))) == {"out_1": "out"}
    assert ranked_outputs(answering(network(None))) == {"out_1": "out"}


def test_what_one_answer_reads_is_told(tmp_path):
    plan = PLANS["router"]
    report = export.save(network(plan, 8), tmp_path / "few.tflite", input_shape=(1, DIM), samples=queries())
    whole = export.save(network(None, 8), tmp_path / "all.tflite", input_shape=(1, DIM), samples=queries())
    hidden = DIM * DIM * 4
    rows = (6 + 20) * DIM * 4 + (12 + 64) * (DIM + 4 + 4) + 64 * 4  # floats; bytes, scales and biases; classes
    assert hidden + rows <= report.bytes_read < hidden + rows + 800
    assert hidden + UNITS * DIM * 4 < whole.bytes_read
    run = export.load(tmp_path / "few.tflite")
    assert run.metadata["candidates"] == {"out": {"neurons": plan.neurons, "of": UNITS}}

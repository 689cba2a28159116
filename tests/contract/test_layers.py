"""Every row of layers_table.py, every promise that a layer of ours makes; on the TensorFlow and the JAX backend."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from layers_table import LAYERS, LayerRow

from keras_efficient import export
from keras_efficient.deploy import Deployable, answering, deploy, foreign_layers
from keras_efficient.errors import WrongArgument

pytestmark = pytest.mark.contract

each_row = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)

# float32 sums in another order: a few times the unit roundoff 6e-8 times the terms of a sum (up to some hundreds).
TOLERANCE = 1e-5

# A fresh process in which our package cannot be imported opens files and runs them.
OPEN_WITHOUT_US = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "keras_efficient":
            raise ImportError("this process has no keras_efficient")
sys.meta_path.insert(0, Refuse())
import keras, numpy as np
for folder in sys.argv[1:]:
    model = keras.saving.load_model(f"{folder}/model.keras")
    outputs = keras.tree.flatten(model(np.load(f"{folder}/inputs.npy")))
    np.save(f"{folder}/outputs.npy", np.concatenate([keras.ops.convert_to_numpy(x) for x in outputs], axis=-1))
"""


def run(model, inputs) -> np.ndarray:
    """The outputs; several, of one batch, side by side."""
    return together(model(inputs, training=False))


def together(outputs) -> np.ndarray:
    flat = [keras.ops.convert_to_numpy(output).astype("float32") for output in keras.tree.flatten(outputs)]
    return np.concatenate(flat, axis=-1)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


@each_row
def test_signature_is_the_stock_layers(row):
    if row.stock is None:
        pytest.skip("drops in for no stock layer")

    def parameters(layer_class):
        found = inspect.signature(layer_class.__init__).parameters.values()
        return [p for p in found if p.name != "self" and p.kind is not p.VAR_KEYWORD]

    ours, theirs = parameters(type(row.make(name="layer"))), parameters(row.stock)
    kept = [(p.name, p.default, p.kind) for p in ours if p.name not in (*row.extra, *row.changed)]
    assert kept == [(p.name, p.default, p.kind) for p in theirs if p.name not in row.changed]
    extra = [p for p in ours if p.name in row.extra]
    assert [p.name for p in extra] == list(row.extra)
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@each_row
def test_computed_shape_is_the_real_one(row):
    model = row.model()
    for batch, free in ((1, 7), (3, 10)):
        inputs = row.sample(batch=batch, free=free)
        assert tuple(model.get_layer("layer").compute_output_shape(inputs.shape)) == run(model, inputs).shape
    symbolic = model.get_layer("layer").compute_output_shape(row.input_shape)
    assert tuple(symbolic) == tuple(model.output.shape)


@each_row
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_dtype_policies(row, policy):
    model = row.model(dtype=policy)
    outputs = model(row.sample())
    assert keras.backend.standardize_dtype(outputs.dtype) == keras.DTypePolicy(policy).compute_dtype
    assert {v.dtype for v in model.variables if "float" in v.dtype} <= {"float32"}
    # float16 has 11 bits, bfloat16 8; some rounding steps in a row.
    tolerance = {"float32": TOLERANCE, "mixed_float16": 2**-11 * 8, "mixed_bfloat16": 2**-8 * 8}[policy]
    if row.approximates is None:
        assert_close(
            keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32")), run(row.model(), row.sample()), tolerance
        )


@each_row
def test_config_round_trip(row):
    layer = row.make(name="layer", dtype="float32")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()


@each_row
def test_keras_file_round_trip(row, tmp_path):
    model = row.model()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(run(again, row.sample()), run(model, row.sample()))


@each_row
def test_a_training_step_changes_every_weight(row):
    model = row.model()
    if not model.trainable_variables:
        pytest.skip("has no trainable weight")
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    inputs = row.sample(batch=4)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    loss = model.train_on_batch(inputs, np.random.default_rng(1).normal(size=run(model, inputs).shape))
    assert np.isfinite(loss)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        assert np.any(keras.ops.convert_to_numpy(variable) != old), variable.path


@each_row
def test_deployed_inference_is_equal(row):
    if row.approximates is not None:
        pytest.skip(row.approximates)
    model = row.model()
    deployed = deploy(model)
    for batch, free in ((1, 7), (3, 12)):
        inputs = row.sample(batch=batch, free=free)
        assert_close(run(deployed, inputs), run(answering(model), inputs))


@each_row
def test_deployed_model_is_another_of_stock_layers(row):
    model = row.model()
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    deployed = deploy(model)
    assert isinstance(model.get_layer("layer"), Deployable)
    assert foreign_layers(deployed) == ()
    assert [layer.name for layer in deployed.layers] == [layer.name for layer in model.layers]
    assert set(deployed.output_names) == set(model.output_names)
    assert not {id(v) for v in model.variables} & {id(v) for v in deployed.variables}
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)


@each_row
def test_deploy_is_idempotent_and_deterministic(row):
    model = row.model()
    deployed = deploy(model)
    for again in (deploy(model), deploy(deployed)):
        assert again.get_config() == deployed.get_config()
        for left, right in zip(again.weights, deployed.weights, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(left), keras.ops.convert_to_numpy(right))


@each_row
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_reduced_precision_deploys_to_float32(row, policy):
    deployed = deploy(row.model(dtype=policy))
    assert {v.dtype for v in deployed.variables if "float" in v.dtype} <= {"float32"}
    assert deployed.get_layer("layer").compute_dtype == "float32"
    if row.approximates is None:
        assert_close(run(deployed, row.sample()), run(answering(row.model()), row.sample()))


@pytest.fixture(scope="module")
def opened_without_us(tmp_path_factory):
    """Outputs of every row's deployed file, from one process that cannot import our package."""
    folders = {row.name: tmp_path_factory.mktemp("deployed") for row in LAYERS}
    expected = {}
    for row in LAYERS:
        deployed = deploy(row.model())
        deployed.save(folders[row.name] / "model.keras")
        np.save(folders[row.name] / "inputs.npy", row.sample())
        expected[row.name] = run(deployed, row.sample())
    command = [sys.executable, "-c", OPEN_WITHOUT_US, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.getbasetemp(), timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (np.load(folder / "outputs.npy"), expected[name]) for name, folder in folders.items()}


@each_row
def test_deployed_file_opens_without_this_package(row, opened_without_us):
    assert_close(*opened_without_us[row.name])


# Under JAX a conversion is a child process of some ten seconds: the first row shows that the road is open.
each_exported_row = pytest.mark.parametrize(
    "row", LAYERS if keras.backend.backend() == "tensorflow" else LAYERS[:1], ids=lambda row: row.name
)


@each_exported_row
@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_exported_file_is_equal(row: LayerRow, suffix, tmp_path):
    if not row.exports:
        with pytest.raises(WrongArgument):
            export.save(row.model(), tmp_path / f"layer{suffix}", input_shape=row.sample(batch=1).shape)
        return
    # What approximates would miss the tolerance of export's own check: there the deployed form is the reference.
    model = deploy(row.model()) if row.approximates else row.model()
    shape = row.sample(batch=1).shape
    export.save(model, tmp_path / f"layer{suffix}", input_shape=shape, samples=row.sample(batch=1))
    actual = export.load(tmp_path / f"layer{suffix}")(row.sample(batch=1))
    assert_close(together(actual), run(answering(model), row.sample(batch=1)))

"""The recipe that makes the SESR weights: a smoke run, and that warm starts copy what they say."""

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

from keras_efficient.deploy import deploy
from keras_efficient.errors import FileProblem
from keras_efficient.zoo.recipes import sesr as recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, repo_root):
    """Crops of the bundled photo under names that fall into both parts of the split."""
    folder = tmp_path_factory.mktemp("pictures")
    photo = Image.open(repo_root / "examples" / "data" / "chelsea.png").convert("RGB")
    for number in range(24):
        left, top = 13 * number % 300, 7 * number % 150
        photo.crop((left, top, left + 140, top + 140)).save(folder / f"{number}.png")
    return folder


def randomized(name):
    keras.utils.set_random_seed(3)
    model = recipe.build(name)
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(ops.convert_to_numpy(weight) + random.normal(size=weight.shape) * 0.02)
    return model


def test_smoke_run_of_twenty_steps(pictures, tmp_path):
    with pytest.raises(FileProblem, match=r"sesr-m5-x2\.weights\.h5"):
        recipe.train("sesr-m3-x2", pictures, tmp_path, steps=20)  # it starts from M5, which is not there yet
    recipe.train("sesr-m5-x2", pictures, tmp_path, steps=20)
    assert (tmp_path / "sesr-m5-x2" / "log.csv").read_text().count("\n") == 2
    assert (tmp_path / "sesr-m5-x2.weights.h5").exists()


def test_a_deeper_network_starts_as_the_shallower_one():
    shallow, deep = randomized("sesr-m5-x2"), randomized("sesr-m7-x2")
    recipe.copy_matching_layers(shallow, deep)
    y = np.random.default_rng(1).random((1, 16, 16, 1)).astype("float32")
    expected = ops.convert_to_numpy(shallow(y))
    # The new blocks are inserted after the old ones as identities.
    np.testing.assert_allclose(ops.convert_to_numpy(deep(y)), expected, atol=1e-5)


def test_x4_starts_with_every_block_of_x2_but_the_last():
    small, large = randomized("sesr-m5-x2"), recipe.build("sesr-m5-x4")
    copied = recipe.copy_matching_layers(small, large)
    assert "last" not in copied
    assert {"first", *(f"body_{i}" for i in range(5))} <= set(copied)
    for name in copied:
        for one, two in zip(small.get_layer(name).get_weights(), large.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


def test_int8_aware_training_deploys_to_stock_layers_near_the_float_model():
    model, aware = randomized("sesr-m5-x2"), recipe.build("sesr-m5-x2.int8")
    recipe.copy_matching_layers(model, aware)
    y = np.random.default_rng(1).random((2, 16, 16, 1)).astype("float32")
    aware(y, training=True)  # the ranges follow this batch
    whole, rounded = ops.convert_to_numpy(model(y)), ops.convert_to_numpy(aware(y))
    error = np.abs(rounded - whole)
    assert 0 < error.max() < 0.1, "fake quantisation must round, and not more than a few steps"
    deployed = deploy(aware)
    assert not any(type(layer).__module__.startswith("keras_efficient") for layer in deployed._flatten_layers())
    # A sum that falls between two steps may round to either side once in a while.
    difference = np.abs(ops.convert_to_numpy(deployed(y)) - rounded)
    assert np.mean(difference > 1e-5) < 0.01
    assert difference.max() < 3 / 255

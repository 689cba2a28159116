"""URSABench's classifiers: published weight counts, what the networks compute, and what they are built from."""

from __future__ import annotations

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import models
from keras_efficient.deploy import deploy
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)

# Networks of every family, small enough for a test.
SHAPE = (9, 8, 3)
SMALL = {
    "mlp": partial(models.MLP, 12, input_shape=SHAPE),
    "resnet": partial(models.CifarResNet, 8, input_shape=SHAPE),
    "resnet projection": partial(models.CifarResNet, 8, shortcut="projection", input_shape=SHAPE),
    "preresnet": partial(models.PreResNet, 8, input_shape=SHAPE),
    "wideresnet": partial(models.WideResNet, 10, 2, input_shape=SHAPE),
}


def images(model, count=2):
    return RNG.normal(size=(count, *model.input_shape[1:])).astype("float32")


def trainable(model):
    return sum(ops.size(variable) for variable in model.trainable_variables)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp200", 199_210),  # 784 · 200 + 200 · 200 + 200 · 10 and biases, as the released networks
        ("mlp400", 478_410),
        ("mlp600", 837_610),
        ("resnet20", 269_722),  # the paper's 0.27 M, by shortcuts without weights
        ("resnet32", 464_154),  # 0.46 M
        ("resnet56", 853_018),  # 0.85 M
        ("preresnet164", 1_703_258),  # 1.7 M
        ("wideresnet28x10", 36_489_290),  # 36.5 M
        ("resnet50", 25_557_032),
        ("resnet50-small", 23_520_842),
    ],
)
def test_weights_are_as_many_as_published(name, count):
    model = models.CLASSIFIERS[name]()
    assert trainable(model) == count
    assert model.output_shape == (None, 1000 if name == "resnet50" else 10)


def test_a_projection_has_weights():
    assert trainable(models.CifarResNet(20, shortcut="projection")) == 272_474


@pytest.mark.contract
@pytest.mark.parametrize("name", SMALL)
def test_logits_of_a_free_batch(name):
    model = SMALL[name](num_classes=7)
    x = images(model, 5)
    logits = ops.convert_to_numpy(model(x))
    assert logits.shape == (5, 7)
    assert (logits < 0).any()  # no softmax
    np.testing.assert_allclose(ops.convert_to_numpy(model(x[:1])), logits[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.contract
@pytest.mark.parametrize("name", ["mlp", "preresnet"])
def test_the_seed_decides(name):
    def weights(seed):
        keras.utils.set_random_seed(seed)
        return [ops.convert_to_numpy(weight) for weight in SMALL[name]().weights]

    first, again, other = weights(1), weights(1), weights(2)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != two).any() for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_changes_every_weight(name):
    keras.utils.set_random_seed(0)
    model = SMALL[name](dropout=0.2)
    before = [ops.convert_to_numpy(weight) for weight in model.weights]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images(model, 8), RNG.integers(10, size=8), batch_size=8, verbose=0)
    for weight, old in zip(model.weights, before, strict=True):
        assert "seed" in weight.path or (ops.convert_to_numpy(weight) != old).any(), weight.path


@pytest.mark.parametrize("name", SMALL)
def test_stock_layers_only(name):
    model = SMALL[name](dropout=0.1)
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)
    x = images(model)
    found = ops.convert_to_numpy(deploy(model)(x))
    np.testing.assert_allclose(found, ops.convert_to_numpy(model(x)), rtol=1e-5, atol=1e-5)


def test_dropout_is_where_the_twins_have_it():
    def rates(model):
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert rates(models.MLP(12, dropout=0.2)) == [0.2, 0.2]
    assert rates(models.WideResNet(10, 1, dropout=0.3)) == [0.3] * 4
    assert rates(models.CifarResNet(8, dropout=0.2)) == [0.2]
    assert rates(models.CifarResNet(8)) == rates(models.WideResNet(10, 1)) == rates(models.MLP(12)) == []


def batch_norm(layer, x):
    gamma, beta, mean, variance = (ops.convert_to_numpy(weight) for weight in layer.weights)
    return gamma * (x - mean) / np.sqrt(variance + layer.epsilon) + beta


def convolve(layer, x, stride):
    """A naive 3 × 3 or 1 × 1, whose kernel lies around every `stride`-th pixel."""
    kernel = ops.convert_to_numpy(layer.kernel)
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    height, width = x.shape[1:3]
    found = 0.0
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            found = found + padded[:, row : row + height, column : column + width] @ kernel[row, column]
    found = found[:, ::stride, ::stride]
    return found + ops.convert_to_numpy(layer.bias) if layer.use_bias else found


def with_random_statistics(model):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([RNG.uniform(0.5, 1.5, size=weight.shape) for weight in layer.weights])
    return model


def test_a_cifar_network_against_a_naive_one():
    model = with_random_statistics(models.CifarResNet(8, input_shape=SHAPE))
    x = images(model)

    def part(name, y, stride=1):
        y = convolve(model.get_layer(f"{name}_conv"), y, stride)
        return batch_norm(model.get_layer(f"{name}_norm"), y)

    y = np.maximum(part("stem", x), 0)
    for stage, filters in enumerate((16, 32, 64)):
        stride, name = 2 if stage else 1, f"stage_{stage}_block_0"
        inside = part(f"{name}_1", np.maximum(part(f"{name}_0", y, stride), 0))
        new = (filters - y.shape[-1]) // 2
        y = np.maximum(inside + np.pad(y[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new, new))), 0)
    expected = y.mean(axis=(1, 2)) @ ops.convert_to_numpy(model.get_layer("logits").kernel)
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), expected, rtol=1e-3, atol=1e-4)


def test_a_wide_network_against_a_naive_one():
    model = with_random_statistics(models.WideResNet(10, 2, input_shape=SHAPE))
    x = images(model)

    def part(name, y, stride=1):
        y = np.maximum(batch_norm(model.get_layer(f"{name}_norm"), y), 0)
        return convolve(model.get_layer(f"{name}_conv"), y, stride)

    y = convolve(model.get_layer("stem_conv"), x, 1)
    for stage in range(3):
        stride, name = 2 if stage else 1, f"stage_{stage}_block_0"
        around = convolve(model.get_layer(f"{name}_shortcut_conv"), y, stride)
        y = around + part(f"{name}_1", part(f"{name}_0", y), stride)
    y = np.maximum(batch_norm(model.get_layer("last_norm"), y), 0)
    expected = y.mean(axis=(1, 2)) @ ops.convert_to_numpy(model.get_layer("logits").kernel)
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), expected, rtol=1e-3, atol=1e-3)


def test_free_sides_and_bottlenecks():
    model = models.PreResNet(47, input_shape=(None, None, 1))
    assert model(RNG.normal(size=(1, 9, 12, 1))).shape == (1, 10)
    convolutions = [model.get_layer(f"stage_2_block_0_{part}_conv") for part in (0, 1, 2, "shortcut")]
    shapes = [tuple(layer.kernel.shape) for layer in convolutions]
    assert shapes == [(1, 1, 128, 64), (3, 3, 64, 64), (1, 1, 64, 256), (1, 1, 128, 256)]
    assert [layer.strides[0] for layer in convolutions] == [1, 2, 1, 2]


def test_names():
    assert [SMALL[name]().name for name in ("mlp", "resnet", "preresnet", "wideresnet")] == [
        "mlp_12",
        "resnet_8",
        "preresnet_8",
        "wide_resnet_10_2",
    ]
    assert SMALL["resnet"](name="mine").name == "mine"


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (models.MLP, {"width": 0}),
        (models.MLP, {"depth": -1}),
        (models.MLP, {"input_shape": (None, 3)}),
        (models.MLP, {"num_classes": 1}),
        (models.CifarResNet, {"depth": 21}),
        (models.CifarResNet, {"depth": 2}),
        (models.CifarResNet, {"shortcut": "none"}),
        (models.CifarResNet, {"input_shape": (32, 32)}),
        (models.PreResNet, {"depth": 44}),
        (models.WideResNet, {"depth": 27}),
        (models.WideResNet, {"width": 0}),
        (models.WideResNet, {"dropout": 1.0}),
        (models.ResNet50, {"dropout": -0.1}),
    ],
)
def test_wrong_arguments_are_named(build, arguments):
    with pytest.raises(WrongArgument, match=f"`{next(iter(arguments))}`"):
        build(**arguments)


def test_the_nearest_depth_is_said():
    with pytest.raises(WrongArgument, match="nearest is 20"):
        models.CifarResNet(21)

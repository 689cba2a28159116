"""The linear block against independent computations: its own expanded form, a naive collapse, and the published
defect."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient.layers import CollapsibleLinearBlock, FakeQuantize
from keras_efficient.layers.fake_quantize import fake_quantize_kernel
from keras_efficient.layers.sparsity import keep_largest

pytestmark = pytest.mark.contract

CASES = [
    {"filters": 6, "kernel_size": 1, "padding": "same"},
    {"filters": 4, "kernel_size": 3, "padding": "same"},
    {"filters": 4, "kernel_size": 3, "padding": "valid"},
    {"filters": 6, "kernel_size": 5, "padding": "same"},
    {"filters": 4, "kernel_size": (3, 5), "padding": "same"},
    {"filters": 4, "kernel_size": (2, 4), "padding": "same"},
    {"filters": 8, "kernel_size": 3, "padding": "same", "strides": 2},
    {"filters": 4, "kernel_size": 3, "padding": "same", "dilation_rate": 2},
    {"filters": 4, "kernel_size": 3, "padding": "valid", "dilation_rate": (1, 3)},
    {"filters": 6, "kernel_size": 3, "padding": "same", "groups": 2},
    {"filters": 4, "kernel_size": 3, "padding": "same", "use_bias": False},
    {"filters": 4, "kernel_size": 3, "padding": "same", "activation": "relu"},
    {"filters": 4, "kernel_size": 3, "padding": "same", "residual": False},
]


def build(seed=0, channels=4, **arguments):
    """A block with random weights, biases included: zero biases would hide the published defect."""
    block = CollapsibleLinearBlock(expansion=24, **arguments)
    first = arguments.get("data_format") == "channels_first"
    block.build((None, channels, None, None) if first else (None, None, None, channels))
    random = np.random.default_rng(seed)
    for weight in block.weights:
        weight.assign(random.normal(size=weight.shape) * 0.3)
    return block


def naive_collapse(block):
    """Kernel and bias by explicit loops in float64."""
    expand, project = np.float64(block.expand_kernel), np.float64(block.project_kernel)
    rows, columns, inputs, _ = expand.shape
    per_group = block.filters // block.groups
    kernel = np.zeros((rows, columns, inputs, block.filters))
    bias = np.zeros(block.filters)
    for o in range(block.filters):
        first = (o // per_group) * block.expansion
        for p in range(block.expansion):
            kernel[..., o] += expand[..., first + p] * project[p, o]
            if block.use_bias:
                bias[o] += float(block.expand_bias[first + p]) * project[p, o]
        if block.use_bias:
            bias[o] += float(block.project_bias[o])
    same = rows % 2 and columns % 2 and inputs == block.filters and max(rows, columns) > 1 and max(block.strides) == 1
    if block.residual is not False and same:
        kernel[rows // 2, columns // 2] += np.eye(inputs)
    return kernel, bias


def tolerance(kernel):
    """float32 rounding of sums over `expansion` products, each up to the largest weight."""
    return 24 * np.finfo(np.float32).eps * 24 * max(np.abs(kernel).max(), 1)


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_collapse_equals_a_naive_loop(arguments):
    block = build(**arguments)
    kernel, bias = naive_collapse(block)
    np.testing.assert_allclose(ops.convert_to_numpy(block.kernel), kernel, atol=tolerance(kernel))
    if block.use_bias:
        np.testing.assert_allclose(ops.convert_to_numpy(block.bias), bias, atol=tolerance(bias))
    else:
        assert block.bias is None


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_collapsed_equals_expanded(arguments):
    block = build(**arguments)
    expanded = CollapsibleLinearBlock(expansion=24, collapsed=False, **arguments)
    expanded.build((None, None, None, 4))
    expanded.set_weights(block.get_weights())
    x = np.random.default_rng(1).normal(size=(2, 11, 13, 4)).astype("float32")
    one, two = ops.convert_to_numpy(block(x)), ops.convert_to_numpy(expanded(x))
    assert one.shape == tuple(block.compute_output_shape(x.shape))
    np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(two).max() + 1e-6)


def test_both_forms_train_alike():
    """Twenty steps of Adam from the same start with non-zero biases: the same function has the same gradients."""
    random = np.random.default_rng(2)
    x = random.normal(size=(4, 12, 12, 4)).astype("float32")
    target = random.normal(size=(4, 12, 12, 4)).astype("float32")
    start = build(filters=4, kernel_size=3, padding="same").get_weights()
    results = []
    for collapsed in (True, False):
        inputs = keras.Input((12, 12, 4))
        block = CollapsibleLinearBlock(4, 3, padding="same", expansion=24, collapsed=collapsed, activation="tanh")
        model = keras.Model(inputs, block(inputs))
        block.set_weights(start)
        model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-3), "mse")
        losses = model.fit(x, target, batch_size=4, epochs=20, shuffle=False, verbose=0).history["loss"]
        results.append((losses, block.get_weights()))
    (losses, weights), (expanded_losses, expanded_weights) = results
    np.testing.assert_allclose(losses, expanded_losses, rtol=1e-4)
    assert losses[-1] < losses[0]
    for collapsed, expanded, before in zip(weights, expanded_weights, start, strict=True):
        assert not np.allclose(collapsed, before)
        np.testing.assert_allclose(collapsed, expanded, rtol=1e-4, atol=1e-4 * np.abs(expanded).max())


def test_a_bias_inside_the_kernel_is_another_function():
    """The authors' release collapses by running unit impulses through both convolutions, biases included.

    That adds the bias to every tap of the kernel. With non-zero biases the two must differ, with zero ones agree.
    """

    def impulse_collapse(block):
        size, channels = block.kernel_size[0], 4
        pad = size - 1
        impulses = np.zeros((channels, 2 * pad + 1, 2 * pad + 1, channels), "float32")
        impulses[np.arange(channels), pad, pad, np.arange(channels)] = 1
        hidden = ops.conv(impulses, block.expand_kernel, padding="valid") + block.expand_bias
        response = ops.conv(hidden, ops.reshape(block.project_kernel, (1, 1, 24, 4))) + block.project_bias
        return ops.convert_to_numpy(response)[:, ::-1, ::-1].transpose(1, 2, 0, 3)

    block = build(filters=4, kernel_size=3, padding="same", residual=False)
    assert np.abs(impulse_collapse(block) - ops.convert_to_numpy(block.kernel)).max() > 0.1
    block.expand_bias.assign(np.zeros(24))
    block.project_bias.assign(np.zeros(4))
    np.testing.assert_allclose(impulse_collapse(block), ops.convert_to_numpy(block.kernel), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kernel_constraint": "non_neg"}, "kernel_constraint"),
        ({"bias_constraint": "non_neg"}, "bias_constraint"),
        ({"expansion": 0}, "expansion"),
        ({"expansion": 2.5}, "expansion"),
        ({"residual": "yes"}, "residual"),
        ({"kernel_bits": 1}, "kernel_bits"),
        ({"lora_rank": 2}, "lora_rank"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"sparsity": "4:4"}, "sparsity"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        CollapsibleLinearBlock(4, 3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"filters": 5, "kernel_size": 3}, "filters=5"),
        ({"filters": 4, "kernel_size": 2}, "no centre"),
        ({"filters": 4, "kernel_size": 3, "strides": 2}, "strides"),
        ({"filters": 4, "kernel_size": 3, "groups": 2}, "groups"),
    ],
)
def test_a_residual_that_cannot_be_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        CollapsibleLinearBlock(residual=True, **arguments).build((None, 8, 8, 4))


def test_regularizers_see_the_collapsed_weights_once():
    """As for Conv2D: before the first call, and once for a layer that is called twice."""
    options = {"kernel_regularizer": keras.regularizers.L1(0.5), "bias_regularizer": keras.regularizers.L2(3.0)}
    block = CollapsibleLinearBlock(4, 3, expansion=8, padding="same", **options)
    block.build((None, 5, 5, 4))
    block.expand_bias.assign(np.arange(8))
    kernel, bias = (ops.convert_to_numpy(w) for w in (block.kernel, block.bias))
    expected = 0.5 * np.abs(kernel).sum() + 3 * np.square(bias).sum()
    assert float(sum(block.losses)) == pytest.approx(expected, rel=1e-5)
    inputs = keras.Input((5, 5, 4))
    model = keras.Model(inputs, block(block(inputs)))
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)
    block.trainable = False
    assert not model.losses


def test_what_conv2d_inherits_and_this_layer_lacks_is_refused():
    block = CollapsibleLinearBlock(4, 3)
    for act in (block.deploy, lambda: block.enable_lora(2)):
        with pytest.raises(ValueError, match=r"build the layer|LoRA"):
            act()
    with pytest.raises(AttributeError, match="build the layer"):
        _ = block.bias
    for option in ({"kernel_bits": 8}, {"sparsity": "2:4"}):
        with pytest.raises(ValueError, match="collapsed=True"):
            CollapsibleLinearBlock(4, 3, collapsed=False, **option)


def test_channels_first_where_the_backend_has_it():
    x = np.random.default_rng(3).normal(size=(2, 4, 9, 8)).astype("float32")
    first = build(filters=4, kernel_size=3, padding="same", data_format="channels_first")
    last = build(filters=4, kernel_size=3, padding="same")
    try:
        got = ops.convert_to_numpy(first(x))
    except Exception as error:  # TensorFlow on a CPU has no such convolution; it must say so itself.
        assert keras.backend.backend() == "tensorflow"
        assert "NHWC" in str(error) or "NCHW" in str(error) or "channels" in str(error)  # noqa: PT017
        return
    expected = ops.convert_to_numpy(last(x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_half_precision_collapses_in_float32():
    block = build(filters=4, kernel_size=3, padding="same", dtype="mixed_float16")
    assert all(w.dtype == "float32" for w in block.weights)
    kernel, _ = naive_collapse(block)
    np.testing.assert_allclose(ops.convert_to_numpy(block.kernel), kernel, atol=tolerance(kernel))
    assert keras.backend.standardize_dtype(block(np.ones((1, 5, 5, 4), "float16")).dtype) == "float16"


def test_kernel_bits_puts_the_deployed_kernel_on_a_grid():
    block = build(filters=4, kernel_size=3, padding="same", kernel_bits=8)
    kernel = block.deploy().get_weights()[0]
    steps = kernel / (np.abs(kernel).max(axis=(0, 1, 2)) / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.abs(steps).max() == pytest.approx(127, abs=1e-3)
    assert not np.allclose(kernel, build(filters=4, kernel_size=3, padding="same").deploy().get_weights()[0])


def test_sparsity_keeps_the_largest_of_each_group():
    dense = ops.convert_to_numpy(build(filters=4, kernel_size=3, padding="same").kernel)
    sparse = ops.convert_to_numpy(build(filters=4, kernel_size=3, padding="same", sparsity="1:2").kernel)
    pairs, kept = (kernel.reshape(3, 3, 2, 2, 4) for kernel in (dense, sparse))
    assert (np.count_nonzero(kept, axis=3) == 1).all()
    np.testing.assert_array_equal(np.abs(kept).sum(axis=3), np.abs(pairs).max(axis=3))
    # As many are kept of equals.
    np.testing.assert_array_equal(
        ops.convert_to_numpy(keep_largest(np.ones((1, 1, 4, 1), "float32"), 2, 4)).ravel(), [1, 1, 0, 0]
    )
    with pytest.raises(ValueError, match="groups of 3"):
        CollapsibleLinearBlock(4, 3, sparsity="2:3").build((None, 8, 8, 4))


def test_fake_quantised_kernel_has_a_straight_through_gradient():
    kernel = np.random.default_rng(4).normal(size=(3, 3, 2, 5)).astype("float32")
    quantised = ops.convert_to_numpy(fake_quantize_kernel(kernel, 4))
    scale = np.abs(kernel).max(axis=(0, 1, 2)) / 7
    np.testing.assert_allclose(quantised, np.round(kernel / scale) * scale, atol=1e-6)


def test_fake_quantize_follows_the_range_and_rounds_to_it():
    layer = FakeQuantize(momentum=0.5)
    x = np.linspace(-1, 3, 401, dtype="float32")[None]
    layer(x, training=True)
    assert float(layer.range_min) == pytest.approx(-1)
    assert float(layer.range_max) == pytest.approx(3)
    layer(x * 2, training=True)
    assert float(layer.range_max) == pytest.approx(4.5)
    y = ops.convert_to_numpy(layer(x))
    scale = 6.0 / 255  # (4.5 + 1.5) / 255
    assert np.abs(y - x).max() <= scale / 2 + 1e-6
    assert len(np.unique(np.round(y / scale, 3))) <= 256
    assert 0.0 in y


def test_fake_quantize_takes_the_range_that_rounds_best():
    random = np.random.default_rng(5)
    values = np.concatenate([random.normal(size=20_000), [40.0, -90.0]]).astype("float32")
    layer = FakeQuantize(momentum=1.0)
    layer.build((None, 1))
    layer.fit(values)
    assert float(layer.range_min) == -90, "the lower end stays"
    assert float(layer.range_max) < 40
    layer.fit(values, keras.activations.silu)
    assert -40 < float(layer.range_min) < -4, "where SiLU is flat nothing is lost"

    def error():
        silu = keras.activations.silu
        return np.abs(ops.convert_to_numpy(silu(layer(values)) - silu(ops.convert_to_tensor(values))))[:-2].mean()

    loud = np.zeros((25, 32, 16, 16), "float32")
    loud[..., 1] = 100
    layer.factor.assign(0.5)
    layer.fit(loud)
    assert float(layer.range_max) == 100, "no channel is left out"
    assert float(layer.factor) == 1
    layer.fit(0 * values)
    assert float(layer.range_max) == 100, "zeros say nothing"
    for wrong in ([], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="from finite values"):
            layer.fit(wrong)
    with pytest.raises(ValueError, match="not built"):
        FakeQuantize().fit(values)
    layer.fit(values, keras.activations.silu)
    fitted, ends = error(), (float(layer.range_min), float(layer.range_max))
    layer(2 * values, training=True)
    assert (float(layer.range_min), float(layer.range_max)) == ends, "it stands still"
    layer.range_min.assign(values.min())
    layer.range_max.assign(values.max())
    assert fitted < 0.6 * error()


def test_fake_quantize_with_a_fixed_range_does_not_move():
    layer = FakeQuantize(minimum=0.0, maximum=1.0)
    y = ops.convert_to_numpy(layer(np.array([[-0.5, 0.31, 2.0]], "float32"), training=True))
    np.testing.assert_allclose(y, [[0.0, round(0.31 * 255) / 255, 1.0]], atol=1e-6)
    for wrong in ({"minimum": 0.0}, {"minimum": 1.0, "maximum": 0.0}):
        with pytest.raises(ValueError, match="must"):
            FakeQuantize(**wrong)

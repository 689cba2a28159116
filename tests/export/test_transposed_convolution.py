"""Conv2DTranspose against its rewrite, for kernels and strides that divide each other and that do not."""

import keras
import numpy as np
import pytest

from keras_efficient.export.lowerings.transposed_convolution import convolution_and_shuffle


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, (3, 4)])
def test_equals_the_transposed_convolution(size, stride):
    inputs = keras.Input((None, None, 3))
    layer = keras.layers.Conv2DTranspose(2, size, strides=stride, padding="same", activation="tanh", name="enlarge")
    model = keras.Model(inputs, layer(inputs))
    random = np.random.default_rng(0)
    layer.set_weights([random.normal(size=w.shape) for w in layer.get_weights()])
    lowered = convolution_and_shuffle(model)
    assert lowered is not model
    assert not any(isinstance(inner, keras.layers.Conv2DTranspose) for inner in lowered._flatten_layers())
    x = random.normal(size=(2, 7, 6, 3)).astype("float32")
    expected, got = model(x).numpy(), lowered(x).numpy()
    assert got.shape == expected.shape
    # Another order of at most 3·81 float32 products.
    np.testing.assert_allclose(got, expected, atol=243 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "valid", "strides": 2},
        {"padding": "same", "strides": 1},
        {"padding": "same", "strides": (2, 3)},
        {"padding": "same", "strides": 2, "output_padding": 1},
    ],
)
def test_leaves_what_it_cannot_do(arguments):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Conv2DTranspose(2, 3, **arguments)(inputs))
    assert convolution_and_shuffle(model) is model

"""The derived radius against the measured one: which pixels change when one input pixel does."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.superres import receptive_field, tiled


def sesr_like(depth=5, scale=2):
    x = keras.Input((None, None, 1))
    first = y = layers.Conv2D(4, 5, padding="same")(x)
    for _ in range(depth):
        y = layers.PReLU(shared_axes=[1, 2], alpha_initializer="ones")(layers.Conv2D(4, 3, padding="same")(y))
    y = layers.Conv2D(scale**2, 5, padding="same")(y + first) + x
    return keras.Model(x, ops.depth_to_space(y, scale))


def half_resolution():
    x = keras.Input((None, None, 1))
    y = layers.Conv2D(4, 6, 2, padding="same")(x)
    y = layers.Conv2D(16, 3, padding="same")(layers.Conv2D(4, 3, padding="same")(y))
    y = layers.Add()([y, layers.Conv2D(16, 2, 2, padding="same")(x)])
    return keras.Model(x, ops.depth_to_space(y, 4))


def nested_and_padded_by_hand():
    x = keras.Input((None, None, 1))
    inner = keras.Model(x, layers.Conv2D(2, 5, dilation_rate=2)(layers.ZeroPadding2D(4)(x)))
    return keras.Sequential([inner, layers.UpSampling2D(3), layers.Conv2D(1, (1, 3), padding="same")])


def pooled():
    x = keras.Input((None, None, 1))
    y = layers.UpSampling2D(2)(layers.AveragePooling2D(2)(layers.Conv2D(2, (3, 5), padding="same")(x)))
    return keras.Model(x, layers.Conv2D(1, 1)(layers.Concatenate()([x, y])))


def lopsided():
    x = keras.Input((None, None, 1))
    return keras.Model(x, layers.Conv2D(1, 4, padding="same")(layers.Conv2D(2, 4, padding="same")(x)))


MODELS = {
    "sesr": (sesr_like, 9, 1, 2),
    "sesr_x3": (lambda: sesr_like(2, 3), 6, 1, 3),
    "half_resolution": (half_resolution, None, 2, 2),
    "lopsided": (lopsided, 4, 1, 1),
    "nested": (nested_and_padded_by_hand, None, 1, 3),
    "pooled": (pooled, 3, 2, 1),
}


def measured_radius(model, scale, size=48):
    image = np.random.default_rng(0).random((1, size, size, 1)).astype(np.float32)
    base = np.asarray(model(image))
    radius = 0
    for place in range(size // 2, size // 2 + 4):
        changed = image.copy()
        changed[0, place, place] += 1
        moved = (np.asarray(model(changed)) != base)[0, :, :, 0]
        for axis in (0, 1):
            hit = np.nonzero(moved.any(axis=axis))[0] // scale
            radius = max(radius, place - hit.min(), hit.max() - place)
    return radius


@pytest.mark.parametrize("name", MODELS)
def test_equals_what_is_measured(name):
    build, radius, multiple, scale = MODELS[name]
    keras.utils.set_random_seed(0)
    model = build()
    field = receptive_field(model)
    assert (field.multiple, field.scale) == (multiple, scale)
    assert field.radius == measured_radius(model, scale)
    assert radius is None or field.radius == radius


# Tiles of a model at half resolution start at even pixels, so that its halo of 7 is 8, and 6 happens to be enough.
@pytest.mark.parametrize(("name", "too_few"), [("sesr", 1), ("half_resolution", 3)])
def test_is_a_halo_that_tiling_can_use(name, too_few):
    keras.utils.set_random_seed(0)
    model = MODELS[name][0]()
    field = receptive_field(model)
    image = np.random.default_rng(0).random((1, 70, 64, 1)).astype(np.float32)
    whole = np.asarray(model(image))
    arguments = {"tile": 40, "scale": field.scale, "multiple": field.multiple}
    # float32 sums of some hundred terms in another order.
    np.testing.assert_allclose(tiled(model, image, halo=field.radius, **arguments), whole, atol=2e-6)
    smaller = tiled(model, image, halo=field.radius - too_few, **arguments)
    assert np.abs(smaller - whole).max() > 1e-5


def test_transposed_convolution_is_not_underestimated():
    x = keras.Input((None, None, 1))
    model = keras.Model(x, layers.Conv2DTranspose(1, 9, 2, padding="same")(layers.Conv2D(2, 5, padding="same")(x)))
    field = receptive_field(model)
    assert field.scale == 2
    assert measured_radius(model, 2) <= field.radius <= measured_radius(model, 2) + 1


def test_what_is_not_known_is_refused_by_name():
    x = keras.Input((None, None, 3))
    pooled_away = layers.GlobalAveragePooling2D(keepdims=True, name="look_everywhere")(x)
    with pytest.raises(UnsupportedLayer, match="look_everywhere"):
        receptive_field(keras.Model(x, x * pooled_away))
    with pytest.raises(WrongArgument, match="functional"):
        receptive_field(lambda y: y)

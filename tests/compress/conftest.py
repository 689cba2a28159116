"""A small super-resolution network, trained once on crops of photos, and the crops to judge it by."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import layers, ops


@dataclass(frozen=True)
class Photos:
    """Low- and high-resolution crops, N×H×W×1 in [0, 1], scale 2; the held-out ones are of other photos."""

    low: np.ndarray
    high: np.ndarray
    held_out_low: np.ndarray
    held_out_high: np.ndarray


def _crops(paths, count, rng):
    from PIL import Image

    planes = [np.asarray(Image.open(path).convert("L"), "float32") / 255 for path in paths]
    high = []
    for index in range(count):
        plane = planes[index % len(planes)]
        row, column = (rng.integers(0, size - 48) for size in plane.shape)
        high.append(plane[row : row + 48, column : column + 48, None])
    high = np.stack(high)
    low = high.reshape(count, 24, 2, 24, 2, 1).mean((2, 4))
    return low, high


@pytest.fixture(scope="session")
def photos(data_dir) -> Photos:
    folder, rng = data_dir / "sr" / "demo", np.random.default_rng(0)
    trained, held_out = ("astronaut.png", "coffee.png"), ("chelsea.png", "rocket.jpg")
    return Photos(
        *_crops([folder / name for name in trained], 256, rng), *_crops([folder / name for name in held_out], 32, rng)
    )


def make_network() -> keras.Model:
    """PReLU, a residual of keras.ops, a nested model, a pixel shuffle."""
    keras.utils.set_random_seed(3)
    inner = keras.Input((None, None, 12))
    block = layers.Conv2D(12, 3, padding="same", activation="relu", name="conv")(inner)
    block = keras.Model(inner, layers.Conv2D(12, 3, padding="same", name="project")(block), name="block")
    inputs = keras.Input((None, None, 1), name="y")
    x = layers.Conv2D(12, 3, padding="same", name="first")(inputs)
    x = features = layers.PReLU(shared_axes=[1, 2], name="slopes")(x)
    x = block(x) + features
    x = layers.Conv2D(4, 3, padding="same", name="last")(x)
    return keras.Model(inputs, ops.depth_to_space(x + inputs, 2), name="upscaler")


@pytest.fixture(scope="session")
def trained(photos) -> keras.Model:
    model = make_network()
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    model.fit(photos.low, photos.high, batch_size=16, epochs=12, verbose=0)
    return model

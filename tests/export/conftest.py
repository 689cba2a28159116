"""Shared by the tests of `export`: one small model, its files (converted once a session), and samples."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops


def small_network(size: int | None = None, name: str = "small") -> keras.Model:
    """Like a super-resolution network: convolutions, PReLU, a shortcut, depth-to-space; 3,076 weights."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((size, size, 1), name="y")
    x = L.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = first = L.PReLU(shared_axes=[1, 2], name="act")(x)
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="middle")(x)
    x = L.Conv2D(4, 3, padding="same", name="last")(x + first)
    model = keras.Model(inputs, ops.depth_to_space(x, 2), name=name)
    generator = np.random.default_rng(0)
    model.get_layer("act").set_weights([generator.uniform(-0.2, 0.9, (1, 1, 16))])
    model.get_layer("first").bias.assign(generator.normal(0, 0.1, 16))
    return model


@pytest.fixture(scope="session")
def small_model() -> keras.Model:
    return small_network()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Twelve 32×32 pictures of waves with a little noise, values in [0, 1]."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[0:32, 0:32] / 32
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in generator.uniform(-3, 3, (12, 2))]
    noise = generator.uniform(0, 0.1, (12, 32, 32))
    return (np.stack(waves) * 0.4 + 0.5 + noise).clip(0, 1)[..., None].astype("float32")


@pytest.fixture(scope="session")
def saved(small_model, images, tmp_path_factory):
    """``saved(precision, suffix) -> (path, report)`` of the small model, converted once a session."""
    from keras_efficient import export

    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(precision: str = "float32", suffix: str = ".tflite"):
        if (precision, suffix) not in done:
            path = folder / f"{precision}{suffix}"
            needs_data = precision in ("int8", "int16x8")
            data = {"calibration": images} if needs_data else {"samples": images}
            report = export.save(small_model, path, precision=precision, metadata={"scale": 2}, **data)
            done[precision, suffix] = (path, report)
        return done[precision, suffix]

    return get

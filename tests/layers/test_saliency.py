"""The head of macroblocks: strides above and below 16, sizes that 16 does not divide, what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient.deploy import deploy
from keras_efficient.layers import MacroblockSaliencyHead

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("frame_size", [(48, 64), (33, 50), (100, 130)])
def test_one_score_for_each_macroblock(stride, frame_size):
    rows, columns = (-(-size // stride) for size in frame_size)
    features = RNG.normal(size=(2, rows, columns, 3)).astype("float32")
    inputs = keras.Input(features.shape[1:])
    model = keras.Model(inputs, MacroblockSaliencyHead(stride, 4, frame_size=frame_size)(inputs))
    want = (2, -(-frame_size[0] // 16), -(-frame_size[1] // 16))
    found = ops.convert_to_numpy(model(features))
    assert found.shape == want
    assert model.output_shape == (None, *want[1:])
    np.testing.assert_allclose(ops.convert_to_numpy(deploy(model)(features)), found, atol=1e-5)


def test_fine_features_are_scored_and_then_averaged():
    layer = MacroblockSaliencyHead(8, 4)
    x = RNG.normal(size=(1, 6, 4, 3)).astype("float32")
    layer(x)
    same = MacroblockSaliencyHead(16, 4)
    same.build((None, None, None, 3))
    same.set_weights(layer.get_weights())
    fine = ops.convert_to_numpy(same(x))
    want = fine.reshape(1, 3, 2, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), want, atol=1e-5)


@pytest.mark.parametrize(("stride", "size"), [(4, (180, 100)), (2, (90, 100)), (1, (45, 40)), (4, (64, 64))])
@pytest.mark.parametrize("known", [True, False])
def test_macroblocks_begin_at_the_upper_left_corner(stride, size, known):
    """Of features that say in which row they are; the last macroblock has fewer of them."""
    rows, columns = (-(-side // stride) for side in size)
    layer = MacroblockSaliencyHead(stride, 1, frame_size=size if known else None)
    inputs = keras.Input((rows, columns, 1) if known else (None, None, 1))
    model = keras.Model(inputs, layer(inputs))
    centre = np.zeros((3, 3, 1, 1))
    centre[1, 1] = 6 / rows  # below the 6 of ReLU6
    layer.set_weights([centre, np.zeros(1), np.full((1, 1, 1, 1), rows / 6), np.zeros(1)])
    x = np.arange(rows, dtype="float32")[None, :, None, None].repeat(columns, 2)
    many = 16 // stride
    want = [np.arange(first, min(first + many, rows)).mean() for first in range(0, rows, many)]
    for one in (model, deploy(model)):
        found = ops.convert_to_numpy(one(x))[0]
        np.testing.assert_allclose(found, np.repeat(np.array(want)[:, None], found.shape[1], axis=1), rtol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="`stride` must divide 16 or be a multiple of it"):
        MacroblockSaliencyHead(12)
    with pytest.raises(ValueError, match="`filters` must be an integer from 1"):
        MacroblockSaliencyHead(16, 0)
    with pytest.raises(ValueError, match=r"Frames of \(64, 64\) have \(4, 4\) features of stride 16"):
        MacroblockSaliencyHead(16, frame_size=(64, 64)).build((None, 5, 4, 3))

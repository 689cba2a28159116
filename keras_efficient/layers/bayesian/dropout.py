"""Dropout as a draw of a network: it is on at prediction too."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument

__all__ = ["MCDropout"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class MCDropout(keras.layers.Dropout):
    """A `Dropout` that drops whatever `training` says; the rest of the network (batch normalisation) is not touched.

    ```
    outputs = inputs · mask / (1 − rate)          mask = 0 with probability `rate`, else 1
    ```

    `deploy()` gives the stock `Dropout`, which passes its input on: the mean. `drawn` gives one mask for all examples.

    Args:
        rate, noise_shape, seed: as in `keras.layers.Dropout`.

    Source: Gal, Ghahramani, ICML 2016, https://arxiv.org/abs/1506.02142.
    """

    def call(self, inputs, training=None):
        return super().call(inputs, training=True)

    def deploy(self):
        """The stock layer."""
        return keras.layers.Dropout.from_config(self.get_config())

    def drawn(self, seed: int) -> keras.Model:
        """A model of stock layers that drops the same of each example.

        Raises:
            WrongArgument: the layer is not called in a model, or on inputs of free sizes.
        """
        shape = self._inbound_nodes[0].input_tensors[0].shape if self._inbound_nodes else (None, None)
        own = self.noise_shape or (None,) * len(shape)
        sizes = [wanted or size for wanted, size in zip(own[1:], shape[1:], strict=True)]
        if None in sizes:
            raise WrongArgument(f"A draw of {self.name!r} needs inputs of known sizes, not {tuple(shape)}.")
        kept = np.random.default_rng(seed).random(sizes) >= self.rate
        mask = np.where(kept, 1 / max(1 - self.rate, 1e-7), 0.0).astype("float32")
        inputs = keras.Input(shape[1:], dtype="float32", name="inputs")
        return keras.Model(inputs, ops.multiply(inputs, mask[None]), name=self.name)

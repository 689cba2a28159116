"""Fake quantisation: training sees the rounding that an integer file will do (Jacob et al., CVPR 2018)."""

from __future__ import annotations

import itertools

import keras
import numpy as np
from keras import ops
from keras.quantizers import fake_quant_with_min_max_vars as fake_quant

__all__ = ["FakeQuantize", "fake_quantize_kernel"]


def fake_quantize_kernel(kernel, bits=8):
    """Rounds a convolution kernel to integers times a scale, one scale per output channel (the last axis).

    `scale = max|kernel| / (2^(bits-1) − 1)`, `result = round(kernel / scale) · scale`: symmetric and without the lowest
    integer, as LiteRT stores weights. The gradient passes the rounding unchanged (straight-through).
    """
    levels = 2 ** (bits - 1) - 1
    largest = ops.max(ops.abs(kernel), axis=tuple(range(len(kernel.shape) - 1)), keepdims=True)
    # The scale is a constant to the gradient: LiteRT takes it from the kernel when the file is written.
    scale = ops.stop_gradient(ops.maximum(largest, 1e-12)) / levels
    return _round_straight_through(kernel / scale) * scale


# Shares of a range that are tried. Rare large values matter more to what comes behind than their number says.
_UPPER = (0.9, 0.8, 0.7, 0.6, 0.5)
_LOWER = (0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08)
_FITTED = 100_000  # values that are looked at


@keras.saving.register_keras_serializable(package="keras_efficient")
class FakeQuantize(keras.layers.Layer):
    """Rounds activations to 256 levels between a learned minimum and maximum, one pair for the tensor.

    ```
    scale = (maximum − minimum) / 255,   zero = round(−minimum / scale)
    outputs = (clip(round(inputs / scale) + zero, 0, 255) − zero) · scale
    ```

    The range is the moving average of the batches' extremes (it stands still in inference) times a learned factor: rare
    large values are worth clipping where that makes the steps finer. The gradient passes inside the range and stops
    outside. `deploy()` gives Keras' own `keras.quantizers.fake_quant_with_min_max_vars` with the learned range, which
    an int8 file takes over: it rounds as the network was trained to be rounded.

    Args:
        momentum: Float in [0, 1]. Of the moving average; 1: the range of the first batch, or of `fit`, stays.
        minimum, maximum: Floats or `None`. A fixed range (both given), for a signal whose range is known.

    Input shape: any. Output shape: the same.

    Raises:
        ValueError: only one end of the range, or an empty range.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, section 3.
    """

    def __init__(self, momentum=0.99, minimum=None, maximum=None, **kwargs):
        super().__init__(**kwargs)
        if (minimum is None) != (maximum is None) or (minimum is not None and not minimum < maximum):
            raise ValueError(
                "`minimum` and `maximum` must both be None, or minimum < maximum. "
                f"Received: minimum={minimum}, maximum={maximum}."
            )
        self.momentum = momentum
        self.minimum = minimum
        self.maximum = maximum

    def build(self, input_shape):
        self._shape = tuple(input_shape)
        options = {"trainable": False, "dtype": self.variable_dtype, "autocast": False}
        low, high = (0.0, 0.0) if self.minimum is None else (self.minimum, self.maximum)
        self.range_min = self.add_weight(name="range_min", shape=(), initializer=_constant(low), **options)
        self.range_max = self.add_weight(name="range_max", shape=(), initializer=_constant(high), **options)
        self.factor = None
        if self.minimum is None:
            options["trainable"] = True
            self.factor = self.add_weight(name="factor", shape=(), initializer="ones", **options)
        self.built = True

    def call(self, inputs, training=False):
        if training and self.minimum is None:
            self._follow(ops.cast(inputs, self.variable_dtype))
        rounded = fake_quant(ops.cast(inputs, self.variable_dtype), *self._range())
        return ops.cast(rounded, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def fit(self, values, activation=None):
        """Takes the range that rounds some values best: the least mean square of what rounding changes.

        Nothing but zeros says nothing, and leaves the range as it is.

        Args:
            values: array, what the layer is given.
            activation: function of a tensor; `None`, or what comes behind the layer: of what it gives the changes are
                counted. Below where an activation is flat nothing is lost.

        Raises:
            ValueError: the layer is not built, or has a fixed range; no values, or some that are not finite.
        """
        if not self.built or self.minimum is not None:
            raise ValueError(f"{self.name!r} takes no range: it is {'fixed' if self.built else 'not built'}.")
        values = np.ravel(ops.convert_to_numpy(values)).astype(np.float32)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"{self.name!r} takes a range from finite values. Received: {values.size} values.")
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        if low == high:
            return
        high = max(high, 1e-6)
        if len(values) > _FITTED:
            # By lot: at equal distances some channels would never be looked at.
            values = values[np.random.default_rng(0).integers(len(values), size=_FITTED)]
        behind = activation or (lambda x: x)
        wanted = ops.convert_to_numpy(behind(ops.convert_to_tensor(values)))
        lows = [low, *(low * share for share in _LOWER)] if activation else [low]
        best = (np.inf, low, high)
        for begin, end in itertools.product(lows, [high, *(high * share for share in _UPPER)]):
            rounded = ops.convert_to_numpy(behind(fake_quant(ops.convert_to_tensor(values), begin, end)))
            best = min(best, (float(np.square(rounded - wanted).mean()), begin, end))
        self.factor.assign(1.0)
        self.range_min.assign(best[1])
        self.range_max.assign(best[2])

    def deploy(self):
        """A model of one stock operation that holds the range."""
        inputs = keras.Input(batch_shape=(None, *self._shape[1:]), dtype=self.variable_dtype)
        low, high = (float(ops.convert_to_numpy(end)) for end in self._range())
        outputs = fake_quant(inputs, low, high)
        outputs._keras_history.operation.name = "rounded"  # Keras would number it anew at every call
        return keras.Model(inputs, outputs, name=self.name)

    def get_config(self):
        config = super().get_config()
        config.update(momentum=self.momentum, minimum=self.minimum, maximum=self.maximum)
        return config

    def _range(self):
        """Zero must be one of the levels (padding is zero), so the range is widened to hold it."""
        low = ops.minimum(ops.convert_to_tensor(self.range_min), 0.0)
        high = ops.maximum(ops.convert_to_tensor(self.range_max), low + 1e-6)
        return (low, high) if self.factor is None else (low * self.factor, high * self.factor)

    def _follow(self, inputs):
        low, high = ops.stop_gradient(ops.min(inputs)), ops.stop_gradient(ops.max(inputs))
        # Before the first batch both ends are zero: take its range at once.
        unset = ops.equal(ops.convert_to_tensor(self.range_max), ops.convert_to_tensor(self.range_min))
        keep = ops.where(unset, 0.0, self.momentum)
        self.range_min.assign(keep * self.range_min + (1 - keep) * low)
        self.range_max.assign(keep * self.range_max + (1 - keep) * high)


def _round_straight_through(values):
    return values + ops.stop_gradient(ops.round(values) - values)


def _constant(value):
    return keras.initializers.Constant(value)

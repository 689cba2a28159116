"""A Gaussian process as a network's last layer, by random features."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.layers.bayesian.operations import named

__all__ = ["PrecisionReset", "RandomFeatureGaussianProcess"]

LIKELIHOODS = ("softmax", "gaussian")


@keras.saving.register_keras_serializable(package="keras_efficient")
class RandomFeatureGaussianProcess(keras.layers.Layer):
    r"""Logits that come nearer to each other the farther an example is from those of the training set.

    ```
    φ(x) = √(2/D) · cos(x · W / length_scale + b)               W ~ N(0, 1), b ~ U(0, 2π), both fixed
    logits = φ(x) · kernel                                      in training
    logits / √(1 + mean_field_factor · variance(x))             in inference
    precision = ridge · I + Σ w_i φ(x_i) φ(x_i)ᵀ                over the examples of training
    variance(x) = φ(x)ᵀ · precision⁻¹ · φ(x)
    ```

    φ(x)·φ(y) nears exp(−‖x−y‖² / 2 length_scale²) as D grows, so this nears a Gaussian process with that kernel, all
    outputs of which have one covariance. w_i is 1/noise_variance for `"gaussian"`; for `"softmax"` it is p(1 − p) of
    the class where that is largest. The precision sums up what training calls saw since it was reset: give
    `model.fit` the callback `PrecisionReset`, which does so before each epoch, or the sum goes over all epochs.

    Far from the data a network keeps distances only if its layers do: `keras.layers.SpectralNormalization` around
    them, and residual connections, are what the paper adds.

    ```python
    x = keras.layers.SpectralNormalization(keras.layers.Dense(128, activation="relu"))(x)
    logits = keras_efficient.layers.RandomFeatureGaussianProcess(10)(x)
    ```

    Args:
        units: Integer, outputs.
        num_features: Integer, D. Inference inverts a D × D matrix in each call; its deployed form does not.
        length_scale: Float, above 0, of the inputs.
        ridge: Float, above 0: precision of the Gaussian prior on each number of the kernel.
        likelihood: `"softmax"` or `"gaussian"`.
        noise_variance: Float, above 0, of the targets of a `"gaussian"` likelihood.
        mean_field_factor: Float, 0 or more: π/8 is the probit approximation of the mean of a sigmoid under a Gaussian;
            0 leaves logits as they are.
        kernel_initializer, kernel_regularizer: of the kernel, as in `keras.layers.Dense`.
        seed: Integer, of W and b.

    Input shape: `(batch, features)`. Output shape: `(batch, units)`.

    Raises:
        WrongArgument: a number out of range, an unknown likelihood, inputs of another rank.

    Source: Liu et al., NeurIPS 2020, https://arxiv.org/abs/2006.10108; Rahimi, Recht, NeurIPS 2007.
    """

    def __init__(
        self,
        units: int,
        num_features: int = 1024,
        *,
        length_scale: float = 1.0,
        ridge: float = 1.0,
        likelihood: str = "softmax",
        noise_variance: float = 1.0,
        mean_field_factor: float = math.pi / 8,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        if likelihood not in LIKELIHOODS:
            raise UnknownName("likelihood", likelihood, LIKELIHOODS)
        positive = {"length_scale": length_scale, "ridge": ridge, "noise_variance": noise_variance}
        wrong = [name for name, value in positive.items() if not value > 0]
        if wrong or units < 1 or num_features < 1 or not mean_field_factor >= 0:
            numbers = positive | {"units": units, "num_features": num_features, "mean_field_factor": mean_field_factor}
            raise WrongArgument(f"Numbers are above 0, or for mean_field_factor 0 or more: {numbers}.")
        self.units, self.num_features, self.length_scale, self.ridge = units, num_features, length_scale, ridge
        self.likelihood, self.noise_variance, self.mean_field_factor = likelihood, noise_variance, mean_field_factor
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed

    def build(self, input_shape: Any) -> None:
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise WrongArgument(f"A Gaussian process takes inputs (batch, features), not {tuple(input_shape)}.")
        size, seeds = self.num_features, (self.seed, None if self.seed is None else self.seed + 1)
        normal = keras.initializers.RandomNormal(stddev=1.0, seed=seeds[0])
        angle = keras.initializers.RandomUniform(0.0, 2 * math.pi, seed=seeds[1])
        # In float32 whatever the policy: angles and sums over all examples lose too much in half precision.
        fixed: dict[str, Any] = {"trainable": False, "autocast": False}
        self.projection = self.add_weight(name="projection", shape=(input_shape[-1], size), initializer=normal, **fixed)
        self.phase = self.add_weight(name="phase", shape=(size,), initializer=angle, **fixed)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(size, self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            autocast=False,
        )
        # What the data add; the prior's part stands in no weight.
        self.information = self.add_weight(name="information", shape=(size, size), initializer="zeros", **fixed)
        self.built = True

    def features(self, inputs: Any) -> Any:
        """φ, (batch, num_features) in float32."""
        angles = ops.matmul(ops.cast(inputs, "float32"), self.projection) / self.length_scale + self.phase
        return math.sqrt(2 / self.num_features) * ops.cos(angles)

    def variance(self, inputs: Any) -> Any:
        """Of each example's outputs, (batch, 1)."""
        return self._variance(self.features(inputs))

    def reset_precision(self) -> None:
        """Forgets the examples seen so far."""
        self.information.assign(ops.zeros(self.information.shape, "float32"))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        features = self.features(inputs)
        logits = ops.matmul(features, self.kernel)
        if training:
            seen = features * self._weights(logits)
            self.information.assign_add(ops.stop_gradient(ops.matmul(ops.transpose(seen), seen)))
        elif self.mean_field_factor:
            logits = logits / ops.sqrt(1 + self.mean_field_factor * self._variance(features))
        return ops.cast(logits, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (input_shape[0], self.units)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> keras.KerasTensor:
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)

    def deploy(self) -> keras.Model:
        """A functional model of stock layers with the covariance as it is now."""
        if not self.built:
            raise WrongArgument(f"Layer {self.name!r} is not built.", hint="Call it once.")
        inputs = keras.Input((self.projection.shape[0],), dtype="float32", name="inputs")
        project = keras.layers.Dense(self.num_features, name="project", dtype="float32")
        output = keras.layers.Dense(self.units, use_bias=False, name="logits", dtype="float32")
        spread = keras.layers.Dense(self.num_features, use_bias=False, name="spread", dtype="float32")
        features = ops.cos(project(inputs))
        logits = output(features)
        if self.mean_field_factor:
            divisor = ops.sqrt(1 + ops.sum(ops.square(spread(features)), axis=-1, keepdims=True))
            logits = ops.divide(logits, divisor)
            scale = math.sqrt(2 / self.num_features * self.mean_field_factor)
            spread.set_weights([scale * np.linalg.inv(np.linalg.cholesky(self._precision_in_numpy())).T])
        arrays = [ops.convert_to_numpy(one) for one in (self.projection, self.phase, self.kernel)]
        project.set_weights([arrays[0] / self.length_scale, arrays[1]])
        output.set_weights([math.sqrt(2 / self.num_features) * arrays[2]])
        return named(keras.Model(inputs, logits, name=self.name))

    def get_config(self) -> dict[str, Any]:
        names = ("units", "num_features", "length_scale", "ridge", "likelihood", "noise_variance", "mean_field_factor")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }

    def _weights(self, logits: Any) -> Any:
        """Square roots of how much each example counts, (batch, 1)."""
        if self.likelihood == "gaussian":
            return ops.full((1, 1), self.noise_variance**-0.5, dtype="float32")
        each = ops.sigmoid(logits) if self.units == 1 else ops.softmax(logits)
        return ops.sqrt(ops.max(each * (1 - each), axis=-1, keepdims=True))

    def _variance(self, features: Any) -> Any:
        precision = self.information + self.ridge * ops.eye(self.num_features, dtype="float32")
        root = ops.cholesky(precision)
        solved = ops.solve_triangular(root, ops.transpose(features), lower=True)
        return ops.transpose(ops.sum(ops.square(solved), axis=0, keepdims=True))

    def _precision_in_numpy(self) -> np.ndarray:
        information = ops.convert_to_numpy(self.information).astype(np.float64)
        return information + self.ridge * np.eye(self.num_features)


class PrecisionReset(keras.callbacks.Callback):
    """Lets the precision of each `RandomFeatureGaussianProcess` count the examples of the last epoch only."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for layer in self.model._flatten_layers():
            if isinstance(layer, RandomFeatureGaussianProcess):
                layer.reset_precision()

"""Layers of Keras whose weights are distributions; what they share is here once, whatever the layer and estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient import probability
from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.layers.bayesian import estimators
from keras_efficient.layers.bayesian.distributions import Distribution, Parameter, deserialized, divergence, starting
from keras_efficient.layers.bayesian.operations import (
    NOT_TAKEN,
    Convolution,
    Product,
    TransposedConvolution,
    drops_in,
)

__all__ = [
    "ESTIMATORS",
    "BayesianConv1D",
    "BayesianConv1DTranspose",
    "BayesianConv2D",
    "BayesianConv2DTranspose",
    "BayesianConv3D",
    "BayesianConv3DTranspose",
    "BayesianDense",
    "BayesianWeights",
]

ESTIMATORS = ("reparameterization", "local_reparameterization", "flipout")


def mean_field(scale: float = 0.02) -> Distribution:
    """The usual posterior: an independent Gaussian for each weight."""
    return Distribution("Normal", loc=Parameter(), scale=Parameter(scale))


class BayesianWeights:
    """What is added to a stock layer, mixed in before it: distributions over its kernel, and over its bias if wanted.

    ```
    kernel ~ posterior                                   at each call, in training and in inference
    outputs = activation(linear(inputs, kernel) + bias)
    loss added = KL(posterior ‖ prior) / num_data
    ```

    With the mean of the data's negative log-likelihood as the model's loss, the sum is the negative evidence lower
    bound divided by the number of examples, whatever the batch size. The KL is in float32 under mixed precision, and
    counts once for each call of a model. A layer that a model calls several times draws at each of them, where one
    random variable would give all of them one draw: share layers for their distribution only.

    Args:
        num_data: Integer, of examples in the training set, by which the KL is divided.
        estimator: `"reparameterization"` draws one kernel for all examples of a call. `"local_reparameterization"`
            draws outputs and `"flipout"` signs for each example, for gradients of less variance; both take a posterior
            of independent Gaussians only.
        prior: `Distribution`; `None`: a standard Gaussian for each weight.
        posterior: `Distribution` of the kernel, with one `Parameter()` that begins at `kernel_initializer`; `None`:
            independent Gaussians whose standard deviations begin at 0.02.
        bias_posterior: the same for the bias; `None`: the bias is a plain weight, without a KL.
        seed: Integer, of the draws.

    Raises:
        WrongArgument: an estimator that does not fit, a posterior without a location or that cannot be
            reparameterized, a regularizer of what has a prior, `lora_rank`.
    """

    stock: type[keras.Layer]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        drops_in(cls, BayesianWeights)

    def __init__(
        self,
        *args: Any,
        num_data: int,
        estimator: str = "reparameterization",
        prior: Distribution | None = None,
        posterior: Distribution | None = None,
        bias_posterior: Distribution | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("lora_rank") is not None:
            raise WrongArgument("`lora_rank` changes a kernel that is drawn here.", hint="Use it on deploy()'s layer.")
        if estimator not in ESTIMATORS:
            raise UnknownName("estimator", estimator, ESTIMATORS)
        if not num_data >= 1:
            raise WrongArgument(f"`num_data` is the number of training examples, 1 or more, not {num_data!r}.")
        super().__init__(*args, **kwargs)
        self.num_data, self.estimator, self.seed = num_data, estimator, seed
        self.prior = Distribution("Normal", loc=0.0, scale=1.0) if prior is None else prior
        self.posterior = mean_field() if posterior is None else posterior
        self.bias_posterior = bias_posterior
        self._check()
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._kl: Any = None

    def _check(self: Any) -> None:
        if self.estimator != "reparameterization" and not self.posterior.is_normal:
            raise WrongArgument(
                f"{self.estimator!r} takes a posterior of independent Gaussians, not {self.posterior.family}.",
                hint="estimator='reparameterization' takes any.",
            )
        if self.prior.location is not None:
            raise WrongArgument("A Parameter of a prior has an initial value.")
        for name, posterior in (("kernel", self.posterior), ("bias", self.bias_posterior)):
            if posterior is None:
                continue
            if posterior.location is None:
                raise WrongArgument(f"The posterior {posterior.family} of the {name} needs one Parameter() for it.")
            if getattr(self, f"{name}_regularizer") is not None:
                raise WrongArgument(f"`{name}_regularizer` would be a second prior.", hint="Give `prior` alone.")

    def build(self: Any, input_shape: Any) -> None:
        super().build(input_shape)  # type: ignore[misc]
        self.built = False
        self._kernel_posterior = self._weights("kernel_posterior", self.posterior, self.mean)
        self._kernel_prior = self._weights("kernel_prior", self.prior, self.mean)
        if self.use_bias and self.bias_posterior is not None:
            self._bias_posterior = self._weights("bias_posterior", self.bias_posterior, self.bias)
            self._bias_prior = self._weights("bias_prior", self.prior, self.bias)
        self.built = True

    def add_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without autocast: draws and divergences are in float32, whatever the policy.
        return super().add_weight(*args, **kwargs | {"autocast": False})  # type: ignore[misc]

    @property
    def mean(self: Any) -> Any:
        """The variable in the place of the stock layer's kernel: the posterior's location."""
        return self._kernel if hasattr(self, "_kernel") else self.kernel

    def call(self: Any, inputs: Any, training: Any = None) -> Any:
        outputs, kernel = self._estimated(inputs)
        weights = {"kernel": kernel}
        if self.use_bias:
            bias = self.bias
            if self.bias_posterior is not None:
                bias = _draw(self.bias_posterior, self._bias_posterior, bias, self.seed_generator)
                weights["bias"] = lambda: bias
            outputs = outputs + self._beside_channels(ops.cast(bias, outputs.dtype))
        self._count_divergence(weights)
        return outputs if self.activation is None else self.activation(outputs)

    def deploy(self: Any) -> keras.Layer:
        """The stock layer with the posterior's mean, or its mode where it has no mean; no draws and no KL."""
        return self._stock_layer(_centre)

    def drawn(self: Any, seed: int) -> keras.Layer:
        """The stock layer with one draw of weights, the same for the same seed."""
        seeds = keras.random.SeedGenerator(seed)
        return self._stock_layer(lambda distribution, own, place: _draw(distribution, own, place, seeds))

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is no kernel yet."""
        raise WrongArgument("A distribution over weights cannot be quantized.", hint="Do it to what deploy() gives.")

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is no kernel yet."""
        raise WrongArgument("A distribution over weights takes no LoRA.", hint="Do it to what deploy() gives.")

    def get_config(self: Any) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        for name in NOT_TAKEN:
            config.pop(name, None)
        serialized = {name: getattr(self, name) for name in ("prior", "posterior", "bias_posterior")}
        own = {name: one and keras.saving.serialize_keras_object(one) for name, one in serialized.items()}
        return config | {"num_data": self.num_data, "estimator": self.estimator, **own, "seed": self.seed}

    @classmethod
    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        named = ("prior", "posterior", "bias_posterior")
        return super().from_config(deserialized(config, named))  # type: ignore[misc]

    def save_own_variables(self: Any, store: Any) -> None:
        keras.Layer.save_own_variables(self, store)

    def load_own_variables(self: Any, store: Any) -> None:
        keras.Layer.load_own_variables(self, store)

    def _weights(self: Any, name: str, distribution: Distribution, place: Any) -> dict[str, Any]:
        """Variables of a distribution over the numbers of a stock layer's variable, which is its location."""
        found = {}
        for path, shape, trainable, initial in distribution.weights(tuple(place.shape)):
            if initial is None:
                found[path] = place
                continue
            options = {"initializer": starting(initial), "trainable": trainable}
            found[path] = self.add_weight(name=f"{name}_{path}", shape=shape, **options)
        return found

    def _estimated(self: Any, inputs: Any) -> tuple[Any, Callable[[], Any]]:
        """Outputs before the bias, and a function that gives a kernel from which a KL may be estimated."""
        seeds = self.seed_generator
        if self.estimator == "reparameterization":
            kernel = _draw(self.posterior, self._kernel_posterior, self.mean, seeds)
            return self.linear(inputs, ops.cast(kernel, inputs.dtype)), lambda: kernel
        values = self.posterior.values(self._kernel_posterior, tuple(self.mean.shape))
        mean, scale = values["loc"], values["scale"]
        if self.estimator == "flipout":
            places, channels = self.axes()
            outputs = estimators.flipout(self.linear, inputs, mean, scale, places, channels, seeds)
        else:
            outputs = estimators.local_reparameterization(self.linear, inputs, mean, scale, seeds)
        return outputs, lambda: estimators.reparameterized(mean, scale, seeds)

    def _count_divergence(self: Any, weights: dict[str, Callable[[], Any]]) -> None:
        if any(one is self._kl for one in self._get_own_losses()):
            return  # a model that calls this layer once more
        each = [divergence(self.posterior, self.prior, self._kernel_posterior, self._kernel_prior, weights["kernel"])]
        if "bias" in weights:
            each.append(
                divergence(self.bias_posterior, self.prior, self._bias_posterior, self._bias_prior, weights["bias"])
            )
        self._kl = sum(each) / self.num_data
        self.add_loss(self._kl)

    def _beside_channels(self: Any, bias: Any) -> Any:
        places, channels = self.axes()
        return bias if channels == -1 else ops.reshape(bias, (1, -1, *([1] * places)))

    def _stock_layer(self: Any, of: Callable[..., Any]) -> keras.Layer:
        """The layer that this one drops in for; `of` makes numbers of a distribution, its variables and their place."""
        if not self.built:
            raise WrongArgument(f"Layer {self.name!r} is not built.", hint="Call it once.")
        config = self.stock.get_config(self)
        for name in NOT_TAKEN:
            config.pop(name, None)
        layer = self.stock.from_config(config | {"dtype": self.variable_dtype})
        layer.build(self.get_build_config()["input_shape"])
        weights = [of(self.posterior, self._kernel_posterior, self.mean)]
        if self.use_bias:
            is_drawn = self.bias_posterior is not None
            weights.append(of(self.bias_posterior, self._bias_posterior, self.bias) if is_drawn else self.bias)
        layer.set_weights([ops.convert_to_numpy(one) for one in weights])
        return layer


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianDense(Product, BayesianWeights, keras.layers.Dense):
    """A `Dense` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`.

    ```python
    x = keras_efficient.layers.BayesianDense(200, activation="relu", num_data=60_000, estimator="flipout")(x)
    ```

    Input shape: `(batch, …, features)`. Output shape: `(batch, …, units)`.
    """


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv1D(Convolution, BayesianWeights, keras.layers.Conv1D):
    """A `Conv1D` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv2D(Convolution, BayesianWeights, keras.layers.Conv2D):
    """A `Conv2D` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv3D(Convolution, BayesianWeights, keras.layers.Conv3D):
    """A `Conv3D` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv1DTranspose(TransposedConvolution, BayesianWeights, keras.layers.Conv1DTranspose):
    """A `Conv1DTranspose` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv2DTranspose(TransposedConvolution, BayesianWeights, keras.layers.Conv2DTranspose):
    """A `Conv2DTranspose` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BayesianConv3DTranspose(TransposedConvolution, BayesianWeights, keras.layers.Conv3DTranspose):
    """A `Conv3DTranspose` whose kernel is a distribution; arguments of its own are those of `BayesianWeights`."""


def _draw(distribution: Distribution, variables: dict[str, Any], place: Any, seeds: keras.random.SeedGenerator) -> Any:
    """Weights in the shape of the variable in their place, in float32."""
    shape = tuple(place.shape)
    if distribution.is_normal:
        values = distribution.values(variables, shape)
        return estimators.reparameterized(values["loc"], values["scale"], seeds)
    made, known = distribution.made(variables, shape), probability.library().distributions
    if made.reparameterization_type != known.FULLY_REPARAMETERIZED:
        raise WrongArgument(
            f"Draws of {distribution.family} have no gradient with respect to its parameters.",
            hint="A posterior must be one that tensorflow-probability reparameterizes.",
        )
    return ops.reshape(made.sample(seed=_seed(seeds)), shape)


def _centre(distribution: Distribution, variables: dict[str, Any], place: Any) -> Any:
    shape = tuple(place.shape)
    if distribution.is_normal:
        return distribution.values(variables, shape)["loc"]
    made = distribution.made(variables, shape)
    try:
        found = np.asarray(ops.convert_to_numpy(made.mean()))
    except NotImplementedError:
        found = np.full((), np.nan)
    if not np.isfinite(found).all():  # Cauchy's
        found = np.asarray(ops.convert_to_numpy(made.mode()))
    return found.reshape(shape)


def _seed(seeds: keras.random.SeedGenerator) -> Any:
    """As tensorflow-probability takes it; on TensorFlow Keras keeps seeds as int64."""
    seed = seeds.next()
    return seed if keras.backend.backend() == "jax" else ops.cast(seed % (2**31 - 1), "int32")

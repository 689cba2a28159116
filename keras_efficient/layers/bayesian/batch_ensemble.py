"""Ensembles that share one kernel: each member scales its inputs and outputs by vectors of its own."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument
from keras_efficient.layers.bayesian.distributions import Distribution, deserialized, divergence, starting
from keras_efficient.layers.bayesian.operations import NOT_TAKEN, Convolution, Product, drops_in, named

__all__ = ["BatchEnsembleConv1D", "BatchEnsembleConv2D", "BatchEnsembleConv3D", "BatchEnsembleDense", "SharedKernel"]


class SharedKernel:
    """What is added to a stock layer, mixed in before it: a vector of each member over inputs, outputs and biases.

    ```
    outputs[i] = activation(linear(inputs[i] ∘ r[m], kernel) ∘ s[m] + bias[m])          m = i mod members
    ```

    which is a kernel of rank-1 factors, `kernel ∘ r[m] s[m]ᵀ`, for each member. Let each example stand `members` times
    behind itself: `keras.ops.repeat(inputs, members, axis=0)`; outputs then are those of all members.

    With a posterior r and s are distributions (rank-1 networks): drawn for each example at each call, in training and
    in inference, and their KL to the prior, divided by `num_data`, is added as a loss.

    Args:
        members: Integer, how many.
        num_data: Integer, of examples in the training set; wanted with a posterior only.
        posterior: `None`, or a `Distribution` "Normal" with `loc=Parameter()` for r and s.
        prior: `Distribution` of r and s; `None`: a Gaussian of mean 1 and standard deviation 1.
        seed: Integer, of the signs at which r and s begin, and of draws.

    Raises:
        WrongArgument: no member, a posterior that is no Gaussian or without `num_data`, `lora_rank`.

    Source: Wen, Tran, Ba, ICLR 2020, https://arxiv.org/abs/2002.06715; Dusenberry et al., ICML 2020,
    https://arxiv.org/abs/2005.07186.
    """

    stock: type[keras.Layer]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        drops_in(cls, SharedKernel)

    def __init__(
        self,
        *args: Any,
        members: int = 4,
        num_data: int | None = None,
        posterior: Distribution | None = None,
        prior: Distribution | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if members < 1:
            raise WrongArgument(f"One member at least, not {members!r}.")
        if kwargs.get("lora_rank") is not None:
            raise WrongArgument("`lora_rank` changes a kernel that members share.")
        if posterior is not None and (not posterior.is_normal or posterior.location != "loc"):
            raise WrongArgument(f"Factors have a Normal with loc=Parameter() as posterior, not {posterior.family}.")
        if posterior is not None and (num_data is None or num_data < 1):
            raise WrongArgument(f"A posterior needs `num_data`, the number of training examples, not {num_data!r}.")
        super().__init__(*args, **kwargs)
        self.members, self.num_data, self.posterior, self.seed = members, num_data, posterior, seed
        self.prior = Distribution("Normal", loc=1.0, scale=1.0) if prior is None else prior
        self.seed_generator = keras.random.SeedGenerator(seed) if posterior is not None else None
        self._kl: Any = None

    def build(self: Any, input_shape: Any) -> None:
        # The stock layer's bias is of one network.
        use_bias, self.use_bias = self.use_bias, False
        super().build(input_shape)  # type: ignore[misc]
        self.use_bias, self.built = use_bias, False
        channels = self.axes()[1]
        sizes = {"input": input_shape[channels], "output": self.compute_output_shape(input_shape)[channels]}
        self._factors, self._priors = {}, {}
        for number, (name, size) in enumerate(sizes.items()):
            shape = (self.members, size)
            signs = _signs(None if self.seed is None else self.seed + number)
            place = self.add_weight(name=f"{name}_factors", shape=shape, initializer=signs)
            self._factors[name] = {"loc": place}
            if self.posterior is not None:
                self._factors[name] = self._weights(f"{name}_posterior", self.posterior, shape) | {"loc": place}
                self._priors[name] = self._weights(f"{name}_prior", self.prior, shape)
        if use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.members, sizes["output"]),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.built = True

    def add_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without autocast: draws and divergences are in float32, whatever the policy.
        return super().add_weight(*args, **kwargs | {"autocast": False})  # type: ignore[misc]

    def call(self: Any, inputs: Any, training: Any = None) -> Any:
        member = ops.arange(ops.shape(inputs)[0]) % self.members
        outputs = self.linear(inputs * self._factor("input", member, inputs), ops.cast(self.kernel, inputs.dtype))
        outputs = outputs * self._factor("output", member, outputs)
        if self.use_bias:
            outputs = outputs + self._beside(ops.take(self.bias, member, axis=0), outputs)
        if self.posterior is not None and not any(one is self._kl for one in self._get_own_losses()):
            each = [self._divergence(name) for name in self._factors]
            # The loss is a mean over rows, and so over members.
            self._kl = sum(each) / (self.num_data * self.members)
            self.add_loss(self._kl)
        return outputs if self.activation is None else self.activation(outputs)

    def member(self: Any, index: int) -> keras.Layer:
        """The stock layer of one member, of means where there is a posterior."""
        factors = {name: ops.convert_to_numpy(own["loc"])[index] for name, own in self._factors.items()}
        kernel = ops.convert_to_numpy(self.kernel)
        groups = getattr(self, "groups", 1)
        # (input channels of a group, outputs): the factors of the inputs that each output sees
        seen = np.repeat(factors["input"].reshape(groups, -1).T, kernel.shape[-1] // groups, axis=1)
        weights = [kernel * seen * factors["output"]]
        if self.use_bias:
            weights.append(ops.convert_to_numpy(self.bias)[index])
        layer = self._stock_layer()
        layer.build(self.get_build_config()["input_shape"])
        layer.set_weights(weights)
        return layer

    def deploy(self: Any) -> keras.Model:
        """A model of stock layers that takes and gives the same rows; of means where there is a posterior."""
        if not self.built:
            raise WrongArgument(f"Layer {self.name!r} is not built.", hint="Call it once.")
        shape = tuple(self.get_build_config()["input_shape"])
        inputs = keras.Input(shape[1:], dtype="float32", name="inputs")
        # Counts rows, since a graph does not know how many there are.
        first = inputs[(slice(None), *[0] * (len(shape) - 1))]
        member = (ops.cumsum(ops.ones_like(first, dtype="int32")) - 1) % self.members
        arrays = {name: ops.convert_to_numpy(own["loc"]) for name, own in self._factors.items()}
        layer = self._stock_layer(use_bias=False, activation=None)
        outputs = layer(inputs * self._beside(_table("input", arrays["input"])(member), inputs))
        layer.set_weights([ops.convert_to_numpy(self.kernel)])
        outputs = outputs * self._beside(_table("output", arrays["output"])(member), outputs)
        if self.use_bias:
            outputs = outputs + self._beside(_table("bias", ops.convert_to_numpy(self.bias))(member), outputs)
        outputs = keras.layers.Activation(self.activation, name="activation", dtype="float32")(outputs)
        return named(keras.Model(inputs, outputs, name=self.name))

    def get_config(self: Any) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        for name in NOT_TAKEN:
            config.pop(name, None)
        serialize = keras.saving.serialize_keras_object
        own = {name: (one := getattr(self, name)) and serialize(one) for name in ("posterior", "prior")}
        return config | own | {name: getattr(self, name) for name in ("members", "num_data", "seed")}

    @classmethod
    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        return super().from_config(deserialized(config, ("posterior", "prior")))  # type: ignore[misc]

    def save_own_variables(self: Any, store: Any) -> None:
        keras.Layer.save_own_variables(self, store)

    def load_own_variables(self: Any, store: Any) -> None:
        keras.Layer.load_own_variables(self, store)

    def _factor(self: Any, name: str, member: Any, beside: Any) -> Any:
        own = self._factors[name]
        found = ops.take(own["loc"], member, axis=0)
        if self.posterior is not None:
            scale = self.posterior.values(own, tuple(own["loc"].shape))["scale"]
            noise = keras.random.normal(ops.shape(found), dtype="float32", seed=self.seed_generator)
            found = found + ops.take(scale, member, axis=0) * noise
        return self._beside(found, beside)

    def _divergence(self: Any, name: str) -> Any:
        own, its = self._factors[name], self._priors[name]
        values = self.posterior.values(own, tuple(own["loc"].shape))

        def draw() -> Any:
            noise = keras.random.normal(values["loc"].shape, dtype="float32", seed=self.seed_generator)
            return values["loc"] + values["scale"] * noise

        return divergence(self.posterior, self.prior, own, its, draw)

    def _beside(self: Any, rows: Any, tensor: Any) -> Any:
        """(batch, channels) in the tensor's dtype, with axes of 1 for those that it does not have."""
        rank, channels = len(tensor.shape), self.axes()[1]
        rest = [1] * (rank - 2)
        shape = (-1, *rest, rows.shape[-1]) if channels == -1 else (-1, rows.shape[-1], *rest)
        return ops.cast(ops.reshape(rows, shape), tensor.dtype)

    def _stock_layer(self: Any, **changed: Any) -> keras.Layer:
        config = self.stock.get_config(self)
        for name in NOT_TAKEN:
            config.pop(name, None)
        return self.stock.from_config(config | {"dtype": self.variable_dtype} | changed)

    def _weights(self: Any, prefix: str, distribution: Distribution, shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            path: self.add_weight(name=f"{prefix}_{path}", shape=own, initializer=starting(initial), trainable=trained)
            for path, own, trained, initial in distribution.weights(shape)
            if initial is not None
        }


@keras.saving.register_keras_serializable(package="keras_efficient")
class BatchEnsembleDense(Product, SharedKernel, keras.layers.Dense):
    """A `Dense` of several members; arguments of its own are those of `SharedKernel`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BatchEnsembleConv1D(Convolution, SharedKernel, keras.layers.Conv1D):
    """A `Conv1D` of several members; arguments of its own are those of `SharedKernel`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BatchEnsembleConv2D(Convolution, SharedKernel, keras.layers.Conv2D):
    """A `Conv2D` of several members; arguments of its own are those of `SharedKernel`."""


@keras.saving.register_keras_serializable(package="keras_efficient")
class BatchEnsembleConv3D(Convolution, SharedKernel, keras.layers.Conv3D):
    """A `Conv3D` of several members; arguments of its own are those of `SharedKernel`."""


def _signs(seed: int | None) -> Any:
    uniform = keras.initializers.RandomUniform(-1.0, 1.0, seed=seed)
    return lambda shape, dtype=None: ops.sign(uniform(shape, dtype))


def _table(name: str, rows: np.ndarray) -> keras.layers.Embedding:
    table = keras.layers.Embedding(*rows.shape, name=f"{name}_factors", dtype="float32")
    table.build()
    table.set_weights([rows])
    return table

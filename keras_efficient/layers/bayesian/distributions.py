"""Distributions over weights as data: a name of tensorflow-probability, and its parameters, trained or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient import probability
from keras_efficient.errors import UnknownName, WrongArgument

__all__ = ["Distribution", "Parameter", "deserialized", "divergence", "softplus_inverse", "starting"]

Variables = Mapping[str, Any]  # by the path of a parameter


@keras.saving.register_keras_serializable(package="keras_efficient")
class Parameter:
    """A parameter of a distribution that is a weight of the layer, one number for each of the layer's weights.

    It is kept as a number without bounds and gets into its range (above 0 for a scale) by the bijector that
    tensorflow-probability has for it.

    Args:
        initial: in its range; `None`: what the layer's own initializer gives, before any bijector. Of a posterior just
            one parameter begins so: its location, in the place of the stock layer's weight.
        trainable: Boolean.
        shape: of the parameter, where it is no number for each weight, such as `()`: one for all of them.

    Raises:
        WrongArgument: a trained location of a shape of its own.
    """

    def __init__(self, initial: float | None = None, *, trainable: bool = True, shape: tuple[int, ...] | None = None):
        if initial is None and shape is not None:
            raise WrongArgument("What begins at the layer's own initializer has the weight's shape.")
        self.initial, self.trainable = initial, trainable
        self.shape = None if shape is None else tuple(shape)

    def get_config(self) -> dict[str, Any]:
        return {"initial": self.initial, "trainable": self.trainable, "shape": self.shape}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Parameter:
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_efficient")
class Distribution:
    """A distribution of tensorflow-probability over all weights of a kernel or a bias.

    ```python
    Distribution("Laplace", loc=0.0, scale=0.1)                                   # a prior
    Distribution("Normal", loc=Parameter(), scale=Parameter(0.02))                # a posterior, the usual one
    Distribution("MultivariateNormalTriL", loc=Parameter(), scale_tril=Parameter(0.02))     # one with correlations
    Distribution(
        "MixtureSameFamily",
        mixture_distribution=Distribution("Categorical", probs=[0.5, 0.5]),
        components_distribution=Distribution("Normal", loc=[0.0, 0.0], scale=[1.0, 0.01]),
    )
    ```

    Of numbers the weights are independent draws; a distribution of vectors is one of all weights in a row.

    Args:
        family: name of a class in `tfp.distributions`.
        parameters: its arguments: numbers or lists of them, `Parameter`, or `Distribution`.

    Raises:
        WrongArgument: an argument of another kind. Of names and ranges tensorflow-probability is asked when the layer
            is built.
    """

    def __init__(self, family: str, **parameters: Any):
        self.family, self.parameters = family, parameters
        for name, value in parameters.items():
            try:
                right = isinstance(value, Parameter | Distribution) or np.asarray(value).dtype.kind in "fiub"
            except ValueError:
                right = False
            if not right:
                raise WrongArgument(
                    f"Parameter {name!r} of {family} is a number, a list of them, a Parameter or a Distribution, "
                    f"not {value!r}."
                )

    def get_config(self) -> dict[str, Any]:
        kinds = (Parameter, Distribution)
        parameters = {
            name: keras.saving.serialize_keras_object(value)
            if isinstance(value, kinds)
            else np.asarray(value, np.float64).tolist()
            for name, value in self.parameters.items()
        }
        return {"family": self.family, "parameters": parameters}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Distribution:
        return cls(
            config["family"],
            **{
                name: keras.saving.deserialize_keras_object(copy.deepcopy(value)) if isinstance(value, dict) else value
                for name, value in config["parameters"].items()
            },
        )

    @property
    def location(self) -> str | None:
        """Path of the parameter that begins at the layer's own initializer.

        Raises:
            WrongArgument: there are several.
        """
        found = [path for path, _, _, value in self._own() if value.initial is None]
        if len(found) > 1:
            raise WrongArgument(f"{self.family} has {len(found)} parameters without an initial value: {found}.")
        return found[0] if found else None

    @property
    def is_normal(self) -> bool:
        """Whether the arithmetic is our own, without tensorflow-probability."""
        plain = not any(isinstance(value, Distribution) for value in self.parameters.values())
        return self.family == "Normal" and set(self.parameters) == {"loc", "scale"} and plain

    def weights(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], bool, Any]]:
        """Of a distribution over weights of a shape, for each parameter that is one: its path, its shape without
        bounds, whether it is trained, and its initial value without bounds (`None`: the layer's own)."""
        for path, family, name, value in self._own():
            wanted, initial = _unbounded(family, name, value, shape)
            yield path, wanted, value.trainable, initial

    def values(self, variables: Variables, shape: tuple[int, ...]) -> dict[str, Any]:
        """Parameters of its own as tensors in float32, within their ranges."""
        return {
            name: value if isinstance(value, Distribution) else _value(self, name, value, variables, shape)
            for name, value in self.parameters.items()
        }

    def made(self, variables: Variables, shape: tuple[int, ...]) -> Any:
        """The distribution of tensorflow-probability; to be made within the call, where it sees the weights as they
        are.

        Raises:
            WrongArgument: arguments that it does not take.
        """
        parameters = self.values(variables, shape)
        for name, value in parameters.items():
            if isinstance(value, Distribution):
                parameters[name] = value.made(_below(variables, name), shape)
        try:
            return _class_of(self.family)(**parameters)
        except (TypeError, ValueError) as error:
            raise WrongArgument(f"Distribution {self.family}: {error}") from error

    def _own(self) -> Iterator[tuple[str, str, str, Parameter]]:
        """Path, family, name and value of each `Parameter`, in this and in the distributions in it."""
        for name, value in self.parameters.items():
            if isinstance(value, Parameter):
                yield name, self.family, name, value
            elif isinstance(value, Distribution):
                for path, family, inner, parameter in value._own():
                    yield f"{name}_{path}", family, inner, parameter


def divergence(posterior: Distribution, prior: Distribution, own: Variables, its: Variables, draw: Any) -> Any:
    """KL(posterior ‖ prior), a scalar in float32: in closed form where there is one, else from the draw.

    ```
    Σ log(σ/s) + (s² + (m − μ)²) / 2σ² − ½                        of two Gaussians (m, s) and (μ, σ)
    log posterior(draw) − log prior(draw)                         where no closed form is known
    ```

    Args:
        posterior, prior: of the weights.
        own, its: their variables.
        draw: a function without arguments that gives weights drawn from the posterior.
    """
    if posterior.is_normal and prior.is_normal:
        shape = own[posterior.location or "loc"].shape
        return _divergence_of_normals(posterior.values(own, shape), prior.values(its, shape), shape)
    weights = draw()
    shape = tuple(weights.shape)
    left, right = posterior.made(own, shape), prior.made(its, shape)
    try:
        found = probability.library().distributions.kl_divergence(left, right)
    except NotImplementedError:
        return _log_probability(left, weights) - _log_probability(right, weights)
    return _summed(left, found, shape)


def starting(initial: Any) -> Any:
    """An initializer that gives what `Distribution.weights` says."""
    if np.ndim(initial) == 0:
        return keras.initializers.Constant(float(initial))
    return lambda shape, dtype=None: ops.convert_to_tensor(initial, dtype)


def deserialized(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A layer's configuration with distributions in the place of their own; the given one is not changed."""
    found = dict(config)
    for name in names:
        if isinstance(found.get(name), dict):
            found[name] = keras.saving.deserialize_keras_object(copy.deepcopy(found[name]))
    return found


def softplus_inverse(value: Any) -> Any:
    """log(eˣ − 1), of numbers above 0."""
    value = np.asarray(value, np.float64)
    return value + np.log(-np.expm1(-value))


def _divergence_of_normals(own: Mapping[str, Any], its: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
    mean, scale, centre, width = own["loc"], own["scale"], its["loc"], its["scale"]
    if len(width.shape) == 0 and tuple(scale.shape) == shape:  # sums first: one division for all
        squares = ops.sum(ops.square(scale)) + ops.sum(ops.square(mean - centre))
        constant = math.prod(shape) * (ops.log(width) - 0.5)
        return constant - ops.sum(ops.log(scale)) + squares / (2 * ops.square(width))
    each = ops.log(width / scale) + (ops.square(scale) + ops.square(mean - centre)) / (2 * ops.square(width)) - 0.5
    return ops.sum(ops.broadcast_to(each, shape))


def _log_probability(distribution: Any, weights: Any) -> Any:
    in_a_row = len(distribution.event_shape) > 0
    return ops.sum(distribution.log_prob(ops.reshape(weights, (-1,)) if in_a_row else weights))


def _summed(distribution: Any, each: Any, shape: tuple[int, ...]) -> Any:
    """Of all weights; what is the same for each of them comes as one number."""
    return ops.sum(each) if len(distribution.event_shape) else ops.sum(ops.broadcast_to(each, shape))


def _class_of(family: str) -> Any:
    known = probability.library().distributions
    found = getattr(known, family, None)
    if not (isinstance(found, type) and issubclass(found, known.Distribution)):
        names = [name for name in dir(known) if isinstance(getattr(known, name), type)]
        raise UnknownName("distribution", family, names)
    return found


def _value(distribution: Distribution, name: str, value: Any, variables: Variables, shape: tuple[int, ...]) -> Any:
    if not isinstance(value, Parameter):
        return ops.convert_to_tensor(value, "float32")
    tensor = ops.convert_to_tensor(variables[name])
    if distribution.is_normal:
        return ops.softplus(tensor) if name == "scale" else tensor
    properties = _properties(distribution.family, name)
    bijector = properties.default_constraining_bijector_fn()
    if value.initial is None and properties.event_ndims:  # the stock layer's weight, in a row
        tensor = ops.reshape(tensor, (-1,))
    return bijector.forward(tensor)


def _unbounded(family: str, name: str, value: Parameter, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """Shape and initial value of the variable behind a parameter."""
    if family == "Normal" and name in ("loc", "scale"):
        bounded = value.initial if name == "loc" else _positive(value.initial)
        return (shape if value.shape is None else value.shape), bounded
    if value.initial is None:
        return shape, None
    properties = _properties(family, name)
    bijector = properties.default_constraining_bijector_fn()
    if value.shape is not None:
        wanted = value.shape
    else:
        in_a_row = any(one.event_ndims for one in _class_of(family).parameter_properties(dtype="float32").values())
        size = (math.prod(shape),) if in_a_row else shape
        wanted = tuple(int(one) for one in properties.shape_fn(size))
    initial = np.full(wanted, value.initial, np.float32)
    if properties.event_ndims == 2:
        initial = initial * np.eye(wanted[-1], dtype=np.float32)
    free = np.asarray(ops.convert_to_numpy(bijector.inverse(initial)))
    return free.shape, free


def _positive(value: float | None) -> Any:
    if value is not None and not value > 0:
        raise WrongArgument(f"The scale of a Normal begins above 0, not at {value!r}.")
    return None if value is None else float(softplus_inverse(value))


def _properties(family: str, name: str) -> Any:
    known = _class_of(family).parameter_properties(dtype="float32")
    if name not in known:
        raise UnknownName(f"parameter of {family}", name, known)
    return known[name]


def _below(variables: Variables, name: str) -> Variables:
    start = f"{name}_"
    return {path.removeprefix(start): value for path, value in variables.items() if path.startswith(start)}

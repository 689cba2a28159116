"""From a network to its Bayesian twin, and from that to networks of stock layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.deploy import deploy, rebuild
from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers.bayesian import layer as bayesian
from keras_efficient.layers.bayesian.batch_ensemble import SharedKernel
from keras_efficient.layers.bayesian.distributions import Distribution, Parameter, softplus_inverse
from keras_efficient.layers.bayesian.dropout import MCDropout
from keras_efficient.layers.bayesian.operations import NOT_TAKEN
from keras_efficient.seeds import seed_of

__all__ = ["bayesianize", "drawn", "member", "with_dropout"]

TWINS: dict[type, type] = {
    getattr(keras.layers, name.removeprefix("Bayesian")): getattr(bayesian, name)
    for name in bayesian.__all__
    if name.startswith("Bayesian") and name != "BayesianWeights"
}
# Whose noise is the same at all places of a channel: which axes they are.
_SPATIAL = {keras.layers.SpatialDropout1D: 1, keras.layers.SpatialDropout2D: 2, keras.layers.SpatialDropout3D: 3}


def bayesianize(
    model: keras.Model,
    *,
    num_data: int,
    estimator: str = "reparameterization",
    prior: Distribution | None = None,
    posterior: Distribution | None = None,
    bias_posterior: Distribution | None = None,
    moped: float | None = None,
    which: Callable[[keras.Layer], bool] | None = None,
) -> keras.Model:
    """A copy of a model in which dense and convolutional layers have distributions over their weights.

    The posterior's location begins at the model's weights. Everything else, batch normalisation too, is copied as it
    is; names, the sharing of layers and nested models stay. Regularizers of layers that become Bayesian are left out,
    since the prior takes their place; reduced precision becomes float32.

    Args:
        model: a built functional or Sequential model. It is not changed.
        num_data, estimator, prior, posterior, bias_posterior: of `BayesianWeights`.
        moped: δ, above 0: for trained weights w. Standard deviations of the posterior begin at δ·|w|, and the prior is
            a Gaussian around w of standard deviation 1 (of `prior`, if given, which must be a Gaussian). `None`: all
            begin as the posterior says, around the prior's own mean.
        which: of the layers that can become Bayesian, those that shall; `None`: all. Of layers of other classes,
            depthwise and separable convolutions and embeddings among them, none can.

    Returns:
        The twin, not compiled.

    Raises:
        WrongArgument: no such layer, or MOPED with a posterior or prior that is no Gaussian.
        UnsupportedLayer: as `keras_efficient.deploy.deploy`.

    Source: Krishnan, Subedar, Tickoo, AAAI 2020, https://arxiv.org/abs/1906.05323, for MOPED.
    """
    options: dict[str, Any] = {"num_data": num_data, "estimator": estimator, "posterior": posterior}
    options |= {"prior": prior if moped is None else _around_weights(prior), "bias_posterior": bias_posterior}
    if moped is not None and not (moped > 0 and all(map(_has_own_scales, (posterior, bias_posterior)))):
        raise WrongArgument(f"MOPED takes a factor above 0, not {moped!r}, and Gaussians of a scale for each weight.")
    found = []

    def twin(operation: keras.Operation, path: str) -> keras.Operation | None:
        if type(operation) not in TWINS or not (which is None or which(operation)):
            return None
        found.append(path)
        own = options if operation.use_bias else options | {"bias_posterior": None}
        made = _twin_of(operation, own)
        if moped is not None:
            _set_moped(made, moped)
        return made

    rebuilt = rebuild(model, twin)
    if not found:
        raise WrongArgument(f"Model {model.name!r} has no layer that can become Bayesian, or none was chosen.")
    return rebuilt


def with_dropout(model: keras.Model, rate: float | None = None) -> keras.Model:
    """A copy of a model whose dropout stays on at prediction.

    Args:
        model: a built functional or Sequential model. It is not changed.
        rate: of all dropout; behind each hidden dense or convolutional layer of a model that has none. `None`: as the
            model's own layers say.

    Raises:
        WrongArgument: a rate that is not in (0, 1), or none for a model without dropout.
        UnsupportedLayer: as `keras_efficient.deploy.deploy`.
    """
    if rate is not None and not 0 < rate < 1:
        raise WrongArgument(f"A rate of dropout is above 0 and below 1, not {rate!r}.")
    if not any(_is_dropout(layer) for layer in model._flatten_layers()):
        if rate is None:
            raise WrongArgument(f"Model {model.name!r} has no dropout.", hint="Give `rate`, to put some into it.")
        return _given_dropout(model, rate)

    def stays_on(operation: keras.Operation, path: str) -> keras.Operation | None:
        return _staying_on(operation, rate) if _is_dropout(operation) else None

    return rebuild(model, stays_on)


def drawn(model: keras.Model, seed: int) -> keras.Model:
    """One draw of a network, frozen: a deployed model (stock Keras layers) that can be saved and exported.

    Weights are drawn from their posteriors whatever the estimator, masks of `MCDropout` once for all examples. Many
    draws averaged are the network's prediction, but for noise that the network has for each example of its own.

    Args:
        model: a built functional or Sequential model. It is not changed.
        seed: of the draw; each layer has its own from it.

    Raises:
        WrongArgument: a model that never draws, or an MCDropout on inputs of free sizes.
        UnsupportedLayer: as `keras_efficient.deploy.deploy`.
    """
    count = 0

    def frozen(operation: keras.Operation, path: str) -> keras.Operation | None:
        nonlocal count
        if not hasattr(operation, "drawn"):
            return None
        count += 1
        return operation.drawn(seed_of(seed, count))

    rebuilt = rebuild(model, frozen)
    if not count:
        raise WrongArgument(f"Model {model.name!r} has no layer that draws.")
    return deploy(rebuilt)


def member(model: keras.Model, index: int) -> keras.Model:
    """One member of a network of `BatchEnsemble` layers: a deployed model (stock Keras layers) of plain rows.

    Args:
        model: a built functional or Sequential model. It is not changed.
        index: from 0 on.

    Raises:
        WrongArgument: a model without such layers, or of fewer members.
        UnsupportedLayer: as `keras_efficient.deploy.deploy`.
    """
    counts = {layer.members for layer in model._flatten_layers() if isinstance(layer, SharedKernel)}
    if not counts or not 0 <= index < min(counts):
        raise WrongArgument(f"Model {model.name!r} has {min(counts, default=0)} members, and no {index!r}.")

    def of(operation: keras.Operation, path: str) -> keras.Operation | None:
        return operation.member(index) if isinstance(operation, SharedKernel) else None

    return deploy(rebuild(model, of))


def _twin_of(layer: Any, options: dict[str, Any]) -> Any:
    config = layer.get_config() | options
    dropped = ["kernel_regularizer"] + ["bias_regularizer"] * (options["bias_posterior"] is not None)
    for name in (*NOT_TAKEN, *dropped):
        config.pop(name, None)
    if layer.get_config().get("lora_rank") or getattr(layer, "quantization_mode", None):
        raise UnsupportedLayer(layer.path, "its kernel is adapted or quantized.", hint="Make it Bayesian before.")
    made = TWINS[type(layer)](**config)
    made.build(layer.get_build_config()["input_shape"])
    made.mean.assign(layer.kernel)
    if layer.use_bias:
        made.bias.assign(layer.bias)
    return made


def _around_weights(prior: Distribution | None) -> Distribution:
    scale: Any = 1.0 if prior is None else prior.parameters.get("scale")
    if prior is not None and not prior.is_normal:
        raise WrongArgument(f"MOPED takes a Gaussian prior, not {prior.family}.")
    return Distribution("Normal", loc=Parameter(0.0, trainable=False), scale=scale)


def _has_own_scales(posterior: Distribution | None) -> bool:
    if posterior is None:
        return True
    scale = posterior.parameters.get("scale")
    return posterior.is_normal and isinstance(scale, Parameter) and scale.shape is None


def _set_moped(made: Any, factor: float) -> None:
    pairs = [(made.mean, made._kernel_posterior, made._kernel_prior)]
    if made.bias_posterior is not None and made.use_bias:
        pairs.append((made.bias, made._bias_posterior, made._bias_prior))
    for place, posterior, prior in pairs:
        weights = ops.convert_to_numpy(place)
        prior["loc"].assign(weights)
        # Weights of zero, biases above all, need some width to have a finite divergence.
        posterior["scale"].assign(softplus_inverse(np.maximum(factor * np.abs(weights), 1e-5)))


def _is_dropout(operation: Any) -> bool:
    return type(operation) in (keras.layers.Dropout, MCDropout, *_SPATIAL)


def _staying_on(operation: Any, rate: float | None) -> MCDropout:
    shape = operation.noise_shape
    if (places := _SPATIAL.get(type(operation))) is not None:
        last = getattr(operation, "data_format", "channels_last") == "channels_last"
        shape = (None, *[1] * places, None) if last else (None, None, *[1] * places)
    options = {"noise_shape": shape, "seed": operation.seed, "dtype": operation.dtype_policy}
    return MCDropout(operation.rate if rate is None else rate, name=operation.name, **options)


def _given_dropout(model: keras.Model, rate: float) -> keras.Model:
    layers: list[keras.layers.Layer] = list(model._flatten_layers())
    behind = {layer.name for layer in layers if type(layer) in TWINS}
    made: dict[str, MCDropout] = {}

    def dropped(path: str, tensor: keras.KerasTensor) -> keras.KerasTensor:
        name = path.rpartition("/")[2]
        if name not in behind:
            return tensor
        if path not in made:
            made[path] = MCDropout(rate, name=f"{name}_dropout")
        return made[path](tensor)

    return rebuild(model, lambda operation, path: None, follow=dropped)

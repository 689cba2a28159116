"""Members trained together: one step of all of them is one step of a compiled loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.members import Members, check_inputs
from keras_efficient.errors import KerasEfficientError, UnsupportedLayer, WrongArgument
from keras_efficient.layers.bayesian import BayesianWeights, RandomFeatureGaussianProcess
from keras_efficient.layers.bayesian.batch_ensemble import SharedKernel

__all__ = ["TrainingFailed", "trained"]

NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
)
Epoch = Callable[[np.ndarray], np.ndarray]


class TrainingFailed(KerasEfficientError, ArithmeticError):
    """A loss that is not finite."""


def trained(
    members: Members,
    data: Data,
    optimizer: keras.optimizers.Optimizer,
    *,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Trains members by the cross-entropy of their logits and the losses that their layers add (a KL, a regularizer);
    gives the mean loss of each after each epoch.

    Each member sees the examples in an order of its own. What is left of an epoch behind its last whole batch is not
    seen in it. The optimizer works on all members' weights at once, so it must treat each number on its own, as all of
    Keras' do but for norms that are clipped over a weight.

    Args:
        members: whose variables hold the weights so far whenever a value is given.
        data: examples and their classes.
        optimizer: not built, or built on these members.
        epochs, batch_size: as usual.
        seed: of the orders.

    Raises:
        WrongArgument: clipped norms, numbers below 1, a backend that is neither TensorFlow nor JAX.
        UnsupportedLayer: a layer with a regularizer or a prior of its own, where the optimizer has one.
        TrainingFailed: a loss is NaN or infinite; its step and its member are named.
    """
    if optimizer.clipnorm is not None or optimizer.global_clipnorm is not None:
        raise WrongArgument("Norms over all members cannot be clipped.", hint="Use `clipvalue`.")
    if epochs < 1 or batch_size < 1:
        raise WrongArgument(f"`epochs` and `batch_size` are 1 or more, not {epochs!r} and {batch_size!r}.")
    kinds = {"tensorflow": _tensorflow_epoch, "jax": _jax_epoch}
    if keras.backend.backend() not in kinds:
        raise WrongArgument(f"Training runs on TensorFlow and JAX, not on {keras.backend.backend()!r}.")
    check_inputs(members.model, data.x.shape[1:])
    outputs = members.model.outputs[0].shape[-1] if members.model.outputs else None
    if outputs is not None and data.num_classes > outputs:
        raise WrongArgument(f"{data.num_classes} classes do not fit a model of {outputs} outputs.")
    if getattr(optimizer, "prior_sd", None) is not None:
        _refuse_second_prior(members.model)
        _leave_scales_out(members, optimizer)
    size = min(batch_size, len(data))
    steps = len(data) // size
    optimizer.build(members.trainable)
    run = kinds[keras.backend.backend()](members, data, optimizer)
    random = np.random.default_rng(seed)
    seen = _information(members)
    for epoch in range(epochs):
        orders = [random.permutation(len(data))[: steps * size] for _ in range(members.count)]
        order = np.stack(orders).astype(np.int32).reshape(members.count, steps, size).transpose(1, 0, 2)
        for counted in seen:  # of an epoch's examples, each once
            counted.assign(ops.zeros_like(counted))
        losses = run(order)
        if not np.isfinite(losses).all():
            step, member = np.argwhere(~np.isfinite(losses))[0]
            value = losses[step, member]
            raise TrainingFailed(f"The loss of member {member} is {value} at step {epoch * steps + step}.")
        yield losses.mean(axis=0)


def _leave_scales_out(members: Members, optimizer: Any) -> None:
    """Normalisation layers' scales are about 1: a prior around 0 would draw them down. Who chose already is heard."""
    if optimizer.built or getattr(optimizer, "_exclude_from_weight_decay", None):
        return
    scales = {
        id(variable)
        for layer in members.model._flatten_layers()
        if isinstance(layer, NORMALIZATIONS)
        for variable in layer.trainable_variables
    }
    pairs = zip(members.model.trainable_variables, members.trainable, strict=True)
    if found := [mine for own, mine in pairs if id(own) in scales]:
        optimizer.exclude_from_prior(found)


def _information(members: Members) -> list[Any]:
    """What last layers that are Gaussian processes count."""
    layers = [one for one in members.model._flatten_layers() if isinstance(one, RandomFeatureGaussianProcess)]
    own = {id(layer.information) for layer in layers}
    pairs = zip(members.model.non_trainable_variables, members.non_trainable, strict=True)
    return [mine for variable, mine in pairs if id(variable) in own]


def _refuse_second_prior(model: keras.Model) -> None:
    for layer in model._flatten_layers():
        path = layer.path
        if isinstance(layer, BayesianWeights | SharedKernel) and layer.posterior is not None:
            raise UnsupportedLayer(path, "it has a prior, and the optimizer has one.", hint="Use MeanFieldVI.")
        if any(variable.regularizer is not None for variable in layer._trainable_variables):
            reason = "its regularizer would be a second prior beside the optimizer's."
            raise UnsupportedLayer(path, reason, hint="Make the layer without, or give `prior_sd=None`.")


def _step_of(members: Members) -> Callable[..., tuple[Any, list[Any]]]:
    """(trainable, others, x, y) with a leading member axis to losses (members,) and others afterwards.

    One member after the other in one graph: on processors that is faster than products of stacked matrices, and it
    takes any layer.
    """

    def losses(trainable: Any, others: Any, x: Any, y: Any) -> tuple[Any, list[Any]]:
        found, left = [], []
        for index in range(members.count):
            logits, after, added = members.logits(index, trainable, others, x[index], training=True)
            loss = keras.losses.sparse_categorical_crossentropy(y[index], logits, from_logits=True)
            found.append(ops.mean(ops.cast(loss, "float32")) + sum(ops.sum(ops.cast(one, "float32")) for one in added))
            left.append(after)
        return ops.stack(found), [ops.stack(values) for values in zip(*left, strict=True)]

    return losses


def _tensorflow_epoch(members: Members, data: Data, optimizer: keras.optimizers.Optimizer) -> Epoch:
    import tensorflow as tf

    x, y = tf.constant(data.x), tf.constant(data.y)
    step_of = _step_of(members)

    @tf.function
    def epoch(order: Any) -> Any:
        kept = tf.TensorArray(tf.float32, size=tf.shape(order)[0])
        for step in tf.range(tf.shape(order)[0]):
            with tf.GradientTape() as tape:
                trainable = [tf.unstack(tf.convert_to_tensor(one.value)) for one in members.trainable]
                others = [tf.unstack(tf.convert_to_tensor(one.value)) for one in members.non_trainable]
                losses, after = step_of(trainable, others, tf.gather(x, order[step]), tf.gather(y, order[step]))
                total = tf.reduce_sum(losses)
            gradients = tape.gradient(total, [one.value for one in members.trainable])
            optimizer.apply(gradients, members.trainable)
            for variable, value in zip(members.non_trainable, after, strict=True):
                variable.assign(value)
            kept = kept.write(step, losses)
        return kept.stack()

    return lambda order: epoch(tf.constant(order)).numpy()


def _jax_epoch(members: Members, data: Data, optimizer: keras.optimizers.Optimizer) -> Epoch:
    import jax
    import jax.numpy as jnp

    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    step_of = _step_of(members)

    def total(trainable: Any, others: Any, some: Any, classes: Any) -> Any:
        losses, after = step_of(trainable, others, some, classes)
        return losses.sum(), (losses, after)

    def step(state: Any, order: Any) -> Any:
        trainable, others, own = state
        gradients, (losses, after) = jax.grad(total, has_aux=True)(trainable, others, x[order], y[order])
        trainable, own = optimizer.stateless_apply(own, gradients, trainable)
        return (trainable, after, own), losses

    epoch = jax.jit(lambda state, order: jax.lax.scan(step, state, order), donate_argnums=0)
    variables = (members.trainable, members.non_trainable, optimizer.variables)

    def run(order: np.ndarray) -> np.ndarray:
        # Copies: what is donated is gone, and a variable may be asked for after a failure.
        state = tuple([jnp.array(one.value) for one in some] for some in variables)
        after, losses = epoch(state, jnp.asarray(order))
        for some, values in zip(variables, after, strict=True):
            for variable, value in zip(some, values, strict=True):
                variable.assign(value)
        return np.asarray(losses)

    return run

"""The likelihood of all data as a function of weights, and weights as one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.members import Members, check_inputs
from keras_efficient.errors import UnsupportedLayer

__all__ = ["Likelihood", "Vectors", "derived", "without_batch_statistics"]


class Vectors:
    """Trainable weights of a model as vectors of `size` numbers, one behind the other in the model's order."""

    def __init__(self, model: keras.Model):
        self.shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        self.ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        self.size = int(self.ends[-1])

    def split(self, vector: Any) -> list[Any]:
        """(size,) to a tensor for each weight, within a graph too."""
        begins = [0, *self.ends[:-1]]
        return [
            ops.reshape(vector[begin:end], shape)
            for begin, end, shape in zip(begins, self.ends, self.shapes, strict=True)
        ]

    def of(self, members: Members) -> np.ndarray:
        """(members, size) of the members as they are now."""
        flat = [ops.convert_to_numpy(one).reshape(members.count, -1) for one in members.trainable]
        return np.concatenate(flat, axis=1)

    def members(self, model: keras.Model, vectors: np.ndarray, others: Sequence[np.ndarray]) -> Members:
        """Of (members, size) and the non-trainable weights of one network, which all of them take."""
        parts = np.split(np.asarray(vectors, np.float32), self.ends[:-1], axis=1)
        trainable = [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return Members(model, trainable, [np.repeat(np.asarray(one)[None], len(vectors), axis=0) for one in others])


class Likelihood:
    """Logarithm of the probability of labels, summed over examples, of a network in inference mode.

    Args:
        model: its architecture.
        others: non-trainable weights.
        data: all of them count.
        batch_size: examples that are in memory with all that layers make of them.
    """

    def __init__(self, model: keras.Model, others: Sequence[Any], data: Data, batch_size: int):
        check_inputs(model, data.x.shape[1:])
        self.model, self.data, self.batch_size = model, data, min(batch_size, len(data))
        # Tensors before any graph, which would hold a copy of its own.
        self._x, self._y = ops.convert_to_tensor(data.x), ops.convert_to_tensor(data.y)
        self._others = [ops.convert_to_tensor(one) for one in others]

    def of(self, trainable: Sequence[Any], x: Any, y: Any, counts: Any = 1.0) -> Any:
        """Of some examples, each as often as it counts."""
        logits, _ = self.model.stateless_call(list(trainable), self._others, x, training=False)
        loss = keras.losses.sparse_categorical_crossentropy(y, ops.cast(logits, "float32"), from_logits=True)
        return -ops.sum(counts * loss)

    def __call__(self, trainable: Sequence[Any]) -> Any:
        """Of all of them, one batch after the other in one graph."""
        size, total = self.batch_size, len(self.data)
        batches = -(-total // size)
        if batches == 1:
            return self.of(trainable, self._x, self._y)
        place = np.minimum(np.arange(batches * size), total - 1).reshape(batches, size)
        counts = (np.arange(batches * size) < total).astype("float32").reshape(batches, size)

        def add(sum_so_far: Any, batch: Any) -> tuple[Any, Any]:
            places, times = batch
            some = self.of(trainable, ops.take(self._x, places, axis=0), ops.take(self._y, places, axis=0), times)
            return sum_so_far + some, sum_so_far

        found, _ = ops.scan(add, ops.zeros(()), (ops.convert_to_tensor(place), ops.convert_to_tensor(counts)))
        return found

    def batches(self, random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and labels of whole batches, in a new order for each pass, without an end."""
        while True:
            order = random.permutation(len(self.data))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                some = order[start : start + self.batch_size]
                yield self.data.x[some], self.data.y[some]


def derived(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A function that gives (value, more), as one that gives ((value, more), gradient of value by the first argument).

    The first argument is a tensor, or a list of them.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def run(first: Any, *others: Any) -> tuple[Any, Any]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(first)
                found = function(first, *others)
            return found, tape.gradient(found[0], first)

        return run
    import jax

    return jax.value_and_grad(function, has_aux=True)


def without_batch_statistics(model: keras.Model, method: str) -> None:
    """Raises UnsupportedLayer where an example's output hangs on other examples, so that there is no density."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            reason = f"{method} needs a likelihood of each example on its own."
            raise UnsupportedLayer(layer.path, reason, hint="Use GroupNormalization or LayerNormalization.")

"""A function of tensors, compiled by Keras' backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_efficient.errors import WrongArgument

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs as one program for each shape of its arguments, which are tensors or lists of them.

    Raises:
        WrongArgument: a backend that is neither TensorFlow nor JAX.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        program: Callable[..., Any] = tf.function(function, reduce_retracing=True)
        return program
    if backend == "jax":
        import jax

        program = jax.jit(function)
        return program
    raise WrongArgument(f"Bayesian networks run on TensorFlow and JAX, not on {backend!r}.")

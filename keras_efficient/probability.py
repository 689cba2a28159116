"""tensorflow-probability, in the form that goes with Keras' backend.

::

    tfp = probability.library()
    tfp.distributions.Normal(0.0, 1.0)
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

from keras_efficient.errors import MissingDependency, WrongArgument

__all__ = ["library"]


def library() -> Any:
    """The module: `tensorflow_probability` on TensorFlow, `tensorflow_probability.substrates.jax` on JAX.

    Raises:
        MissingDependency: it is not installed, or too old for the installed backend.
        WrongArgument: another backend.
    """
    names = {"tensorflow": "tensorflow_probability", "jax": "tensorflow_probability.substrates.jax"}
    backend = keras.backend.backend()
    if backend not in names:
        raise WrongArgument(f"tensorflow-probability runs on TensorFlow and JAX, not on {backend!r}.")
    if backend == "jax":
        _mend_jax()
    try:
        return importlib.import_module(names[backend])
    except (ImportError, AttributeError) as error:
        raise MissingDependency("tensorflow-probability", "A distribution", "bayes") from error


def _mend_jax() -> None:
    """tensorflow-probability 0.25 looks for a table that JAX 0.7 moved; later versions do not need it."""
    import jax
    from jax.interpreters import xla

    name = "pytype_aval_mappings"
    if not hasattr(xla, name) and hasattr(jax._src.core, name):
        setattr(xla, name, getattr(jax._src.core, name))

"""The one place that imports tensorflow-model-optimization and tf_keras, leaving the process as it was."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from keras_efficient.errors import MissingDependency, WrongArgument

__all__ = ["import_tf_keras", "import_tfmot", "require_tensorflow_backend"]

_VARIABLE = "TF_USE_LEGACY_KERAS"


def import_tfmot() -> ModuleType:
    """`tensorflow_model_optimization`, with the environment and `tf.keras` as they were.

    tfmot sets TF_USE_LEGACY_KERAS=1 when it is imported. TensorFlow reads that variable when `tf.keras` is first used
    and never again, so every such name is resolved before, by what the user has set, and the variable is put back.

    Raises:
        MissingDependency: tfmot or tf_keras is not installed.
    """
    import_tf_keras()
    _require("tensorflow_model_optimization", "tensorflow-model-optimization")
    import tensorflow as tf

    # All that a user could reach; `layers`, `losses` and `optimizers` are in tf_keras and in Keras 3.
    for lazy in (tf.keras, tf.compat.v1.keras, tf.compat.v2.keras):
        lazy.layers  # noqa: B018
    for lazy in (tf.losses, tf.metrics, tf.optimizers, tf.initializers):
        dir(lazy)
    before = os.environ.get(_VARIABLE)
    try:
        import tensorflow_model_optimization as tfmot
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before
    return tfmot


def import_tf_keras() -> ModuleType:
    """`tf_keras`, Keras 2 under its own name.

    Raises:
        MissingDependency: it is not installed.
    """
    _require("tf_keras", "tf_keras")
    import tf_keras

    return tf_keras


def require_tensorflow_backend() -> None:
    """Refuses to go on where Keras runs on another backend.

    Raises:
        WrongArgument: with what to do instead.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise WrongArgument(
            f"keras_efficient.compress trains with TensorFlow, and Keras runs on {keras.backend.backend()!r} here.",
            hint="Save deploy(model) as .keras and compress it in a process with KERAS_BACKEND=tensorflow.",
        )


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingDependency(package, "keras_efficient.compress", "compress")

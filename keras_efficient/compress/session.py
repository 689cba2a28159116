"""A compression in progress: a tf_keras model that is trained, and the Keras 3 model that it becomes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_efficient.compress._tfmot import import_tf_keras
from keras_efficient.compress.bridge import Bridge
from keras_efficient.compress.sizes import Sizes, measure
from keras_efficient.errors import UnknownName, WrongArgument

if TYPE_CHECKING:
    from keras_efficient.export import Report

__all__ = ["Session"]


class Session(ABC):
    """What `prune`, `cluster` and `quantize_aware` return: compile it, fit it, strip it.

    The training model takes inputs and targets in the order in which the original's flatten (one array where there is
    one input; a dict by input name is fine too).

    Attributes:
        model: the tf_keras model that is trained, for whatever this class does not offer.
        layers: paths of the layers that are compressed.
        skipped: paths of the layers with weights that are not, each with the reason.
    """

    def __init__(self, bridge: Bridge, model: Any, layers: Iterable[str], skipped: Mapping[str, str]):
        self.model = model
        self.layers = tuple(layers)
        self.skipped = dict(skipped)
        self._bridge = bridge
        self._trained = False

    def compile(self, optimizer: Any = "adam", loss: Any = None, metrics: Any = None, **options: Any) -> None:
        """As `keras.Model.compile`. Optimizers, losses and metrics of Keras 3, of tf_keras and names are taken.

        A loss of Keras 3, your own too, is called as it is. Optimizers and metrics are replaced by those of tf_keras of
        the same class and options, so they have to be stock ones.

        Raises:
            WrongArgument: an optimizer or metric of Keras 3 without a counterpart in tf_keras.
        """
        tf_keras = import_tf_keras()
        given = {"optimizer": optimizer, "loss": loss, "metrics": metrics, **options}
        self.model.compile(**keras.tree.map_structure(lambda thing: _crossed(thing, tf_keras), given))

    def fit(self, *args: Any, callbacks: Sequence[Any] | None = None, **options: Any) -> Any:
        """As `keras.Model.fit`; callbacks are tf_keras callbacks. Returns tf_keras's `History`."""
        callbacks = callbacks or ()
        for callback in callbacks:
            if isinstance(callback, keras.callbacks.Callback):
                raise WrongArgument(
                    f"{type(callback).__name__} is a callback of Keras 3, the model in training is one of tf_keras.",
                    hint=f"Use tf_keras.callbacks.{type(callback).__name__}.",
                )
        self._before_fit(*args, **options)
        history = self.model.fit(*args, callbacks=[*callbacks, *self._callbacks()], **options)
        self._trained = True
        return history

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """As `keras.Model.evaluate`, on the model in training."""
        return self.model.evaluate(*args, **options)

    def predict(self, *args: Any, **options: Any) -> np.ndarray:
        """As `keras.Model.predict`, on the model in training."""
        return self.model.predict(*args, **options)

    def strip(self) -> keras.Model:
        """The compressed model: Keras 3, stock layers and operations, the names and structure of the original.

        Raises:
            WrongArgument: nothing has been trained yet.
        """
        if not self._trained:
            raise WrongArgument("Nothing has been trained yet.", hint="Call compile() and fit() first.")
        return self._strip()

    def export(self, path: str | Path, **options: Any) -> Report:
        """`keras_efficient.export.save(self.strip(), path, **options)`: a checked file, and the report on it."""
        from keras_efficient.export import save

        return save(self.strip(), path, **options)

    def measure(self) -> Sizes:
        """Sizes of the stripped model: pruning and clustering show after gzip only."""
        return measure(self.strip())

    @abstractmethod
    def _strip(self) -> keras.Model: ...

    def _before_fit(self, x: Any = None, *args: Any, **options: Any) -> None:  # noqa: B027
        """What a kind of compression does with `fit`'s data before training."""

    def _callbacks(self) -> list[Any]:
        return []


def selected(bridge: Bridge, layers: Iterable[str] | None) -> frozenset[str]:
    """The paths that the caller chose, all where none were.

    Raises:
        UnknownName: a path that is not in the model.
    """
    known = [twin.path for twin in bridge.twins]
    if layers is None:
        return frozenset(known)
    chosen = frozenset([layers] if isinstance(layers, str) else layers)
    for path in chosen:
        if path not in known:
            raise UnknownName("layer", path, known)
    return chosen


def keep_mask(wrapper: Any) -> Any:
    """Lets one of tfmot's wrappers hand on the mask that its layer hands on: by itself it drops it, without a word."""
    wrapper.supports_masking = wrapper.layer.supports_masking
    wrapper.compute_mask = wrapper.layer.compute_mask
    wrapper._call_spec.expects_mask_arg = wrapper.layer._call_spec.expects_mask_arg
    return wrapper


def _crossed(thing: Any, tf_keras: Any) -> Any:
    """The same for tf_keras, where it is an object of Keras 3."""
    if isinstance(thing, keras.losses.Loss):
        return _loss(thing, tf_keras)
    if isinstance(thing, keras.metrics.Metric):
        return _counterpart(thing, tf_keras.metrics)
    if isinstance(thing, keras.optimizers.Optimizer):
        if getattr(thing, "_exclude_from_weight_decay", None) or getattr(
            thing, "_exclude_from_weight_decay_pattern", None
        ):
            raise WrongArgument(
                f"{type(thing).__name__} leaves weights out of its decay, which does not cross to tf_keras.",
                hint=f"Give a tf_keras {type(thing).__name__}, and call its exclude_from_weight_decay().",
            )
        return _counterpart(thing, tf_keras.optimizers)
    return thing


def _loss(thing: keras.losses.Loss, tf_keras: Any) -> Any:
    """The loss of tf_keras that takes its values from one of Keras 3, and weights, masks and reduces them itself.

    Raises:
        WrongArgument: a reduction that tf_keras does not have.
    """
    import tensorflow as tf

    kinds = tf_keras.losses.Reduction
    mean = kinds.SUM_OVER_BATCH_SIZE
    reductions = {"sum": kinds.SUM, "none": kinds.NONE, None: kinds.NONE, "sum_over_batch_size": mean, "mean": mean}
    if thing.reduction not in reductions:
        raise WrongArgument(
            f"{type(thing).__name__} has the reduction {thing.reduction!r}, and tf_keras has none like it.",
            hint="Use reduction='sum_over_batch_size'.",
        )

    class Loss(tf_keras.losses.Loss):
        @tf.autograph.experimental.do_not_convert  # as Keras 3 calls it
        def call(self, y_true, y_pred):
            return thing.call(keras.ops.cast(y_true, thing.dtype), keras.ops.cast(y_pred, thing.dtype))

    return Loss(reductions[thing.reduction], thing.name)


def _counterpart(thing: Any, home: Any) -> Any:
    """The object of tf_keras of the same class name and options.

    Raises:
        WrongArgument: there is none, be it that the class is the user's own, or it does not take the options.
    """
    kind = type(thing).__name__
    twin_class = getattr(home, kind, None)
    if twin_class is None or type(thing).__module__.partition(".")[0] != "keras":
        raise WrongArgument(f"tf_keras has no {kind} like this one.", hint="Give a tf_keras object, or a function.")
    known = inspect.signature(twin_class.__init__).parameters
    # A metric made of a function keeps options there that its configuration leaves out.
    config = {key: value for key, value in getattr(thing, "_fn_kwargs", {}).items() if key in known or "fn" in known}
    config |= {key: value for key, value in thing.get_config().items() if value is not None or key in known}
    config.pop("dtype", None)
    rate = config.get("learning_rate")
    if isinstance(rate, dict):
        config["learning_rate"] = _counterpart(thing._learning_rate, home.schedules)
    elif rate is not None:
        config["learning_rate"] = float(rate)
    try:
        return twin_class.from_config(config)
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WrongArgument(f"{kind} does not cross to tf_keras: {reason}", hint=f"Give a tf_keras {kind}.") from error

"""A compression in progress: a tf_keras model that is trained, and the Keras 3 model that it becomes."""

from __future__ import annotations

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

        Raises:
            WrongArgument: an optimizer or metric of Keras 3 without a counterpart in tf_keras.
        """
        tf_keras = import_tf_keras()
        if isinstance(optimizer, keras.optimizers.Optimizer):
            optimizer = _counterpart(optimizer, tf_keras.optimizers)
        loss, metrics = (
            keras.tree.map_structure(lambda thing: _crossed(thing, tf_keras), things) for things in (loss, metrics)
        )
        self.model.compile(optimizer=optimizer, loss=loss, metrics=metrics, **options)

    def fit(self, *args: Any, callbacks: Sequence[Any] = (), **options: Any) -> Any:
        """As `keras.Model.fit`; callbacks are tf_keras callbacks. Returns tf_keras's `History`."""
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


def _crossed(thing: Any, tf_keras: Any) -> Any:
    if isinstance(thing, keras.losses.Loss):

        def loss(target, prediction):
            return thing(target, prediction)

        loss.__name__ = thing.name
        return loss
    if isinstance(thing, keras.metrics.Metric):
        return _counterpart(thing, tf_keras.metrics)
    return thing


def _counterpart(thing: Any, home: Any) -> Any:
    """The object of tf_keras of the same class name and options."""
    kind = type(thing).__name__
    twin_class = getattr(home, kind, None)
    if twin_class is None:
        raise WrongArgument(f"tf_keras has no {kind}.", hint="Give a tf_keras object, or a function.")
    config = {key: value for key, value in thing.get_config().items() if value is not None and key != "dtype"}
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

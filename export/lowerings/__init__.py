"""Rewrites of a deployed model into one that computes the same and that a target can take, or runs faster.

A lowering is one idea in one file: a function ``Model -> Model`` over stock layers. It returns the very model it was
given where it finds nothing to do. Most are written with `keras_efficient.deploy.rebuild`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

__all__ = ["LARGE", "Lowering", "apply", "operations", "rebuild_if"]

LARGE = 32 * 2**20  # bytes from which on a table is not copied, nor shown to a converter


@dataclass(frozen=True)
class Lowering:
    """A named rewrite.

    Args:
        name: as the report shows it, such as ``split-grouped-convolutions``.
        function: the rewrite; returns its argument where nothing is to be done.
    """

    name: str
    function: Callable[[keras.Model], keras.Model]


def apply(model: keras.Model, lowerings: Iterable[Lowering]) -> tuple[keras.Model, tuple[str, ...]]:
    """Applies lowerings in order; returns the model and the names of those that changed it."""
    names: list[str] = []
    for lowering in lowerings:
        lowered = lowering.function(model)
        if lowered is not model:
            names.append(lowering.name)
            model = lowered
    return model, tuple(names)


def rebuild_if(
    model: keras.Model,
    applies: Callable[[keras.Operation], bool],
    make: Callable[[Any], keras.Operation],
) -> keras.Model:
    """`model` with every operation that `applies` replaced by what `make` gives; the same object if there is none.

    Layers and `keras.ops` operations are looked at, also those inside nested models and wrappers.
    """
    from keras_efficient.deploy import rebuild

    if not any(applies(operation) for operation in operations(model)):
        return model
    return rebuild(model, lambda operation, path: make(operation) if applies(operation) else None, shared=_is_large)


def _is_large(layer: keras.Layer) -> bool:
    """Whether one table makes a layer too large to copy it at each rewrite; models that are lowered are nobody's."""
    weights = layer.weights
    return len(weights) == 1 and math.prod(weights[0].shape) * np.dtype(weights[0].dtype).itemsize >= LARGE


def operations(model: keras.Model) -> Iterator[keras.Operation]:
    """All layers and `keras.ops` operations of a model, also those inside nested models and wrappers."""
    for layer in model._flatten_layers():
        yield layer
        for operation in getattr(layer, "operations", ()):
            if not hasattr(operation, "_flatten_layers"):  # a layer comes by itself
                yield operation

"""What goes into a model's output layer for labelled data: the queries that an index is learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos.layer import input_of
from keras_efficient.models import SampledSoftmax

__all__ = ["Queries", "forget_steps", "output_layer", "queries"]

BATCH = 1024


@dataclass(frozen=True, eq=False)
class Queries:
    """Vectors that go into an output layer, and the classes that are right for each.

    Attributes:
        vectors: (n, d) float32.
        labels, offsets: those of query i are ``labels[offsets[i]:offsets[i + 1]]``; int32 and (n + 1,) int64.
    """

    vectors: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def owners(self) -> np.ndarray:
        """The query of each label."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def select(self, rows: np.ndarray) -> Queries:
        """Some of the queries, by their numbers."""
        lengths = np.diff(self.offsets)[rows]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(self.offsets[rows] - bounds[:-1], lengths) + np.arange(bounds[-1])
        return Queries(self.vectors[rows], self.labels[index], bounds)


def output_layer(model: keras.Model) -> HALOSOutput:
    """The model's `HALOSOutput`.

    Raises:
        UnsupportedLayer: it has none, or several, or is not built.
    """
    if not isinstance(model, keras.Model):
        raise WrongArgument(f"A keras.Model is needed, not {type(model).__name__}.")
    if isinstance(model, SampledSoftmax):
        raise UnsupportedLayer(model.name, "it trains another model.", hint="Give that: its `.classifier`.")
    found = [layer for layer in model._flatten_layers() if isinstance(layer, HALOSOutput)]
    if len(found) != 1:
        hint = "Let the last layer be keras_efficient.layers.HALOSOutput(units)."
        raise UnsupportedLayer(model.name, f"it has {len(found)} HALOSOutput layers, one is needed.", hint=hint)
    if not found[0].built:
        raise UnsupportedLayer(
            found[0].name, "it is not built.", hint="Begin the model with keras.Input, or call it once."
        )
    return found[0]


def forget_steps(model: keras.Model) -> None:
    """Lets `fit`, `evaluate` and `predict` be compiled anew: over several devices they know each variable's place."""
    model.train_function = model.test_function = model.predict_function = None


def queries(model: keras.Model, data: Any) -> Queries:
    """Runs the model up to its `HALOSOutput` on data.

    Args:
        model: a functional or Sequential model.
        data: ``(x, y)``, or a `tf.data.Dataset` or `keras.utils.PyDataset` of such batches; a third part, weights of
            samples, is left unread. y holds class numbers, (n,) or (n, m) with −1 where there are fewer; or (n, units),
            an array or a SciPy matrix, not zero where a class is right.

    Raises:
        WrongArgument: labels out of range, or of another number than the inputs; nothing that has a label; data in
            another form.
        UnsupportedLayer: as `output_layer`; the layer's logits are not an output of the model.
    """
    layer = output_layer(model)
    if not getattr(model, "inputs", None):
        hint = "Build it with the functional API, or as a Sequential one."
        raise UnsupportedLayer(model.name, "it is a subclassed model: its graph of layers is not known.", hint=hint)
    body = keras.Model(model.inputs, input_of(model, layer))
    vectors, labels, lengths = [], [], []
    for x, y in _batches(data):
        some, counts = _labels(y if _is_sparse(y) else np.asarray(keras.ops.convert_to_numpy(y)), layer.units)
        found = np.asarray(body.predict_on_batch(x), np.float32)
        found = found.reshape(-1, found.shape[-1])
        if len(counts) != len(found):
            raise WrongArgument(f"There are labels for {len(counts)} inputs, and {len(found)} inputs.")
        vectors.append(found)
        labels.append(some)
        lengths.append(counts)
    if not vectors or not sum(map(len, labels)):
        raise WrongArgument("The data has no label to learn from.")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    together = Queries(np.concatenate(vectors), np.concatenate(labels).astype(np.int32), offsets)
    if not np.isfinite(together.vectors).all():
        row = int(np.flatnonzero(~np.isfinite(together.vectors).all(1))[0])
        raise WrongArgument(f"What goes into layer {layer.name!r} is not finite for input {row}.")
    return together.select(np.flatnonzero(np.diff(offsets)))


def _batches(data: Any) -> Iterator[tuple[Any, Any]]:
    of_batches = isinstance(data, list) and all(isinstance(one, tuple) for one in data)
    if isinstance(data, (tuple, list)) and len(data) in (2, 3) and not of_batches:
        x, y = data[:2]
        y = y.tocsr() if _is_sparse(y) else y
        sizes = [_number(part) for part in (*keras.tree.flatten(x), y)]
        number = next((size for size in sizes if size != sizes[-1]), sizes[-1])
        if number != sizes[-1]:
            raise WrongArgument(f"There are labels for {sizes[-1]} inputs, and {number} inputs.")
        for start in range(0, number, BATCH):
            yield keras.tree.map_structure(lambda a, start=start: a[start : start + BATCH], x), y[start : start + BATCH]
        return
    if isinstance(data, keras.utils.PyDataset):
        data = map(data.__getitem__, range(len(data)))
    elif not hasattr(data, "__iter__"):
        raise WrongArgument(f"Data is (x, y), a tf.data.Dataset or a keras.utils.PyDataset, not {type(data).__name__}.")
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise WrongArgument("Batches must be (x, y).")
        _number(batch[1])
        yield batch[0], batch[1]


def _number(array: Any) -> int:
    """How many rows an array has."""
    if isinstance(array, dict):
        raise WrongArgument(f"Labels are one array, those of the last layer, not {len(array)} of names.")
    shape = np.shape(array) if not hasattr(array, "shape") else tuple(array.shape)
    if not shape:
        raise WrongArgument("The data must come in batches: labels or inputs have no axis.", hint="dataset.batch(256)")
    return int(shape[0])


def _is_sparse(y: Any) -> bool:
    """Whether labels are a SciPy matrix, whose package need not be there."""
    return hasattr(y, "tocsr")


def _labels(y: Any, units: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels of all rows, one row's after the other's, and how many each has."""
    if _is_sparse(y):
        if y.shape[1] != units:
            raise WrongArgument(f"A matrix of labels must be (n, {units}), got {y.shape}.")
        rows, labels = y.tocsr().nonzero()
        return labels, np.bincount(rows, minlength=y.shape[0])
    ones = y.dtype.kind in "iu" and y.ndim == 2 and y.shape[1] == units and y.size and 0 <= y.min() <= y.max() <= 1
    if (y.dtype.kind in "fb" or ones) and y.ndim == 2 and y.shape[1] == units:
        rows, labels = np.nonzero(y)
        return labels, np.bincount(rows, minlength=len(y))
    if y.dtype.kind not in "iu" or y.ndim not in (1, 2):
        raise WrongArgument(
            f"Labels are class numbers of shape (n,) or (n, m), or (n, {units}) floats; got {y.dtype} {y.shape}."
        )
    y = y[:, None] if y.ndim == 1 else y
    if y.size and (y.min() < -1 or y.max() >= units):
        wrong = y.min() if y.min() < -1 else y.max()
        row = int(np.flatnonzero((y == wrong).any(1))[0])
        raise WrongArgument(f"Row {row} has the label {wrong}; there are classes 0 to {units - 1}.")
    return y[y >= 0], (y >= 0).sum(1)

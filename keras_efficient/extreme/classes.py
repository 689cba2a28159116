"""Changes of a model's classes, and of its weights, that need no index from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_efficient.deploy import rebuild
from keras_efficient.errors import WrongArgument
from keras_efficient.extreme.clusters import CHUNK, group_sums, unit
from keras_efficient.extreme.queries import forget_steps, output_layer
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos import HashPlan, Index, Plan

__all__ = ["add_classes", "remove_classes", "set_classes"]

NEIGHBOURS = 4  # classes that are there, by which a new one finds its place
LOGITS = 2**24  # of new classes with those that are there, at once
LISTS = 8  # that a new class comes into, where a class may lie in several blocks


def add_classes(
    model: keras.Model, kernel: np.ndarray, bias: np.ndarray | None = None
) -> tuple[keras.Model, np.ndarray]:
    """A copy of the model with more classes, which its index finds from now on.

    A new class comes into a block with a free place where classes lie whose weights are like its own. Of lists it
    comes into several, and of hash tables into a bucket of each, where need be in the place of what stands there last.
    Its weights are all that is known of it: where its queries do not lie where those of classes with such weights lie,
    it is not found before the index is learned again, from data that has it.

    Args:
        model: with a `HALOSOutput`. It is not changed.
        kernel: (n, d) weights of the new classes.
        bias: (n,); by default zeros.

    Returns:
        the model, not compiled and in float32, and the numbers of the new classes.

    Raises:
        WrongArgument: weights of another width, not finite, or more classes than blocks have places for; an index of
            other weights.
    """
    layer = output_layer(model)
    kernel, bias = _weights(layer, kernel, bias)
    ids = np.arange(layer.units, layer.units + len(kernel), dtype=np.int32)
    twin = HALOSOutput.from_config({**layer.get_config(), "units": layer.units + len(kernel), "plan": None})
    twin.build((None, layer.kernel.shape[1]))
    twin.kernel.assign(np.concatenate([_array(layer.kernel), kernel]))
    if layer.bias is not None:
        twin.bias.assign(np.concatenate([_array(layer.bias), bias]))
    if (index := _checked(layer)) is not None:
        plan = dataclasses.replace(index.plan, units=twin.units)
        slots = _with_classes(index, _array(layer.kernel), kernel, ids)
        twin.set_index(Index(plan, {**index.arrays, "slots": slots}, twin.fingerprint()))
    return rebuild(model, lambda operation, path: twin if operation is layer else None), ids


def remove_classes(model: keras.Model, ids: np.ndarray) -> None:
    """Takes classes out of the model's index: they are no answer any more. Numbers of the others stay.

    Their weights stay, too, so that `set_classes` does not bring them back, and `reindex` does not; an index that is
    learned again is one of all classes.

    Raises:
        WrongArgument: the layer has no index, or a class does not exist.
    """
    layer = output_layer(model)
    ids, index = _known(layer, ids), _index(layer)
    slots = np.where(np.isin(index.arrays["slots"], ids), -1, index.arrays["slots"])
    head = np.setdiff1d(index.arrays["head"], ids).astype(np.int32)
    plan = dataclasses.replace(index.plan, head=len(head))
    layer.set_index(Index(plan, {**index.arrays, "slots": slots, "head": head}, index.fingerprint))
    forget_steps(model)


def set_classes(model: keras.Model, ids: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None = None) -> None:
    """Gives classes other weights, and other biases if there are some; they stay where they lie in the index.

    Raises:
        WrongArgument: a class that does not exist, weights of another width or not finite; an index of other weights.
    """
    layer = output_layer(model)
    ids, index = _known(layer, ids), _checked(layer)
    kept = layer.bias if bias is None else None
    kernel, bias = _weights(layer, kernel, bias)
    if ids.ndim != 1 or len(np.unique(ids)) != len(ids):
        raise WrongArgument(f"Classes are (n,) numbers, each once, got {ids.shape}: {ids.ravel()[:5]}.")
    if len(ids) != len(kernel):
        raise WrongArgument(f"There are weights for {len(kernel)} classes, and {len(ids)} classes.")
    for variable, values in ((layer.kernel, kernel), (layer.bias, bias)):
        if variable is not None and variable is not kept:
            array = _array(variable).copy()
            array[ids] = values
            variable.assign(array)
    if index is not None:
        layer.set_index(dataclasses.replace(index, fingerprint=layer.fingerprint()))


def _with_classes(index: Index, old: np.ndarray, kernel: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The slots with the new classes in them, in places that are looked at."""
    slots, width = index.arrays["slots"].copy(), index.plan.width
    free = (slots[:, :width] < 0).sum(axis=1)
    if not index.plan.overlapping and free.sum() < len(ids):
        raise WrongArgument(
            f"The index has {free.sum()} free places, for {len(ids)} new classes.", hint="Learn it again: learn_index."
        )
    least = -(width // 2) if index.plan.overlapping else 0  # so many that stand last make room
    for blocks, number in zip(_most_alike(old, slots, kernel), ids, strict=True):
        chosen = _of_each_table(index.plan, blocks[free[blocks] > least])
        if not len(chosen):
            hint = "Learn the index again: learn_index."
            raise WrongArgument(f"{len(ids)} new classes are too many for the blocks that they are like.", hint=hint)
        free[chosen] -= 1
        places = np.where(free[chosen] < 0, width + free[chosen], np.argmax(slots[chosen] < 0, axis=1))
        slots[chosen, places] = number
    return slots


def _most_alike(old: np.ndarray, slots: np.ndarray, kernel: np.ndarray) -> Iterator[np.ndarray]:
    """For each new class all blocks: those first in which the classes lie that its weights are most like, and then
    those that are like it on the whole."""
    old, kernel = unit(old), unit(kernel)
    order = np.argsort(slots, axis=None, kind="stable")[np.count_nonzero(slots < 0) :]
    blocks, bounds = order // slots.shape[1], np.searchsorted(slots.ravel()[order], np.arange(len(old) + 1))
    centres = np.zeros((len(slots), old.shape[1]))
    for start in range(0, len(order), CHUNK):  # rows that are taken from the kernel at once
        part = slice(start, start + CHUNK)
        centres += group_sums(old[slots.ravel()[order[part]]], blocks[part], len(slots))
    centres, step = unit(centres).astype(np.float32), max(1, LOGITS // len(old))
    for start in range(0, len(kernel), step):
        some = kernel[start : start + step]
        for votes, alike in zip(some @ centres.T, some @ old.T, strict=True):
            for number in np.argpartition(-alike, min(NEIGHBOURS, len(old)) - 1)[:NEIGHBOURS]:
                votes[blocks[bounds[number] : bounds[number + 1]]] += 1
            yield np.argsort(-votes, kind="stable")


def _of_each_table(plan: Plan, order: np.ndarray) -> np.ndarray:
    """The blocks that a class comes into: the best one, of lists the best few, and of hash tables the best of each."""
    if not isinstance(plan, HashPlan):
        return order[: LISTS if plan.overlapping else 1]
    tables = order // plan.buckets
    return order[np.unique(tables, return_index=True)[1]]


def _weights(layer: HALOSOutput, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.asarray(kernel, np.float32)
    bias = np.zeros(len(kernel), np.float32) if bias is None else np.asarray(bias, np.float32)
    if kernel.ndim != 2 or kernel.shape[1] != layer.kernel.shape[1] or bias.shape != (len(kernel),):
        wanted = f"(n, {layer.kernel.shape[1]}) and (n,)"
        raise WrongArgument(f"Weights and biases must be {wanted}, got {kernel.shape} and {bias.shape}.")
    if not np.isfinite(kernel).all() or not np.isfinite(bias).all():
        raise WrongArgument("The weights of the classes must be finite.")
    return kernel, bias


def _known(layer: HALOSOutput, ids: Any) -> np.ndarray:
    ids = np.atleast_1d(np.asarray(ids))
    if not ids.size:
        return np.zeros(0, np.int64)
    if ids.dtype.kind not in "iu" or (ids.size and (ids.min() < 0 or ids.max() >= layer.units)):
        raise WrongArgument(f"Classes are numbers from 0 to {layer.units - 1}, got {ids.dtype} {ids.ravel()[:5]}.")
    return ids


def _checked(layer: HALOSOutput) -> Index | None:
    """The layer's index, if it has one, and that for its weights."""
    layer.check_contents()
    index = layer.index
    if index is not None:
        layer.set_index(index)  # which refuses one of other weights
    return index


def _index(layer: HALOSOutput) -> Index:
    layer.check_contents()
    if (index := layer.index) is None:
        raise WrongArgument(f"Layer {layer.name!r} has no index.", hint="extreme.learn_index(model, data) makes one.")
    return index


def _array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))

"""Statistics of batch normalisation that belong to a draw, not to the path that led to it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.members import Members
from keras_efficient.errors import WrongArgument

__all__ = ["refreshed"]


def refreshed(members: Members, data: Data, *, batch_size: int = 256) -> Members:
    """Members whose batch normalisation has the means and variances that their own weights give on the data.

    Each is the mean over batches, from one pass in training mode. Without batch normalisation, the members themselves.

    Args:
        members: draws; they are not changed.
        data: whose inputs are passed, in an order by chance that is always the same: batches of sorted data would hide
            what differs from one to the next. What is left behind the last whole batch is not passed.
        batch_size: of the pass.

    Raises:
        WrongArgument: a layer that forgets nothing (`momentum=1`), or no example in a batch.
    """
    found = _statistics(members.model)
    if not found:
        return members
    if batch_size < 1:
        raise WrongArgument(f"A batch has 1 example or more, not {batch_size!r}.")
    size = min(batch_size, len(data))
    batches = np.random.default_rng(0).permutation(len(data))[: len(data) // size * size].reshape(-1, size)
    model = members.model

    def one_batch(trainable: Any, others: Any, x: Any) -> Any:
        _, after = model.stateless_call(trainable, others, x, training=True)
        return [after[place] for place in found]

    program = compiled(one_batch)
    others = [np.array(ops.convert_to_numpy(one)) for one in members.non_trainable]
    for index in range(members.count):
        mine = [[value.value[index] for value in some] for some in (members.trainable, members.non_trainable)]
        for place in found:  # from zero on, a moving average is a share of the batch's own
            mine[1][place] = ops.zeros_like(mine[1][place])
        sums = [np.zeros(others[place].shape[1:]) for place in found]
        for some in batches:
            batch = program(*mine, ops.convert_to_tensor(data.x[some]))
            sums = [total + ops.convert_to_numpy(one) for total, one in zip(sums, batch, strict=True)]
        for (place, momentum), total in zip(found.items(), sums, strict=True):
            others[place][index] = total / len(batches) / (1 - momentum)
    return Members(model, [ops.convert_to_numpy(one) for one in members.trainable], others)


def _statistics(model: keras.Model) -> dict[int, float]:
    """Places of moving means and variances among the non-trainable variables, and their momentum."""
    places = {id(variable): place for place, variable in enumerate(model.non_trainable_variables)}
    found = {}
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            if layer.momentum >= 1:
                raise WrongArgument(f"Layer {layer.name!r} keeps its statistics: its momentum is {layer.momentum!r}.")
            for variable in (layer.moving_mean, layer.moving_variance):
                found[places[id(variable)]] = float(layer.momentum)
    return found

"""What methods share that follow the gradient: members that are trained, and looked at after some epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.bayes.statistics import refreshed
from keras_efficient.bayes.training import trained
from keras_efficient.errors import WrongArgument

__all__ = ["Drawn", "ModelFunction", "check_run", "divided", "steps_of", "walked"]

ModelFunction = Callable[[], keras.Model]


class Drawn:
    """Draws of weights as they come; in the end a posterior.

    Args:
        data: on which batch normalisation gets statistics of each draw's own, since those of the path lag behind.
    """

    def __init__(self, data: Data):
        self._data = data
        self._kept: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self._model: keras.Model | None = None

    def add(self, members: Members) -> None:
        """All members as they are now."""
        self._model = members.model
        both = (members.trainable, members.non_trainable)
        trainable, others = ([np.array(ops.convert_to_numpy(one)) for one in some] for some in both)
        self._kept.append((trainable, others))

    def posterior(self) -> StackedPosterior:
        assert self._model is not None
        stacked = [
            [np.concatenate(values) for values in zip(*(draw[kind] for draw in self._kept), strict=True)]
            for kind in (0, 1)
        ]
        return StackedPosterior(refreshed(Members(self._model, *stacked), self._data))


def check_run(model_fn: ModelFunction, data: Data, seed: int) -> None:
    """What every method is given.

    Raises:
        WrongArgument: a model instead of a function, arrays instead of `Data`, or a seed that is none.
    """
    if isinstance(model_fn, keras.Model) or not callable(model_fn):
        hint = "Members need fresh weights: give `lambda: build()`, not `build()`."
        raise WrongArgument(f"`model_fn` is a function that builds a model, not {type(model_fn).__name__}.", hint=hint)
    if not isinstance(data, Data):
        raise WrongArgument(f"`data` is a `bayes.Data`, not {type(data).__name__}.", hint="Give `bayes.Data(x, y)`.")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise WrongArgument(f"A seed is an integer from 0 on, not {seed!r}.")


def divided(data: Data, part: float, seed: int) -> tuple[Data, Data]:
    """A part of the data, drawn by chance, is held out: the rest, and that part.

    Raises:
        WrongArgument: one of the two would be empty.
    """
    count = round(part * len(data))
    if not 1 <= count < len(data):
        raise WrongArgument(f"{part!r} of {len(data)} examples leaves none on one side.")
    order = np.random.default_rng([seed, 4]).permutation(len(data))
    rest, held = (Data(data.x[some], data.y[some], data.num_classes) for some in (order[count:], order[:count]))
    return rest, held


def steps_of(data: Data, batch_size: int) -> int:
    """Steps of an epoch.

    Raises:
        WrongArgument: a batch of no example.
    """
    if batch_size < 1:
        raise WrongArgument(f"A batch has 1 example or more: batch_size={batch_size!r}.")
    return len(data) // min(batch_size, len(data))


def walked(
    model_fn: ModelFunction, data: Data, optimizer: Any, *, members: int, epochs: int, batch_size: int, seed: int
) -> Iterator[tuple[int, Members]]:
    """New members after each epoch: the number of the epoch, from 1 on, and the members."""
    check_run(model_fn, data, seed)
    weights, order = np.random.SeedSequence(seed).generate_state(2)
    some = Members.new(model_fn, members, int(weights))
    steps = trained(some, data, optimizer, epochs=epochs, batch_size=batch_size, seed=int(order))
    for number, _ in enumerate(steps, 1):
        yield number, some

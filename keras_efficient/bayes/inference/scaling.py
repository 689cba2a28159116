"""One temperature for all logits, found on examples that were held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import ModelFunction, check_run, divided
from keras_efficient.bayes.inference.laplace import last_dense
from keras_efficient.bayes.inference.maximum import MAP
from keras_efficient.bayes.inference.space import Float, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.errors import WrongArgument

__all__ = ["TemperatureScaling", "best_temperature"]


@dataclass(frozen=True)
class TemperatureScaling:
    """Another method on a part of the data, and one temperature by which logits are divided on the rest.

    ```
    p = mean over members of softmax(logits / T)        T: where the negative log likelihood of the rest is least
    ```

    One network's accuracy stays what it was. The temperature is in the weights of the last layer, and so in every file
    that is made of them.

    Attributes:
        method: whose `fit` gives draws of weights.
        held_out: part of the data on which T is found.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, https://arxiv.org/abs/1706.04599.
    """

    method: Any = field(default_factory=MAP)
    held_out: float = 0.1

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws of the method, with a last layer divided by T, which `diagnostics` has.

        Raises:
            WrongArgument: a part that leaves no example on one side, or a method that gives no draws of weights.
            UnsupportedLayer: a model whose last layer is not a Dense one that gives logits.
        """
        check_run(model_fn, data, seed)
        rest, held = divided(data, self.held_out, seed)
        posterior = self.method.fit(model_fn, rest, seed)
        if not isinstance(posterior, StackedPosterior):
            raise WrongArgument(f"{type(self.method).__name__} gives no draws of weights, which could be scaled.")
        layer = last_dense(posterior.model, type(self).__name__)
        temperature = best_temperature(posterior.predict(held.x), held.y)
        members = _cooled(posterior.members, [layer.kernel, *([layer.bias] if layer.use_bias else [])], temperature)
        return StackedPosterior(members, diagnostics={**posterior.diagnostics, "temperature": temperature})

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary, besides what the method has."""
        return {"held_out": Float(0.02, 0.3)}


def best_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Where the negative log likelihood of the mean over members is least, from 1/100 to 100.

    Args:
        probabilities: (members, n, classes), at a temperature of 1.
        labels: (n,) integers.
    """
    # Logits but for a constant; what float32 rounds to zero counts as its smallest number.
    logits = np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny))
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits * np.exp(-log_temperature)
        own = scaled[:, rows, labels] - np.logaddexp.reduce(scaled, axis=2)
        return float(-np.logaddexp.reduce(own, axis=0).mean())

    return float(np.exp(_lowest(loss, -np.log(100), np.log(100))))


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one number is least: the best of a grid, which is drawn closer around it again and again."""
    while True:
        grid = np.linspace(low, high, 21)
        best = int(np.argmin([function(place) for place in grid]))
        if high - low < 1e-4:
            return float(grid[best])
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]


def _cooled(members: Members, variables: list[Any], temperature: float) -> Members:
    names = {id(one) for one in variables}
    model = members.model
    trainable = [
        ops.convert_to_numpy(value) / (temperature if id(variable) in names else 1.0)
        for variable, value in zip(model.trainable_variables, members.trainable, strict=True)
    ]
    return Members(model, trainable, [ops.convert_to_numpy(one) for one in members.non_trainable])

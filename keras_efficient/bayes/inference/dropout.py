"""Dropout that stays on at prediction, as draws of an approximate posterior."""

from __future__ import annotations

from dataclasses import dataclass

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import ModelFunction, check_run
from keras_efficient.bayes.inference.maximum import MAP, tops
from keras_efficient.bayes.inference.space import Float, Int, Space
from keras_efficient.bayes.posterior import StochasticPosterior
from keras_efficient.layers.bayesian import with_dropout

__all__ = ["MCDropout"]


@dataclass(frozen=True)
class MCDropout(MAP):
    """Training with dropout as `MAP` does it, and dropout that stays on, while batch normalisation does not draw.

    Attributes:
        learning_rate, alpha, prior_sd, epochs, batch_size: of `MAP`.
        rate: of all dropout; behind each hidden dense or convolutional layer of a model that has none. `None`: as the
            model's own layers say.
        draws: how many networks.

    Source: Gal, Ghahramani, ICML 2016, https://arxiv.org/abs/1506.02142.
    """

    rate: float | None = 0.2
    draws: int = 30

    def fit(  # type: ignore[override]  # a maximum that draws
        self, model_fn: ModelFunction, data: Data, seed: int
    ) -> StochasticPosterior:
        """One network with masks of its own for each draw.

        Raises:
            WrongArgument: no draw, a rate that is not in (0, 1), or none for a model without dropout.
        """
        check_run(model_fn, data, seed)
        members = tops(self, 1, lambda: with_dropout(model_fn(), self.rate), data, seed)
        return StochasticPosterior(members.network(0), self.draws, seed=seed)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {**super().space(), "rate": Float(0.02, 0.6), "draws": Int(10, 100)}

"""The most probable weights, once or several times."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import ModelFunction, steps_of, walked
from keras_efficient.bayes.inference.space import Choice, Float, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.optimizers import SGHMC
from keras_efficient.bayes.posterior import Posterior, StackedPosterior
from keras_efficient.errors import WrongArgument

__all__ = ["MAP", "DeepEnsemble", "tops"]


@dataclass(frozen=True)
class MAP:
    """Maximum a posteriori by gradient descent with momentum, the learning rate along half a cosine.

    Attributes:
        learning_rate: at the beginning, of the mean loss.
        alpha: one minus the momentum.
        prior_sd: standard deviation of the Gaussian prior on weights; weight decay is 1 / (prior_sd² · examples).
        epochs, batch_size: of training.
    """

    learning_rate: float = 0.1
    alpha: float = 0.1
    prior_sd: float = 0.234
    epochs: int = 30
    batch_size: int = 128

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> Posterior:
        """One draw.

        Raises:
            WrongArgument: no epoch, or a learning rate not above 0.
        """
        return StackedPosterior(tops(self, 1, model_fn, data, seed))

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {
            "learning_rate": Float(0.01, 0.5, log=True),
            "alpha": Float(0.02, 1.0, log=True),
            "prior_sd": Float(0.05, 2.0, log=True),
            "batch_size": Choice((32, 64, 128, 256)),
        }


@dataclass(frozen=True)
class DeepEnsemble(MAP):
    """Several maxima, each from initial weights and in an order of its own, trained together.

    Attributes:
        members: how many.

    Source: Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, https://arxiv.org/abs/1612.01474.
    """

    members: int = 8

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """A draw for each member."""
        return StackedPosterior(tops(self, self.members, model_fn, data, seed))


def tops(method: MAP, members: int, model_fn: ModelFunction, data: Data, seed: int) -> Members:
    """Members at the end of their training, where methods go on that begin at a maximum."""
    if method.epochs < 1 or not method.learning_rate > 0:
        numbers = f"epochs={method.epochs!r}, learning_rate={method.learning_rate!r}"
        raise WrongArgument(f"A maximum takes one epoch at least, and a learning rate above 0: {numbers}.")
    steps = steps_of(data, method.batch_size) * method.epochs
    rate = keras.optimizers.schedules.CosineDecay(method.learning_rate, steps)
    optimizer = SGHMC(rate, len(data), alpha=method.alpha, prior_sd=method.prior_sd, temperature=0.0)
    run = {"members": members, "epochs": method.epochs, "batch_size": method.batch_size, "seed": seed}
    *_, (_, some) = walked(model_fn, data, optimizer, **run)
    return some

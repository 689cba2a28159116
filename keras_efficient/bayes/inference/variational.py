"""A Gaussian for each weight, fitted to the posterior by the evidence lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import ModelFunction, check_run, steps_of, walked
from keras_efficient.bayes.inference.space import Choice, Float, Space
from keras_efficient.bayes.posterior import StochasticPosterior
from keras_efficient.layers.bayesian import Distribution, Parameter, bayesianize

__all__ = ["MeanFieldVI"]


@dataclass(frozen=True)
class MeanFieldVI:
    """Mean-field variational inference over the kernels of dense and convolutional layers, by Adam.

    ```
    loss = mean negative log-likelihood of a batch + KL(posterior ‖ prior) / examples
    ```

    Biases and batch normalisation are trained as weights without a distribution.

    Attributes:
        learning_rate: of Adam, at the beginning of half a cosine.
        prior_sd: standard deviation of the Gaussian prior on each number of a kernel.
        initial_sd: standard deviations of the posterior at the beginning.
        estimator: of the gradient, as in `keras_efficient.layers.BayesianWeights`.
        draws: how many networks the posterior has.
        epochs, batch_size: of training.

    Source: Blundell et al., ICML 2015, https://arxiv.org/abs/1505.05424.
    """

    learning_rate: float = 1e-3
    prior_sd: float = 0.234
    initial_sd: float = 0.02
    estimator: str = "flipout"
    draws: int = 30
    epochs: int = 30
    batch_size: int = 128

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StochasticPosterior:
        """A network that draws.

        Raises:
            WrongArgument: numbers out of range, an unknown estimator, no draw, or a model without a layer for it.
        """
        check_run(model_fn, data, seed)
        prior = Distribution("Normal", loc=0.0, scale=self.prior_sd)
        posterior = Distribution("Normal", loc=Parameter(), scale=Parameter(self.initial_sd))
        options: dict[str, Any] = {"num_data": len(data), "estimator": self.estimator}
        options |= {"prior": prior, "posterior": posterior}
        steps = steps_of(data, self.batch_size) * self.epochs
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(self.learning_rate, steps))
        run: dict[str, Any] = {"members": 1, "epochs": self.epochs, "batch_size": self.batch_size, "seed": seed}
        *_, (_, members) = walked(lambda: bayesianize(model_fn(), **options), data, optimizer, **run)
        return StochasticPosterior(members.network(0), self.draws, seed=seed)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {
            "learning_rate": Float(1e-4, 1e-2, log=True),
            "prior_sd": Float(0.05, 2.0, log=True),
            "initial_sd": Float(0.001, 0.1, log=True),
            "batch_size": Choice((32, 64, 128, 256)),
        }

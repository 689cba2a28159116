"""Samplers whose step goes down to a small one, at which it stays while they draw."""

from __future__ import annotations

from dataclasses import dataclass, field

import keras

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import Drawn, ModelFunction, check_run, steps_of, walked
from keras_efficient.bayes.inference.space import Choice, Float, Space
from keras_efficient.bayes.optimizers import SGHMC
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.errors import WrongArgument
from keras_efficient.seeds import seed_of

__all__ = ["SGHMCSampler", "SGLDSampler"]


@dataclass(frozen=True)
class SGHMCSampler:
    """Stochastic-gradient HMC: from new weights to a mode while the step falls along half a cosine, then draws.

    Attributes:
        learning_rate, sampling_rate: at the beginning, and from the end of the burn-in on.
        alpha: friction.
        prior_sd: standard deviation of the Gaussian prior on weights.
        temperature: of the posterior; 1 is Bayes' own. There is noise from the first step on.
        burn_in: epochs before the first draw.
        samples: draws of each chain.
        thinning: epochs from a draw to the next.
        chains: runs from initial weights of their own, all draws of which count.
        batch_size: of training.

    Source: Chen, Fox, Guestrin, ICML 2014, https://arxiv.org/abs/1402.4102.
    """

    learning_rate: float = 0.1
    sampling_rate: float = 0.01
    alpha: float = 0.1
    prior_sd: float = 0.234
    temperature: float = 1.0
    burn_in: int = 30
    samples: int = 10
    thinning: int = 2
    chains: int = 1
    batch_size: int = 128

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws of all chains.

        Raises:
            WrongArgument: numbers below 1, or rates not above 0.
        """
        rates_are_above_zero = self.learning_rate > 0 and self.sampling_rate > 0
        if min(self.burn_in, self.samples, self.thinning, self.chains) < 1 or not rates_are_above_zero:
            raise WrongArgument(f"Epochs, draws and chains are 1 or more, learning rates above 0: {self}.")
        check_run(model_fn, data, seed)
        steps = steps_of(data, self.batch_size) * self.burn_in
        last = self.sampling_rate / self.learning_rate
        optimizer = SGHMC(
            keras.optimizers.schedules.CosineDecay(self.learning_rate, steps, alpha=last),
            len(data),
            alpha=self.alpha,
            prior_sd=self.prior_sd,
            temperature=self.temperature,
            seed=seed_of(seed, 1),
        )
        epochs = self.burn_in + self.samples * self.thinning
        run = {"members": self.chains, "epochs": epochs, "batch_size": self.batch_size}
        drawn = Drawn(data)
        for epoch, some in walked(model_fn, data, optimizer, seed=seed, **run):
            if epoch > self.burn_in and (epoch - self.burn_in) % self.thinning == 0:
                drawn.add(some)
        return drawn.posterior()

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {
            "learning_rate": Float(0.01, 0.5, log=True),
            "sampling_rate": Float(0.001, 0.1, log=True),
            "alpha": Float(0.02, 1.0, log=True),
            "prior_sd": Float(0.05, 2.0, log=True),
            "batch_size": Choice((32, 64, 128, 256)),
        }


@dataclass(frozen=True)
class SGLDSampler(SGHMCSampler):
    """As `SGHMCSampler`, without momentum.

    Attributes:
        learning_rate, sampling_rate: ten times those of `SGHMCSampler` go as far, since nothing is carried on.
        alpha: 1.

    Source: Welling, Teh, ICML 2011.
    """

    learning_rate: float = 1.0
    sampling_rate: float = 0.1
    alpha: float = field(default=1.0, init=False)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        mine: Space = {name: some for name, some in super().space().items() if name != "alpha"}
        return {**mine, "learning_rate": Float(0.1, 2.0, log=True), "sampling_rate": Float(0.01, 1.0, log=True)}

"""Means of weights along a path of constant learning rate, and the Gaussian around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._likelihood import Vectors
from keras_efficient.bayes.inference._runs import ModelFunction
from keras_efficient.bayes.inference.maximum import MAP, tops
from keras_efficient.bayes.inference.space import Float, Int, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.optimizers import SGHMC
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.bayes.statistics import refreshed
from keras_efficient.bayes.training import trained
from keras_efficient.errors import WrongArgument

__all__ = ["SWA", "SWAG", "Moments"]


class Moments:
    """Mean, variance and last deviations of vectors that come one by one.

    ```
    mean = Σ w / k        variance = max(Σ w² / k − mean², 0)        D = [w − mean so far] of the last K vectors
    ```

    Args:
        rank: K, columns of D at most; 0: none is kept.
    """

    def __init__(self, rank: int = 0):
        if rank < 0:
            raise WrongArgument(f"A rank is 0 or more, not {rank!r}.")
        self.rank, self.count = rank, 0
        self._deviations: list[np.ndarray] = []

    def add(self, vector: np.ndarray) -> None:
        """One more vector, which counts as much as each before."""
        vector = np.asarray(vector, np.float64)
        if self.count == 0:
            self._mean, self._spread = np.zeros_like(vector), np.zeros_like(vector)
        self.count += 1
        before = vector - self._mean
        self._mean = self._mean + before / self.count
        deviation = vector - self._mean
        # Sums of squares about the mean so far: differences of squares would lose what is small against the mean.
        self._spread = self._spread + before * deviation
        self._deviations = [*self._deviations, deviation][-self.rank :] if self.rank else []

    @property
    def mean(self) -> np.ndarray:
        """(size,)"""
        return self._mean

    @property
    def variance(self) -> np.ndarray:
        """(size,), by the count."""
        return np.maximum(self._spread / self.count, 0.0)

    @property
    def deviations(self) -> np.ndarray:
        """D, (size, at most K)."""
        return np.stack(self._deviations, axis=1)

    def draw(self, random: np.random.Generator, count: int, scale: float = 1.0) -> np.ndarray:
        """(count, size) draws of the Gaussian that is half diagonal and half of low rank.

        ```
        w = mean + scale · (√(½ variance) z₁ + D z₂ / √(2 (K − 1)))        z ~ N(0, I)
        ```

        Raises:
            WrongArgument: fewer than two deviations, of which there is no covariance.
        """
        columns = len(self._deviations)
        if columns < 2:
            raise WrongArgument(f"A covariance of low rank needs 2 vectors at least, not {columns}.")
        diagonal, deviations = np.sqrt(0.5 * self.variance), self.deviations / np.sqrt(2 * (columns - 1))
        drawn = np.empty((count, len(self.mean)), np.float32)
        for row in drawn:  # one by one, since numbers in double precision for all draws are many
            noise = diagonal * random.standard_normal(len(diagonal)) + deviations @ random.standard_normal(columns)
            row[:] = self.mean + scale * noise
        return drawn


@dataclass(frozen=True)
class SWA(MAP):
    """Stochastic weight averaging: the mean of weights at the ends of epochs, on from the maximum.

    Attributes:
        learning_rate, alpha, prior_sd, epochs, batch_size: of the way to the maximum, as of `MAP`.
        averaging_rate: the constant learning rate behind it.
        averaging_epochs: weights that are collected, one at the end of each epoch.

    Source: Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407.
    """

    averaging_rate: float = 0.05
    averaging_epochs: int = 20

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """One draw, the mean."""
        moments = Moments()
        members = self._collected(moments, model_fn, data, seed)
        return drawn_at(members, moments.mean[None], data)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        mine: Space = {"averaging_rate": Float(0.001, 0.2, log=True), "averaging_epochs": Int(5, 50)}
        return {**super().space(), **mine}

    def path(self, model_fn: ModelFunction, data: Data, seed: int) -> Iterator[Members]:
        """One network at the end of each epoch of the constant learning rate."""
        members = tops(self, 1, model_fn, data, seed)
        optimizer = SGHMC(self.averaging_rate, len(data), alpha=self.alpha, prior_sd=self.prior_sd, temperature=0.0)
        order = int(np.random.SeedSequence([seed, 2]).generate_state(1)[0])
        run = {"epochs": self.averaging_epochs, "batch_size": self.batch_size, "seed": order}
        for _ in trained(members, data, optimizer, **run):
            yield members

    def _collected(self, moments: Moments, model_fn: ModelFunction, data: Data, seed: int) -> Members:
        for members in self.path(model_fn, data, seed):
            moments.add(Vectors(members.model).of(members)[0])
        return members


@dataclass(frozen=True)
class SWAG(SWA):
    """A Gaussian around the mean of weights, of their variances and their last deviations.

    Attributes:
        learning_rate, …, averaging_epochs: of `SWA`.
        rank: deviations that are kept.
        scale: by which draws are nearer to the mean; 1 is what was seen on the path.
        draws: how many.

    Source: Maddox, Garipov, Izmailov, Vetrov, Wilson, NeurIPS 2019, https://arxiv.org/abs/1902.02476.
    """

    rank: int = 20
    scale: float = 1.0
    draws: int = 30

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws of the Gaussian.

        Raises:
            WrongArgument: fewer than two epochs, ranks or no draw.
        """
        if min(self.rank, self.averaging_epochs) < 2 or self.draws < 1:
            numbers = f"rank={self.rank!r}, averaging_epochs={self.averaging_epochs!r}, draws={self.draws!r}"
            raise WrongArgument(f"SWAG takes a rank and epochs of 2 or more, and draws 1 or more: {numbers}.")
        moments = Moments(self.rank)
        members = self._collected(moments, model_fn, data, seed)
        random = np.random.default_rng([seed, 3])
        return drawn_at(members, moments.draw(random, self.draws, self.scale), data)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {**super().space(), "rank": Int(2, 40), "scale": Float(0.1, 2.0, log=True)}


def drawn_at(members: Members, vectors: np.ndarray, data: Data) -> StackedPosterior:
    """Networks of the members' architecture at other weights, with statistics of batch normalisation of their own."""
    others = [ops.convert_to_numpy(one)[0] for one in members.non_trainable]
    return StackedPosterior(refreshed(Vectors(members.model).members(members.model, vectors, others), data))

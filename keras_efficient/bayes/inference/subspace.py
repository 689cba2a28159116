"""Inference in the few directions in which weights moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._likelihood import Likelihood, Vectors, derived
from keras_efficient.bayes.inference._runs import ModelFunction
from keras_efficient.bayes.inference.averaging import SWA, drawn_at
from keras_efficient.bayes.inference.space import Float, Int, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.bayes.statistics import refreshed
from keras_efficient.bayes.training import TrainingFailed
from keras_efficient.errors import WrongArgument

__all__ = ["SubspaceSlice", "SubspaceVI", "elliptical_slice", "mean_field", "principal"]


def principal(vectors: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of vectors and their principal directions, each as long as the standard deviation along it.

    ```
    w − mean = U S Vᵀ (singular values)        basis = V S / √(k − 1)
    ```

    Args:
        vectors: (k, size).
        rank: directions, fewer than vectors.

    Returns:
        mean (size,), basis (size, rank).

    Raises:
        WrongArgument: as many directions as vectors, or none.
    """
    vectors = np.asarray(vectors, np.float64)
    if not 1 <= rank < len(vectors):
        raise WrongArgument(f"{len(vectors)} vectors have 1 to {len(vectors) - 1} principal directions, not {rank!r}.")
    mean = vectors.mean(axis=0)
    _, lengths, directions = np.linalg.svd(vectors - mean, full_matrices=False)
    return mean, directions[:rank].T * lengths[:rank] / np.sqrt(len(vectors) - 1)


def elliptical_slice(
    log_likelihood: Callable[[np.ndarray], float], start: np.ndarray, prior_sd: float, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Draws, without an end, of the density ∝ likelihood(z) · N(z; 0, prior_sd² I).

    Each is a point of the ellipse through the one before and a draw of the prior, above a level of likelihood. The
    likelihood of where it stands is kept, so that a draw costs the points that were tried on the way.

    Args:
        log_likelihood: of a vector; its constant does not matter.
        start: a vector whose likelihood is not zero.
        prior_sd: of the Gaussian prior.
        random: chance.

    Raises:
        TrainingFailed: a likelihood is NaN, or zero where it starts.

    Source: Murray, Adams, MacKay, AISTATS 2010, https://arxiv.org/abs/1001.0175.
    """
    here = np.asarray(start, np.float64)
    height = _finite(log_likelihood(here), here)
    while True:
        other = prior_sd * random.standard_normal(here.shape)
        level = height + np.log(random.uniform())
        angle = random.uniform(0, 2 * np.pi)
        low, high = angle - 2 * np.pi, angle
        while True:
            there = here * np.cos(angle) + other * np.sin(angle)
            found = log_likelihood(there)
            if found > level:
                break
            if np.isnan(found):
                raise TrainingFailed(f"The likelihood at {there} is not a number.")
            low, high = (angle, high) if angle < 0 else (low, angle)
            angle = random.uniform(low, high)
        here, height = there, found
        yield here


def mean_field(
    derivative: Callable[[np.ndarray], np.ndarray],
    size: int,
    prior_sd: float,
    random: np.random.Generator,
    *,
    steps: int,
    learning_rate: float = 0.02,
) -> tuple[np.ndarray, np.ndarray]:
    """The Gaussian of independent numbers that is nearest to a posterior with the prior N(0, prior_sd² I).

    It climbs the evidence lower bound with Adam on reparameterised draws, and gives the mean of m and of ln s over the
    second half of the steps, in which the chance of single draws goes out:

    ```
    ELBO = E log likelihood(m + s ε) − KL(N(m, s²) ‖ N(0, prior_sd²))        ε ~ N(0, I)
    ```

    Args:
        derivative: of the log likelihood at a vector, or an estimate of it.
        size: of vectors.
        prior_sd: of the prior.
        random: chance.
        steps, learning_rate: of Adam, in units of the prior's width.

    Returns:
        m, s of (size,) each.

    Raises:
        WrongArgument: no step.
        TrainingFailed: a gradient is not finite.
    """
    if steps < 1:
        raise WrongArgument(f"One step at least, not {steps!r}.")
    # Rows are m / prior_sd and log(s / prior_sd); the widths begin small, where the likelihood is smooth.
    place = np.stack([np.zeros(size), np.full(size, np.log(0.1))])
    first, second, total = np.zeros_like(place), np.zeros_like(place), np.zeros_like(place)
    for step in range(1, steps + 1):
        noise, width = random.standard_normal(size), np.exp(place[1])
        slope = prior_sd * derivative(prior_sd * (place[0] + width * noise))
        gradient = np.stack([slope - place[0], slope * noise * width + 1 - np.square(width)])
        if not np.isfinite(gradient).all():
            raise TrainingFailed(f"The gradient of the likelihood is not finite at step {step - 1}.")
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * np.square(gradient)
        move = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        place = place + learning_rate * move
        if step > steps // 2:
            total = total + place
    place = total / (steps - steps // 2)
    return prior_sd * place[0], prior_sd * np.exp(place[1])


@dataclass(frozen=True)
class _Subspace(SWA):
    """What the two methods share: a path of weights, its principal directions, and a prior within them.

    ```
    w = mean + basis z        p(z | data) ∝ likelihood(w)^(1/T) · N(z; 0, subspace_sd² I)
    ```
    """

    rank: int = 5
    subspace_sd: float = 1.0
    temperature: float = 1.0
    draws: int = 30

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws of the subspace.

        Raises:
            WrongArgument: as many directions as epochs of the constant learning rate, or numbers not above 0.
        """
        if not (self.subspace_sd > 0 and self.temperature > 0 and self.draws >= 1):
            numbers = f"subspace_sd={self.subspace_sd!r}, temperature={self.temperature!r}, draws={self.draws!r}"
            raise WrongArgument(f"A subspace has a width, a temperature and draws above 0: {numbers}.")
        self._check()
        if not 1 <= self.rank < self.averaging_epochs:  # which `principal` says too, but after the training
            raise WrongArgument(f"{self.averaging_epochs!r} epochs have no {self.rank!r} principal directions.")
        vectors = []
        for members in self.path(model_fn, data, seed):
            vectors.append(Vectors(members.model).of(members)[0])
        mean, basis = principal(np.stack(vectors), self.rank)
        vectors.clear()
        inner = self._drawn(_Plane(members, mean, basis, data), np.random.default_rng([seed, 3]))
        return drawn_at(members, mean + inner @ basis.T, data)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        mine: Space = {"rank": Int(2, 20), "subspace_sd": Float(0.3, 10.0, log=True), "averaging_epochs": Int(21, 50)}
        return {**super().space(), **mine, "temperature": Float(1.0, 10_000.0, log=True)}

    def _check(self) -> None:
        """Raises WrongArgument where a number of one of the two methods alone is out of range."""
        raise NotImplementedError("Each method in the subspace says it.")

    def _drawn(self, plane: _Plane, random: np.random.Generator) -> np.ndarray:
        """(draws, rank)"""
        raise NotImplementedError("Each method in the subspace says it.")


@dataclass(frozen=True)
class SubspaceSlice(_Subspace):
    """Elliptical slice sampling in the principal directions of a path of weights.

    The likelihood is that of all data in inference mode, at the batch normalisation of the path's mean.

    Attributes:
        learning_rate, …, averaging_epochs: of `SWA`, whose path it is.
        rank: directions, fewer than `averaging_epochs`.
        subspace_sd: of the prior, in standard deviations of the path along each direction.
        temperature: T, of the likelihood; 1 is Bayes' own. In few directions all data say more than is true of
            the network, so that larger ones are worth a try.
        draws: how many; one of two is kept.
        burn_in: draws before the first that is kept.

    Source: Izmailov et al., UAI 2019, https://arxiv.org/abs/1907.07504.
    """

    burn_in: int = 20

    def _check(self) -> None:
        if self.burn_in < 0:
            raise WrongArgument(f"A burn-in has 0 draws or more, not {self.burn_in!r}.")

    def _drawn(self, plane: _Plane, random: np.random.Generator) -> np.ndarray:
        def log_likelihood(place: np.ndarray) -> float:
            return plane.log_likelihood(place) / self.temperature

        chain = elliptical_slice(log_likelihood, np.zeros(self.rank), self.subspace_sd, random)
        every = [next(chain) for _ in range(self.burn_in + 2 * self.draws)]
        return np.stack(every[self.burn_in + 1 :: 2])


@dataclass(frozen=True)
class SubspaceVI(_Subspace):
    """A Gaussian of independent numbers in the principal directions of a path of weights.

    Attributes:
        learning_rate, …, draws: of `SubspaceSlice`.
        steps: of climbing, each on a batch of `batch_size`.

    Source: Izmailov et al., UAI 2019, https://arxiv.org/abs/1907.07504.
    """

    steps: int = 2000

    def _check(self) -> None:
        if self.steps < 1:
            raise WrongArgument(f"There is one step at least, not {self.steps!r}.")

    def _drawn(self, plane: _Plane, random: np.random.Generator) -> np.ndarray:
        derivative = plane.derivative(self.batch_size, random)
        middle, width = mean_field(
            lambda place: derivative(place) / self.temperature, self.rank, self.subspace_sd, random, steps=self.steps
        )
        return middle + width * random.standard_normal((self.draws, self.rank))


class _Plane:
    """The likelihood of data as a function of a place in the subspace."""

    def __init__(self, members: Members, mean: np.ndarray, basis: np.ndarray, data: Data):
        self._vectors, self._data = Vectors(members.model), data
        self._mean, self._basis = (ops.convert_to_tensor(one.astype("float32")) for one in (mean, basis))
        others = [ops.convert_to_numpy(one)[0] for one in members.non_trainable]
        middle = refreshed(self._vectors.members(members.model, mean[None], others), data)
        self._model, self._others = members.model, [one.value[0] for one in middle.non_trainable]
        whole = Likelihood(self._model, self._others, data, 1000)
        self._whole = compiled(lambda place: whole(self._weights(place)))

    def log_likelihood(self, place: np.ndarray) -> float:
        return float(self._whole(ops.convert_to_tensor(place.astype("float32"))))

    def derivative(self, batch_size: int, random: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        """An estimate of its gradient from batches that take turns."""
        some = Likelihood(self._model, self._others, self._data, batch_size)
        times = len(self._data) / some.batch_size
        slope = compiled(derived(lambda place, x, y: (some.of(self._weights(place), x, y), ())))
        batches = some.batches(random)

        def estimate(place: np.ndarray) -> np.ndarray:
            _, found = slope(*(ops.convert_to_tensor(one) for one in (place.astype("float32"), *next(batches))))
            return times * ops.convert_to_numpy(found).astype(np.float64)

        return estimate

    def _weights(self, place: Any) -> list[Any]:
        return self._vectors.split(self._mean + ops.matmul(self._basis, place))


def _finite(value: float, place: np.ndarray) -> float:
    if not np.isfinite(value):
        raise TrainingFailed(f"The log likelihood where the chain begins, {place}, is {value}.")
    return value

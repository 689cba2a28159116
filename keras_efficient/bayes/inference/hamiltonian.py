"""Chains that follow the exact gradient of all data, and what they say about their own convergence."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient import probability
from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._likelihood import Likelihood, Vectors, without_batch_statistics
from keras_efficient.bayes.inference._runs import ModelFunction, check_run
from keras_efficient.bayes.inference.space import Float, Int, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.bayes.training import TrainingFailed
from keras_efficient.errors import WrongArgument

__all__ = ["HMC", "NUTS", "Chains", "LogDensity", "convergence"]

LogDensity = Callable[[Any], Any]
ADAPTED = 0.8  # of the burn-in, in which step sizes are adapted


@dataclass(frozen=True, eq=False)
class Chains:
    """What several chains drew.

    Attributes:
        draws: (draws, chains, size).
        log_density: (draws, chains).
        diagnostics: `rhat_log_density`, `ess_log_density`, `acceptance` (its mean), `step_size`.
    """

    draws: np.ndarray
    log_density: np.ndarray
    diagnostics: dict[str, float]


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo of all weights at once, on all data: the standard that cheaper methods are held against.

    ```
    log p(w | data) = Σ_examples log p(y | x, w) − ‖w‖² / 2σ² + constant
    ```

    Independent chains start at initial weights of their own and run side by side. Step sizes are found during the
    burn-in by dual averaging. Run it on JAX, where it is many times as fast as on TensorFlow.

    Attributes:
        prior_sd: σ, of the Gaussian prior on weights.
        chains: how many.
        draws: of each chain, after the burn-in.
        burn_in: draws that are thrown away.
        step_size: in the beginning.
        leapfrog_steps: of a draw.
        acceptance: that step sizes are to have.
        batch_size: examples in memory at once; all count in each step.
        probes: training examples on which the convergence of predictions is measured.

    Source: Neal, Handbook of MCMC, 2011, https://arxiv.org/abs/1206.1901; Hoffman, Gelman, JMLR 2014 (dual averaging).
    """

    prior_sd: float = 0.3
    chains: int = 4
    draws: int = 1000
    burn_in: int = 500
    step_size: float = 0.01
    leapfrog_steps: int = 30
    acceptance: float = 0.8
    batch_size: int = 2000
    probes: int = 100

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """All draws, chain after chain.

        Its `diagnostics` are those of `sample`, and `rhat_predictions` and `ess_predictions`: the worst and the least
        of probabilities of classes for the first training examples.

        Raises:
            UnsupportedLayer: batch normalisation, with which examples hang on each other.
            WrongArgument: numbers below what is possible.
            TrainingFailed: a log density is not finite.
        """
        if not self.prior_sd > 0 or self.probes < 1 or self.batch_size < 1:
            numbers = f"prior_sd={self.prior_sd!r}, probes={self.probes!r}, batch_size={self.batch_size!r}"
            raise WrongArgument(f"A prior, probes and batches are above 0: {numbers}.")
        check_run(model_fn, data, seed)
        members = Members.new(model_fn, self.chains, int(np.random.SeedSequence(seed).generate_state(1)[0]))
        model = members.model
        without_batch_statistics(model, type(self).__name__)
        vectors, others = Vectors(model), [ops.convert_to_numpy(one)[0] for one in members.non_trainable]
        likelihood = Likelihood(model, others, data, self.batch_size)

        def log_density(states: Any) -> Any:
            prior = -ops.sum(ops.square(states), axis=1) / (2 * self.prior_sd**2)
            return prior + ops.stack([likelihood(vectors.split(states[chain])) for chain in range(self.chains)])

        found = self.sample(log_density, vectors.of(members), seed)
        rows = found.draws.swapaxes(0, 1).reshape(-1, vectors.size)
        posterior = StackedPosterior(vectors.members(model, rows, others), diagnostics=found.diagnostics)
        rhat, ess = convergence(posterior.predict(data.x[: self.probes]), self.chains)
        posterior.diagnostics |= {
            "rhat_predictions": float(rhat.max()),
            "ess_predictions": float(np.nanmin(ess, initial=np.inf)),
        }
        return posterior

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {"prior_sd": Float(0.05, 2.0, log=True), "leapfrog_steps": Int(5, 200, log=True)}

    def sample(self, log_density: LogDensity, initial: np.ndarray, seed: int) -> Chains:
        """Draws of any density.

        Args:
            log_density: (chains, size) tensors of the backend to (chains,), differentiable.
            initial: (chains, size) where chains start; its length counts, not `chains`.
            seed: of all chance.

        Raises:
            WrongArgument: fewer than 4 draws, which have no convergence, or other numbers below what is possible.
            TrainingFailed: a log density is not finite.
        """
        if self.draws < 4 or self.burn_in < 1 or len(initial) < 1:
            numbers = f"draws={self.draws!r}, burn_in={self.burn_in!r}, chains={len(initial)!r}"
            raise WrongArgument(f"A chain takes 4 draws, a burn-in of 1 and one chain at least: {numbers}.")
        if not self.step_size > 0 or not 0 < self.acceptance < 1:
            numbers = f"step_size={self.step_size!r}, acceptance={self.acceptance!r}"
            raise WrongArgument(f"A step is above 0, an acceptance between 0 and 1: {numbers}.")
        self._check()
        mcmc = probability.library().mcmc
        kernel = mcmc.DualAveragingStepSizeAdaptation(
            self._kernel(mcmc, log_density),
            num_adaptation_steps=int(ADAPTED * self.burn_in),
            target_accept_prob=self.acceptance,
        )

        def trace(_: Any, results: Any) -> tuple[Any, Any, Any]:
            inner = results.inner_results
            return _density_of(inner), ops.exp(ops.minimum(inner.log_accept_ratio, 0.0)), results.new_step_size

        def run(start: Any, key: Any) -> Any:
            how = {"num_burnin_steps": self.burn_in, "kernel": kernel, "trace_fn": trace, "seed": key}
            return mcmc.sample_chain(self.draws, start, **how)

        start = ops.convert_to_tensor(np.asarray(initial, np.float32))
        draws, traced = compiled(run)(start, _key(seed))
        heights, accepted, sizes = (ops.convert_to_numpy(one) for one in traced)
        return _checked(ops.convert_to_numpy(draws), heights, accepted, sizes)

    def _check(self) -> None:
        """Raises WrongArgument where the length of a path is out of range."""
        if self.leapfrog_steps < 1:
            raise WrongArgument(f"A draw takes one step at least: leapfrog_steps={self.leapfrog_steps!r}.")

    def _kernel(self, mcmc: Any, log_density: LogDensity) -> Any:
        return mcmc.HamiltonianMonteCarlo(log_density, self.step_size, self.leapfrog_steps)


@dataclass(frozen=True)
class NUTS(HMC):
    """As `HMC`, with paths that end by themselves where they would turn back.

    Attributes:
        prior_sd, …, probes: of `HMC`; its `leapfrog_steps` does not count.
        max_tree_depth: 2 to the power of this is the most steps of a draw.

    Source: Hoffman, Gelman, JMLR 2014, https://arxiv.org/abs/1111.4246.
    """

    max_tree_depth: int = 8

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {"prior_sd": super().space()["prior_sd"], "max_tree_depth": Int(4, 10)}

    def _check(self) -> None:
        if self.max_tree_depth < 1:
            raise WrongArgument(f"A tree has a depth of 1 at least: max_tree_depth={self.max_tree_depth!r}.")

    def _kernel(self, mcmc: Any, log_density: LogDensity) -> Any:
        return mcmc.NoUTurnSampler(log_density, self.step_size, max_tree_depth=self.max_tree_depth)


def convergence(values: np.ndarray, chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Split R-hat, and the effective number of draws, of numbers that chains drew.

    ```
    R̂² = (between + (1 − 1/k) within) / within, of halves of chains, of k draws each
    ```

    Args:
        values: (chains · draws, …), chain after chain, as a posterior's `predict` gives them.
        chains: how many.

    Returns:
        Two arrays (…). A number that never changes has an R-hat of 1 and no effective number (NaN).

    Source: Gelman et al., Bayesian Data Analysis, 3rd edition, 11.4, 11.5.
    """
    found = np.asarray(values, np.float64).reshape(chains, -1, *np.shape(values)[1:])
    constant = (found == found[:1, :1]).all(axis=(0, 1))
    draws = found.shape[1] // 2
    # In NumPy, since that of tensorflow-probability is a square, and another one.
    halves = found[:, : 2 * draws].reshape(2 * chains, draws, *found.shape[2:])
    within, between = halves.var(axis=1, ddof=1).mean(axis=0), halves.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat = np.sqrt(between / within + 1 - 1 / draws)
    # Chains of which there is one have nothing across, and keep their axis.
    across = 1 if chains > 1 else None
    tensor = ops.convert_to_tensor(found.swapaxes(0, 1).astype(np.float32))
    effective = probability.library().mcmc.effective_sample_size
    with _quiet():
        ess = ops.convert_to_numpy(effective(tensor, cross_chain_dims=across, filter_beyond_positive_pairs=True))
    return np.where(constant, 1.0, rhat), np.where(constant, np.nan, ess.reshape(constant.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tensorflow-probability drops imaginary parts that are zero, of which TensorFlow warns."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _density_of(results: Any) -> Any:
    """NUTS says it itself, HMC of what it accepted."""
    return getattr(results, "accepted_results", results).target_log_prob


def _key(seed: int) -> Any:
    words = np.random.SeedSequence([seed, 5]).generate_state(2)
    if keras.backend.backend() == "jax":
        import jax

        return jax.random.PRNGKey(int(words[0] >> 1))
    return ops.convert_to_tensor((words >> 1).astype("int32"))


def _checked(draws: np.ndarray, heights: np.ndarray, accepted: np.ndarray, sizes: np.ndarray) -> Chains:
    if not np.isfinite(heights).all():
        draw, chain = np.argwhere(~np.isfinite(heights))[0]
        raise TrainingFailed(f"The log density of chain {chain} is {heights[draw, chain]} at draw {draw}.")
    rhat, ess = convergence(heights.T.reshape(-1), heights.shape[1])
    said = {
        "rhat_log_density": float(rhat),
        "ess_log_density": float(ess),
        "acceptance": float(accepted.mean()),
        "step_size": float(np.ravel(sizes)[-1]),
    }
    return Chains(draws, heights, said)

"""Samplers that go from mode to mode in cycles."""

from __future__ import annotations

from dataclasses import dataclass, field

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import Drawn, ModelFunction, check_run, steps_of, walked
from keras_efficient.bayes.inference.space import Choice, Float, Int, Space
from keras_efficient.bayes.optimizers import SGHMC, CyclicCosine, CyclicTemperature
from keras_efficient.bayes.posterior import StackedPosterior
from keras_efficient.errors import WrongArgument
from keras_efficient.seeds import seed_of

__all__ = ["CSGHMC", "CSGLD", "SnapshotEnsemble"]


@dataclass(frozen=True)
class CSGHMC:
    """Stochastic-gradient HMC in cycles: a large step finds a mode, small ones with noise draw from it.

    Attributes:
        learning_rate: at the beginning of each cycle.
        alpha: friction.
        prior_sd: standard deviation of the Gaussian prior on weights.
        temperature: of the posterior; 1 is Bayes' own.
        cycles, epochs_per_cycle: how long.
        samples_per_cycle: draws, after each of a cycle's last epochs.
        noise_from: part of a cycle after which there is noise.
        chains: runs from initial weights of their own, all draws of which count.
        batch_size: of training.

    Source: Zhang, Li, Zhang, Chen, Wilson, ICLR 2020, https://arxiv.org/abs/1902.03932.
    """

    learning_rate: float = 0.1
    alpha: float = 0.1
    prior_sd: float = 0.234
    temperature: float = 1.0
    cycles: int = 6
    epochs_per_cycle: int = 20
    samples_per_cycle: int = 4
    noise_from: float = 0.6
    chains: int = 1
    batch_size: int = 64

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """Draws of all cycles of all chains.

        Raises:
            WrongArgument: more samples in a cycle than epochs, or no cycle.
        """
        if self.cycles < 1 or not self.learning_rate > 0:
            numbers = f"cycles={self.cycles!r}, learning_rate={self.learning_rate!r}"
            raise WrongArgument(f"There is one cycle at least, and a learning rate above 0: {numbers}.")
        if not 1 <= self.samples_per_cycle <= self.epochs_per_cycle:
            raise WrongArgument(f"A cycle of {self.epochs_per_cycle} epochs has no {self.samples_per_cycle} samples.")
        check_run(model_fn, data, seed)
        steps = steps_of(data, self.batch_size) * self.epochs_per_cycle
        optimizer = SGHMC(
            CyclicCosine(self.learning_rate, steps),
            len(data),
            alpha=self.alpha,
            prior_sd=self.prior_sd,
            temperature=self.temperature and CyclicTemperature(self.temperature, steps, self.noise_from),
            restart_every=steps,
            seed=seed_of(seed, 1),
        )
        run = {"members": self.chains, "epochs": self.cycles * self.epochs_per_cycle, "batch_size": self.batch_size}
        drawn = Drawn(data)
        for epoch, some in walked(model_fn, data, optimizer, seed=seed, **run):
            if (epoch - 1) % self.epochs_per_cycle >= self.epochs_per_cycle - self.samples_per_cycle:
                drawn.add(some)
        return drawn.posterior()

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        return {
            "learning_rate": Float(0.01, 0.5, log=True),
            "alpha": Float(0.02, 1.0, log=True),
            "prior_sd": Float(0.05, 2.0, log=True),
            "epochs_per_cycle": Int(10, 50),
            "samples_per_cycle": Int(1, 8),
            "noise_from": Float(0.5, 0.95),
            "batch_size": Choice((32, 64, 128, 256)),
        }


@dataclass(frozen=True)
class CSGLD(CSGHMC):
    """As `CSGHMC`, without momentum.

    Attributes:
        learning_rate: ten times that of `CSGHMC` goes as far, since nothing is carried on.
        alpha: 1.
    """

    learning_rate: float = 1.0
    alpha: float = field(default=1.0, init=False)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        mine: Space = {name: some for name, some in super().space().items() if name != "alpha"}
        return {**mine, "learning_rate": Float(0.1, 2.0, log=True)}


@dataclass(frozen=True)
class SnapshotEnsemble:
    """The network at the end of each cycle of a training whose learning rate begins anew: an ensemble for one run.

    Attributes:
        learning_rate: at the beginning of each cycle.
        alpha: one minus the momentum.
        prior_sd: standard deviation of the Gaussian prior on weights.
        members: cycles, and snapshots.
        epochs_per_cycle: epochs from one to the next.
        batch_size: of training.

    Source: Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, ICLR 2017, https://arxiv.org/abs/1704.00109.
    """

    learning_rate: float = 0.1
    alpha: float = 0.1
    prior_sd: float = 0.234
    members: int = 6
    epochs_per_cycle: int = 20
    batch_size: int = 128

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """A draw for each cycle."""
        cycles = CSGHMC(
            learning_rate=self.learning_rate,
            alpha=self.alpha,
            prior_sd=self.prior_sd,
            temperature=0.0,
            cycles=self.members,
            epochs_per_cycle=self.epochs_per_cycle,
            samples_per_cycle=1,
            batch_size=self.batch_size,
        )
        return cycles.fit(model_fn, data, seed)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary."""
        names = ("learning_rate", "alpha", "prior_sd", "epochs_per_cycle", "batch_size")
        return {name: CSGHMC.space()[name] for name in names}

"""Hyper-parameters of a method, found on data that no test sees."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import divided
from keras_efficient.bayes.inference.space import Choice, Float, Int
from keras_efficient.bayes.tasks import prediction
from keras_efficient.bayes.training import TrainingFailed
from keras_efficient.errors import MissingDependency, UnknownName, WrongArgument

__all__ = ["Tune", "Tuned"]


@dataclass(frozen=True)
class Tuned:
    """The best of some trials.

    Attributes:
        method: with its fields set.
        value: its smoothed NLL on held-out data.
        trials: fields and value of each, in their order; a value of `None`: it failed.
    """

    method: Any
    value: float
    trials: tuple[tuple[dict[str, Any], float | None], ...]


@dataclass(frozen=True)
class Tune:
    """Searches a method's fields by Optuna; the objective is the smoothed NLL of held-out data.

    Every trial begins with fresh weights, drawn from the same seed.

    Attributes:
        method: what is tuned; fields that are not searched keep their values.
        trials: how many, those of before included where there is a file.
        space: field to `Float`, `Int` or `Choice`; `None`: the method's own.
        held_out: share of the data that is not trained on; 0.2 as in the paper.
        path: of an SQLite file that keeps the trials, so that a search goes on where it was; `None`: none.

    Raises:
        WrongArgument: a field that the method lacks, or shares and numbers out of range.
        MissingDependency: Optuna is not installed.
    """

    method: Any
    trials: int = 30
    space: dict[str, Float | Int | Choice] | None = None
    held_out: float = 0.2
    path: str | Path | None = None

    def __post_init__(self) -> None:
        fields = [one.name for one in dataclasses.fields(self.method)]
        for name in self.space or {}:
            if name not in fields:
                raise UnknownName(f"field of {type(self.method).__name__}", name, fields)
        if self.trials < 1 or not 0 < self.held_out < 1:
            raise WrongArgument(f"Trials are 1 or more, a share is between 0 and 1: {self.trials}, {self.held_out}.")

    def run(
        self,
        model_fn: Callable[[], keras.Model],
        data: Data,
        seed: int,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tuned:
        """Searches.

        Args:
            model_fn: gives the network.
            data: of which a part is held out, the same in every trial.
            seed: of the split, of the search and of each trial's training.
            progress: is called with trials done, and in all.

        Raises:
            TrainingFailed: no trial gave a finite value.
        """
        optuna = _optuna()
        space = self.space or type(self.method).space()
        rest, held = divided(data, self.held_out, seed)

        def objective(trial: Any) -> float:
            method = dataclasses.replace(self.method, **{name: _asked(trial, name, one) for name, one in space.items()})
            try:
                p = method.fit(model_fn, rest, seed).predict(held.x, reduce="mean")
                return prediction(p, held.y)["nll_smoothed"]
            except (TrainingFailed, WrongArgument) as err:  # a combination that does not go
                raise optuna.TrialPruned(str(err)) from err

        with _quiet(optuna):
            study = self._study(optuna, data, seed)
            while (done := sum(trial.state.is_finished() for trial in study.trials)) < self.trials:
                if progress is not None:
                    progress(done, self.trials)
                study.optimize(objective, n_trials=1)
            return self._best(study)

    def _study(self, optuna: Any, data: Data, seed: int) -> Any:
        storage = None if self.path is None else f"sqlite:///{Path(self.path).absolute()}"
        # Trials of another method, space or data are another search's.
        what = f"{self.method!r} {self.space!r} {self.held_out!r} {data.x.shape} {seed}".encode()
        name = f"{type(self.method).__name__}-{hashlib.sha256(what + data.y.tobytes()).hexdigest()[:16]}"
        made = {"study_name": name, "storage": storage, "load_if_exists": True}
        study = optuna.create_study(direction="minimize", **made)
        # A search that goes on must not ask again for what its sampler asked at first.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
        return study

    def _best(self, study: Any) -> Tuned:
        trials = tuple((dict(one.params), one.value) for one in study.trials if one.state.is_finished())
        if not any(value is not None for _, value in trials):
            raise TrainingFailed(f"None of {len(trials)} trials of {type(self.method).__name__} ended with a number.")
        return Tuned(dataclasses.replace(self.method, **study.best_params), float(study.best_value), trials)


def _asked(trial: Any, name: str, one: Float | Int | Choice) -> Any:
    if isinstance(one, Choice):
        return trial.suggest_categorical(name, list(one.options))
    suggest = trial.suggest_float if isinstance(one, Float) else trial.suggest_int
    return suggest(name, one.low, one.high, log=one.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as err:
        raise MissingDependency("optuna", "Tuning", "bayes") from err
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """A search tells of itself by `progress`; lines of Optuna for each trial are noise."""
    kept = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(kept)

"""Optimizers that draw from a posterior instead of going to its top."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_efficient.errors import WrongArgument

__all__ = ["SGHMC", "SGLD", "CyclicCosine", "CyclicTemperature"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class SGHMC(keras.optimizers.Optimizer):
    """Stochastic-gradient Hamiltonian Monte Carlo: momentum, friction, and the noise that makes up for the friction.

    ```
    v ← (1 − α) v − ε (∇L + w / (σ² N)) + √(2 α ε T / N) ξ          ξ ~ N(0, 1)
    w ← w + v
    ```

    L is the mean loss over a batch, a negative log-likelihood; then at temperature T = 1 and small ε weights are draws
    of the density ∝ exp(−N · mean loss − ‖w‖² / 2σ²). Lower temperatures sharpen it. Its errors grow with ε / α and
    with the noise of small batches. The prior is here and nowhere else: no `kernel_regularizer` besides. Without noise
    (T = 0) this is SGD with a momentum of 1 − α.

    Args:
        learning_rate: ε, a number or a schedule.
        num_data: N, examples in the training set.
        alpha: friction, above 0, at most 1: one minus the momentum.
        prior_sd: σ, of a Gaussian prior on every weight that `exclude_from_prior` does not name; `None`: a flat prior.
        temperature: T, a number from 0 on or a schedule.
        restart_every: steps after which the momentum begins at zero again, as learning rates of cycles do.
        seed: of the noise.
        options: of `keras.optimizers.Optimizer`, but for `weight_decay`.

    Raises:
        WrongArgument: numbers out of range, or a `weight_decay`, which would be a second prior.

    Source: Chen, Fox, Guestrin, ICML 2014, https://arxiv.org/abs/1402.4102, equation 15.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        num_data: int = 1,
        *,
        alpha: float = 0.1,
        prior_sd: float | None = None,
        temperature: float | keras.optimizers.schedules.LearningRateSchedule = 1.0,
        restart_every: int | None = None,
        seed: int | None = None,
        name: str | None = None,
        **options: Any,
    ):
        if options.get("weight_decay") is not None:
            raise WrongArgument("`weight_decay` would be a second prior.", hint="Give `prior_sd` alone.")
        is_number = not _is_schedule(temperature)
        if num_data < 1 or not 0 < alpha <= 1 or (prior_sd is not None and not prior_sd > 0):
            numbers = f"num_data={num_data!r}, alpha={alpha!r}, prior_sd={prior_sd!r}"
            raise WrongArgument(f"Data are 1 or more, alpha is above 0 and at most 1, a prior wider than 0: {numbers}.")
        if (is_number and not temperature >= 0) or (restart_every is not None and restart_every < 1):
            numbers = f"temperature={temperature!r}, restart_every={restart_every!r}"
            raise WrongArgument(f"A temperature is 0 or more, a restart after 1 step or more: {numbers}.")
        super().__init__(learning_rate, name=name, **options)
        self.num_data, self.alpha, self.prior_sd = num_data, alpha, prior_sd
        self.temperature, self.restart_every, self.seed = temperature, restart_every, seed
        self._noise = keras.random.SeedGenerator(seed)
        self._track_variable(self._noise.state)  # saved, and handed on by `stateless_apply`

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        if self.alpha < 1:
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def exclude_from_prior(self, var_list: list[Any] | None = None, var_names: list[str] | None = None) -> None:
        """Gives variables a flat prior; call it before `build`.

        Args:
            var_list: variables.
            var_names: regular expressions of their names.
        """
        self.exclude_from_weight_decay(var_list, var_names)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        dtype = variable.dtype
        rate, gradient = ops.cast(learning_rate, dtype), ops.cast(gradient, dtype)
        if self.prior_sd is not None and self._use_weight_decay(variable):
            gradient = gradient + variable / (self.prior_sd**2 * self.num_data)
        move = -rate * gradient
        if _is_schedule(self.temperature) or self.temperature > 0:
            temperature = ops.cast(_at(self.temperature, self.iterations), dtype)
            width = ops.sqrt(2 * self.alpha * rate * temperature / self.num_data)
            move = move + width * keras.random.normal(variable.shape, dtype=dtype, seed=self._noise)
        if self.alpha < 1:
            momentum = self.momentums[self._get_variable_index(variable)]
            kept = (1 - self.alpha) * momentum
            if self.restart_every is not None:
                kept = kept * ops.cast(self.iterations % self.restart_every != 0, dtype)
            move = kept + move
            self.assign(momentum, move)
        self.assign_add(variable, move)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("weight_decay", None)
        names = ("num_data", "alpha", "prior_sd", "restart_every", "seed")
        config |= {name: getattr(self, name) for name in names}
        is_schedule = _is_schedule(self.temperature)
        config["temperature"] = (
            keras.saving.serialize_keras_object(self.temperature) if is_schedule else self.temperature
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SGHMC:
        if isinstance(config.get("temperature"), dict):
            found = keras.saving.deserialize_keras_object(config["temperature"], custom_objects=custom_objects)
            config = {**config, "temperature": found}
        made: SGHMC = super().from_config(config, custom_objects=custom_objects)
        return made


@keras.saving.register_keras_serializable(package="keras_efficient")
class SGLD(SGHMC):
    """Stochastic-gradient Langevin dynamics: a gradient step and noise, which is `SGHMC` without any momentum.

    ```
    w ← w − ε (∇L + w / (σ² N)) + √(2 ε T / N) ξ
    ```

    Args:
        learning_rate, num_data, prior_sd, temperature, seed: of `SGHMC`.

    Source: Welling, Teh, ICML 2011.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        num_data: int = 1,
        **options: Any,
    ):
        if options.pop("alpha", 1.0) != 1.0:
            raise WrongArgument("SGLD has no momentum: `alpha` is 1.", hint="SGHMC has one.")
        super().__init__(learning_rate, num_data, alpha=1.0, **options)


class _Cyclic(keras.optimizers.schedules.LearningRateSchedule):
    """What begins anew after each cycle.

    Args:
        initial: of each cycle.
        cycle_steps: steps of a cycle.
    """

    def __init__(self, initial: float, cycle_steps: int):
        if not initial >= 0 or cycle_steps < 1:
            raise WrongArgument(f"A cycle begins at 0 or more and has a step at least: {initial!r}, {cycle_steps!r}.")
        self.initial, self.cycle_steps = initial, cycle_steps

    def _phase(self, step: Any) -> Any:
        return ops.cast(ops.cast(step, "int32") % self.cycle_steps, "float32") / self.cycle_steps

    def get_config(self) -> dict[str, Any]:
        return {"initial": self.initial, "cycle_steps": self.cycle_steps}


@keras.saving.register_keras_serializable(package="keras_efficient")
class CyclicCosine(_Cyclic):
    """A learning rate that falls along half a cosine and begins anew.

    ```
    rate = ½ initial (cos(π · (step mod cycle_steps) / cycle_steps) + 1)
    ```

    Source: Zhang, Li, Zhang, Chen, Wilson, ICLR 2020, https://arxiv.org/abs/1902.03932, equation 1.
    """

    def __call__(self, step: Any) -> Any:
        return 0.5 * self.initial * (ops.cos(math.pi * self._phase(step)) + 1.0)


@keras.saving.register_keras_serializable(package="keras_efficient")
class CyclicTemperature(_Cyclic):
    """No noise at the beginning of a cycle, where the way to a mode is looked for, and a temperature afterwards.

    Args:
        initial: the temperature.
        cycle_steps: steps of a cycle.
        noise_from: the part of a cycle from which on there is noise, 0 to 1.
    """

    def __init__(self, initial: float, cycle_steps: int, noise_from: float = 0.6):
        super().__init__(initial, cycle_steps)
        if not 0 <= noise_from <= 1:
            raise WrongArgument(f"`noise_from` is a part of a cycle, from 0 to 1, not {noise_from!r}.")
        self.noise_from = noise_from

    def __call__(self, step: Any) -> Any:
        return self.initial * ops.cast(self._phase(step) >= self.noise_from, "float32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "noise_from": self.noise_from}


def _at(value: Any, step: Any) -> Any:
    return value(step) if _is_schedule(value) else value


def _is_schedule(value: Any) -> bool:
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)

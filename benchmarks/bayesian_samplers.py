"""Samplers against posteriors that are known exactly, and HMC's convergence on digits: sections of `ursabench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.harness import Row
from keras_efficient.bayes import SGHMC, SGLD, CyclicCosine, CyclicTemperature, Data, tasks
from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.inference import HMC, NUTS
from keras_efficient.bayes.inference.hamiltonian import convergence
from keras_efficient.bayes.inference.laplace import Full
from keras_efficient.bayes.inference.subspace import elliptical_slice, mean_field, principal

__all__ = ["hmc", "samplers"]

N, PRIOR_SD, SEEDS = 500, 0.05, (0, 1, 2)
STEP = 0.02  # of SGLD and SGHMC; curvatures of the mean loss are 0.4 to 2.5
CYCLES, CYCLE_STEPS, MODE = 20, 1600, 3.0

Found = tuple[np.ndarray, np.ndarray]  # mean and standard deviation of each weight


def samplers(quick: bool) -> Iterator[Row]:
    """Mean and standard deviation of three weights of a linear model, and weights of two modes."""
    x, y = _regression()
    precision = x.T @ x + np.eye(3) / PRIOR_SD**2
    exact = _gaussian(precision, x.T @ y)
    seeds = SEEDS[: 1 if quick else None]
    part = 4 if quick else 1

    def released(seed: int) -> Found:
        """Noise of a standard deviation that is too small by the square root of N: a temperature of 1 / N."""
        return _followed(SGHMC(STEP, N, prior_sd=PRIOR_SD, temperature=1 / N, seed=seed), x, y, part)

    peer = max(_deviation(released(seed), exact) for seed in seeds[:1])
    small = {"step": STEP, "batch": "all data", "prior sd": PRIOR_SD}
    yield _row(
        "SGHMC (peer: the noise of the released code)",
        lambda seed: _followed(SGHMC(STEP, N, prior_sd=PRIOR_SD, seed=seed), x, y, part),
        exact,
        seeds,
        {**small, "alpha": 0.1},
        peer=round(peer, 4),
    )
    yield _row(
        "SGLD", lambda seed: _followed(SGLD(STEP, N, prior_sd=PRIOR_SD, seed=seed), x, y, part), exact, seeds, small
    )

    def log_density(states: Any) -> Any:
        errors = ops.matmul(states, x.T.astype("float32")) - y.astype("float32")
        return -0.5 * (ops.sum(ops.square(errors), axis=1) + ops.sum(ops.square(states), axis=1) / PRIOR_SD**2)

    for method in (
        HMC(draws=1000 // part, burn_in=300, leapfrog_steps=8),
        NUTS(draws=1000 // part, burn_in=300),
    ):
        name = type(method).__name__

        def sampled(seed: int, method: HMC = method) -> Found:
            start = np.random.default_rng(seed).normal(size=(16, 3))
            return _moments(method.sample(log_density, start, seed).draws.reshape(-1, 3))

        yield _row(name, sampled, exact, seeds, {"chains": 16, "method": repr(method)})

    # A subspace of full rank: the principal directions of weights about the top of the likelihood, as of a path.
    path = np.linalg.solve(x.T @ x, x.T @ y) + PRIOR_SD * np.random.default_rng(4).normal(size=(8, 3))
    mean, basis = principal(path, 3)
    directions = x @ basis
    inner_precision = directions.T @ directions + np.eye(3)
    inner = _gaussian(inner_precision, directions.T @ (y - x @ mean))
    in_weights = mean + basis @ inner[0], np.sqrt(np.diag(basis @ np.linalg.inv(inner_precision) @ basis.T))

    def log_likelihood(place: np.ndarray) -> float:
        errors = directions @ place + x @ mean - y
        return float(-0.5 * errors @ errors)

    def sliced(seed: int) -> Found:
        chain = elliptical_slice(log_likelihood, np.zeros(3), 1.0, np.random.default_rng(seed))
        drawn = np.stack([next(chain) for _ in range(40_000 // part)][100:])
        return _moments(mean + drawn @ basis.T)

    yield _row("elliptical slices in a subspace of full rank", sliced, in_weights, seeds, {"draws": 40_000 // part})

    def climbed(seed: int) -> Found:
        def derivative(place: np.ndarray) -> np.ndarray:
            slope: np.ndarray = -directions.T @ (directions @ place + x @ mean - y)
            return slope

        return mean_field(derivative, 3, 1.0, np.random.default_rng(seed), steps=10_000)

    factorised = inner[0], 1 / np.sqrt(np.diag(inner_precision))
    yield _row(
        "mean-field VI in it (exact: the diagonal of the precision)", climbed, factorised, seeds, {"steps": 10_000}
    )

    def around(seed: int) -> Found:
        top, _ = _followed(SGHMC(STEP, N, prior_sd=PRIOR_SD, temperature=0.0), x, y, part)
        curvature, random = Full(x.T @ x, 1), np.random.default_rng(seed)
        drawn = np.stack([curvature.draw(random, PRIOR_SD**-2)[:, 0] for _ in range(20_000)])
        return _moments(top + drawn)

    yield _row("Laplace, all covariances, around gradient descent's end", around, exact, seeds, {"draws": 20_000})
    yield from _cyclic(seeds, 32 if quick else 128)


def hmc(quick: bool) -> Iterator[Row]:
    """Four chains on scikit-learn's digits; R-hat of probabilities of examples that were not trained on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] - 8) / 8, y[order]
    method = HMC(draws=20, burn_in=20, leapfrog_steps=5) if quick else HMC(**DIGITS)
    began = time.perf_counter()
    posterior = method.fit(_digits_network, Data(x[:1300], y[:1300], 10), seed=0)
    seconds = time.perf_counter() - began
    found = posterior.predict(x[1300:])
    rhat, ess = convergence(found, method.chains)
    scores = tasks.prediction(found, y[1300:])
    yield Row(
        "HMC, digits, MLP 64-32-10 (2,410 parameters), 4 chains: largest split R-hat of the test set's probabilities",
        round(float(rhat.max()), 4),
        "",
        bar="≤ 1.01",
        reached=bool(rhat.max() <= 1.01),
        details={
            "backend": keras.backend.backend(),
            "method": repr(method),
            "seconds": round(seconds, 1),
            "examples": len(found[0]),
            "least effective draws": round(float(np.nanmin(ess)), 1),
            **{name: round(value, 4) for name, value in posterior.diagnostics.items()},
            **{name: round(scores[name], 4) for name in ("error", "nll", "ece")},
        },
    )


DIGITS: dict[str, Any] = {"prior_sd": 0.3, "draws": 700, "burn_in": 200, "leapfrog_steps": 60}


def _digits_network() -> keras.Model:
    inputs = keras.Input((64,))
    return keras.Model(inputs, layers.Dense(10)(layers.Dense(32, activation="relu")(inputs)))


def _row(
    name: str, run: Callable[[int], Found], exact: Found, seeds: tuple[int, ...], details: dict[str, Any], **more: Any
) -> Row:
    found = [run(seed) for seed in seeds]
    worst = max(_deviation(one, exact) for one in found)
    return Row(
        f"linear-Gaussian posterior, {N} examples, 3 weights, {name}: largest deviation of a mean or sd, in exact sds",
        round(worst, 4),
        "",
        bar="≤ 0.05",
        reached=worst <= 0.05,
        details={
            **details,
            "backend": keras.backend.backend(),
            "seeds": list(seeds),
            "sd over exact": [np.round(sd / exact[1], 4).tolist() for _, sd in found],
            "mean less exact, in sds": [np.round((mean - exact[0]) / exact[1], 4).tolist() for mean, _ in found],
        },
        **more,
    )


def _regression() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and answers of a linear model with unit noise."""
    random = np.random.default_rng(1)
    x = random.normal(size=(N, 3)) @ np.array([[1.0, 0.4, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 1.2]])
    return x, x @ [0.5, -1.0, 0.2] + random.normal(size=N)


def _gaussian(precision: np.ndarray, shift: np.ndarray) -> Found:
    covariance = np.linalg.inv(precision)
    return covariance @ shift, np.sqrt(np.diag(covariance))


def _moments(drawn: np.ndarray) -> Found:
    return drawn.mean(axis=0, dtype=np.float64), drawn.std(axis=0, dtype=np.float64)


def _deviation(found: Found, exact: Found) -> float:
    (mean, sd), (exact_mean, exact_sd) = found, exact
    return float(max(np.abs((mean - exact_mean) / exact_sd).max(), np.abs(sd / exact_sd - 1).max()))


def _followed(optimizer: SGHMC, x: np.ndarray, y: np.ndarray, part: int) -> Found:
    """256 chains from zero on, by gradients of the mean loss of all data."""
    squares, products = ((x.T @ one / N).astype("float32") for one in (x, y))
    places = _walk(optimizer, np.zeros((256, 3), "float32"), lambda w: ops.matmul(w, squares) - products)
    kept = [next(places) for _ in range(6000 // part)][2000 // part :: 5]
    return _moments(np.concatenate(kept))


def _walk(optimizer: SGHMC, start: np.ndarray, gradient: Callable[[Any], Any]) -> Iterator[np.ndarray]:
    """Where an optimizer is after each step, without an end."""
    weights = keras.Variable(start)
    optimizer.build([weights])
    if keras.backend.backend() == "tensorflow":
        step = compiled(lambda: optimizer.apply([gradient(weights)], [weights]))
        while True:
            step()
            yield ops.convert_to_numpy(weights)
    step = compiled(lambda value, state: optimizer.stateless_apply(state, [gradient(value[0])], value))
    value, state = [weights.value], [one.value for one in optimizer.variables]
    while True:
        value, state = step(value, state)
        yield ops.convert_to_numpy(value[0])


def _cyclic(seeds: tuple[int, ...], chains: int) -> Iterator[Row]:
    """Chains that all begin in one of two modes."""

    def gradient(places: Any) -> Any:
        """Of −ln(½ N(w; (3, 0), I) + ½ N(w; (−3, 0), I)): w less the mean over modes by their responsibilities."""
        first, second = places[:, :1], places[:, 1:]
        return ops.concatenate([first - MODE * ops.tanh(MODE * first), second], axis=1)

    start = np.tile(np.float32([MODE, 0.0]), (chains, 1))

    def drawn(optimizer: SGHMC) -> np.ndarray:
        """(draws, chains, 2): each tenth place of the last tenth of each cycle."""
        places = _walk(optimizer, start, gradient)
        every = np.stack([next(places).copy() for _ in range(CYCLES * CYCLE_STEPS)])
        late = every.reshape(CYCLES, CYCLE_STEPS, chains, 2)[:, CYCLE_STEPS * 9 // 10 :: 10]
        return late.reshape(-1, chains, 2)

    peer = drawn(SGLD(0.001, 1, seed=0))
    for name, alpha, rate in (("cSGLD", 1.0, 1.5), ("cSGHMC", 0.3, 1.5)):
        schedules = CyclicCosine(rate, CYCLE_STEPS), CyclicTemperature(1.0, CYCLE_STEPS, 0.0)
        how = {"alpha": alpha, "temperature": schedules[1], "restart_every": CYCLE_STEPS}
        found = [drawn(SGHMC(schedules[0], 1, seed=seed, **how)) for seed in seeds]
        weights = [float((one[..., 0] > 0).mean()) for one in found]
        both = min(float(((one[..., 0] > 0).any(axis=0) & (one[..., 0] < 0).any(axis=0)).mean()) for one in found)
        worst = max(abs(weight - 0.5) for weight in weights)
        details = {
            "backend": keras.backend.backend(),
            "seeds": list(seeds),
            "chains of each seed": chains,
            "learning rate at a cycle's beginning": rate,
            "steps of a cycle": CYCLE_STEPS,
            "noise": "from each cycle's beginning on",
            "weights of the mode where chains begin": [round(weight, 4) for weight in weights],
            "mean and sd within modes, exact 3, 0, 1, 1": [np.round(_within(one), 4).ravel().tolist() for one in found],
            "peer": "SGLD at a constant step of 0.001, which does not leave the mode",
        }
        yield Row(
            f"two Gaussians 6 sds apart, {name}, {CYCLES} cycles: share of chains that find both modes",
            round(both, 4),
            "",
            bar="1",
            reached=both == 1,
            details=details,
        )
        yield Row(
            f"two Gaussians 6 sds apart, {name}, {CYCLES} cycles: largest deviation of a mode's weight from ½",
            round(worst, 4),
            "",
            peer=round(abs(float((peer[..., 0] > 0).mean()) - 0.5), 4),
            bar="≤ 0.1",
            reached=worst <= 0.1,
            details=details,
        )
        worst = max(_deviation(_within(one), (np.array([MODE, 0.0]), np.ones(2))) for one in found)
        yield Row(
            f"two Gaussians 6 sds apart, {name}, {CYCLES} cycles: largest deviation of a mean or sd within modes",
            round(worst, 4),
            "",
            bar="≤ 0.05",
            reached=worst <= 0.05,
            details=details,
        )


def _within(drawn: np.ndarray) -> Found:
    """Mean and standard deviation about a mode, both modes laid upon each other."""
    return _moments((drawn * np.where(drawn[..., :1] > 0, 1.0, -1.0)).reshape(-1, 2))

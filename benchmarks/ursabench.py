"""Bayesian networks: samplers against exact posteriors, methods on MNIST, speed.

    python -m benchmarks.ursabench

The training on MNIST takes an hour on a core; probabilities of what is trained are kept in runs/ursabench.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from benchmarks import bayesian_exports, bayesian_layers, bayesian_samplers, bayesian_speed, harness
from benchmarks.harness import Row
from keras_efficient.atomic import replacing
from keras_efficient.bayes import Data, tasks
from keras_efficient.bayes.inference import CSGHMC, MAP, SWAG, DeepEnsemble, LastLayerLaplace

FOLDER = Path("runs/ursabench")
SEEDS = (0, 1, 2)
MEAN, DEVIATION = 0.1307, 0.3081
# Chosen on ten thousand training examples that were held out.
METHODS: dict[str, Any] = {
    "MAP": MAP(),
    "cSGHMC, T = 0.1": CSGHMC(temperature=0.1),
    "cSGHMC, T = 1": CSGHMC(temperature=1.0, prior_sd=0.14),
    "ensemble of 8": DeepEnsemble(),
    "SWAG": SWAG(averaging_rate=0.05),
    "last-layer Laplace": LastLayerLaplace(),
}
# Against the MAP of the same seed: SWAG and Laplace begin at the very weights of it. Whether a tie is enough.
PAIRED = {"ensemble of 8": False, "SWAG": True, "last-layer Laplace": True}
BARS = {
    "MAP": {"error": 0.0160, "nll_smoothed": 0.0560},
    "cSGHMC, T = 0.1": {"error": 0.0153, "nll_smoothed": 0.0463, "ece": 0.0060},
}


def mlp200() -> keras.Model:
    inputs = keras.Input((784,))
    x = layers.Dense(200, activation="relu")(inputs)
    x = layers.Dense(200, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def mnist(quick: bool) -> Iterator[Row]:
    """Error, NLL and calibration on the test set."""
    train, (x, y) = _mnist("train"), _mnist("t10k")
    data = Data(*(part[: 2000 if quick else None] for part in train), 10)
    nll: dict[str, np.ndarray] = {}
    for name, method in METHODS.items():
        method = _short(method) if quick else method
        found = [_probabilities(method, seed, data, x, quick) for seed in SEEDS[: 2 if quick else None]]
        scores = [tasks.prediction(probabilities, y) for probabilities, _ in found]
        seconds = [round(one, 1) for _, one in found]
        for metric in ("error", "nll_smoothed", "ece", "nll", "brier", "adaptive_ece"):
            values = [score[metric] for score in scores]
            bar = BARS.get(name, {}).get(metric)
            mean = float(np.mean(values))
            details = {"seeds": values, "method": repr(method), "seconds": seconds, "draws": len(found[0][0])}
            if len(values) > 1:
                details["standard error"] = float(np.std(values, ddof=1) / len(values) ** 0.5)
            barred: dict[str, Any] = {} if bar is None else {"bar": f"≤ {bar}", "reached": mean <= bar}
            what = f"MLP200, MNIST, {len(values)} seeds, {name}: {metric}"
            yield Row(what, round(mean, 5), "", details=details, **barred)
        nll[name] = np.array([score["nll_smoothed"] for score in scores])
    for name, may_tie in PAIRED.items():
        more = nll[name] - nll["MAP"]
        error = float(more.std(ddof=1) / len(more) ** 0.5)
        yield Row(
            f"MLP200, MNIST, {len(more)} seeds, {name}: nll_smoothed more than that of the same seed's MAP",
            round(float(more.mean()), 5),
            "",
            bar="< 0, or a tie within two standard errors" if may_tie else "< 0",
            reached=bool(more.mean() <= 2 * error if may_tie else more.mean() < 0),
            details={"seeds": more.tolist(), "standard error": error},
        )


def _short(method: Any) -> Any:
    if isinstance(method, CSGHMC):
        return replace(method, cycles=1, epochs_per_cycle=4)
    if isinstance(method, SWAG):
        return replace(method, epochs=2, averaging_epochs=2)
    return replace(method, epochs=2)


def _probabilities(method: Any, seed: int, data: Data, x: np.ndarray, quick: bool) -> tuple[np.ndarray, float]:
    """Of the test set, (draws, n, 10), and the seconds of training."""
    name = "".join(letter if letter.isalnum() else "-" for letter in repr(method))
    path = FOLDER / ("quick" if quick else "mnist") / f"{name}-{seed}.npz"
    if not path.exists():
        began = time.perf_counter()
        posterior = method.fit(mlp200, data, seed)
        seconds = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez(temporary, probabilities=posterior.predict(x, batch_size=1000), seconds=seconds)
    with np.load(path) as kept:
        return kept["probabilities"], float(kept["seconds"])


def _mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = (_idx(f"{part}-{kind}") for kind in ("images", "labels"))
    return ((pictures / 255 - MEAN) / DEVIATION).reshape(len(pictures), -1).astype(np.float32), labels.astype(int)


def _idx(begins: str) -> np.ndarray:
    (path,) = (harness.data_folder() / "cls" / "mnist").glob(f"{begins}*.gz")
    content = gzip.decompress(path.read_bytes())
    count = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * count).reshape(np.frombuffer(content, ">u4", count, 4))


SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "mnist": mnist,
    "samplers": bayesian_samplers.samplers,
    "hmc": bayesian_samplers.hmc,
    "predict": bayesian_speed.predict,
    "together": bayesian_speed.together,
    "layers": bayesian_layers.layers,
    "exports": bayesian_exports.exports,
}

if __name__ == "__main__":
    harness.main("ursabench", SECTIONS)

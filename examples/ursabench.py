"""Bayesian networks on handwritten digits: several methods compared, and one shipped with its doubts.

    python examples/ursabench.py [--epochs 20]

The digits are scikit-learn's. Each method gives draws of a network; all draws are asked in one call, and tell mistakes
and foreign inputs by their disagreement. The ensemble becomes one file for LiteRT, in integers. Writes to out/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_efficient import bayes, export, models
from keras_efficient.bayes import datasets, inference, tasks


def network() -> keras.Model:
    """64–64–10, which gives logits."""
    return models.MLP(64, 1, input_shape=(8, 8, 1))


def methods(epochs: int) -> dict[str, object]:
    shared = {"batch_size": 32, "prior_sd": 0.5}
    return {
        "MAP": inference.MAP(epochs=epochs, **shared),
        "ensemble of 5": inference.DeepEnsemble(members=5, epochs=epochs, **shared),
        "cyclic SGHMC": inference.CSGHMC(cycles=4, epochs_per_cycle=epochs, samples_per_cycle=3, **shared),
        "SWAG": inference.SWAG(epochs=epochs, averaging_epochs=epochs, draws=10, **shared),
        "last-layer Laplace": inference.LastLayerLaplace(epochs=epochs, draws=20, **shared),
    }


def main(out: Path, epochs: int) -> dict[str, dict[str, float]]:
    """Compares methods, exports the ensemble; returns scores of each, and of the file."""
    out.mkdir(parents=True, exist_ok=True)
    data = datasets.load({"name": "digits"})
    noise = data.outside({"name": "noise"})
    scores, posteriors = {}, {}
    print(f"{'method':20} {'draws':>5} {'error':>7} {'NLL':>7} {'ECE':>7}   AUROC of mistakes, of noise")
    for name, method in methods(epochs).items():
        posterior = posteriors[name] = method.fit(network, data.train, seed=0)
        probabilities = posterior.predict(data.test.x)  # (draws, examples, classes)
        found = tasks.prediction(probabilities, data.test.y)
        found["mistakes"] = tasks.misclassification(probabilities, data.test.y)["auroc_total"]
        found["noise"] = tasks.out_of_distribution(probabilities, posterior.predict(noise))["auroc_total"]
        scores[name] = found
        numbers = f"{found['error']:7.4f} {found['nll']:7.4f} {found['ece']:7.4f}"
        print(f"{name:20} {posterior.count:5} {numbers}   {found['mistakes']:.3f}, {found['noise']:.3f}")

    path = out / "digits-ensemble.tflite"
    ensemble = posteriors["ensemble of 5"]
    report = bayes.export_posterior(
        ensemble, path, mode="ensemble", precision="int8", calibration=data.train.x[:200], overwrite=True
    )
    run = export.load(path)
    probabilities = np.concatenate([run(one[None]) for one in data.test.x])
    scores["file"] = tasks.prediction(probabilities, data.test.y)
    print(f"{path}: {report.bytes / 1e3:.0f} kB, {report.latency_ms:.3f} ms, error {scores['file']['error']:.4f}")

    doubts = tasks.uncertainty(ensemble.predict(data.test.x))
    least = int(np.argmax(doubts["total"]))
    shares = ", ".join(f"{name} {doubts[name][least]:.2f}" for name in ("total", "aleatoric", "epistemic"))
    print(f"the digit that it doubts most is a {data.test.y[least]} (in nats: {shares})")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("needs two epochs at least")
    main(arguments.out, arguments.epochs)

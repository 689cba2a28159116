"""Trains and measures recommenders for `benchmarks.memcom`; every result is kept as soon as it is there.

A run is described by plain values (`Run`). Its result is a line of `benchmarks/results/memcom_runs.jsonl`: whoever asks
for a run that is in it gets that line, so that a benchmark of many hours can be stopped and gone on with.

    KERAS_BACKEND=jax python -m benchmarks.memcom_training gowalla '{"form": "subspace", "bits": 1}' --compression 16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from benchmarks import harness

RUNS = harness.RESULTS / "memcom_runs.jsonl"

# Epochs at which the whole table's validation score has stopped to rise (see `convergence` in memcom.json).
EPOCHS = {"gowalla": 60, "amazon-beauty": 30, "ml-1m-implicit": 100}
TUNING_USERS = 6000
TUNING_EPOCHS = {"gowalla": 12, "amazon-beauty": 8, "ml-1m-implicit": 30}
RATES = (0.005, 0.01, 0.02)

FULL = {"method": "reduced"}
PAPER = {"form": "scaled"}
OURS = {"form": "subspace", "bits": 2}

# The forms of MEmCom, and what they are compared with at 16 times fewer bytes. Baselines get the width of numbers that
# is best for them: eight bits where rows are shared, four and two where every entity has a row.
FORMS = {
    "MEmCom as published": PAPER,
    "MEmCom, int8 rows, int8 scalar": {"form": "scaled", "bits": 8, "scalar_bits": 8},
    "MEmCom subspace, 2 bits": OURS,
    "MEmCom subspace, 1 bit": {"form": "subspace", "bits": 1},
}
BASELINES = {
    "naive hashing, int8": {"method": "naive", "bits": 8},
    "truncate rare, int8": {"method": "truncate", "bits": 8},
    "double hashing, int8": {"method": "double", "bits": 8},
    "frequency-based double hashing, int8": {"method": "double", "bits": 8, "own_rows": 3000},
    "quotient-remainder multiply, int8": {"method": "quotient_remainder", "bits": 8},
    "quotient-remainder add, int8": {"method": "quotient_remainder", "bits": 8, "how": "add"},
    "quotient-remainder concatenate, int8": {"method": "quotient_remainder", "bits": 8, "how": "concatenate"},
    "hash embedding, int8": {"method": "hash_embedding", "bits": 8},
    "factorised, int4": {"method": "factorised", "bits": 4},
    "reduced dimension, int4": {"method": "reduced", "bits": 4},
    "whole table, 2 bits": {"method": "reduced", "bits": 2, "size": 64},
    "tensor train": {"method": "tensor_train"},
    "deep hash": {"method": "deep_hash", "hashes": 128},
    "ROBE, int8": {"method": "robe", "bits": 8},
}


@dataclass(frozen=True)
class Run:
    """One training: `options` are those of the embedding; ``split`` is what is left out, ``valid`` or ``test``."""

    dataset: str
    options: str  # JSON with sorted keys: a run must be hashable
    compression: float | None
    dim: int = 64
    rate: float = 0.01
    epochs: int = 60
    seed: int = 0
    split: str = "test"

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def make(dataset: str, options: dict[str, Any], compression: float | None, **more: Any) -> Run:
    """A run with the epochs of its data set."""
    return Run(dataset, json.dumps(options, sort_keys=True), compression, **{"epochs": EPOCHS[dataset], **more})


def result(run: Run, *, compute: bool = True) -> dict[str, Any] | None:
    """The kept result of a run; without one it is trained now, or, where that is not wanted, `None`."""
    for line in RUNS.read_text().splitlines() if RUNS.exists() else ():
        known = json.loads(line)
        if known["run"] == dataclasses.asdict(run):
            return known
    if not compute:
        return None
    found = {"run": dataclasses.asdict(run), **_train(run)}
    with RUNS.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


def ours_at(dataset: str, compression: float, dim: int) -> dict[str, Any]:
    """Our form with the bits that validation prefers at this ratio."""
    choices = [{"form": "subspace", "bits": bits} for bits in (1, 2, 4)]
    return max(choices, key=lambda options: _best(dataset, options, compression, dim)[1])


def best_rate(dataset: str, options: dict[str, Any], compression: float | None, dim: int = 64) -> float:
    """The rate with the best validation score after a short training: the same three for every method."""
    return _best(dataset, options, compression, dim)[0]


def _best(dataset: str, options: dict[str, Any], compression: float | None, dim: int) -> tuple[float, float]:
    scores = {}
    for rate in RATES:
        run = make(
            dataset, options, compression, dim=dim, rate=rate, split="valid", epochs=TUNING_EPOCHS[dataset], seed=100
        )
        scores[rate] = result(run)["ndcg"]
    return max(scores.items(), key=lambda item: item[1])


@cache
def _data(dataset: str, split: str):
    """Training part and held-out part, items renumbered by falling count in the training part."""
    from keras_efficient import recsys

    folder = harness.data_folder() / "recsys" / dataset
    train = recsys.read_lists(folder / "train.txt.gz")
    valid, test = (recsys.read_lists(folder / f"{part}.txt.gz") for part in ("valid", "test"))
    users = max(part.num_users for part in (train, valid, test))
    items = max(part.num_items for part in (train, valid, test))
    train, valid, test = (dataclasses.replace(p, num_users=users, num_items=items) for p in (train, valid, test))
    if split == "valid":
        train, held_out = recsys.without(train, valid), valid
    else:
        held_out = test
    (train, held_out), _ = recsys.by_frequency(train, held_out)
    return train, held_out


def _train(run: Run) -> dict[str, Any]:
    import keras

    from keras_efficient import models, recsys

    train, held_out = _data(run.dataset, run.split)
    keras.utils.set_random_seed(run.seed)
    options = dict(json.loads(run.options))
    if run.compression is not None and "size" not in options:
        options["compression"] = run.compression
    options["embeddings_initializer"] = keras.initializers.RandomNormal(stddev=0.1, seed=run.seed)
    model = models.SequenceClassifier(
        train.num_items + 1,
        train.num_items,
        dim=run.dim,
        hidden=(64,),
        activation="tanh",
        dropout=0.5,
        combiner="sqrtn",
        embedding=options,
    )
    started = time.time()
    history = recsys.train(
        model, train, epochs=run.epochs, learning_rate=run.rate, seed=run.seed, batch_size=512, negatives=4096
    )
    seconds = time.time() - started
    layer = model.get_layer("embedding")
    layer.freeze()  # what is measured is what would be stored
    found = recsys.evaluate(
        model.predict_on_batch, train, held_out, k=20, users=TUNING_USERS if run.split == "valid" else None
    )
    return {
        "ndcg": found.ndcg,
        "recall": found.recall,
        "users": found.users,
        "nbytes": layer.nbytes,
        "ratio": layer.compression_ratio,
        "size": layer.plan.size,
        "loss": history["loss"][-1],
        "seconds": round(seconds, 1),
        "backend": keras.backend.backend(),
        "measured": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(EPOCHS))
    parser.add_argument("options", type=json.loads, help="of the embedding, as JSON")
    parser.add_argument("--compression", type=float)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    arguments = vars(parser.parse_args())
    arguments["epochs"] = arguments["epochs"] or EPOCHS[arguments["dataset"]]
    print(json.dumps(result(make(**arguments)), indent=1))


if __name__ == "__main__":
    main()

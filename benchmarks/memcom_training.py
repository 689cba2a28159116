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
WEIGHTS = harness.RESULTS.parent.parent / "runs" / "memcom"

# Epochs at which the whole table's validation score has stopped to rise (see `convergence` in memcom.json).
EPOCHS = {"gowalla": 60, "amazon-beauty": 30, "ml-1m-implicit": 100}
TUNING_USERS = 6000
TUNING_EPOCHS = {"gowalla": 30, "amazon-beauty": 15, "ml-1m-implicit": 50}
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
    known = _known(run)
    return _keep(run, _train(run)) if known is None and compute else known


def _known(run: Run) -> dict[str, Any] | None:
    for line in RUNS.read_text().splitlines() if RUNS.exists() else ():
        known = json.loads(line)
        if known["run"] == dataclasses.asdict(run):
            return known
    return None


def _keep(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    found = {"run": dataclasses.asdict(run), **found}
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


def _model(run: Run, num_items: int):
    import keras

    from keras_efficient import models

    keras.utils.set_random_seed(run.seed)
    options = dict(json.loads(run.options))
    if run.compression is not None and "size" not in options:
        options["compression"] = run.compression
    options["embeddings_initializer"] = keras.initializers.RandomNormal(stddev=0.1, seed=run.seed)
    return models.SequenceClassifier(
        num_items + 1,
        num_items,
        dim=run.dim,
        hidden=(64,),
        activation="tanh",
        dropout=0.5,
        combiner="sqrtn",
        embedding=options,
    )


def _fit(run: Run, model, train, **changed: Any) -> list[float]:
    from keras_efficient import recsys

    settings = {"epochs": run.epochs, "learning_rate": run.rate, "seed": run.seed, "batch_size": 512, "negatives": 4096}
    return recsys.train(model, train, **{**settings, **changed})["loss"]


def _evaluate(run: Run, model, train, held_out):
    """Quality of the frozen model: what is measured is what would be stored."""
    from keras_efficient import recsys

    model.get_layer("embedding").freeze()
    users = TUNING_USERS if run.split == "valid" else None
    return recsys.evaluate(model.predict_on_batch, train, held_out, k=20, users=users)


def _train(run: Run) -> dict[str, Any]:
    import keras

    train, held_out = _data(run.dataset, run.split)
    model = _model(run, train.num_items)
    started = time.time()
    losses = _fit(run, model, train)
    seconds = time.time() - started
    layer = model.get_layer("embedding")
    found = _evaluate(run, model, train, held_out)
    return {
        "ndcg": found.ndcg,
        "recall": found.recall,
        "users": found.users,
        "nbytes": layer.nbytes,
        "ratio": layer.compression_ratio,
        "size": layer.plan.size,
        "loss": losses[-1],
        "seconds": round(seconds, 1),
        "backend": keras.backend.backend(),
        "measured": time.strftime("%Y-%m-%d"),
    }


def fitted(run: Run) -> dict[str, Any]:
    """nDCG of a trained whole table that `from_embedding` compresses: as it is, and after one epoch.

    The epoch has a third of the highest rate that the form is trained with from scratch. Kept as `result` keeps it, as
    a run of no epochs.
    """
    run = dataclasses.replace(run, epochs=0)
    known = _known(run)
    if known is not None:
        return known
    train, held_out = _data(run.dataset, run.split)
    whole, full = _whole(run, train, held_out)
    options = {**json.loads(run.options), "compression": run.compression, "combiner": "sqrtn", "mask_zero": True}
    counts = [0.0, *train.counts()]  # of the padding: none
    found = {"full": full}
    for stage in ("fitted", "one_epoch"):
        model = _model(run, train.num_items)
        for layer in model.layers:
            if layer.name != "embedding":
                layer.set_weights(whole.get_layer(layer.name).get_weights())
        _adopt(model.get_layer("embedding"), whole.get_layer("embedding").embeddings(), counts, options)
        if stage == "one_epoch":
            rate = best_rate(run.dataset, json.loads(run.options), run.compression, run.dim) / 3
            _fit(run, model, train, epochs=1, learning_rate=rate)
        found[stage] = _evaluate(run, model, train, held_out).ndcg
    return _keep(run, found)


def _adopt(layer, matrix, counts, options: dict[str, Any]) -> None:
    """Gives a layer the weights that `from_embedding` finds for this matrix."""
    made = type(layer).from_embedding(matrix, counts=counts, **options)
    layer.set_weights(made.get_weights())


def _whole(run: Run, train, held_out) -> tuple[Any, float]:
    """The model with the whole table, trained as for the other sections, and its nDCG; its weights stay in runs/."""
    import keras

    rate = best_rate(run.dataset, FULL, None, run.dim)
    whole = make(run.dataset, FULL, None, dim=run.dim, rate=rate, seed=run.seed, split=run.split)
    model = _model(whole, train.num_items)
    path = WEIGHTS / f"{run.dataset}-{run.dim}-{run.seed}-{run.split}.weights.h5"
    if path.exists():
        model.load_weights(path)
    else:
        _fit(whole, model, train)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save_weights(path)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return model, _evaluate(whole, copy, train, held_out).ndcg


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

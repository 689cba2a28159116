"""Trains and measures recommenders for `benchmarks.memcom`; every result is kept as soon as it is there.

A run is described by plain values (`Run`). Its result is a line of `benchmarks/results/memcom_runs.jsonl`: whoever asks
for a run that is in it gets that line, so that a benchmark of many hours can be stopped and gone on with.

    KERAS_BACKEND=jax python -m benchmarks.memcom_training gowalla '{"form": "subspace", "bits": 1}' --compression 16
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from benchmarks import harness

RUNS = harness.RESULTS / "memcom_runs.jsonl"
WEIGHTS = harness.RESULTS.parent.parent / "runs" / "memcom"

# Of the whole table; memcom.json says what twice as many gain on Gowalla.
EPOCHS = {"gowalla": 60, "amazon-beauty": 30, "ml-1m-implicit": 100}
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
DECAYS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RATE, DECAY = 0.01, 0.1  # where the search begins
# Of a smaller table that begins as the nearest to a trained whole one, with the network around that one.
TUNED_EPOCHS = {"gowalla": 5, "amazon-beauty": 3, "ml-1m-implicit": 10}
TUNED_RATES = (0.0001, 0.0003, 0.001, 0.004, 0.016)
TUNED_RATE = 0.001  # where the search begins
TUNING_SEED = 100
# What the vector of a history is multiplied by once the model is trained. Histories are whole in evaluation and halves
# in training; shorter vectors are better then, and rounding makes them shorter: without this it would seem to gain.
# Validation chooses: of these, and of further ones while the best is at an end, the top of a parabola through the best.
# From one to the next test results move by 1.5 per cent, more than what the best methods are apart.
SCALES = (1.25, 1.0, 0.8, 0.64, 0.512)

FULL = {"method": "reduced"}
PAPER = {"form": "scaled"}
CODEBOOKS = {"form": "codebooks", "bits": 8}
SUBSPACE = {"form": "subspace", "bits": 2}

# The forms of MEmCom, and what they are compared with at 16 times fewer bytes. Baselines get the width of numbers that
# is best for them: eight bits where rows are shared, four and two where every entity has a row.
FORMS = {
    "MEmCom as published": PAPER,
    "MEmCom, int8 rows, int8 scalar": {"form": "scaled", "bits": 8, "scalar_bits": 8},
    "MEmCom codebooks": CODEBOOKS,
    "MEmCom codebooks, 12 bytes": {"form": "codebooks", "bits": 8, "hash_size": 12},
    "MEmCom subspace, 2 bits": SUBSPACE,
    "MEmCom subspace, 1 bit": {"form": "subspace", "bits": 1},
}
BASELINES = {
    "whole table, 2 bits": {"method": "reduced", "bits": 2, "size": 64},
    "whole table, 1 bit": {"method": "reduced", "bits": 1, "size": 64},
    "reduced dimension, 2 bits": {"method": "reduced", "bits": 2},
    "reduced dimension, int4": {"method": "reduced", "bits": 4},
    "factorised, int4": {"method": "factorised", "bits": 4},
    "quotient-remainder multiply, int8": {"method": "quotient_remainder", "bits": 8},
    "quotient-remainder add, int8": {"method": "quotient_remainder", "bits": 8, "how": "add"},
    "quotient-remainder concatenate, int8": {"method": "quotient_remainder", "bits": 8, "how": "concatenate"},
    "hash embedding, int8": {"method": "hash_embedding", "bits": 8},
    "naive hashing, int8": {"method": "naive", "bits": 8},
    "truncate rare, int8": {"method": "truncate", "bits": 8},
    "double hashing, int8": {"method": "double", "bits": 8},
    "frequency-based double hashing, int8": {"method": "double", "bits": 8, "own_rows": 3000},
    "ROBE, int8": {"method": "robe", "bits": 8},
}
# Of these an epoch would take many times as long, were a vector computed wherever its id stands.
SLOW_BASELINES = {
    "tensor train": {"method": "tensor_train"},
    "deep hash": {"method": "deep_hash", "hashes": 128},
}
MOST_DISTINCT = 6656  # ids of a batch of training
# What `from_embedding` is compared with training from nothing by.
FROM_NOTHING = ("MEmCom as published", "MEmCom subspace, 2 bits", "whole table, 2 bits")
# Our forms that are tried at each of the paper's ratios: a column has 32 / ratio bits.
OURS_AT = {
    4: ({"form": "subspace", "bits": 4}, SUBSPACE, CODEBOOKS),
    12: (SUBSPACE, CODEBOOKS),
    16: (SUBSPACE, CODEBOOKS),
    40: ({"form": "subspace", "bits": 1}, CODEBOOKS),
}


@dataclass(frozen=True)
class Run:
    """One training: `options` are those of the embedding; ``split`` is what is left out, ``valid`` or ``test``.

    It begins from random weights, or, `fitted`, from the whole table of the same seed and its network. Without a
    `scale` the result is that of the best.
    """

    dataset: str
    options: str  # JSON with sorted keys: a run must be hashable
    compression: float | None
    dim: int
    rate: float
    decay: float
    epochs: int
    fitted: bool
    seed: int
    split: str
    scale: float | None = None


def whole(dataset: str, dim: int) -> Run:
    """The run of a whole table, at the rate and the decay from which validation prefers no neighbour."""
    plain = {"epochs": EPOCHS[dataset], "fitted": False, "seed": TUNING_SEED, "split": "valid"}
    run = Run(dataset, _text(FULL), None, dim=dim, rate=RATE, decay=DECAY, **plain)
    if dim != 64:  # the search begins where that of the usual width ended
        run = dataclasses.replace(whole(dataset, 64), dim=dim)
    before = None
    while before != run:
        before = run
        run = _best(_best(run, "decay", DECAYS), "rate", RATES)
    return run


def _best(run: Run, name: str, ladder: Sequence[float]) -> Run:
    """The run with another value of an attribute: that from which no neighbour is better."""

    def at(value: float) -> Run:
        return dataclasses.replace(run, **{name: value})

    return at(_climb(ladder, getattr(run, name), lambda value: result(at(value))["ndcg"]))


def _climb(ladder: Sequence[float], start: float, score: Callable[[float], float]) -> float:
    """The rung from which neither neighbour is better, so that the best is never at the edge of what was tried."""
    index = ladder.index(start)
    for step in (-1, 1):
        while 0 <= index + step < len(ladder) and score(ladder[index + step]) > score(ladder[index]):
            index += step
    return ladder[index]


def tested(run: Run, seed: int) -> Run:
    """The run on test data of what validation chose."""
    return dataclasses.replace(run, seed=seed, split="test", scale=result(run)["scale"])


def reference(dataset: str, dim: int) -> Run:
    """What losses are counted from: the whole table with the same choices, those of more epochs among them."""
    return tuned(dataset, FULL, None, dim, nothing=True)


def tuned(
    dataset: str, options: dict[str, Any], compression: float | None, dim: int = 64, *, nothing: bool | None = None
) -> Run:
    """The run of a table that validation prefers; the same choices for every method.

    Fitted to the whole table, and then left so, or trained for a few epochs; or trained from nothing. The rates of both
    are those from which no neighbour is better. By default the last is only tried where fits stay two per cent behind
    the whole table, which is trained from nothing itself: nearer to it nothing was gained (two bits for all came to
    0.1145 instead of 0.1154 on Gowalla, codebooks to 0.063 instead of 0.1155).
    """
    plain = fitted(dataset, options, compression, 0, dim)
    more = fitted(dataset, options, compression, TUNED_EPOCHS[dataset], dim)

    def score(run: Run) -> float:
        return result(run)["ndcg"]

    best = max(plain, _best(more, "rate", TUNED_RATES), key=score)
    if nothing is None:
        nothing = score(best) < 0.98 * score(whole(dataset, dim))
    if not nothing:
        return best
    return max(best, _best(from_nothing(dataset, options, compression, dim), "rate", RATES), key=score)


def from_nothing(dataset: str, options: dict[str, Any], compression: float | None, dim: int = 64) -> Run:
    """The run of a table from random weights: as the whole table is trained."""
    return dataclasses.replace(whole(dataset, dim), options=_text(options), compression=compression)


def fitted(dataset: str, options: dict[str, Any], compression: float | None, epochs: int, dim: int = 64) -> Run:
    """The run of a table that is fitted to the whole one and trained for so many epochs at the middle rate."""
    run = dataclasses.replace(whole(dataset, dim), options=_text(options), compression=compression)
    return dataclasses.replace(run, fitted=True, epochs=epochs, rate=TUNED_RATE if epochs else 0.0)


def ours_at(dataset: str, ratio: int, dim: int) -> dict[str, Any]:
    """Our form that validation prefers at this ratio, as fitted."""
    return max(OURS_AT[ratio], key=lambda options: result(fitted(dataset, options, float(ratio), 0, dim))["ndcg"])


def _text(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def result(run: Run) -> dict[str, Any]:
    """The kept result of a run; without one it is trained now."""
    for line in RUNS.read_text().splitlines() if RUNS.exists() else ():
        known = json.loads(line)
        if known["run"] == dataclasses.asdict(run):
            return known
    found = {"run": dataclasses.asdict(run), **_train(run)}
    with RUNS.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


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
    if run.compression is not None and not {"size", "hash_size"} & set(options):
        options["compression"] = run.compression
    # Means of vectors, not sums over √n: training sees half of a history, evaluation all of it. They begin large enough
    # for a mean of a dozen.
    options["embeddings_initializer"] = keras.initializers.RandomNormal(stddev=0.36, seed=run.seed)
    return models.SequenceClassifier(
        num_items + 1,
        num_items,
        dim=run.dim,
        hidden=(64,),
        activation="tanh",
        dropout=0.5,
        combiner="mean",
        embedding=options,
    )


def _train(run: Run) -> dict[str, Any]:
    import keras

    train, held_out = _data(run.dataset, run.split)
    model = _model(run, train.num_items)
    layer = model.get_layer("embedding")
    started = time.time()
    if run.fitted:
        _begin_as_whole(run, model, train)
    slow = json.loads(run.options) in SLOW_BASELINES.values()
    with _each_once(layer) if slow else contextlib.nullcontext():
        losses = _fit(run, model, train) if run.epochs else []
    seconds = time.time() - started
    if _text(FULL) == run.options and not run.fitted:
        _save(model, _path(run))
    layer.freeze()  # what is measured is what would be stored
    rankings = _rankings(run, _with_vectors(run, model, train) if slow else model, train, held_out)
    scale, found = max(rankings.items(), key=lambda item: item[1].ndcg)
    return {
        "scale": scale,
        "scales": {f"{key:g}": round(ranking.ndcg, 6) for key, ranking in rankings.items()},
        "ndcg": found.ndcg,
        "ndcg_error": found.ndcg_error,
        "recall": found.recall,
        "users": found.users,
        "nbytes": layer.nbytes,
        "ratio": layer.compression_ratio,
        "size": layer.plan.size,
        "loss": losses[-1] if losses else None,
        "seconds": round(seconds, 1),
        "backend": keras.backend.backend(),
        "commit": harness.commit(),
        "measured": time.strftime("%Y-%m-%d"),
    }


def _fit(run: Run, model, train) -> list[float]:
    from keras_efficient import recsys

    settings = {"epochs": run.epochs, "learning_rate": run.rate, "weight_decay": run.decay, "seed": run.seed}
    return recsys.train(model, train, batch_size=512, negatives=4096, **settings)["loss"]


@contextlib.contextmanager
def _each_once(layer) -> Iterator[None]:
    """Within it no vector of a batch is computed twice; what comes out is the same."""
    values = layer._values
    layer._values = _of_all(layer) if layer.method == "tensor_train" else _of_distinct(values)
    try:
        yield
    finally:
        del layer._values


def _of_distinct(values: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """More distinct ids than there is room for make the loss NaN, which ends the training."""
    import jax.numpy as jnp

    def found(ids):
        distinct, places = jnp.unique(ids, size=min(MOST_DISTINCT, ids.size), fill_value=0, return_inverse=True)
        vectors, dense = values(distinct)
        places = places.reshape(ids.shape)
        return jnp.where((distinct[places] == ids)[..., None], vectors[places], jnp.nan), dense

    return found


def _of_all(layer) -> Callable[[Any], Any]:
    """A tensor train's table is two products of its cores: less work than the vectors of a batch one by one."""
    import jax.numpy as jnp

    rank, (n1, n2, n3), (d1, d2, d3) = layer.plan.size, layer.plan._entities, layer.plan._columns

    def found(ids):
        first, second, third = (jnp.asarray(layer._state[name].value) for name in ("first", "second", "third"))
        both = jnp.einsum(
            "aer,brfs->abefs", first.reshape(n1, d1, rank), second.reshape(n2, rank, d2, rank), optimize=True
        )
        table = jnp.einsum("abefs,csg->abcefg", both, third.reshape(n3, rank, d3), optimize=True)
        return table.reshape(n1 * n2 * n3, d1 * d2 * d3)[ids], {}

    return found


def _with_vectors(run: Run, model, train):
    """The model with its embedding's vectors in a whole table, so that none is computed twice."""
    copy = _model(dataclasses.replace(run, options=_text(FULL), compression=None), train.num_items)
    for layer in model.layers:
        if layer.name != "embedding":
            copy.get_layer(layer.name).set_weights(layer.get_weights())
    copy.get_layer("embedding").set_weights([model.get_layer("embedding").embeddings()])
    return copy


def _rankings(run: Run, model, train, held_out) -> dict[float, Any]:
    """The quality by scale: at that of the run, or at all between which to choose."""
    if run.scale is not None:
        return {run.scale: _evaluate(run.scale, model, train, held_out)}
    found = {scale: _evaluate(scale, model, train, held_out) for scale in SCALES}
    step = SCALES[0] / SCALES[1]
    while (best := max(found, key=lambda scale: found[scale].ndcg)) in (min(found), max(found)):
        further = round(best * step if best == max(found) else best / step, 4)
        found[further] = _evaluate(further, model, train, held_out)
    peak = _peak({scale: ranking.ndcg for scale, ranking in found.items()})
    found[peak] = _evaluate(peak, model, train, held_out)
    return found


def _evaluate(scale: float, model, train, held_out):
    """The quality with the vectors of histories multiplied by `scale`, which the kernel behind them takes over."""
    from keras_efficient import recsys

    kernel = model.get_layer("hidden_0").kernel
    kernel.assign(kernel * scale)
    found = recsys.evaluate(model.predict_on_batch, train, held_out, k=20)
    kernel.assign(kernel / scale)
    return found


def _peak(values: dict[float, float]) -> float:
    """Where the parabola through the highest value, not at an end, and its neighbours has its top.

    The keys are a geometric series.
    """
    keys = sorted(values)
    index = max(range(len(keys)), key=lambda index: values[keys[index]])
    low, middle, high = (values[key] for key in keys[index - 1 : index + 2])
    bend = 2 * middle - low - high
    steps = (high - low) / bend / 2 if bend else 0.0
    return round(keys[index] * (keys[1] / keys[0]) ** steps, 3)


def _begin_as_whole(run: Run, model, train) -> None:
    """Gives a model the weights of the whole table's, and its table those that `from_embedding` finds for that."""
    full = whole(run.dataset, run.dim)
    if run.split == "test":
        full = tested(full, run.seed)
    if not _path(full).exists():
        _train(full)
    source = _model(full, train.num_items)
    source.load_weights(_path(full))
    for layer in model.layers:
        if layer.name != "embedding":
            layer.set_weights(source.get_layer(layer.name).get_weights())
    layer = model.get_layer("embedding")
    counts = [0.0, *train.counts()]  # of the padding: none
    config = layer.get_config()
    options = {name: value for name, value in config.items() if name not in ("input_dim", "output_dim", "name")}
    made = type(layer).from_embedding(source.get_layer("embedding").embeddings(), counts=counts, **options)
    layer.set_weights(made.get_weights())


def _path(run: Run) -> Path:
    """Where the weights of a whole table are kept, outside of the repository: a script can make them again."""
    name = f"{run.dataset}-{run.dim}-{run.rate:g}-{run.decay:g}-{run.epochs}-{run.seed}-{run.split}.weights.h5"
    return WEIGHTS / name


def _save(model, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    model.save_weights(partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(EPOCHS))
    parser.add_argument("options", type=json.loads, help="of the embedding, as JSON")
    parser.add_argument("--compression", type=float, default=16.0)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--nothing", action="store_true", default=None, help="try to train from random weights as well")
    found = tuned(**vars(parser.parse_args()))
    print(json.dumps(result(found), indent=1))


if __name__ == "__main__":
    main()

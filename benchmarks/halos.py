"""HALOS against the whole output layer, against hashing at random, and the bars of this project.

    python -m benchmarks.halos [--quick] [--only SECTION …]   SECTION: quality, hashes, large, batches, energy, peers

The networks are trained once, and the large index is learned once, to `runs/halos/`; what an index is learned from are
parts of the training part. `peers` runs in the environment whose Python `KERAS_EFFICIENT_PEERS` names, see
`benchmarks.halos_peers`; `energy` counts instructions by valgrind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from benchmarks import halos_large, harness
from benchmarks.harness import Row

FOLDER = harness.RESULTS.parent.parent / "runs" / "halos"
EPOCHS = {"gowalla": 60, "amazon-beauty": 30}
BUDGET = 0.02
METHODS = ("contexts", "cells", "hash", "inner_product", "random_hash")
# Of the random hash that the learned one is compared with, at equal neurons; validation chooses.
TABLES_AND_BITS = ((1, 6), (2, 7), (2, 8), (4, 8), (4, 9), (8, 9), (8, 10), (16, 10), (16, 11), (32, 12))
HIDDEN = 0.2  # of a user's training items, which are the labels that an index is learned from then
ROUNDS = 50
FEW_ROUNDS = 15  # where guards are taken away


@cache
def _parts(dataset: str) -> tuple[Any, Any]:
    """Training and test part, items by falling frequency in training."""
    from keras_efficient import recsys

    folder = harness.data_folder() / "recsys" / dataset
    parts = [recsys.read_lists(folder / f"{name}.txt.gz") for name in ("train", "test")]
    sizes = {name: max(getattr(part, name) for part in parts) for name in ("num_users", "num_items")}
    return recsys.by_frequency(*(dataclasses.replace(part, **sizes) for part in parts))[0]


@cache
def _model(dataset: str) -> Any:
    """A network that was trained by the settings that validation chose for MEmCom's benchmark."""
    import keras

    from keras_efficient import models, recsys

    train, _ = _parts(dataset)
    keras.utils.set_random_seed(0)
    model = models.SequenceClassifier(
        train.num_items + 1,
        train.num_items,
        hidden=(64,),
        activation="tanh",
        dropout=0.5,
        embedding={"method": "reduced", "embeddings_initializer": keras.initializers.RandomNormal(stddev=0.36, seed=0)},
        output={"k": 20},
    )
    path = FOLDER / f"{dataset}.weights.h5"
    if path.exists():
        model.load_weights(path)
        return model
    recsys.train(model, train, epochs=EPOCHS[dataset], learning_rate=0.01, weight_decay=0.1, verbose=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_weights(path)
    return model


def _batches(known: Any, wanted: Any, seed: int = 0) -> Any:
    """Batches of histories of ids and of what should be found, padded."""
    import keras

    from keras_efficient.recsys.evaluation import history_batches

    items, offsets = known.histories()
    labels, bounds = wanted.histories()
    users = np.flatnonzero((np.diff(offsets) > 0) & (np.diff(bounds) > 0))
    made = []
    for places, ids in history_batches(items, offsets, users):
        lengths = np.diff(bounds)[users[places]]
        y = np.full((len(ids), int(lengths.max())), -1, np.int32)
        for row, user in enumerate(users[places]):
            y[row, : lengths[row]] = labels[bounds[user] : bounds[user + 1]]
        made.append((ids, y))

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(made)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return made[index]

    return Batches()


def _some(dataset: str, share: float, seed: int) -> np.ndarray:
    """So many of the users."""
    return np.random.default_rng(seed).random(_parts(dataset)[0].num_users) < share


def _strangers(dataset: str) -> np.ndarray:
    """A fifth of the users."""
    return _some(dataset, 0.2, 9)


@cache
def _learning(dataset: str, users: str) -> tuple[Any, Any]:
    """What an index is learned from, and what settings are chosen by.

    A part of every user's training items is hidden, three times over: the rest leads to them. Of `known` users they are
    there as a test asks for them too: all of their training items, which lead to themselves. `parts` is without these,
    `others` without a fifth of the users. Settings are chosen by other users than the index is learned from, but for
    `known` ones, where none are chosen.
    """
    from keras_efficient.extreme.queries import queries

    train, _ = _parts(dataset)
    if users == "others":
        train = train.select(~_strangers(dataset)[train.users])
    held_out = _some(dataset, 0.1, 8)[train.users]
    random, model = np.random.default_rng(1), _model(dataset)
    found, valid = [], None
    if users != "parts":
        found.append(queries(model, _batches(train, train)))
    for _ in range(3):
        hidden = random.random(len(train)) < HIDDEN
        learned = np.ones(len(train), bool) if users == "known" else ~held_out
        if valid is None:
            valid = queries(model, _batches(train.select(held_out & ~hidden), train.select(held_out & hidden)))
        found.append(queries(model, _batches(train.select(learned & ~hidden), train.select(learned & hidden))))
    return _together(found), valid


def _together(parts: list[Any]) -> Any:
    from keras_efficient.extreme.queries import Queries

    vectors, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("vectors", "labels"))
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return Queries(vectors, labels, np.concatenate([[0], np.cumsum(lengths)]))


def _learn(dataset: str, method: str, users: str = "parts", **options: Any) -> tuple[Any, float]:
    """What `extreme.learn_index` does with the queries that are there already."""
    import keras

    from keras_efficient import extreme
    from keras_efficient.layers import HALOSOutput

    layer = _model(dataset).get_layer("logits")
    x = keras.Input((layer.kernel.shape[1],))
    alone = HALOSOutput(layer.units, layer.k, name="alone")
    model = keras.Model(x, alone(x))
    alone.set_weights([layer.kernel, layer.bias])
    parts = []
    for part in _learning(dataset, users):
        y = np.full((len(part), int(np.diff(part.offsets).max())), -1, np.int32)
        owners = part.owners
        y[owners, np.arange(len(owners)) - part.offsets[owners]] = part.labels
        parts.append((part.vectors, y))
    started = time.time()
    learned = extreme.learn_index(model, parts[0], method=method, budget=BUDGET, validation=parts[1], **options)
    return (alone, learned), time.time() - started


def _test_recall(dataset: str, layer: Any) -> float:
    """Label recall on the test part: labels that are no part of what an index was learned from or chosen by."""
    from keras_efficient import extreme

    rows = np.concatenate([np.asarray(layer.kernel), np.asarray(layer.bias)[:, None]], axis=1)
    test, _, _ = _test_queries(dataset)
    return extreme.measure(lambda x: np.asarray(layer.candidates(x)), layer.neurons, rows, test).label_recall


@dataclasses.dataclass(frozen=True)
class _Quality:
    """Per user: P@1, P@5 and R@20."""

    values: np.ndarray

    def against(self, full: _Quality, column: int) -> tuple[float, float]:
        """The ratio of means, and the standard error of the paired difference over the full one's mean."""
        ours, theirs = self.values[:, column], full.values[:, column]
        error = (ours - theirs).std(ddof=1) / np.sqrt(len(ours))
        return float(ours.mean() / theirs.mean()), float(error / theirs.mean())


@cache
def _test_queries(dataset: str) -> Any:
    """Of every user who has something to be found: what should be, what the user has, and the user."""
    import keras

    from keras_efficient.extreme.queries import Queries
    from keras_efficient.recsys.evaluation import _parts as lists_of
    from keras_efficient.recsys.evaluation import history_batches

    train, test = _parts(dataset)
    items, offsets = train.histories()
    labels, bounds = test.histories()
    users = np.flatnonzero((np.diff(offsets) > 0) & (np.diff(bounds) > 0))
    model = _model(dataset)
    body = keras.Model(model.input, model.get_layer("logits").input)
    vectors = np.zeros((len(users), model.get_layer("logits").kernel.shape[1]), np.float32)
    for places, ids in history_batches(items, offsets, users):
        vectors[places] = np.asarray(body.predict_on_batch(ids))[: len(places)]
    seen = Queries(vectors, *lists_of(items, offsets, users))
    return Queries(vectors, *lists_of(labels, bounds, users)), seen, users


def _qualities(dataset: str, candidates: dict[str, Any]) -> dict[str, _Quality]:
    """The quality of the full layer and of every set of candidates, on all test users; seen items are not ranked."""
    from keras_efficient import ranking

    layer = _model(dataset).get_layer("logits")
    weights, bias = np.asarray(layer.kernel).T.copy(), np.asarray(layer.bias)
    test, seen, _ = _test_queries(dataset)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("full", *candidates)}
    for start in range(0, len(test), 512):
        rows = np.arange(start, min(start + 512, len(test)))
        part, known = test.select(rows), seen.select(rows)
        logits = part.vectors @ weights + bias
        for name in found:
            scores = logits
            if name != "full":
                ids = candidates[name](part.vectors)
                inside = np.zeros((len(rows), layer.units + 1), bool)
                np.put_along_axis(inside, ids, True, axis=1)
                scores = np.where(inside[:, :-1], logits, -np.inf)
            ranked = ranking.top_k(scores, 20, exclude=(known.labels, known.offsets))
            relevant = (part.labels, part.offsets)
            columns = [ranking.precision(ranked, relevant, 1), ranking.precision(ranked, relevant, 5)]
            found[name].append(np.stack([*columns, ranking.recall(ranked, relevant, 20)], axis=1))
    return {name: _Quality(np.concatenate(parts)) for name, parts in found.items()}


def quality(quick: bool) -> Iterator[Row]:
    """Answers of candidates against those of all classes: two recommenders, all test users, 2 % of the neurons."""
    if quick:
        return
    for dataset in EPOCHS:
        layers, learned, seconds = {}, {}, {}
        for method in METHODS:
            (layers[method], learned[method]), seconds[method] = _learn(dataset, method, "known")
        units, strangers = layers["cells"].units, f"{METHODS[0]}, users that it was not learned from"
        (layers[strangers], learned[strangers]), seconds[strangers] = _learn(dataset, METHODS[0], "others")
        popular = np.arange(round(BUDGET * units))  # items are sorted by their frequency
        candidates = {name: lambda x, layer=layer: np.asarray(layer.candidates(x)) for name, layer in layers.items()}
        candidates["the most frequent only"] = lambda x, popular=popular: np.tile(popular, (len(x), 1))
        found = _qualities(dataset, candidates)
        everyone, some = found.pop("full"), _strangers(dataset)[_test_queries(dataset)[2]]
        found[strangers] = _Quality(found[strangers].values[some])
        for name, quality in found.items():
            full = _Quality(everyone.values[some]) if name == strangers else everyone
            means = [round(float(value), 5) for value in full.values.mean(axis=0)]
            details: dict[str, Any] = {"users": len(quality.values), "full": dict(zip(NAMES, means, strict=True))}
            if name in learned:
                measures = learned[name].measures
                details |= {"neurons": measures.neurons, "share": round(measures.share, 5)}
                details["seconds"] = round(seconds[name], 1)
            barred = name in (METHODS[0], strangers)
            for column, (what, bar) in enumerate(zip(NAMES, BARS, strict=True)):
                ratio, error = quality.against(full, column)
                reached = ratio + error >= 1 if column == 0 else ratio >= bar
                text = "≥ full within one standard error" if column == 0 else f"≥ {bar:.0%} of full"
                yield Row(
                    f"{dataset}, {units:,} classes, {BUDGET:.0%} of the neurons: {what}, {name}",
                    round(ratio * means[column], 5),
                    "",
                    peer=means[column],
                    ratio=round(ratio, 4),
                    details={**details, "standard_error_of_ratio": round(error, 5)},
                    **({"bar": text, "reached": bool(reached)} if barred else {}),
                    why=STRANGE if name == strangers and not reached else "",
                )


STRANGE = "histories that no list was made for; half of its items occur three times at most"
NAMES = ("P@1", "P@5", "R@20")
BARS = (1.0, 0.99, 0.97)


def hashes(quick: bool) -> Iterator[Row]:
    """Learned hash tables against random ones of the same neurons, and each guard against collapse taken away."""
    if quick:
        return
    from keras_efficient import extreme

    dataset = "gowalla"
    random, layers = {}, {}
    for tables, bits in TABLES_AND_BITS:
        for by_queries in (False, True):
            guards = extreme.Guards(by_labels=False, by_queries=by_queries)
            found, _ = _learn(dataset, "random_hash", tables=tables, bits=bits, guards=guards)
            layers[tables, bits, by_queries] = found[0]
            random[tables, bits, by_queries] = found[1].measures.label_recall
    best = max(random, key=lambda key: random[key])
    table = {
        f"{tables} tables of {bits} bits, classes by {'queries' if by else 'weights'}": round(recall, 4)
        for (tables, bits, by), recall in random.items()
    }
    peer = _test_recall(dataset, layers[best])
    (layer, learned), seconds = _learn(dataset, "hash", tables=4, bits=10, rounds=ROUNDS)
    recall, last = _test_recall(dataset, layer), learned.rounds[-1]
    rounds = [round(value, 4) for value in learned.rounds]
    yield Row(
        f"label recall on {dataset}, test, at {BUDGET:.0%} of the neurons: learned hash tables, the best random ones",
        round(recall, 4),
        "",
        peer=round(peer, 4),
        ratio=round(recall / peer, 3),
        bar="≥ 1.3×",
        reached=recall >= 1.3 * peer,
        details={"random on validation": table, "rounds on validation": rounds, "seconds": round(seconds)},
    )
    yield Row(
        f"label recall on validation after {ROUNDS} rounds against the best of them",
        round(last, 4),
        "",
        peer=round(max(learned.rounds), 4),
        ratio=round(last / max(learned.rounds), 3),
        bar="no collapse: within a tenth",
        reached=last >= 0.9 * max(learned.rounds),
    )
    whole, _ = _learn(dataset, "hash", tables=4, bits=10, rounds=FEW_ROUNDS)
    reference = _test_recall(dataset, whole[0])
    options: dict[str, tuple[int, dict[str, Any]]] = {"random hyperplanes, nothing else changed": (0, {})}
    options |= {guard: (FEW_ROUNDS, without) for guard, without in WITHOUT.items()}
    for guard, (rounds, without) in options.items():
        found, _ = _learn(dataset, "hash", tables=4, bits=10, rounds=rounds, guards=extreme.Guards(**without))
        recall = _test_recall(dataset, found[0])
        yield Row(
            f"label recall on {dataset}, test, of learned hash tables in {FEW_ROUNDS} rounds, {guard}",
            round(recall, 4),
            "",
            peer=round(reference, 4),
            ratio=round(recall / reference, 3),
            details={"rounds on validation": [round(value, 4) for value in found[1].rounds]},
        )
    found, _ = _learn(dataset, "hash", tables=4, bits=4, ranges=6, rounds=FEW_ROUNDS)
    recall = _test_recall(dataset, found[0])
    what = f"label recall on {dataset}, test, of winner-takes-all tables, {FEW_ROUNDS} draws of places each"
    yield Row(what, round(recall, 4), "", peer=round(reference, 4), ratio=round(recall / reference, 3))


WITHOUT: dict[str, dict[str, Any]] = {
    "labels that are found leave the positives": {"kept_positives": 0.0},
    "retrieved negatives only": {"uniform_negatives": 0.0},
    "as many negatives as are retrieved": {"balanced": False},
    "hyperplanes of length one": {"unit_norm": True},
    "no penalty on bits that say the same": {"orthogonal": 0.0},
    "labels of one weight": {"rare_labels": False},
    "full buckets drop classes": {"spill": False},
    "not centred": {"centred": False},
    "classes by their weights": {"by_queries": False},
    "buckets by labels alone": {"by_answers": False},
    "buckets by codes, not by labels": {"by_labels": False},
    "as in the paper: none of them": {
        "kept_positives": 0.0,
        "uniform_negatives": 0.0,
        "balanced": False,
        "orthogonal": 0.0,
        "rare_labels": False,
        "keep_best": False,
        "spill": False,
        "centred": False,
        "by_queries": False,
        "by_labels": False,
    },
}


@cache
def _large() -> tuple[Path, dict[str, Any]]:
    """Where the index of 670,091 classes is, without its ending, and what its learning told."""
    path = FOLDER / "planted"
    if not path.with_suffix(".npz").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {**halos_large.run("learn", path), "commit": harness.commit()}
        told["test"] = halos_large.run("quality", path)  # for minutes all classes are asked
        path.with_suffix(".json").write_text(json.dumps(told))
    return path, json.loads(path.with_suffix(".json").read_text())


@cache
def _files() -> tuple[Path, dict[str, Any]]:
    """A folder of files of the large layer, and what their making told."""
    folder = FOLDER / "files"
    told = folder / "told.json"
    if not told.exists():
        found = halos_large.run("files", _large()[0], folder)
        told.write_text(json.dumps({**found, "commit": harness.commit()}))
    return folder, json.loads(told.read_text())


LARGE = "670,091 × 128"


def large(quick: bool) -> Iterator[Row]:
    """670,091 classes with planted structure: learning, quality, time of files on one thread, memory."""
    if quick:
        return
    _, learned = _large()
    reached = learned["seconds"] <= 600 and learned["gigabytes"] <= 6
    bar = {"bar": "≤ 600 s and ≤ 6 GiB", "reached": reached}
    yield Row(f"index learning, {LARGE}, two cores", learned["seconds"], "s", details=learned, **bar)
    found = learned.pop("test")
    kept = {"bar": "≥ 0.995", "reached": found["kept"] >= 0.995}
    what = f"P@1 over that of the full layer, {LARGE}, {learned['share']:.2%} of the neurons"
    yield Row(what, found["kept"], "", details=found, **kept)
    folder, told = _files()
    for name in ("candidates, 32 bits", "candidates, 8 bits"):
        peak = told[name]["peak gigabytes"]
        what = f"{LARGE}, {name}: peak of memory of the conversion, from a .keras file by the command line"
        yield Row(what, peak, "GB", details=told[name], bar="≤ 3 GB, seconds", reached=peak <= 3)
    times = halos_large.run("time", folder)
    for ours, peer, least in (
        ("candidates, 32 bits", "dense, float32", 30),
        ("candidates, 8 bits", "dense, float32", 30),
        ("candidates, 8 bits", "dense, int8", 12),
        ("candidates, 8 bits, dynamic", "dense, int8", 12),
        ("candidates, 4 bits", "dense, int8", None),
        ("whole, candidates, 8 bits", "whole, dense, float32", None),
    ):
        ratio = times[peer]["median"] / times[ours]["median"]
        barred = {} if least is None else {"bar": f"≥ {least}×", "reached": ratio >= least}
        details = {"ours": times[ours], "peer": times[peer], **told.get(ours, {})}
        what = f"{LARGE}, LiteRT, 1 thread, a new query in every call: {ours}, against {peer}"
        yield Row(
            what,
            times[ours]["median"],
            "µs",
            peer=times[peer]["median"],
            ratio=round(ratio, 1),
            details=details,
            **barred,
        )
    memory = halos_large.run("memory", folder / "candidates, 32 bits.tflite")
    what = f"{LARGE}, float32: anonymous memory that a thousand queries add"
    yield Row(what, memory["added"], "MB", details=memory, bar="< 30 MB", reached=memory["added"] < 30)


def batches(quick: bool) -> Iterator[Row]:
    """Compiled calls of the deployed model, and files, by batch, on one thread, against all classes."""
    if quick:
        return
    for backend, name in (("tensorflow", "TensorFlow"), ("jax", "JAX")):
        for batch, times in halos_large.run("call", _large()[0], backend=backend).items():
            ratio = times["dense"] / times["candidates"]
            first = batch == "1" and backend == "tensorflow"
            least, text = (10, "≥ 10×") if first else (1 / 1.05, "never slower than 1.05× dense")
            what = f"{LARGE}, {name}, 1 thread, batch {batch}: candidates against all classes"
            bar: dict[str, Any] = {"bar": text, "reached": ratio >= least}
            yield Row(what, times["candidates"], "ms", peer=times["dense"], ratio=round(ratio, 1), **bar)
            if first and "keras_rs" in times:
                ratio = times["keras_rs"] / times["candidates"]
                what = f"{LARGE}, {name}, 1 thread, batch 1: candidates against keras-rs BruteForceRetrieval"
                bar = {"bar": "≥ 1.5×", "reached": ratio >= 1.5}
                yield Row(what, times["candidates"], "ms", peer=times["keras_rs"], ratio=round(ratio, 1), **bar)
    for batch, times in halos_large.run("batches", _files()[0]).items():
        ours, *others = (times[name] for name in halos_large.ANY_BATCH)
        dense = min(others)
        what = f"{LARGE}, LiteRT, 1 thread, batch {batch} of any: candidates, 8 bits, against the faster dense file"
        bar = {"bar": "never slower than 1.05× dense", "reached": dense / ours >= 1 / 1.05}
        yield Row(what, ours, "ms", peer=dense, ratio=round(dense / ours, 1), **bar)


def energy(quick: bool) -> Iterator[Row]:
    """No power meter can be read here: bytes of weights that a query reads, and instructions, stand for energy."""
    if quick:
        return
    folder, told = _files()
    whole = 4 * 670_091 * 129 / 1e6
    read = told["candidates, 32 bits"]["megabytes read"]
    bar = {"bar": "≥ 85 % less", "reached": read <= 0.15 * whole}
    what = f"{LARGE}, float32: bytes of weights that a query reads (a proxy of energy)"
    yield Row(what, read, "MB", peer=round(whole, 1), ratio=round(read / whole, 5), **bar)
    ours, peer = (_instructions(folder / f"{name}.tflite") for name in ("candidates, 32 bits", "dense, float32"))
    bar = {"bar": "≥ 85 % less", "reached": ours <= 0.15 * peer}
    what = f"{LARGE}, float32: instructions of a query (a proxy of energy)"
    yield Row(what, round(ours / 1e6, 3), "million", peer=round(peer / 1e6, 1), ratio=round(ours / peer, 5), **bar)


def _instructions(file: Path) -> float:
    """Of one query: what ten more take."""
    counts = []
    for queries in (1, 11):
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
        command += ["-m", "benchmarks.halos_large", "run", str(file), str(queries)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        counts.append(int(re.search(r"refs:\s+([\d,]+)", done.stderr).group(1).replace(",", "")))
    return (counts[1] - counts[0]) / 10


def peers(quick: bool) -> Iterator[Row]:
    """Searches for the largest inner product at the same P@1: the fastest setting of each that comes up to ours."""
    python = os.environ.get("KERAS_EFFICIENT_PEERS")
    if quick or not python:
        return
    data, (folder, _) = FOLDER / "peers", _files()
    if not (data / "labels.npy").exists():
        data.mkdir(parents=True, exist_ok=True)
        planted = halos_large.halos_planted.planted()
        x, y = planted.queries(4000, 3)
        np.save(data / "rows.npy", np.concatenate([planted.kernel, planted.bias[:, None]], 1))
        np.save(data / "queries.npy", x)
        np.save(data / "labels.npy", y[:, 0])
        del planted
    lines = []
    for step in ("build", "search"):
        command = [python, "-m", "benchmarks.halos_peers", step, str(data)]
        environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if step == "search" else {})}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours = halos_large.run("precision", folder / "candidates, 8 bits.tflite", data)["P@1"]
    times = {name: values["median"] for name, values in halos_large.run("time", folder).items()}
    took = times["candidates, 8 bits"]
    for name in dict.fromkeys(line["peer"] for line in lines):
        settings = [line for line in lines if line["peer"] == name]
        equal = [line for line in settings if line["precision"] >= ours - EQUAL]
        line = min(equal, key=lambda line: line["microseconds"]) if equal else max(settings, key=_precision)
        reach = "" if equal else "; no setting comes up to that"
        setting = f"{name} ({line['setting']}, rows {line['rows']})"
        what = f"{LARGE}, 1 thread: candidates, 8 bits, P@1 {ours}, against {setting}, P@1 {line['precision']}{reach}"
        ratio = line["microseconds"] / took
        bar: dict[str, Any] = {} if name == "scann" else {"bar": "≥ 1.5×", "reached": ratio >= 1.5}
        details = {"settings": settings}
        yield Row(what, took, "µs", peer=line["microseconds"], ratio=round(ratio, 2), details=details, **bar)
        if name == "scann":
            whole = times["whole, candidates, 8 bits"]
            peer = round(times["hidden layers alone"] + line["microseconds"], 1)
            what = f"{LARGE}, 1 thread: the whole model in one file, against its hidden layers in LiteRT and {setting}"
            bar = {"bar": "not slower", "reached": whole <= peer}
            yield Row(what, whole, "µs", peer=peer, ratio=round(peer / whole, 2), **bar)


EQUAL = 0.001  # of P@1: a standard error of the difference of two searches on 4,000 queries


def _precision(line: dict[str, Any]) -> float:
    return line["precision"]


SECTIONS = {
    "quality": quality,
    "hashes": hashes,
    "large": large,
    "batches": batches,
    "energy": energy,
    "peers": peers,
}

if __name__ == "__main__":
    harness.main("halos", SECTIONS)

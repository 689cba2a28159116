"""The ratings of ML-100k: RankNet at 32 times fewer bytes, and keras.io's recipe for memory-efficient embeddings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import ops

from benchmarks import harness
from benchmarks.harness import Row
from keras_efficient import layers, models
from keras_efficient.compress import compress_embeddings


@cache
def _ratings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items, ratings."""
    from keras_efficient import recsys

    found = recsys.read_movielens(harness.data_folder() / "recsys" / "ml-100k" / "ratings.tsv.gz")
    return found.users, found.items, found.ratings


def _sorted(ids: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Ids numbered anew from 0 by falling count in the training part."""
    values, index = np.unique(ids, return_inverse=True)
    counts = np.bincount(index[train], minlength=len(values))
    rank = np.empty(len(values), np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return rank[index]


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(spread)


# RankNet

RANKNET_RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
RANKNET_EPOCHS, RANKNET_TUNED_EPOCHS = 20, 4
RANKNET_FORMS = (
    {"form": "scaled", "bits": 8, "scalar_bits": 8},
    {"form": "subspace", "bits": 2},
    {"form": "subspace", "bits": 1},
)
TABLES = ("user_embedding", "item_embedding")


@dataclass(frozen=True)
class RankNet:
    """One training on pairs of items that one user rated differently.

    Attributes:
        form: arguments of our layer, as JSON; empty for the whole tables.
        rate: of Adam, the highest.
        fitted: further epochs of the whole tables, or after `from_embedding` on them; `None`: trained from nothing.
    """

    form: str
    rate: float
    fitted: int | None = None


def ranknet(seeds: Sequence[int], dim: int = 128, ratio: float = 32.0) -> Iterator[Row]:
    """nDCG@10 of each user's held-out ratings, gains 2^rating − 1.

    All choices by a validation part, taken from the training part, and a seed of their own; both sides have the same.
    """

    def validated(run: RankNet) -> float:
        return _ranknet(run, dim, ratio, 100, validation=True)[0]

    plain = max((RankNet("", rate) for rate in RANKNET_RATES), key=validated)
    whole = max(plain, dataclasses.replace(plain, fitted=RANKNET_TUNED_EPOCHS), key=validated)
    forms = [json.dumps(form, sort_keys=True) for form in RANKNET_FORMS]
    choices = [RankNet(form, rate) for form in forms for rate in RANKNET_RATES]
    choices += [RankNet(form, plain.rate, epochs) for form in forms for epochs in (0, RANKNET_TUNED_EPOCHS)]
    scores = {run: validated(run) for run in choices}
    ours = max(scores, key=lambda run: scores[run])
    found = {run: [_ranknet(run, dim, ratio, seed, validation=False) for seed in seeds] for run in (whole, ours)}
    mean, error = _mean_error([100 * (1 - b[0] / a[0]) for a, b in zip(found[whole], found[ours], strict=True)])
    sizes = {run: results[0][1] for run, results in found.items()}
    yield Row(
        f"RankNet on ML-100k, d = {dim}, all tables {ratio:g}× smaller: nDCG@10 lost",
        round(mean, 2),
        "%",
        bar="≤ 1",
        reached=mean <= 1,
        details={
            "standard_error": round(error, 2),
            "ours": dataclasses.asdict(ours),
            "whole": dataclasses.asdict(whole),
            "ndcg": {name: [round(r[0], 4) for r in found[run]] for name, run in (("whole", whole), ("ours", ours))},
            "ratio": round(sizes[whole] / sizes[ours], 2),
            "validation": {
                **{f"whole, rate {rate}": round(validated(RankNet("", rate)), 4) for rate in RANKNET_RATES},
                "whole": round(validated(whole), 4),
                **{f"{run.form}, rate {run.rate}, fitted {run.fitted}": round(v, 4) for run, v in scores.items()},
            },
        },
    )


@cache
def _ranknet(run: RankNet, dim: int, ratio: float, seed: int, *, validation: bool) -> tuple[float, int]:
    """nDCG@10 and bytes of the tables."""
    users, items, ratings = _ratings()
    train, test = _split(validation)
    users, items = _sorted(users, train), _sorted(items, train)
    data = (users, items, ratings)
    keras.utils.set_random_seed(seed)
    sizes = (int(users.max()) + 1, int(items.max()) + 1)
    options = {**json.loads(run.form), "compression": ratio} if run.form and run.fitted is None else None
    model = models.PointwiseRanker(*sizes, dim=dim, dropout=0.3, embedding=options)
    _train(model, data, train, RANKNET_EPOCHS, run.rate, seed)
    if run.fitted is not None and run.form:
        form = {name: value for name, value in json.loads(run.form).items() if name != "scalar_bits"}
        counts = {
            name: np.bincount(ids[train], minlength=size)
            for name, ids, size in zip(TABLES, (users, items), sizes, strict=True)
        }
        model = compress_embeddings(model, compression=ratio, counts=counts, only=TABLES, **form)
    if run.fitted is not None:
        _train(model, data, train, run.fitted, run.rate / 3, seed)
    tables = [model.get_layer(name) for name in TABLES]
    for table in tables:
        table.freeze()
    pairs = {"user": users[test], "items": items[test][:, None]}
    scores = np.asarray(model.predict(pairs, batch_size=4096, verbose=0))[:, 0]
    return _ndcg(users[test], scores, ratings[test], 10), sum(table.nbytes for table in tables)


@cache
def _split(validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """80 % and 20 % of the ratings, at random, the same for all seeds; for validation the same of the first part."""
    order = np.random.default_rng(2022).permutation(len(_ratings()[0]))
    cut = int(0.8 * len(order))
    if not validation:
        return order[:cut], order[cut:]
    inner = int(0.8 * cut)
    return order[:inner], order[inner:cut]


def _train(model: keras.Model, data: Any, train: np.ndarray, epochs: int, rate: float, seed: int) -> None:
    """In every epoch each rating meets another one of its user, drawn anew; equal ones are left out."""
    from keras_efficient import recsys

    users, items, ratings = data
    random = np.random.default_rng(seed)
    order = train[np.lexsort((random.random(len(train)), users[train]))]
    starts = np.searchsorted(users[order], np.arange(users.max() + 2))
    for epoch in range(epochs):
        owner = users[order]
        other = order[starts[owner] + (random.random(len(order)) * (starts[owner + 1] - starts[owner])).astype(int)]
        unequal = np.flatnonzero(ratings[order] != ratings[other])
        unequal = unequal[: len(unequal) // 1024 * 1024]  # whole batches only: another size is another compilation
        if epoch == 0:
            schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(unequal) // 1024, alpha=0.02)
            # Over pairs, not over the elements of lists of two.
            model.compile(keras.optimizers.Adam(schedule), _mean_over_pairs(recsys.ranknet(reduction="sum")))
        better = ratings[order] > ratings[other]
        pairs = np.stack(
            [np.where(better, items[order], items[other]), np.where(better, items[other], items[order])], 1
        )
        labels = np.tile(np.float32([1, 0]), (len(unequal), 1))
        model.fit({"user": owner[unequal], "items": pairs[unequal]}, labels, batch_size=1024, epochs=1, verbose=0)


def _mean_over_pairs(total: Any) -> Any:
    return lambda labels, scores: total(labels, scores) / ops.cast(ops.shape(labels)[0], "float32")


def _ndcg(users: np.ndarray, scores: np.ndarray, ratings: np.ndarray, k: int) -> float:
    """Mean over users with two or more different ratings; equal scores keep the order of the data."""
    found = []
    for user in np.unique(users):
        mine = users == user
        gains = 2.0 ** ratings[mine] - 1
        if len(np.unique(gains)) < 2:
            continue
        discount = 1 / np.log2(np.arange(2, min(k, len(gains)) + 2))
        ranked = gains[np.argsort(-scores[mine], kind="stable")][: len(discount)]
        found.append((ranked @ discount) / (np.sort(gains)[::-1][: len(discount)] @ discount))
    return float(np.mean(found))


# keras.io


@keras.saving.register_keras_serializable(package="keras_efficient_benchmarks")
class MixedDimension(keras.layers.Layer):
    """Blocks of ids by popularity with narrower vectors, each projected to the full width (Ginart et al., 2019)."""

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], output_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.bounds = np.concatenate([[0], np.cumsum(blocks)])
        self.widths, self.output_dim = tuple(widths), output_dim
        # The recipe gives each block a row for ids that it does not know.
        self.tables = [keras.layers.Embedding(size + 1, width) for size, width in zip(blocks, widths, strict=True)]
        self.projections = [None if w == output_dim else keras.layers.Dense(output_dim) for w in widths]

    def call(self, ids):
        total = 0.0
        for index, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            low, high = int(self.bounds[index]), int(self.bounds[index + 1])
            inside = ops.logical_and(ids >= low, ids < high)
            vectors = table(ops.where(inside, ids - low + 1, 0))
            vectors = vectors if projection is None else projection(vectors)
            total = total + vectors * ops.expand_dims(ops.cast(inside, vectors.dtype), -1)
        return total


def keras_io(seeds: Sequence[int]) -> Iterator[Row]:
    """MSE, Adam at 1e-3, batches of 128, three epochs, 85 % of the ratings: all as in the recipe, with a seed.

    The bits of our forms were chosen on the split of seed 0, which is not among those that are reported.
    """
    seeds = [seed + 1 for seed in seeds]
    found = {name: [_recipe(make, seed) for seed in seeds] for name, make in KERAS_IO.items()}
    whole = [result[0] for result in found["whole tables"]]
    worse = {
        name: _mean_error([100 * (a[0] / b - 1) for a, b in zip(results, whole, strict=True)])
        for name, results in found.items()
    }
    ratio = {name: found["whole tables"][0][1] / results[0][1] for name, results in found.items()}
    for name in found:
        yield Row(
            f"MAE on ML-100k above that of whole tables (keras.io's training), {ratio[name]:.1f}× smaller: {name}",
            round(worse[name][0], 2),
            "%",
            details={
                "mae": [round(r[0], 4) for r in found[name]],
                "nbytes": found[name][0][1],
                "standard_error": round(worse[name][1], 2),
            },
        )
    ours, recipe = "ours, subspace of 4-bit scalars", "keras.io's recipe"
    reached = worse[ours][0] < worse[recipe][0] and ratio[ours] > ratio[recipe]
    yield Row(
        "keras.io's memory-efficient recipe on ML-100k: ours is smaller (times) and better (MAE above whole tables)",
        round(worse[ours][0], 2),
        "%",
        peer=round(worse[recipe][0], 2),
        ratio=round(ratio[ours] / ratio[recipe], 3),
        bar="smaller and better",
        reached=reached,
        why="" if reached else "see the two rows above",
        details={"times_smaller": {name: round(value, 2) for name, value in ratio.items()}},
    )


def _whole(users: int, items: int) -> tuple[keras.Layer, keras.Layer]:
    return keras.layers.Embedding(users, 64), keras.layers.Embedding(items, 64)


def _keras_io(users: int, items: int) -> tuple[keras.Layer, keras.Layer]:
    """Quotient and remainder for users; for items, three blocks of the recipe's shares (400 : 1,300 : 2,006)."""
    # The recipe takes users // 50 buckets, whose square must be as large as the number of users.
    buckets = max(users // 50, math.isqrt(users - 1) + 1)
    blocks = [round(items * 400 / 3706), round(items * 1300 / 3706)]
    blocks.append(items - sum(blocks))
    query = layers.CompressedEmbedding(users, 64, method="quotient_remainder", size=buckets)
    return query, MixedDimension(blocks, (64, 32, 16), 64)


def _ours(bits: int, compression: float) -> Any:
    def make(users: int, items: int) -> tuple[keras.Layer, keras.Layer]:
        options = {"form": "subspace", "bits": bits, "compression": compression}
        return layers.MEmComEmbedding(users, 64, **options), layers.MEmComEmbedding(items, 64, **options)

    return make


KERAS_IO = {
    "whole tables": _whole,
    "keras.io's recipe": _keras_io,
    "ours, subspace of 4-bit scalars": _ours(4, 5.3),
    "ours, subspace of 2-bit scalars": _ours(2, 16),
}


def _recipe(make: Any, seed: int) -> tuple[float, int]:
    """Mean absolute error and bytes of the tables."""
    users, items, ratings = _ratings()
    users, items = (_sorted(ids, np.arange(len(ids))) for ids in (users, items))  # by all ratings, as in the recipe
    keras.utils.set_random_seed(seed)
    chosen = np.random.default_rng(seed).random(len(users)) <= 0.85
    user, item = keras.Input((), dtype="int32", name="user"), keras.Input((), dtype="int32", name="item")
    tables = make(int(users.max()) + 1, int(items.max()) + 1)
    logits = ops.sum(tables[0](user) * tables[1](item), axis=-1)
    model = keras.Model({"user": user, "item": item}, ops.sigmoid(logits) * 5)
    model.compile(keras.optimizers.Adam(1e-3), "mse", metrics=["mae"])
    inputs = {"user": users, "item": items}
    fit, test = ({name: ids[part] for name, ids in inputs.items()} for part in (chosen, ~chosen))
    model.fit(fit, ratings[chosen], batch_size=128, epochs=3, verbose=0)
    for table in tables:
        if isinstance(table, layers.CompressedEmbedding):
            table.freeze()
    predicted = np.asarray(model.predict(test, batch_size=4096, verbose=0)).ravel()
    size = sum(t.nbytes if isinstance(t, layers.CompressedEmbedding) else 4 * t.count_params() for t in tables)
    return float(np.mean(np.abs(predicted - ratings[~chosen]))), size

"""The index of hash tables, whose hyperplanes are learned from labels: HALOS' own way.

```
a = tanh(β θᵀq̂),  c = tanh(β θᵀŵ),  s_t = Σ_{k in table t} a_k c_k,  loss = mean of BCE(σ(s_t), y)
```

over pairs of a query and a class: y = 1 for its labels, 0 for classes that were retrieved for it and are wrong. θ is
learned, the tables are filled again with it, pairs are drawn again from what these retrieve, and so on. The two move
each other, so that the game may collapse: see `Guards`.

Source: HALOS, MLSys 2022; Climbing the WOL, arXiv 2007.01230; the soft hash is that of MONGOOSE (ICLR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.extreme.clusters import unit
from keras_efficient.extreme.queries import Queries
from keras_efficient.extreme.routing import class_means
from keras_efficient.layers.halos import HashPlan, Index

__all__ = ["Guards", "filled_again", "hash_plan", "learned_hashes", "random_hashes"]

PAIRS = 2048  # of each kind in a step
STEPS = 60  # between two fillings of the tables
RATE = 0.005
FOUND = 0.02  # what a label weighs that another table finds already
FLIPS = 4  # of the least certain bits, to find a bucket with room


@dataclass(frozen=True)
class Guards:
    """What keeps learned hashes from collapsing; each can be taken away.

    Attributes:
        kept_positives: weight of labels that are retrieved already, where those that are not weigh one. At 0 a label
            leaves the positives as soon as it is found, and is forgotten.
        uniform_negatives: share of the negatives that are any classes instead of retrieved ones. Without, everything
            that is near a query is pushed away from it.
        balanced: as many negatives as positives; else as many as are retrieved for each query.
        unit_norm: hyperplanes have length one, and β is 6; else they are free, and β is 1.
        orthogonal: weight of ``‖θᵀθ − 1‖²`` inside of a table: bits that say the same are lost.
        rare_labels: whether a label weighs one over the root of its frequency.
        keep_best: whether the tables with the best label recall on validation data are kept, not the last ones.
        spill: whether a class whose bucket is full goes to that beyond its least certain bits; else it is in no bucket
            of that table.
        centred: whether the mean is taken from queries and classes before they are hashed.
        by_queries: whether a class is hashed by the mean of its queries; else by its weights.
        by_labels: whether a bucket holds the classes that are the labels of its queries, those first that no table
            before finds; else those whose own code it is.
    """

    kept_positives: float = 0.3
    uniform_negatives: float = 0.5
    balanced: bool = True
    unit_norm: bool = True
    orthogonal: float = 1e-2
    rare_labels: bool = True
    keep_best: bool = True
    spill: bool = True
    centred: bool = True
    by_queries: bool = True
    by_labels: bool = True


def hash_plan(units: int, dim: int, budget: float, *, tables: int | None = None, bits: int | None = None) -> HashPlan:
    """Tables whose buckets are a quarter larger than evenly spread classes would need.

    Raises:
        WrongArgument: so few neurons are no tables.
    """
    neurons = math.floor(budget * units)
    for count in [tables] if tables else [4, 3, 2, 1]:
        wanted = max(1, math.ceil(math.log2(max(1.25 * units * count / max(neurons, 1), 2))))
        digits = bits or wanted
        capacity = (neurons - count * digits) // count
        if capacity >= 1 and capacity * 2**digits >= units:
            return HashPlan(units=units, dim=dim, capacity=capacity, tables=count, bits=digits)
    raise WrongArgument(
        f"A budget of {budget:g} leaves {neurons} of {units} neurons, too few for such hash tables.",
        hint="Give a larger budget, fewer tables, or more bits.",
    )


@dataclass(frozen=True, eq=False)
class _Keys:
    """Unit vectors that are hashed, what is taken from a query before, and pairs of queries and their labels."""

    queries: np.ndarray
    classes: np.ndarray
    centre: np.ndarray
    owners: np.ndarray
    labels: np.ndarray
    known: np.ndarray  # the pairs as sorted numbers

    def are_labels(self, owners: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether each class is a label of its query."""
        pairs = owners * len(self.classes) + classes
        place = np.searchsorted(self.known, pairs).clip(max=len(self.known) - 1)
        return self.known[place] == pairs

    def codes(self, plan: HashPlan, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The bucket of queries in each table."""
        sides = (self.queries[rows] @ theta).reshape(len(rows), plan.built, plan.bits)
        return (sides > 0) @ (2 ** np.arange(plan.bits))


def _keys(queries: Queries, rows: np.ndarray, guards: Guards) -> _Keys:
    classes = class_means(queries, rows).means if guards.by_queries else rows[:, :-1]
    none = np.zeros(classes.shape[1], np.float32)
    centre = queries.vectors.mean(axis=0) if guards.centred else none
    own = centre if guards.by_queries else unit(classes).mean(axis=0) if guards.centred else none
    own_keys = unit((classes if guards.by_queries else unit(classes)) - own)
    owners = queries.owners
    known = np.sort(owners * len(rows) + queries.labels)
    return _Keys(unit(queries.vectors - centre), own_keys, centre, owners, queries.labels, known)


def random_hashes(plan: HashPlan, queries: Queries, rows: np.ndarray, *, seed: int, guards: Guards) -> Index:
    """Tables of random hyperplanes, orthogonal inside of a table as far as there are dimensions."""
    keys = _keys(queries, rows, guards)
    return _filled(plan, _hyperplanes(plan, seed), keys, guards)


def filled_again(
    plan: HashPlan, index: Index, queries: Queries, rows: np.ndarray, guards: Guards | None = None
) -> Index:
    """The same hyperplanes, whose tables are filled again: a model's queries and classes move when it is trained on."""
    guards = Guards() if guards is None else guards
    theta = index.arrays["projection"][0].T.astype(np.float64)
    return _filled(plan, theta, _keys(queries, rows, guards), guards)


def learned_hashes(
    plan: HashPlan,
    queries: Queries,
    rows: np.ndarray,
    *,
    seed: int,
    guards: Guards,
    rounds: int,
    judge: Callable[[Index], float],
) -> tuple[Index, list[float]]:
    """Tables of learned hyperplanes.

    Args:
        plan: the sizes.
        queries: labelled.
        rows: (units, d + 1) weights and bias of each class.
        seed: of hyperplanes and pairs.
        guards: against collapse.
        rounds: fillings of the tables.
        judge: label recall of an index on validation data.

    Returns:
        the index, and the label recall of every round, that of random hyperplanes first. With `keep_best` the index is
        never worse on validation data than with random ones.
    """
    random = np.random.default_rng(seed)
    keys, theta = _keys(queries, rows, guards), _hyperplanes(plan, seed)
    moments = np.zeros((2, *theta.shape))
    step = 0
    index = _filled(plan, theta, keys, guards)
    best, recalls = index, [judge(index)]
    for _ in range(rounds):
        for _ in range(STEPS):
            pairs = _pairs(plan, keys, index, theta, guards, random)
            gradient = _gradient(plan, theta, *pairs, guards)
            step += 1
            moments[0] += 0.1 * (gradient - moments[0])
            moments[1] += 0.001 * (gradient**2 - moments[1])
            unbiased = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            theta = theta - RATE * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            if guards.unit_norm:
                theta = theta / np.maximum(np.linalg.norm(theta, axis=0), 1e-12)
        index = _filled(plan, theta, keys, guards)
        recalls.append(judge(index))
        if not guards.keep_best or recalls[-1] >= max(recalls):
            best = index
    return best, recalls


def _hyperplanes(plan: HashPlan, seed: int) -> np.ndarray:
    """(d, tables · bits), of length one."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(plan.built):
        normal = random.normal(size=(plan.dim, plan.bits))
        parts.append(np.linalg.qr(normal)[0] if plan.bits <= plan.dim else normal / np.linalg.norm(normal, axis=0))
    return np.concatenate(parts, axis=1)


def _filled(plan: HashPlan, theta: np.ndarray, keys: _Keys, guards: Guards) -> Index:
    """The index of tables with these hyperplanes."""
    slots = np.full((plan.built, plan.buckets, plan.capacity), -1, np.int32)
    if guards.by_labels:
        _fill_by_labels(plan, slots, keys, theta)
    for table in range(plan.built):
        _fill_by_codes(plan, slots[table], keys.classes @ theta[:, table * plan.bits :][:, : plan.bits], guards.spill)
    arrays = {
        "projection": theta.T[None].astype(np.float32),
        "projection_bias": -(keys.centre @ theta)[None].astype(np.float32),
        "slots": slots.reshape(plan.blocks, plan.capacity),
        "head": np.zeros(0, np.int32),
    }
    return Index(plan, arrays)


def _fill_by_labels(plan: HashPlan, slots: np.ndarray, keys: _Keys, theta: np.ndarray) -> None:
    """Gives each bucket the labels that its queries have most often, those first that no table before it finds."""
    found = np.zeros(len(keys.labels), bool)
    codes = keys.codes(plan, theta, np.arange(len(keys.queries)))
    for table in range(plan.built):
        pairs, which = np.unique(codes[keys.owners, table] * plan.units + keys.labels, return_inverse=True)
        worth = np.bincount(which, np.where(found, FOUND, 1.0))
        bucket, label = pairs // plan.units, pairs % plan.units
        order = np.lexsort((-worth, bucket))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order)) - np.searchsorted(bucket, bucket[order])
        fits = place < plan.capacity
        slots[table, bucket[fits], place[fits]] = label[fits]
        found |= fits[which]


def _fill_by_codes(plan: HashPlan, slots: np.ndarray, sides: np.ndarray, spill: bool) -> None:
    """Puts the classes that are in no bucket of a table into those of their codes, as far as there is room."""
    flips = min(FLIPS, plan.bits)
    codes = (sides > 0) @ (2 ** np.arange(plan.bits))
    certain = np.argsort(np.abs(sides), axis=1)[:, :flips]
    left = np.setdiff1d(np.arange(plan.units), slots)
    for mask in range(2**flips if spill else 1):
        turned = sum((1 << certain[left, bit]) * (mask >> bit & 1) for bit in range(flips))
        left = _insert(slots, left, codes[left] ^ turned)
    if spill and len(left):
        _insert(slots, left, np.repeat(np.arange(plan.buckets), (slots < 0).sum(axis=1))[: len(left)])


def _insert(slots: np.ndarray, classes: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Puts classes into buckets while there is room, in their order; returns those that found none."""
    free = (slots < 0).sum(axis=1)
    order = np.argsort(buckets, kind="stable")
    buckets, classes = buckets[order], classes[order]
    rank = np.arange(len(order)) - np.searchsorted(buckets, buckets)
    fits = rank < free[buckets]
    slots[buckets[fits], slots.shape[1] - free[buckets[fits]] + rank[fits]] = classes[fits]
    return np.sort(classes[~fits])


def _pairs(
    plan: HashPlan, keys: _Keys, index: Index, theta: np.ndarray, guards: Guards, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys of queries and of classes, whether the class is a label of the query, and what the pair weighs."""
    picked = random.integers(len(keys.labels), size=PAIRS)
    owners, labels = keys.owners[picked], keys.labels[picked]
    buckets = index.arrays["slots"].reshape(plan.built, plan.buckets, plan.capacity)
    retrieved = buckets[np.arange(plan.built), keys.codes(plan, theta, owners)].reshape(PAIRS, -1)
    weights = np.where((retrieved == labels[:, None]).any(axis=1), guards.kept_positives, 1.0)
    if guards.rare_labels:
        rare = 1 / np.sqrt(np.bincount(keys.labels, minlength=plan.units)[labels])
        weights = weights * rare / rare.mean()
    number = PAIRS if guards.balanced else 4 * PAIRS
    rows = random.integers(PAIRS, size=number)
    wrong = retrieved[rows, random.integers(retrieved.shape[1], size=number)]
    wrong = np.where(random.random(number) < guards.uniform_negatives, random.integers(plan.units, size=number), wrong)
    there = (wrong >= 0) & ~keys.are_labels(owners[rows], wrong)
    rows, wrong = rows[there], wrong[there]
    negative = np.full(len(wrong), weights.sum() / max(len(wrong), 1) if guards.balanced else 1.0)
    pair_queries = np.concatenate([keys.queries[owners], keys.queries[owners[rows]]])
    pair_classes = np.concatenate([keys.classes[labels], keys.classes[wrong]])
    truth = np.concatenate([np.ones(PAIRS), np.zeros(len(wrong))])
    return pair_queries, pair_classes, truth, np.concatenate([weights, negative])


def _gradient(
    plan: HashPlan,
    theta: np.ndarray,
    queries: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    weights: np.ndarray,
    guards: Guards,
) -> np.ndarray:
    """Of the loss in θ, (d, tables · bits)."""
    beta = 6.0 if guards.unit_norm else 1.0
    a, c = np.tanh(beta * queries @ theta), np.tanh(beta * classes @ theta)
    s = (a * c).reshape(len(a), plan.built, plan.bits).sum(axis=2)
    g = (1 / (1 + np.exp(-s)) - truth[:, None]) * weights[:, None] / (weights.sum() * plan.built)
    g = np.repeat(g, plan.bits, axis=1) * beta
    gradient = queries.T @ (g * c * (1 - a**2)) + classes.T @ (g * a * (1 - c**2))
    if guards.orthogonal:
        for table in range(plan.built):
            part = slice(table * plan.bits, (table + 1) * plan.bits)
            product = theta[:, part].T @ theta[:, part] - np.eye(plan.bits)
            gradient[:, part] += guards.orthogonal * 4 * theta[:, part] @ product
    return gradient

"""The index of hash tables, whose hyperplanes are learned from labels: HALOS' own way.

```
a = tanh(β θᵀq̂),  c = tanh(β θᵀŵ),  s_t = Σ_{k in table t} a_k c_k,  loss = mean of BCE(σ(s_t), y)
```

over pairs of a query and a class: y = 1 for its labels, 0 for classes that were retrieved for it and are wrong. θ is
learned, the tables are filled again with it, pairs are drawn again from what these retrieve, and so on. The two move
each other, so that the game may collapse: see `Guards`.

Winner-takes-all hashes (`ranges` above 2) compare places of a query instead. They have no gradient: of several draws of
places that one is kept, table by table, which finds most labels that no table before it finds.

Source: HALOS, MLSys 2022; Climbing the WOL, arXiv 2007.01230; the soft hash is that of MONGOOSE (ICLR 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.extreme.clusters import unit
from keras_efficient.extreme.contexts import LABEL, affordable, worth_of_answers
from keras_efficient.extreme.measures import full_answers
from keras_efficient.extreme.queries import Queries
from keras_efficient.extreme.routing import class_means
from keras_efficient.layers.halos import HashPlan, Index

__all__ = ["Guards", "filled_again", "hash_plan", "learned_hashes", "random_hashes"]

PAIRS = 2048  # of each kind in a step
STEPS = 60  # between two fillings of the tables
RATE = 0.005
ANSWERS = 20  # of the full layer for each query
FOUND = 0.02  # what a class weighs that another table finds already
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
        unit_norm: hyperplanes have length one, and β is 6; else they are free, and β is 1: how sharp a bit is, is
            learned with it, and more labels are found.
        orthogonal: weight of ``‖θᵀθ − 1‖²`` inside of a table: bits that say the same are lost.
        rare_labels: whether a label weighs one over the root of its frequency.
        keep_best: whether the tables with the best label recall on validation data are kept, not the last ones.
        spill: whether a class whose bucket is full goes to that beyond its least certain bits; else it is in no bucket
            of that table.
        centred: whether the mean is taken from queries and classes before they are hashed.
        by_queries: whether a class is hashed by the mean of its queries; else by its weights.
        by_labels: whether a bucket holds the classes that are the labels of its queries, those first that no table
            before finds; else those whose own code it is.
        by_answers: whether what the full layer answers counts beside labels there.
    """

    kept_positives: float = 0.3
    uniform_negatives: float = 0.5
    balanced: bool = True
    unit_norm: bool = False
    orthogonal: float = 1e-2
    rare_labels: bool = True
    keep_best: bool = True
    spill: bool = True
    centred: bool = True
    by_queries: bool = True
    by_labels: bool = True
    by_answers: bool = True


def hash_plan(
    units: int, dim: int, budget: float, *, tables: int | None = None, bits: int | None = None, ranges: int = 2
) -> HashPlan:
    """Tables whose buckets are a quarter larger than evenly spread classes would need.

    Raises:
        WrongArgument: so few neurons are no tables, or a query has fewer places than are compared.
    """
    if isinstance(ranges, bool) or not isinstance(ranges, int) or not 2 <= ranges <= max(dim, 2):
        raise WrongArgument(f"`ranges` must be a whole number from 2 to {max(dim, 2)}, not {ranges!r}.")
    neurons = math.floor(budget * units)
    for count in [tables] if tables else [4, 3, 2, 1]:
        wanted = max(1, math.ceil(math.log(max(1.25 * units * count / max(neurons, 1), ranges), ranges) - 1e-9))
        digits = bits or wanted
        capacity = (neurons - (count * digits if ranges == 2 else 0)) // count
        if capacity >= 1 and capacity * ranges**digits >= units:
            return HashPlan(units=units, dim=dim, capacity=capacity, tables=count, bits=digits, ranges=ranges)
    raise WrongArgument(
        f"A budget of {budget:g} leaves {neurons} of {units} neurons, too few for such hash tables.",
        hint="Give a larger budget, fewer tables, or more bits.",
    )


@dataclass(frozen=True, eq=False)
class _Keys:
    """Unit vectors that are hashed, what is taken from a query before, and pairs of queries and their labels.

    Buckets are filled with the classes that are `wanted` by the queries `asking`, each for what it is worth.
    """

    queries: np.ndarray
    classes: np.ndarray
    centre: np.ndarray
    owners: np.ndarray
    labels: np.ndarray
    known: np.ndarray  # the pairs as sorted numbers
    asking: np.ndarray
    wanted: np.ndarray
    worth: np.ndarray

    def are_labels(self, owners: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether each class is a label of its query."""
        pairs = owners * len(self.classes) + classes
        place = np.searchsorted(self.known, pairs).clip(max=len(self.known) - 1)
        return self.known[place] == pairs

    def codes(self, plan: HashPlan, hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The bucket of queries in each table."""
        return _codes(plan, hashes, self.queries[rows])


def _codes(plan: HashPlan, hashes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Buckets (n, tables) by hyperplanes (d, tables · bits), or by places (tables · bits, ranges) that are compared."""
    if plan.ranges == 2:
        digits = vectors @ hashes > 0
    else:
        parts = (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))
        digits = np.concatenate([part[:, hashes].argmax(axis=-1) for part in parts])
    return digits.reshape(len(vectors), -1, plan.bits) @ (plan.ranges ** np.arange(plan.bits))


def _keys(queries: Queries, rows: np.ndarray, guards: Guards) -> _Keys:
    classes = class_means(queries, rows).means if guards.by_queries else rows[:, :-1]
    none = np.zeros(classes.shape[1], np.float32)
    centre = queries.vectors.mean(axis=0) if guards.centred else none
    own = centre if guards.by_queries else unit(classes).mean(axis=0) if guards.centred else none
    own_keys = unit((classes if guards.by_queries else unit(classes)) - own)
    owners = queries.owners
    known = np.sort(owners * len(rows) + queries.labels)
    asking, wanted, worth = owners, queries.labels, np.full(len(owners), LABEL)
    if guards.by_labels and guards.by_answers:
        depth, asked = min(ANSWERS, len(rows)), affordable(len(queries), rows, np.random.default_rng(0))
        answers = full_answers(rows, queries.select(asked), depth)
        asking = np.concatenate([asking, np.repeat(asked, depth)])
        wanted = np.concatenate([wanted, answers.ravel()])
        worth = np.concatenate([worth, np.tile(worth_of_answers(depth), len(asked))])
    keys = unit(queries.vectors - centre)
    return _Keys(keys, own_keys, centre, owners, queries.labels, known, asking, wanted, worth)


def random_hashes(plan: HashPlan, queries: Queries, rows: np.ndarray, *, seed: int, guards: Guards) -> Index:
    """Tables of random places, or of random hyperplanes, orthogonal inside of a table as far as that goes."""
    guards = _of_places(guards) if plan.ranges > 2 else guards
    hashes = _hyperplanes(plan, seed) if plan.ranges == 2 else _places(plan, np.random.default_rng(seed))
    return _filled(plan, hashes, _keys(queries, rows, guards), guards)


def filled_again(
    plan: HashPlan, index: Index, queries: Queries, rows: np.ndarray, guards: Guards | None = None
) -> Index:
    """The same hyperplanes, whose tables are filled again: a model's queries and classes move when it is trained on.

    Classes that are in no bucket stay out.
    """
    guards = Guards() if guards is None else guards
    if plan.ranges > 2:
        guards, hashes = _of_places(guards), index.arrays["places"].reshape(-1, plan.ranges)
    else:
        hashes = index.arrays["projection"][0].T.astype(np.float64)
    found = _filled(plan, hashes, _keys(queries, rows, guards), guards)
    slots = found.arrays["slots"]
    return Index(plan, {**found.arrays, "slots": np.where(np.isin(slots, index.reachable), slots, -1)})


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
    """Tables of learned hyperplanes, or places.

    Args:
        plan: the sizes.
        queries: labelled.
        rows: (units, d + 1) weights and bias of each class.
        seed: of hyperplanes and pairs, or of places.
        guards: against collapse.
        rounds: fillings of the tables; draws of places for each.
        judge: label recall of an index on validation data.

    Returns:
        the index, and the label recall of every round, that of random hyperplanes first. With `keep_best` the index is
        never worse on validation data than with random ones.
    """
    random = np.random.default_rng(seed)
    if plan.ranges > 2:
        return _chosen_places(plan, _keys(queries, rows, _of_places(guards)), guards, rounds, judge, random)
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


def _of_places(guards: Guards) -> Guards:
    """A deployed winner is one of the query's places as they are."""
    return dataclasses.replace(guards, centred=False)


def _places(plan: HashPlan, random: np.random.Generator, tables: int | None = None) -> np.ndarray:
    """(tables · bits, ranges), all different inside of a row."""
    rows = (plan.built if tables is None else tables) * plan.bits
    return random.random((rows, plan.dim)).argpartition(plan.ranges - 1, axis=1)[:, : plan.ranges]


def _chosen_places(
    plan: HashPlan,
    keys: _Keys,
    guards: Guards,
    rounds: int,
    judge: Callable[[Index], float],
    random: np.random.Generator,
) -> tuple[Index, list[float]]:
    first = _places(plan, random)
    recalls = [judge(_filled(plan, first, keys, guards))]
    found = np.zeros(len(keys.wanted), bool)
    chosen = []
    for table in range(plan.built):
        draws = [first[table * plan.bits :][: plan.bits], *(_places(plan, random, 1) for _ in range(rounds))]
        fits = [_labels_in(plan, keys, _codes(plan, places, keys.queries)[:, 0], found)[-1] for places in draws]
        best = int(np.argmax([keys.worth[found | some].sum() for some in fits]))
        found |= fits[best]
        chosen.append(draws[best])
    index = _filled(plan, np.concatenate(chosen), keys, guards)
    recalls.append(judge(index))
    if guards.keep_best and recalls[1] < recalls[0]:
        index = _filled(plan, first, keys, guards)
    return index, recalls


def _filled(plan: HashPlan, hashes: np.ndarray, keys: _Keys, guards: Guards) -> Index:
    """The index of tables with these hyperplanes, or places."""
    slots = np.full((plan.built, plan.buckets, plan.capacity), -1, np.int32)
    if guards.by_labels:
        found = np.zeros(len(keys.wanted), bool)
        codes = keys.codes(plan, hashes, np.arange(len(keys.queries)))
        for table in range(plan.built):
            bucket, place, label, fits = _labels_in(plan, keys, codes[:, table], found)
            slots[table, bucket, place] = label
            found |= fits
    for table in range(plan.built):
        if plan.ranges == 2:
            sides = keys.classes @ hashes[:, table * plan.bits :][:, : plan.bits]
            _fill_by_codes(plan, slots[table], sides, guards.spill)
        else:
            own = _codes(plan, hashes[table * plan.bits :][: plan.bits], keys.classes)[:, 0]
            left = np.setdiff1d(np.arange(plan.units), slots[table])
            _fill_the_rest(plan, slots[table], _insert(slots[table], left, own[left]), guards.spill)
    arrays: dict[str, np.ndarray] = {"places": hashes.ravel().astype(np.int32)}
    if plan.ranges == 2:
        arrays = {
            "projection": hashes.T[None].astype(np.float32),
            "projection_bias": -(keys.centre @ hashes)[None].astype(np.float32),
        }
    blocks = slots.reshape(plan.blocks, plan.capacity)
    return Index(plan, {**arrays, "slots": blocks, "head": np.zeros(0, np.int32)})


def _labels_in(
    plan: HashPlan, keys: _Keys, codes: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The classes that the queries of each bucket want most, those first that no table before it finds.

    Returns:
        bucket, place and class of each that fits; and which of the keys' wanted classes these are.
    """
    pairs, which = np.unique(codes[keys.asking] * plan.units + keys.wanted, return_inverse=True)
    worth = np.bincount(which, np.where(found, FOUND, 1.0) * keys.worth)
    bucket, label = pairs // plan.units, pairs % plan.units
    order = np.lexsort((-worth, bucket))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.searchsorted(bucket, bucket[order])
    fits = place < plan.capacity
    return bucket[fits], place[fits], label[fits], fits[which]


def _fill_by_codes(plan: HashPlan, slots: np.ndarray, sides: np.ndarray, spill: bool) -> None:
    """Puts the classes that are in no bucket of a table into those of their codes, as far as there is room."""
    flips = min(FLIPS, plan.bits)
    codes = (sides > 0) @ (2 ** np.arange(plan.bits))
    certain = np.argsort(np.abs(sides), axis=1)[:, :flips]
    left = np.setdiff1d(np.arange(plan.units), slots)
    for mask in range(2**flips if spill else 1):
        turned = sum((1 << certain[left, bit]) * (mask >> bit & 1) for bit in range(flips))
        left = _insert(slots, left, codes[left] ^ turned)
    _fill_the_rest(plan, slots, left, spill)


def _fill_the_rest(plan: HashPlan, slots: np.ndarray, left: np.ndarray, spill: bool) -> None:
    """Puts classes wherever there is room."""
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
    g = (1 / (1 + np.exp(-s)) - truth[:, None]) * weights[:, None] / (max(weights.sum(), 1e-12) * plan.built)
    g = np.repeat(g, plan.bits, axis=1) * beta
    gradient = queries.T @ (g * c * (1 - a**2)) + classes.T @ (g * a * (1 - c**2))
    if guards.orthogonal:
        for table in range(plan.built):
            part = slice(table * plan.bits, (table + 1) * plan.bits)
            product = theta[:, part].T @ theta[:, part] - np.eye(plan.bits)
            gradient[:, part] += guards.orthogonal * 4 * theta[:, part] @ product
    return gradient

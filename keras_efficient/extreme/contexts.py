"""The index of contexts: queries that are alike share a list of the classes that answer them.

A class may be in many lists, and one that answers nothing is in none (learned screening: Chen et al., ICLR 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.extreme.clusters import group_sums, k_means, unit
from keras_efficient.extreme.measures import full_answers
from keras_efficient.extreme.queries import Queries
from keras_efficient.layers.halos import Index, RouterPlan
from keras_efficient.layers.halos.plans import ArraySource

__all__ = ["LABEL", "affordable", "contexts", "contexts_plan", "moved_again", "worth_of_answers"]

ROUTER_SHARE = 0.125  # of the budget
BEAMS = (4, 2, 1)  # the largest that the budget allows
DEEPEST = 6  # levels of a tree
QUERIES = 40  # that stand behind a list, at least on average
MOST_LISTS = 4096
DEPTH = 60  # answers of the full layer that are counted for each query
HALF = 10  # the rank from which on an answer counts for less than half of the first
LABEL = 3.0  # what a label counts for, where the first answer of the full layer counts for one
PRODUCTS = 4e12  # that the full layer's answers may take; of more queries a part is asked
NOWHERE = -1e9  # the score of a node without queries


def contexts_plan(units: int, dim: int, budget: float, queries: int) -> RouterPlan:
    """A tree over as many lists as so many queries tell apart, as deep as the budget makes it.

    Raises:
        WrongArgument: the budget leaves no list.
    """
    neurons = math.floor(budget * units)
    lists = min(max(queries // QUERIES, 1), MOST_LISTS)
    while lists > 1:
        for beam in BEAMS:
            for depth in range(1, DEEPEST + 1):  # each level costs time of its own
                plan = _tree_plan(units, dim, neurons, lists, depth, beam)
                if plan is not None and plan.routed <= ROUTER_SHARE * neurons:
                    return plan
        lists //= 2
    only = _tree_plan(units, dim, neurons, 1, 1, 1)
    if only is None:
        raise WrongArgument(
            f"A budget of {budget:g} leaves {neurons} of {units} neurons, too few for a list of candidates.",
            hint="Give a larger budget; below some thousand classes all of them are as fast.",
        )
    return only


def _tree_plan(units: int, dim: int, neurons: int, lists: int, depth: int, beam: int) -> RouterPlan | None:
    width = math.ceil(lists ** (1 / depth) - 1e-9)
    beams, there = [], 1
    for _ in range(depth - 1):
        there = min(beam, there * width)
        beams.append(there)
    routed = width * (1 + sum(beams))
    if routed >= neurons:
        return None
    capacity = min(neurons - routed, units)
    widths = (width,) * depth
    return RouterPlan(units=units, dim=dim, capacity=capacity, widths=widths, beams=(*beams, 1), shared=True)


def contexts(plan: RouterPlan, queries: Queries, rows: np.ndarray, *, seed: int) -> Index:
    """Groups queries, and fills the list of each group with the classes that answer its queries most often.

    Args:
        plan: the sizes.
        queries: labelled.
        rows: (units, d + 1) weights and bias of each class.
        seed: of the groups.
    """
    random = np.random.default_rng(seed)
    queries = queries.select(affordable(len(queries), rows, random))
    arrays = _tree(plan, queries.vectors, random)
    groups = _found(plan, arrays, queries.vectors)
    answers = full_answers(rows, queries, min(DEPTH, plan.units))
    return Index(plan, {**arrays, "slots": _lists(plan, groups, queries, answers), "head": np.zeros(0, np.int32)})


def moved_again(plan: RouterPlan, index: Index, queries: Queries) -> Index:
    """The same lists, whose tree is at the means of the queries that it leads to them now."""
    arrays = dict(index.arrays)
    groups = _found(plan, arrays, queries.vectors)
    for level, (name, shelf) in enumerate(plan.shelves().items()):
        nodes = groups // math.prod(plan.widths[level + 1 :])
        sums = group_sums(unit(queries.vectors), nodes, shelf.blocks * shelf.width).reshape(arrays[name].shape)
        there = np.linalg.norm(sums, axis=-1, keepdims=True) > 0
        arrays[name] = np.where(there, unit(sums), arrays[name]).astype(np.float32)
    return Index(plan, arrays)


def _tree(plan: RouterPlan, vectors: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Centres of groups of queries, and of groups inside of these, level by level."""
    arrays: dict[str, np.ndarray] = {}
    groups = np.zeros(len(vectors), np.int64)
    for name, shelf in plan.shelves().items():
        centres = np.zeros((shelf.blocks, shelf.width, plan.dim), np.float32)
        biases = np.full((shelf.blocks, shelf.width), NOWHERE, np.float32)
        order = np.argsort(groups, kind="stable")
        bounds = np.searchsorted(groups[order], np.arange(shelf.blocks + 1))
        deeper = np.zeros_like(groups)
        for node in range(shelf.blocks):
            members = order[bounds[node] : bounds[node + 1]]
            if len(members):
                inner, chosen = k_means(vectors[members], min(shelf.width, len(members)), random)
                centres[node, : len(inner)], biases[node, : len(inner)] = inner, 0.0
                deeper[members] = node * shelf.width + chosen
        arrays[name], arrays[f"{name}_bias"], groups = centres, biases, deeper
    return arrays


def _found(plan: RouterPlan, arrays: Mapping[str, np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """The list that the tree leads each query to, which need not be that of its nearest centre."""
    source = ArraySource({name: keras.ops.convert_to_tensor(array) for name, array in arrays.items()})
    parts = (vectors[start : start + 8192] for start in range(0, len(vectors), 8192))
    return np.concatenate([keras.ops.convert_to_numpy(plan.find(part, source))[:, 0] for part in parts])


def affordable(number: int, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Which of so many queries the full layer can answer in a while: all, or some."""
    most = int(PRODUCTS // (2 * rows.size))
    return np.arange(number) if number <= most else np.sort(random.choice(number, most, replace=False))


def worth_of_answers(depth: int) -> np.ndarray:
    """What the full layer's answers of each rank count for; a label counts for `LABEL`."""
    return 1 / (1 + np.arange(depth) / HALF)


def _lists(plan: RouterPlan, groups: np.ndarray, queries: Queries, answers: np.ndarray) -> np.ndarray:
    """The classes of each list, those that count for most first; free places stay −1.

    Places that a list's own queries do not fill go to the classes that answer most queries of all lists.
    """
    slots = np.full((plan.blocks, plan.capacity), -1, np.int32)
    shares = worth_of_answers(answers.shape[1])

    def counted(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        weights = np.broadcast_to(shares, answers.shape).ravel()
        found = np.bincount(answers.ravel(), weights, minlength=plan.units)
        return found + LABEL * np.bincount(labels, minlength=plan.units)

    all_over = counted(answers, queries.labels)
    order = np.argsort(groups, kind="stable")
    bounds = np.searchsorted(groups[order], np.arange(plan.blocks + 1))
    for block in range(plan.blocks):
        members = order[bounds[block] : bounds[block + 1]]
        score = counted(answers[members], queries.select(members).labels)
        # A small share of that puts what was not counted here in order.
        score += shares[-1] * all_over / (1 + 2 * all_over.sum())
        best = np.argpartition(-score, min(plan.capacity, plan.units - 1))[: plan.capacity]
        slots[block, : len(best)] = best[np.argsort(-score[best], kind="stable")]
    return slots

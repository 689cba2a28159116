"""The index of cells: classes that are alike lie in one block, and a tree of linear scores leads to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.extreme.clusters import balanced_groups, group_sums, some, unit
from keras_efficient.extreme.placement import placed, preferences
from keras_efficient.extreme.queries import Queries
from keras_efficient.extreme.routing import ClassMeans, class_means, discriminants
from keras_efficient.layers.halos import Index, RouterPlan

__all__ = ["cells", "routed_again", "router_plan"]

Scores = Callable[[ClassMeans, np.ndarray, int], tuple[np.ndarray, np.ndarray]]

LOOSE = 1.1  # places over classes: balanced groups cut fewer alike classes apart where some places are free
MOVES = 2  # of classes to other blocks; a third one changed little
LEAST_BEAM, CHOICES = 8, 24  # of the tree in a move
HEAD_SHARE = 0.125  # of the budget
ROUTER_SHARE = 0.45  # of the budget, at most
PROBES, PROBES_OF_MANY, MANY = 8, 64, 2**17  # blocks that a query takes, and of so many classes


def router_plan(
    units: int, dim: int, budget: float, *, head: int | None = None, probes: int | None = None
) -> RouterPlan:
    """A tree of two levels that looks at no more than a share `budget` of the neurons, its own scores included.

    Raises:
        WrongArgument: so few are no tree.
    """
    neurons = math.floor(budget * units)
    head = round(HEAD_SHARE * neurons) if head is None else head
    probes = (PROBES if units < MANY else PROBES_OF_MANY) if probes is None else probes
    for beams in (probes, max(probes // 2, 1), max(probes // 4, 1), 1):
        plan = _fitted(units, dim, neurons, head, probes, beams)
        if plan is not None and plan.routed <= ROUTER_SHARE * neurons:
            return plan
    if probes > 1:
        return router_plan(units, dim, budget, head=head, probes=probes // 2)
    raise WrongArgument(
        f"A budget of {budget:g} leaves {neurons} of {units} neurons, too few for a router.",
        hint="Give a larger budget; below some thousand classes all of them are as fast.",
    )


def _fitted(units: int, dim: int, neurons: int, head: int, probes: int, beam: int) -> RouterPlan | None:
    """The plan with the largest blocks that the budget allows."""
    for capacity in range((neurons - head) // probes, 0, -1):
        count = math.ceil(LOOSE * (units - head) / capacity)
        first = max(beam, round(math.sqrt(count * beam)))  # first + beam · second is least there
        second = math.ceil(count / first)
        if first * second < probes or beam * second < probes:
            continue
        plan = RouterPlan(
            units=units, dim=dim, capacity=capacity, head=head, widths=(first, second), beams=(beam, probes)
        )
        if plan.neurons <= neurons:
            return plan
    return None


def cells(plan: RouterPlan, queries: Queries, rows: np.ndarray, *, seed: int, learned: bool = True) -> Index:
    """Puts classes into the blocks of a plan, and finds the scores that lead to them.

    Args:
        plan: the sizes.
        queries: labelled.
        rows: (units, d + 1) weights and bias of each class.
        seed: of the groups.
        learned: whether labels say what is alike and where it is looked for; else the classes' weights alone do.
    """
    counts = np.bincount(queries.labels, minlength=plan.units)
    head = np.sort(np.argsort(-counts, kind="stable")[: plan.head]).astype(np.int32)
    rest = np.setdiff1d(np.arange(plan.units), head)
    classes = class_means(queries, rows) if learned else _by_weights(rows)
    parts = [rows[:, :-1], classes.means] if learned else [rows[:, :-1]]
    random = np.random.default_rng(seed)
    groups = np.full(plan.units, -1, np.int32)
    groups[rest] = _nested_groups(np.concatenate([unit(part[rest]) for part in parts], axis=1), plan, random)
    routers = _routers(plan, classes, groups, discriminants if learned else _centres)
    for _ in range(MOVES if learned else 0):
        groups[rest] = _placed_again(plan, routers, classes, rest)
        routers = _routers(plan, classes, groups, discriminants)
    return Index(plan, {**routers, "slots": _slots(groups, plan), "head": head})


def routed_again(plan: RouterPlan, index: Index, queries: Queries, rows: np.ndarray) -> Index:
    """The same blocks, with the scores that lead to them learned anew: a model's queries move when it is trained on."""
    groups = np.full(plan.units, -1, np.int32)
    block, place = np.nonzero(index.arrays["slots"] >= 0)
    groups[index.arrays["slots"][block, place]] = block
    routers = _routers(plan, class_means(queries, rows), groups, discriminants)
    return Index(plan, {**index.arrays, **routers})


def _placed_again(
    plan: RouterPlan, routers: dict[str, np.ndarray], classes: ClassMeans, rest: np.ndarray
) -> np.ndarray:
    """The block of each class, where the scores lead its mean query to, as far as there is room.

    Groups of balanced sizes cut classes off from those that they are like; queries of these would not find them.
    """
    beam = max(LEAST_BEAM, plan.widths[0] // 32)
    blocks, scores = preferences(plan, routers, classes.means[rest], beam=beam, count=CHOICES)
    return placed(blocks, scores, classes.masses[rest], plan)


def _routers(plan: RouterPlan, classes: ClassMeans, groups: np.ndarray, scores: Scores) -> dict[str, np.ndarray]:
    """The linear scores of every node of the tree, among all nodes of its level."""
    arrays: dict[str, np.ndarray] = {}
    for level, (name, shelf) in enumerate(plan.shelves().items()):
        below = math.prod(plan.widths[level + 1 :])
        nodes = np.where(groups >= 0, groups // below, -1)
        found, biases = scores(classes, nodes, shelf.blocks * shelf.width)
        arrays[name] = found.reshape(shelf.blocks, shelf.width, plan.dim)
        arrays[f"{name}_bias"] = biases.reshape(shelf.blocks, shelf.width)
    return arrays


def _nested_groups(features: np.ndarray, plan: RouterPlan, random: np.random.Generator) -> np.ndarray:
    """The block of each class: groups, divided into groups, level by level."""
    groups = np.zeros(len(features), np.int64)
    for level, width in enumerate(plan.widths):
        capacity = plan.capacity * math.prod(plan.widths[level + 1 :])
        deeper = np.empty(len(features), np.int64)
        for group in range(math.prod(plan.widths[:level])):
            members = np.flatnonzero(groups == group)
            deeper[members] = group * width + balanced_groups(some(features, members), width, capacity, random)
        groups = deeper
    return groups.astype(np.int32)


def _slots(groups: np.ndarray, plan: RouterPlan) -> np.ndarray:
    slots = np.full((plan.blocks, plan.capacity), -1, np.int32)
    order = np.argsort(groups, kind="stable")[np.count_nonzero(groups < 0) :]
    place = np.arange(len(order)) - np.searchsorted(groups[order], np.arange(plan.blocks))[groups[order]]
    slots[groups[order], place] = order
    return slots


def _by_weights(rows: np.ndarray) -> ClassMeans:
    """What a search for the largest inner product knows of classes: their weights and biases."""
    return ClassMeans(rows, np.ones(len(rows), np.float32), np.eye(rows.shape[1]))


def _centres(classes: ClassMeans, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean weights and bias of each group: ``R q + ρ`` is the mean logit of its classes."""
    members = np.bincount(groups[groups >= 0], minlength=count)
    means = group_sums(classes.means, groups, count) / np.maximum(members, 1)[:, None]
    biases = np.where(members > 0, means[:, -1], -1e9)
    return means[:, :-1].astype(np.float32), biases.astype(np.float32)

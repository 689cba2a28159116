"""Moves classes to the blocks that their own queries are led to, as far as there is room."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_efficient.layers.halos import RouterPlan

__all__ = ["placed", "preferences"]

CHUNK = 16384  # points at once
LEAST = 1e-3  # the wish for a last choice
FAR = 20.0  # below the best log-probability nothing is ever looked for


def preferences(
    plan: RouterPlan, arrays: Mapping[str, np.ndarray], points: np.ndarray, *, beam: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The blocks with the highest scores for each point, the best first, and the scores: (n, count) each.

    Args:
        plan: the tree.
        arrays: its rows and biases.
        points: (n, d).
        beam: nodes that are kept at each level but the last.
        count: of blocks for a point; fewer where the kept nodes do not have so many.
    """
    parts = [_best_of(plan, arrays, points[i : i + CHUNK], beam, count) for i in range(0, len(points), CHUNK)]
    blocks, scores = (np.concatenate(values) for values in zip(*parts, strict=True))
    return blocks, scores


def _best_of(
    plan: RouterPlan, arrays: Mapping[str, np.ndarray], points: np.ndarray, beam: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    nodes, values = np.zeros((len(points), 1), np.int64), np.zeros((len(points), 1), np.float32)
    for level, (name, shelf) in enumerate(plan.shelves().items()):
        scores = np.empty((nodes.size, shelf.width), np.float32)
        owners = np.arange(nodes.size) // nodes.shape[1]
        order = np.argsort(nodes.ravel(), kind="stable")
        bounds = np.searchsorted(nodes.ravel()[order], np.arange(shelf.blocks + 1))
        for node in range(shelf.blocks):  # one product for all points that reach it
            there = order[bounds[node] : bounds[node + 1]]
            scores[there] = points[owners[there]] @ arrays[name][node].T + arrays[f"{name}_bias"][node]
        scores = scores.reshape(len(points), -1)
        kept = min(count if level + 1 == len(plan.widths) else beam, scores.shape[1])
        places = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(scores, places, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        places, values = np.take_along_axis(places, order, axis=1), np.take_along_axis(values, order, axis=1)
        nodes = np.take_along_axis(nodes, places // shelf.width, axis=1) * shelf.width + places % shelf.width
    return nodes.astype(np.int32), values


def placed(blocks: np.ndarray, scores: np.ndarray, masses: np.ndarray, plan: RouterPlan) -> np.ndarray:
    """A block for each class, none with more than its places: the block that it likes best among those with room.

    Where too many want a block, it takes those that are asked for most and would lose most (deferred acceptance: a
    class that is turned down, now or later, asks for its next choice). Those that no block of their choice takes go
    where there is room, near to their first choice in the tree's order.

    Args:
        blocks, scores: from `preferences`, one row a class.
        masses: (n,) how often each class is asked for.
        plan: of the blocks.

    Returns:
        (n,) int32.
    """
    choices = blocks.shape[1]
    scores = np.maximum(scores, scores[:, :1] - FAR)
    wishes = masses[:, None] * (scores - scores[:, -1:] + LEAST)
    turn, found = np.zeros(len(blocks), np.int64), np.full(len(blocks), -1, np.int32)
    while len(asking := np.flatnonzero((found < 0) & (turn < choices))):
        wanted = blocks[asking, turn[asking]]
        contested = np.zeros(plan.blocks + 1, bool)  # the last is of those that have none
        contested[wanted] = True
        holding = np.flatnonzero(contested[found] & (found >= 0))
        who, where = np.concatenate([holding, asking]), np.concatenate([found[holding], wanted])
        order = np.lexsort((-wishes[who, turn[who]], where))
        place = np.arange(len(who)) - np.searchsorted(where[order], np.arange(plan.blocks))[where[order]]
        stays, goes = who[order[place < plan.capacity]], who[order[place >= plan.capacity]]
        found[stays] = where[order[place < plan.capacity]]
        found[goes] = -1
        turn[goes] += 1
    left = np.flatnonzero(found < 0)
    left = left[np.argsort(blocks[left, 0], kind="stable")]
    free = np.repeat(np.arange(plan.blocks), plan.capacity - np.bincount(found[found >= 0], minlength=plan.blocks))
    found[left] = free[_next_free(np.searchsorted(free, blocks[left, 0]), len(free))]
    return found


def _next_free(wanted: np.ndarray, count: int) -> np.ndarray:
    """A place of its own for each of some rising wishes: that or a later one, as far as there are such."""
    steps = np.arange(len(wanted))
    later = np.maximum.accumulate(wanted - steps) + steps
    # What would go beyond the end moves back, and pushes those before it.
    return np.minimum(later, count - len(wanted) + steps)

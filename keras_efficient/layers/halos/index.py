"""What is learned about where classes lie: a plan and the arrays that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.layers.halos.plans import Plan

__all__ = ["Index"]


@dataclass(frozen=True, eq=False)
class Index:
    """Which blocks of classes there are, and the arrays that lead to them.

    Attributes:
        plan: how a query finds its blocks.
        arrays: by name: rows and biases of the plan's shelves (``router_0`` of shape (blocks, width, d),
            ``router_0_bias`` of (blocks, width), …), ``slots`` (blocks, capacity) int32 with −1 in free places,
            ``head`` (plan.head,) int32.
        fingerprint: of the weights that it was learned for; empty if it fits any of the size.

    Raises:
        WrongArgument: an array that is missing, of another shape, not finite, or that names a class that does not exist
            or names one twice where each lies in one place only.
    """

    plan: Plan
    arrays: Mapping[str, np.ndarray]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        wanted = shapes(self.plan)
        if set(self.arrays) != set(wanted):
            raise WrongArgument(
                f"An index of this plan has the arrays {', '.join(wanted)}, not {', '.join(self.arrays)}."
            )
        for name, (shape, dtype) in wanted.items():
            array = np.asarray(self.arrays[name])
            if array.shape != shape or (dtype == "int32") != (array.dtype.kind in "iu"):
                raise WrongArgument(
                    f"Array {name!r} must be {dtype} of shape {shape}, got {array.dtype} {array.shape}."
                )
            if dtype == "float32" and not np.isfinite(array).all():
                raise WrongArgument(f"Array {name!r} is not finite.")
        _check_classes(self.plan, self.arrays["slots"], self.arrays["head"])

    @classmethod
    def random(cls, plan: Plan, seed: int = 0) -> Index:
        """An index that leads anywhere: what a plan costs can be timed with it before one is learned.

        Every class has its place, as far as there are places, and a few places stay free; where classes may lie in
        several blocks all other places are filled.
        """
        random = np.random.default_rng(seed)
        arrays = {
            name: random.normal(size=shape).astype("float32") if dtype == "float32" else np.zeros(shape, "int32")
            for name, (shape, dtype) in shapes(plan).items()
        }
        order = random.permutation(plan.units).astype("int32")
        places = np.full(plan.blocks * plan.capacity, -1, "int32")
        rest = order[plan.head :]
        rest = np.resize(rest, len(places) - plan.blocks // 4) if plan.overlapping else rest[: len(places)]
        places[: len(rest)] = rest
        slots = random.permutation(places).reshape(plan.blocks, plan.capacity)
        if plan.overlapping:  # a block has a class once
            for block in slots:
                block[np.setdiff1d(np.arange(len(block)), np.unique(block, return_index=True)[1])] = -1
        return cls(plan, {**arrays, "slots": slots, "head": order[: plan.head]})

    @property
    def reachable(self) -> np.ndarray:
        """Classes that lie in a block or in the head, sorted."""
        found = np.union1d(self.arrays["slots"], self.arrays["head"])
        return found[found >= 0]


def shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of an index."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shelf in plan.shelves().items():
        found[name] = ((shelf.blocks, shelf.width, plan.dim), "float32")
        found[f"{name}_bias"] = ((shelf.blocks, shelf.width), "float32")
    found |= {name: (shape, "int32") for name, shape in plan.integers().items()}
    return {**found, "slots": ((plan.blocks, plan.capacity), "int32"), "head": ((plan.head,), "int32")}


def _check_classes(plan: Plan, slots: np.ndarray, head: np.ndarray) -> None:
    if head.size and head.min() < 0:
        raise WrongArgument("The head has no free places: make it shorter.")
    both = np.concatenate([slots.ravel(), head])
    if both.size and (both.min() < -1 or both.max() >= plan.units):
        wrong = both.min() if both.min() < -1 else both.max()
        raise WrongArgument(f"The index names class {wrong}; there are 0 to {plan.units - 1}, and −1 for a free place.")
    if not plan.overlapping:
        found, counts = np.unique(both[both >= 0], return_counts=True)
        if (counts > 1).any():
            raise WrongArgument(f"The index has class {found[counts > 1][0]} in {counts.max()} places.")
        return
    inside = np.sort(slots, axis=1)
    if (twice := (inside[:, 1:] == inside[:, :-1]) & (inside[:, 1:] >= 0)).any():
        block = int(np.flatnonzero(twice.any(axis=1))[0])
        raise WrongArgument(f"The index has a class twice in block {block}.")

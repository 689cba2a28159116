"""Where to look for the classes of a query: which blocks of them, by a few products with small arrays.

A plan is pure arithmetic, as those of the embeddings are: it says which arrays there are and which blocks a query
takes. The layer owns the arrays, and the deployed form runs the same plan on stock layers.

Classes lie in blocks of equal capacity, ``slots[block, place] = class``, −1 where a place is free. With a head, the
classes in it are candidates of every query and lie in no block.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument

__all__ = [
    "PLANS",
    "ArraySource",
    "Finder",
    "HashPlan",
    "Plan",
    "RouterPlan",
    "Shelf",
    "Source",
    "best",
    "candidate_ids",
    "candidates",
]


MOST_DIGITS = 31  # of a code, which is an int32


@dataclass(frozen=True)
class Shelf:
    """Blocks of rows of which a query takes some: ``rows (blocks, width, d)``, ``biases (blocks, width)``."""

    blocks: int
    width: int


class Finder(Protocol):
    """What a plan asks for the arrays that lead to blocks."""

    def scores(self, name: str, blocks: Any, x: Any) -> Any:
        """Products of queries ``(b, d)`` with the rows of the blocks ``(b, p)`` of a shelf, plus biases: ``(b, p·w)``.

        Without blocks those of a shelf's only block: ``(b, w)``.
        """
        ...

    def picked(self, name: str, x: Any) -> Any:
        """The columns of the queries that an array of integers names: ``(b, len(array))``."""
        ...


class Source(Finder, Protocol):
    """What it asks for the classes in them, too; the training form and the deployed form each have one."""

    def ids(self, blocks: Any) -> Any:
        """The classes in these blocks, ``(b, p)`` to ``(b, p·width)``; −1 in free places."""
        ...

    def head(self, x: Any) -> tuple[Any, Any]:
        """Logits and classes of the head, ``(b, head)`` each."""
        ...

    def logits(self, blocks: Any, ids: Any, x: Any) -> Any:
        """Of the classes `ids` in these blocks, ``(b, p·width)``; −inf in free places."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every plan has in common.

    Attributes:
        units: number of classes.
        dim: width d of a query.
        capacity: places in a block.
        head: so many classes are candidates of every query.
        places: so many places of a block, the first ones, are looked at; 0: all of them.
    """

    units: int
    dim: int
    capacity: int
    head: int = 0
    places: int = 0

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name, least in (("units", 1), ("dim", 1), ("capacity", 1), ("head", 0), ("places", 0)):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) < 2**31:
                raise WrongArgument(f"A plan's {name} must be a whole number from {least} on, not {value!r}.")
        if self.head > self.units or self.places > self.capacity:
            raise WrongArgument(
                f"A plan of {self.units} classes has a head of {self.head}; of {self.capacity} places of a block "
                f"{self.places} are looked at."
            )

    def _check_size(self) -> None:
        """Before anything of that size is made: a plan may come from a file."""
        rows = sum(shelf.blocks * shelf.width for shelf in self.shelves().values())
        largest = max([self.blocks * self.capacity, rows * self.dim, *map(math.prod, self.integers().values())])
        if largest >= 2**31:
            raise WrongArgument(f"An index of {self.blocks} blocks of {self.capacity} places is too large.")

    @property
    def overlapping(self) -> bool:
        """Whether a class may lie in several blocks. Its row is stored once then, and read by its number; else those of
        a block lie side by side."""
        raise NotImplementedError("Each plan says this for itself.")

    @property
    def repeats(self) -> bool:
        """Whether a class may be twice among the candidates of a query."""
        return self.overlapping and self.probes + (self.head > 0) > 1

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        raise NotImplementedError("Each plan says this for itself.")

    @property
    def probes(self) -> int:
        """How many blocks a query takes."""
        raise NotImplementedError("Each plan says this for itself.")

    @property
    def routed(self) -> int:
        """Rows that a query is multiplied with to find its blocks."""
        raise NotImplementedError("Each plan says this for itself.")

    def shelves(self) -> dict[str, Shelf]:
        """The arrays that are multiplied with to find blocks."""
        raise NotImplementedError("Each plan says this for itself.")

    def integers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a plan's arrays of integers, besides ``slots`` and ``head``."""
        return {}

    def find(self, x: Any, source: Finder) -> Any:
        """The blocks of queries ``(b, d)``: ``(b, probes)`` int32."""
        raise NotImplementedError("Each plan says this for itself.")

    def dial(self, neurons: int) -> Plan:
        """The same plan, looking at as many neurons as it can, but no more than so many.

        Raises:
            WrongArgument: it cannot look at so few; the message says how few it can.
        """
        raise NotImplementedError("Each plan says this for itself.")

    @property
    def width(self) -> int:
        """Places of a block that are looked at."""
        return self.places or self.capacity

    @property
    def candidates(self) -> int:
        """Places that a query looks at, free ones and the head included."""
        return self.head + self.probes * self.width

    @property
    def neurons(self) -> int:
        """Rows of length d that a query is multiplied with, those that find the blocks included."""
        return self.routed + self.candidates

    def to_config(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"kind": self.kind, **plain}

    @staticmethod
    def from_config(config: dict[str, Any]) -> Plan:
        """The plan that `to_config` told."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items() if name != "kind"
        }
        return PLANS[config["kind"]](**plain)


@dataclass(frozen=True, kw_only=True)
class RouterPlan(Plan):
    """A tree of linear scores: at each level the best nodes are kept, and the last level's are the blocks.

    ```
    nodes_1     = top-beams[0] of R_1 q + ρ_1
    nodes_{l+1} = top-beams[l] of R_{l+1}[nodes_l] q + ρ_{l+1}[nodes_l]
    ```

    Attributes:
        widths: children of a node, level by level; their product is the number of blocks.
        beams: nodes that are kept, level by level; the last is the number of blocks that a query takes.
        shared: whether a class may lie in several blocks.
    """

    widths: tuple[int, ...]
    beams: tuple[int, ...]
    shared: bool = False

    kind: ClassVar[str] = "router"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or len(self.widths) != len(self.beams) or min(*self.widths, *self.beams) < 1:
            raise WrongArgument(f"Each level has a width and a beam: got {self.widths} and {self.beams}.")
        there = 1
        for width, beam in zip(self.widths, self.beams, strict=True):
            if beam > (there := there * width):
                raise WrongArgument(f"A beam of {beam} is more than the {there} nodes that it chooses from.")
            there = beam
        self._check_size()

    @property
    def overlapping(self) -> bool:
        return self.shared

    @property
    def blocks(self) -> int:
        return math.prod(self.widths)

    @property
    def probes(self) -> int:
        return self.beams[-1]

    @property
    def routed(self) -> int:
        return sum(kept * width for kept, width in zip((1, *self.beams), self.widths, strict=False))

    def shelves(self) -> dict[str, Shelf]:
        nodes = [math.prod(self.widths[:level]) for level in range(len(self.widths))]
        pairs = zip(nodes, self.widths, strict=True)
        return {f"router_{level}": Shelf(count, width) for level, (count, width) in enumerate(pairs)}

    def find(self, x: Any, source: Finder) -> Any:
        nodes = None
        for level, (width, beam) in enumerate(zip(self.widths, self.beams, strict=True)):
            _, best = ops.top_k(source.scores(f"router_{level}", nodes, x), beam)
            best = ops.cast(best, "int32")
            if nodes is None:
                nodes = best
            else:  # the places are those of the kept nodes' children, one node's after the other's
                parents = ops.take_along_axis(nodes, ops.floor_divide(best, width), axis=1)
                nodes = parents * width + ops.mod(best, width)
        return nodes

    def dial(self, neurons: int) -> RouterPlan:
        """Shared blocks are lists, the best first, of which so much is read; of others more or fewer are."""
        if self.shared:
            places = (neurons - self.routed - self.head) // self.probes
            _check_dial(places, neurons, self.routed + self.head + self.probes)
            return dataclasses.replace(self, places=min(places, self.capacity))
        least, most = 1, self.blocks
        _check_dial(neurons - self.probing(1).neurons + 1, neurons, self.probing(1).neurons)
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.probing(middle).neurons <= neurons else (least, middle - 1)
        return self.probing(least)

    def probing(self, probes: int) -> RouterPlan:
        """The same tree with so many blocks for a query; the beams before grow or shrink with that."""
        factor, beams, there = probes / self.probes, [], 1
        for level, (width, beam) in enumerate(zip(self.widths, self.beams, strict=True)):
            below = math.prod(self.widths[level + 1 :])
            wanted = max(math.ceil(beam * factor), math.ceil(probes / below))
            beams.append(min(wanted, there * width) if level + 1 < len(self.widths) else probes)
            there = beams[-1]
        return dataclasses.replace(self, beams=tuple(beams))


@dataclass(frozen=True, kw_only=True)
class HashPlan(Plan):
    """Hash tables: each gives the block of its code, and a query's candidates are the union of them.

    ```
    SimHash:              code_t = Σ_k 2^k [θ_{t,k} · q + τ_{t,k} > 0]
    winner takes all:     code_t = Σ_k r^k argmax_j q[places_{t,k,j}],  j < r
    ```

    Attributes:
        tables: how many are looked into, L.
        bits: K, digits of a code, which are bits where `ranges` is 2.
        ranges: r, values of a digit: 2 is SimHash, more are winner-takes-all hashes of as many places each.
        built: how many tables there are; `tables` of them are looked into.
    """

    tables: int
    bits: int
    ranges: int = 2
    built: int = 0

    kind: ClassVar[str] = "hash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.built:
            object.__setattr__(self, "built", self.tables)
        if not 1 <= self.tables <= self.built or not 1 <= self.bits <= MOST_DIGITS or self.ranges < 2:
            raise WrongArgument(f"No hash has {self.tables} of {self.built} tables of {self.bits} digits.")
        self._check_size()

    @property
    def overlapping(self) -> bool:
        return True

    @property
    def buckets(self) -> int:
        """Of a table."""
        return self.ranges**self.bits

    @property
    def blocks(self) -> int:
        return self.built * self.buckets

    @property
    def probes(self) -> int:
        return self.tables

    @property
    def routed(self) -> int:
        return self.built * self.bits if self.ranges == 2 else 0

    def shelves(self) -> dict[str, Shelf]:
        return {"projection": Shelf(1, self.built * self.bits)} if self.ranges == 2 else {}

    def integers(self) -> dict[str, tuple[int, ...]]:
        return {} if self.ranges == 2 else {"places": (self.built * self.bits * self.ranges,)}

    def find(self, x: Any, source: Finder) -> Any:
        if self.ranges == 2:
            digits = ops.cast(ops.greater(source.scores("projection", None, x), 0.0), "int32")
        else:
            seen = ops.reshape(source.picked("places", x), (-1, self.built * self.bits, self.ranges))
            digits = ops.cast(ops.argmax(seen, axis=-1), "int32")
        digits = ops.reshape(digits, (-1, self.built, self.bits))[:, : self.tables]
        powers = np.array([self.ranges**digit for digit in range(self.bits)], np.int32)
        codes = ops.sum(digits * powers, axis=-1)
        return codes + np.arange(self.tables, dtype=np.int32) * self.buckets

    def dial(self, neurons: int) -> HashPlan:
        """More or fewer of the tables that there are."""
        tables = (neurons - self.routed - self.head) // self.capacity
        _check_dial(tables, neurons, self.routed + self.head + self.capacity)
        return dataclasses.replace(self, tables=min(tables, self.built))


def _check_dial(found: int, neurons: int, least: int) -> None:
    if found < 1:
        raise WrongArgument(f"{neurons} neurons are too few: this index looks at {least} at least.")


PLANS: dict[str, type[Plan]] = {plan.kind: plan for plan in (RouterPlan, HashPlan)}


class ArraySource:
    """A plan's arrays as they are; `rounded` is what is done to rows that are taken from them."""

    def __init__(self, arrays: Mapping[str, Any], rounded: Callable[[Any], Any] = lambda rows: rows):
        self.arrays, self.rounded = arrays, rounded

    def scores(self, name: str, blocks: Any, x: Any) -> Any:
        """As `Finder` says."""
        rows, biases = self.arrays[name], self.arrays[f"{name}_bias"]
        if blocks is None:
            return ops.matmul(x, ops.transpose(rows[0])) + biases[0]
        taken = self.rounded(ops.take(rows, blocks, axis=0))
        return products(side_by_side(taken), x) + flat(ops.take(biases, blocks, axis=0))

    def picked(self, name: str, x: Any) -> Any:
        """As `Finder` says."""
        return ops.take(x, self.arrays[name], axis=1)


def side_by_side(taken: Any, width: int | None = None) -> Any:
    """``(b, p, w, d)`` or ``(b, p, w·d)`` to ``(b, p·w, d)``."""
    width = taken.shape[-1] if width is None else width
    return ops.reshape(taken, (-1, math.prod(taken.shape[1:]) // width, width))


def flat(values: Any) -> Any:
    """``(b, p, w)`` to ``(b, p·w)``."""
    return ops.reshape(values, (-1, values.shape[1] * values.shape[2]))


def products(rows: Any, x: Any) -> Any:
    """``(b, n, d)`` rows times ``(b, d)`` queries: ``(b, n)``."""
    return ops.squeeze(ops.matmul(rows, ops.expand_dims(x, -1)), -1)


def best(logits: Any, ids: Any, k: int, exclude: Any = None) -> tuple[Any, Any]:
    """The k candidates with the largest logits.

    Args:
        logits, ids: ``(b, candidates)``; what is none has −inf and −1.
        k: how many; where there are fewer candidates, −inf and −1 fill up.
        exclude: ``(b, m)`` classes that must not be answered, −1 where there is none; or `None`.

    Returns:
        logits ``(b, k)``, classes ``(b, k)`` int32.
    """
    if exclude is not None:
        hidden = ops.any(ops.equal(ids[:, :, None], ops.cast(exclude, "int32")[:, None, :]), axis=-1)
        logits, ids = ops.where(hidden, -np.inf, logits), ops.where(hidden, -1, ids)
    found = min(k, logits.shape[1])
    logits, places = ops.top_k(logits, found)
    ids = ops.take_along_axis(ids, ops.cast(places, "int32"), axis=1)
    if found < k:
        logits = ops.pad(logits, [[0, 0], [0, k - found]], constant_values=-np.inf)
        ids = ops.pad(ids, [[0, 0], [0, k - found]], constant_values=-1)
    return logits, ids


def candidate_ids(plan: Plan, x: Any, source: Source) -> Any:
    """The classes of all candidates, ``(b, plan.candidates)``; −1 where there is none, or one again."""
    ids = source.ids(plan.find(x, source))
    if plan.head:
        ids = ops.concatenate([source.head(x)[1], ids], axis=1)
    if not plan.repeats:
        return ids
    ids = ops.sort(ids, axis=1)
    return ops.where(ops.pad(ops.equal(ids[:, 1:], ids[:, :-1]), [[0, 0], [1, 0]]), -1, ids)


def candidates(plan: Plan, x: Any, source: Source) -> tuple[Any, Any]:
    """Logits and classes of all candidates, ``(b, plan.candidates)``; −inf and −1 where there is none, or one again."""
    blocks = plan.find(x, source)
    ids = source.ids(blocks)
    logits = source.logits(blocks, ids, x)
    if plan.head:
        first, classes = source.head(x)
        logits, ids = ops.concatenate([first, logits], axis=1), ops.concatenate([classes, ids], axis=1)
    if not plan.repeats:
        return logits, ids
    order = ops.cast(ops.argsort(ids, axis=1), "int32")
    ids, logits = (ops.take_along_axis(values, order, axis=1) for values in (ids, logits))
    again = ops.pad(ops.equal(ids[:, 1:], ids[:, :-1]), [[0, 0], [1, 0]])
    return ops.where(again, -np.inf, logits), ops.where(again, -1, ids)

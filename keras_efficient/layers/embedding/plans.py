"""How each method makes a vector out of a few small tables: which rows an id takes, and how they are combined.

A plan is pure arithmetic. The layer that follows it owns the variables, their rounding and their storage, so that a
method is no more than its tables, its codes and its formula. Ids are taken to be sorted by falling frequency (Keras'
lookup layers sort a vocabulary so) wherever a plan treats frequent entities in another way.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_efficient.layers.embedding.hashing import MOST_BUCKETS, mix
from keras_efficient.layers.table import BITS, Table

__all__ = ["METHODS", "ImpossibleCompression", "Plan"]

Rows = Mapping[str, Any]


class ImpossibleCompression(ValueError):
    """A method cannot become as small as was asked for, or has not so many rows as were asked for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every method has in common.

    Attributes:
        input_dim: number of entities n.
        output_dim: width of a vector d.
        size: the one number that sets how large the tables are; each method says what it counts. 0: not chosen yet.
        bits: width of the numbers in the tables: 32 (floats), 16, 8, 4, 2 or 1.
        grown_from: number of entities before the first growth, 0 where there was none. What is rounded by a scale of
            the whole table keeps the scale of these, so that old vectors stay as they are.
    """

    input_dim: int
    output_dim: int
    size: int = 0
    bits: int = 32
    grown_from: int = 0

    # What `size` is called in error messages.
    counts: ClassVar[str] = "rows"
    # Whether the largest size makes sense where none is asked for.
    has_default: ClassVar[bool] = True
    # Axes of what `combine` gives, behind those of the ids.
    axes: ClassVar[int] = 1
    # Whether more entities leave the vectors of the old ones as they are.
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_integer(self.bits) or self.bits not in BITS:
            raise ValueError(f"`bits` must be one of {', '.join(map(str, BITS))}. Received: bits={self.bits!r}.")
        least, most = self.limits()
        if self.size and not least <= self.size <= most:
            raise ImpossibleCompression(
                f"{self.size} {self.counts} are out of range: {least} to {most} are possible for "
                f"{self.input_dim} entities of {self.output_dim} columns."
            )

    def fitted(self, compression: float) -> Plan:
        """This plan with the largest `size` whose bytes are at most the full table's over `compression`.

        Raises:
            ImpossibleCompression: even the smallest size takes more; the message says how far the method goes.
        """
        budget = self.full_nbytes / compression
        least, most = self.limits()
        smallest = dataclasses.replace(self, size=least)
        if smallest.nbytes > budget:
            largest = math.floor(100 * self.full_nbytes / smallest.nbytes) / 100
            possible = (
                f"the largest possible here is {largest:g}" if largest >= 1 else "a table as small as this has none"
            )
            raise ImpossibleCompression(
                f"`compression={compression:g}` leaves no {self.counts}: {possible}. "
                f"Received: input_dim={self.input_dim}, output_dim={self.output_dim}, bits={self.bits}."
            )
        while least < most:
            middle = (least + most + 1) // 2
            if dataclasses.replace(self, size=middle).nbytes <= budget:
                least = middle
            else:
                most = middle - 1
        return dataclasses.replace(self, size=least)

    def limits(self) -> tuple[int, int]:
        """Smallest and largest possible `size`; bytes grow with it between the two."""
        return 1, self.input_dim

    def tables(self) -> dict[str, Table]:
        """The arrays that rows are taken from."""
        raise NotImplementedError("Each method says this for itself.")

    def dense(self) -> dict[str, tuple[int, int]]:
        """Kernels that every vector is multiplied by: inputs and outputs of each."""
        return {}

    def codes(self, ids: Any) -> dict[str, Any]:
        """For each table the rows that an id takes: ids' shape, or with one more axis where it takes several."""
        raise NotImplementedError("Each method says this for itself.")

    def chosen(self, rows: Rows) -> dict[str, Any]:
        """As `codes`, for tables whose rows are chosen by those that were taken from others."""
        return {}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        """What is pooled, ``(…, columns)`` or with more `axes`: the vectors, or what `project` makes vectors of.

        Args:
            rows: by table, those that `codes` chose.
            dense: by name, what multiplies by that kernel.
            ids: as for `codes`.
        """
        raise NotImplementedError("Each method says this for itself.")

    def project(self, pooled: Any, dense: Rows) -> Any:
        """Vectors ``(…, d)``, by a linear map: sums may be taken before it, where they are cheaper."""
        return pooled

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the method stores."""
        kernels = sum(4 * inputs * outputs for inputs, outputs in self.dense().values())
        return sum(table.nbytes for table in self.tables().values()) + kernels

    @property
    def full_nbytes(self) -> int:
        """Bytes of the float32 table that it takes the place of."""
        return 4 * self.input_dim * self.output_dim

    def _table(self, rows: int, columns: int, **options: Any) -> Table:
        return Table(rows, columns, **{"bits": self.bits, **options})

    def _own_rows(self, columns: int, **options: Any) -> Table:
        """A table with a row for every entity."""
        return self._table(self.input_dim, columns, scale_rows=self.grown_from, **options)


@dataclass(frozen=True, kw_only=True)
class Hashed(Plan):
    """A plan whose first table is reached by a hash of the id.

    Attributes:
        hash: ``"modulo"``, i mod m, which keeps the m most frequent entities apart where ids are sorted by frequency;
            ``"mix"``, a hash without a pattern, for ids in any order.
    """

    hash: str = "modulo"

    def __post_init__(self) -> None:
        if self.hash not in ("modulo", "mix"):
            raise ValueError(f'`hash` must be "modulo" or "mix". Received: hash={self.hash!r}.')
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return 1, self._most_buckets(self.input_dim)

    def _most_buckets(self, entities: int) -> int:
        return entities if self.hash == "modulo" else min(entities, MOST_BUCKETS)

    def bucket(self, ids: Any, buckets: int) -> Any:
        """h(i)."""
        return ops.mod(ids, buckets) if self.hash == "modulo" else mix(ids, buckets)


@dataclass(frozen=True, kw_only=True)
class MEmCom(Hashed):
    """``e(i) = U[h(i)] · V[i] (+ W[i])``: a row for each bucket, numbers of its own for each entity. `size`: rows m.

    The vector is cut into as many groups of columns as an entity has scalars; each scalar scales (V) and shifts (W) its
    group. With `own_rows` k, the k most frequent entities have rows of their own.

    Attributes:
        bias: whether there is a W.
        scalars: G, a divisor of d.
        scalar_bits: width of the numbers in V and W.
        own_rows: k.
    """

    bias: bool = False
    scalars: int = 1
    scalar_bits: int = 32
    own_rows: int = 0

    def __post_init__(self) -> None:
        if not _is_integer(self.scalars) or self.scalars < 1 or self.output_dim % self.scalars:
            raise ValueError(
                f"`scalars` must divide `output_dim` ({self.output_dim}). Received: scalars={self.scalars!r}."
            )
        if not _is_integer(self.scalar_bits) or self.scalar_bits not in (32, 16, 8):
            raise ValueError(f"`scalar_bits` must be 32, 16 or 8. Received: scalar_bits={self.scalar_bits!r}.")
        _check_own_rows(self.own_rows, self.input_dim)
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return 1, self._most_buckets(self.input_dim - self.own_rows)

    def tables(self) -> dict[str, Table]:
        scalars = {"bits": self.scalar_bits, "scale": "table"}
        found = {
            "rows": self._table(self.own_rows + self.size, self.output_dim),
            "scalars": self._own_rows(self.scalars, initial="ones", **scalars),
        }
        if self.bias:
            found["shifts"] = self._own_rows(self.scalars, initial="zeros", **scalars)
        return found

    def codes(self, ids: Any) -> dict[str, Any]:
        if self.own_rows:
            hashed = self.own_rows + self.bucket(ops.maximum(ids - self.own_rows, 0), self.size)
            row = ops.where(ops.less(ids, self.own_rows), ids, hashed)
        else:
            row = self.bucket(ids, self.size)
        return {"rows": row, "scalars": ids, **({"shifts": ids} if self.bias else {})}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        vectors = rows["rows"] * self._spread(rows["scalars"])
        # In this order: of `vectors + shifts` Keras would make a bias along d where a sequence is as long as d.
        return self._spread(rows["shifts"]) + vectors if self.bias else vectors

    def _spread(self, scalars: Any) -> Any:
        """``(…, G)`` to ``(…, d)``, or to what broadcasts to it."""
        return scalars if self.scalars == 1 else ops.repeat(scalars, self.output_dim // self.scalars, axis=-1)


@dataclass(frozen=True, kw_only=True)
class Codebooks(Plan):
    """``e(i) = [U₁[h₁(i)], …, U_G[h_G(i)]]``, the hashes learned and stored, a byte each. `size`: hashes G.

    Product quantisation (Jégou et al., 2011): the columns are cut into G stretches of nearly one width, and each entity
    has for each stretch one of 256 rows that all share. Before `from_embedding` finds better ones the bytes are hashes
    of the id. `bits` is the width of the numbers in the rows.
    """

    counts: ClassVar[str] = "codebooks"
    has_default: ClassVar[bool] = False
    axes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.bits < 8:
            raise ValueError(f"Rows that all entities share have 32, 16 or 8 bits. Received: bits={self.bits}.")
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return 1, self.output_dim

    @property
    def choices(self) -> int:
        """Rows of a codebook."""
        return min(256, self.grown_from or self.input_dim)

    @property
    def widths(self) -> list[int]:
        """Columns of each stretch; those of the first stretches are one more where d / G leaves a rest."""
        width, rest = divmod(self.output_dim, self.size)
        return [width + (index < rest) for index in range(self.size)]

    def tables(self) -> dict[str, Table]:
        return {
            "choices": Table(self.input_dim, self.size, bits=8, choices=self.choices),
            "rows": self._table(self.size * self.choices, self.widths[0], scale="table"),
        }

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"choices": ids}

    def chosen(self, rows: Rows) -> dict[str, Any]:
        first = np.arange(self.size, dtype=np.int32) * self.choices
        return {"rows": ops.cast(rows["choices"], "int32") + first}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return rows["rows"]

    def project(self, pooled: Any, dense: Rows) -> Any:
        stretches = [pooled[..., index, :width] for index, width in enumerate(self.widths)]
        return ops.concatenate(stretches, axis=-1)


@dataclass(frozen=True, kw_only=True)
class NaiveHashing(Hashed):
    """``e(i) = U[h(i)]``: entities of one bucket share their vector. `size`: rows of U."""

    def tables(self) -> dict[str, Table]:
        return {"rows": self._table(self.size, self.output_dim)}

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"rows": self.bucket(ids, self.size)}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return rows["rows"]


@dataclass(frozen=True, kw_only=True)
class TruncateRare(Plan):
    """``e(i) = U[min(i, m − 1)]``: all rare entities share the last row. `size`: rows of U, m."""

    def tables(self) -> dict[str, Table]:
        return {"rows": self._table(self.size, self.output_dim)}

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"rows": ops.minimum(ids, self.size - 1)}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return rows["rows"]


@dataclass(frozen=True, kw_only=True)
class DoubleHashing(Plan):
    """``e(i) = [A[h₁(i)], B[h₂(i)]]``, or the sum of the two. `size`: rows of A and of B.

    With `own_rows` k, the k most frequent entities have rows of their own in both tables (frequency-based double
    hashing, Zhang et al., RecSys 2020).

    Attributes:
        how: ``"concatenate"`` or ``"add"``.
        own_rows: k.
    """

    how: str = "concatenate"
    own_rows: int = 0

    def __post_init__(self) -> None:
        _check_how(self.how, ("concatenate", "add"))
        _check_own_rows(self.own_rows, self.input_dim)
        if self.how == "concatenate":
            _check_halves(self.output_dim)
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return self.own_rows + 1, min(self.input_dim, self.own_rows + MOST_BUCKETS)

    def tables(self) -> dict[str, Table]:
        width = self.output_dim // (2 if self.how == "concatenate" else 1)
        return {name: self._table(self.size, width) for name in ("first", "second")}

    def codes(self, ids: Any) -> dict[str, Any]:
        hashed = {name: mix(ids, self.size - self.own_rows, seed) for seed, name in enumerate(("first", "second"))}
        if not self.own_rows:
            return hashed
        own = ops.less(ids, self.own_rows)
        return {name: ops.where(own, ids, code + self.own_rows) for name, code in hashed.items()}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return _joined(self.how, rows["first"], rows["second"])


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(Plan):
    """``e(i) = R[i mod m] ∘ Q[i div m]``, a pair of rows for every entity (Shi et al., KDD 2020). `size`: m.

    Attributes:
        how: ∘, ``"multiply"``, ``"add"`` or ``"concatenate"``.
    """

    how: str = "multiply"
    counts: ClassVar[str] = "remainders"

    def __post_init__(self) -> None:
        _check_how(self.how, ("multiply", "add", "concatenate"))
        if self.how == "concatenate":
            _check_halves(self.output_dim)
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return math.isqrt(self.input_dim - 1) + 1, self.input_dim  # below √n the quotients cost more than is saved

    def tables(self) -> dict[str, Table]:
        width = self.output_dim // (2 if self.how == "concatenate" else 1)
        initial = "around_one" if self.how == "multiply" else "embeddings"
        quotients = -(-self.input_dim // self.size)
        return {
            "remainder": self._table(self.size, width),
            "quotient": self._table(quotients, width, initial=initial),
        }

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"remainder": ops.mod(ids, self.size), "quotient": ops.floor_divide(ids, self.size)}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return _joined(self.how, rows["remainder"], rows["quotient"])


@dataclass(frozen=True, kw_only=True)
class HashEmbedding(Plan):
    """``e(i) = Σ_k P[i, k] · U[h_k(i)]`` with k = 1, 2 (Svenstrup et al., NeurIPS 2017). `size`: rows of U."""

    def limits(self) -> tuple[int, int]:
        return 1, min(self.input_dim, MOST_BUCKETS)

    def tables(self) -> dict[str, Table]:
        bits = max(self.bits, 8)  # a weight of two or four bits would be no weight
        return {
            "rows": self._table(self.size, self.output_dim),
            "weights": self._own_rows(2, bits=bits, scale="table", initial="ones"),
        }

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"rows": mix(ops.expand_dims(ids, -1), self.size, np.arange(2)), "weights": ids}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return ops.sum(rows["rows"] * ops.expand_dims(rows["weights"], -1), axis=-2)


@dataclass(frozen=True, kw_only=True)
class Reduced(Plan):
    """``e(i) = [A[i], 0]``: narrower vectors, filled up with zeros. `size`: width of A; d is the whole table."""

    counts: ClassVar[str] = "columns"

    def limits(self) -> tuple[int, int]:
        return 1, self.output_dim

    def tables(self) -> dict[str, Table]:
        return {"rows": self._own_rows(self.size, scale="table" if self.bits <= 2 else "row")}

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"rows": ids}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        missing = self.output_dim - self.size
        return ops.pad(rows["rows"], [(0, 0)] * len(ids.shape) + [(0, missing)]) if missing else rows["rows"]


@dataclass(frozen=True, kw_only=True)
class Factorised(Plan):
    """``e(i) = Σ_k A[i, k] · P[k]``, A n×r, P r×d (Lan et al., ICLR 2020). `size`: r.

    `bits` is the width of the numbers in A; P has floats. With few bits r may be larger than d: with one bit a vector
    is a sum of signed rows.
    """

    counts: ClassVar[str] = "columns"
    has_default: ClassVar[bool] = False

    def limits(self) -> tuple[int, int]:
        return 1, self.output_dim * (8 if self.bits < 8 else 1)

    def tables(self) -> dict[str, Table]:
        return {"rows": self._own_rows(self.size, scale="table" if self.bits < 8 else "row")}

    def dense(self) -> dict[str, tuple[int, int]]:
        return {"projection": (self.size, self.output_dim)}

    def codes(self, ids: Any) -> dict[str, Any]:
        return {"rows": ids}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return rows["rows"]

    def project(self, pooled: Any, dense: Rows) -> Any:
        return dense["projection"](pooled)


@dataclass(frozen=True, kw_only=True)
class TensorTrain(Plan):
    """``e(i) = G₁[i₁] · G₂[i₂] · G₃[i₃]``, i = (i₁, i₂, i₃) in mixed radix (Yin et al., MLSys 2021). `size`: rank R."""

    counts: ClassVar[str] = "ranks"
    has_default: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    def limits(self) -> tuple[int, int]:
        return 1, max(1, self.input_dim // 4)

    def tables(self) -> dict[str, Table]:
        (n1, n2, n3), (d1, d2, d3), rank = self._entities, self._columns, self.size
        # Each vector is a sum over R² paths of products of three: this makes it as large as `Embedding`'s.
        initial = (0.05 / math.sqrt(3) / rank) ** (1 / 3)
        shapes = {"first": (n1, d1 * rank), "second": (n2, rank * d2 * rank), "third": (n3, rank * d3)}
        return {name: self._table(*shape, initial=initial) for name, shape in shapes.items()}

    def codes(self, ids: Any) -> dict[str, Any]:
        _, n2, n3 = self._entities
        rest = ops.floor_divide(ids, n3)
        return {"first": ops.floor_divide(rest, n2), "second": ops.mod(rest, n2), "third": ops.mod(ids, n3)}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        (d1, d2, _), rank = self._columns, self.size
        first, second, third = (split(rows[n], k) for n, k in (("first", d1), ("second", rank), ("third", rank)))
        both = split(merge(ops.matmul(first, second), d1), d1 * d2)
        return merge(ops.matmul(both, third), d1 * d2)

    @property
    def _entities(self) -> tuple[int, int, int]:
        """Three numbers, near to each other, whose product is at least n."""
        third = math.ceil(self.input_dim ** (1 / 3) - 1e-9)
        second = math.ceil(math.sqrt(self.input_dim / third) - 1e-9)
        return -(-self.input_dim // (second * third)), second, third

    @property
    def _columns(self) -> tuple[int, int, int]:
        """Three factors of d, as near to each other as its divisors allow."""
        d = self.output_dim
        splits = [(a, b, d // (a * b)) for a in _divisors(d) for b in _divisors(d // a)]
        return min(splits, key=lambda split: (max(split) / min(split), split))


@dataclass(frozen=True, kw_only=True)
class DeepHash(Plan):
    """``e(i) = W₂ · mish(W₁ · hashes(i))`` with no table at all (DHE, Kang et al., KDD 2021). `size`: hidden width.

    Attributes:
        hashes: how many hash functions; each gives a number in [−1, 1].
    """

    hashes: int = 1024
    counts: ClassVar[str] = "hidden units"
    has_default: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits != 32:
            raise ValueError(f"This method has no table whose bits could be fewer. Received: bits={self.bits}.")
        if not _is_integer(self.hashes) or self.hashes < 1:
            raise ValueError(f"`hashes` must be a positive integer. Received: hashes={self.hashes!r}.")
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return 1, max(1, self.input_dim)

    def tables(self) -> dict[str, Table]:
        return {}

    def dense(self) -> dict[str, tuple[int, int]]:
        return {"hidden": (self.hashes, self.size), "output": (self.size, self.output_dim)}

    def codes(self, ids: Any) -> dict[str, Any]:
        return {}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        buckets = 1_000_003
        found = ops.cast(mix(ops.expand_dims(ids, -1), buckets, np.arange(self.hashes)), "float32")
        hidden = dense["hidden"](found * (2.0 / (buckets - 1)) - 1.0)
        return dense["output"](hidden * ops.tanh(ops.softplus(hidden)))


@dataclass(frozen=True, kw_only=True)
class Robe(Plan):
    """Every vector is d / Z stretches of one circular array (ROBE, Desai et al., MLSys 2022). `size`: numbers in it.

    Attributes:
        block: Z, numbers in a stretch.
    """

    block: int = 16
    counts: ClassVar[str] = "numbers"

    def __post_init__(self) -> None:
        if not _is_integer(self.block) or self.block < 1 or self.output_dim % self.block:
            raise ValueError(f"`block` must divide `output_dim` ({self.output_dim}). Received: block={self.block}.")
        if self.bits < 8:
            raise ValueError(f"Stretches may begin anywhere, so no byte holds two. Received: bits={self.bits}.")
        super().__post_init__()

    def limits(self) -> tuple[int, int]:
        return self.block, min(self.input_dim * self.output_dim, MOST_BUCKETS)

    def tables(self) -> dict[str, Table]:
        return {"array": self._table(self.size, 1, scale="table")}

    def codes(self, ids: Any) -> dict[str, Any]:
        blocks = self.output_dim // self.block
        starts = ops.expand_dims(mix(ops.expand_dims(ids, -1), self.size, np.arange(blocks)), -1)
        places = ops.mod(starts + np.arange(self.block, dtype=np.int32), self.size)
        return {"array": merge(places, blocks)}

    def combine(self, rows: Rows, dense: Rows, ids: Any) -> Any:
        return ops.squeeze(rows["array"], -1)


METHODS: dict[str, type[Plan]] = {
    "memcom": MEmCom,
    "codebooks": Codebooks,
    "naive": NaiveHashing,
    "truncate": TruncateRare,
    "double": DoubleHashing,
    "quotient_remainder": QuotientRemainder,
    "hash_embedding": HashEmbedding,
    "reduced": Reduced,
    "factorised": Factorised,
    "tensor_train": TensorTrain,
    "deep_hash": DeepHash,
    "robe": Robe,
}


def split(values: Any, parts: int) -> Any:
    """``(…, parts · k)`` to ``(…, parts, k)`` without a reshape, which several free axes would forbid."""
    return ops.stack(ops.split(values, parts, axis=-1), axis=-2)


def merge(values: Any, parts: int) -> Any:
    """``(…, parts, k)`` to ``(…, parts · k)``."""
    return ops.concatenate([values[..., i, :] for i in range(parts)], axis=-1)


def _joined(how: str, left: Any, right: Any) -> Any:
    if how == "concatenate":
        return ops.concatenate([left, right], axis=-1)
    return left * right if how == "multiply" else left + right


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_own_rows(own_rows: Any, entities: int) -> None:
    if not _is_integer(own_rows) or own_rows < 0:
        raise ValueError(f"`own_rows` must be an integer from 0 on. Received: own_rows={own_rows!r}.")
    if own_rows >= entities:
        raise ImpossibleCompression(f"`own_rows` must be from 0 to {entities - 1}. Received: own_rows={own_rows}.")


def _check_how(how: str, known: tuple[str, ...]) -> None:
    if how not in known:
        raise ValueError(f"`how` must be one of {', '.join(known)}. Received: how={how!r}.")


def _check_halves(width: int) -> None:
    if width % 2:
        raise ValueError(f"Two halves are joined: `output_dim` must be even. Received: output_dim={width}.")


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]

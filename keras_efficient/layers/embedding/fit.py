"""Tables that come nearest to a trained embedding matrix, in closed form or by alternating least squares.

Every function minimises ``Σ_i c_i ‖E_i − e(i)‖²`` over the tables of a plan, where c are the counts of the entities.
What has no closed form here (`None`) is left to gradients.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from keras_efficient.layers.embedding import plans
from keras_efficient.layers.embedding.plans import Plan
from keras_efficient.layers.table import STEP, Table, dequantize, quantize

__all__ = ["fit", "weighted_error"]

Values = dict[str, np.ndarray]
SWEEPS = 12  # of alternating steps: the error falls by less than one per cent in the last of them
K_MEANS_STEPS = 30  # of normal values 15 have an error larger by 0.8 per cent, 60 one smaller by 0.3
SAMPLE = 65536  # entities that k-means looks at: of 300,000, all of them lower the error by 1.3 per cent


def weighted_error(matrix: np.ndarray, vectors: np.ndarray, counts: np.ndarray) -> float:
    """``Σ c_i ‖E_i − e(i)‖² / Σ c_i ‖E_i‖²``: 0 where nothing is lost, 1 where all is."""
    lost = float(np.sum(counts[:, None] * np.square(matrix - vectors, dtype=np.float64)))
    return lost / max(float(np.sum(counts[:, None] * np.square(matrix, dtype=np.float64))), 1e-30)


@singledispatch
def fit(plan: Plan, matrix: np.ndarray, counts: np.ndarray) -> Values | None:
    """Values of the plan's tables and kernels, by name; `None` where only gradients can find them.

    Args:
        plan: which tables there are.
        matrix: E, (n, d).
        counts: c, (n,), positive.
    """
    return None


@fit.register
def _memcom(plan: plans.MEmCom, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """The best rank-one approximation of each bucket and group of columns: U its first right singular vector.

    Entities with rows of their own keep them. With a bias, W is the mean of what is left of a group, and U and W take
    turns.
    """
    rows = _codes(plan, "rows")
    groups, width = plan.scalars, plan.output_dim // plan.scalars
    shifts = np.zeros((plan.input_dim, groups), np.float32)
    table = np.zeros((plan.own_rows + plan.size, plan.output_dim), np.float32)
    scalars = np.ones((plan.input_dim, groups), np.float32)
    for _ in range(SWEEPS if plan.bias else 1):
        rest = matrix - np.repeat(shifts, width, axis=1)
        for group in range(groups):
            part = slice(group * width, (group + 1) * width)
            table[:, part], scalars[:, group] = _rank_one(rest[:, part], rows, len(table), counts)
        if plan.bias:
            left = matrix - table[rows] * np.repeat(scalars, width, axis=1)
            shifts = left.reshape(plan.input_dim, groups, width).mean(axis=2).astype("float32")
    # Equal vectors by larger rows and smaller scalars: those of a bucket are about one, as in training.
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        size = np.sqrt(
            _sums(np.square(scalars[:, group]) * counts, rows, len(table)) / _weight(counts, rows, len(table))
        )
        size = np.where(size > 0, size, 1.0).astype("float32")
        table[:, part] *= size[:, None]
        scalars[:, group] /= size[rows]
    return {"rows": table, "scalars": scalars, **({"shifts": shifts} if plan.bias else {})}


def _rank_one(part: np.ndarray, rows: np.ndarray, count: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each bucket the unit vector u and scalars v with the least ``Σ c ‖e − v·u‖²``: by power iteration."""
    # Begin with the mean of the vectors, turned to the side of the longest.
    start = part[_longest(part, rows, count, counts)]
    u = _unit(start)
    for _ in range(30):
        v = np.einsum("nd,nd->n", part, u[rows])
        u = _unit(_row_sums(part * (counts * v)[:, None], rows, count) + 1e-12 * u)
    v = np.einsum("nd,nd->n", part, u[rows])
    return u, v


@fit.register
def _factorised(plan: plans.Factorised, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """The singular vectors of the weighted matrix; of few bits, scalars and rows in turn.

    Each scalar in its turn takes its best level, then the rows are solved for.
    """
    table = plan.tables()["rows"]
    if table.bits >= 8:
        return _principal(plan, matrix, counts)
    kernel = _frame(matrix, counts, plan.size)
    step = STEP[table.bits]
    scalars = np.zeros((plan.input_dim, plan.size), np.float32)
    rest = matrix.astype(np.float32).copy()
    for _ in range(SWEEPS):
        for k, row in enumerate(kernel):
            along = rest @ row / max(float(row @ row), 1e-12)
            level = _level(table, scalars[:, k] + along, step)
            rest -= np.outer(level - scalars[:, k], row)
            scalars[:, k] = level
        kernel = _kernel(scalars, matrix, counts)
        rest = matrix - scalars @ kernel
    stored, scale = quantize(table, scalars)  # its scale is another than the step above
    return {"rows": scalars, "projection": _kernel(_values(table, stored, scale), matrix, counts)}


def _principal(plan: plans.Factorised, matrix: np.ndarray, counts: np.ndarray) -> Values:
    scale = np.sqrt(counts / counts.sum())[:, None]
    _, _, axes = np.linalg.svd(scale * matrix, full_matrices=False)
    axes = np.pad(axes[: plan.size], [(0, max(0, plan.size - len(axes))), (0, 0)])  # fewer entities than columns
    if plan.bits < 32:  # columns of equal size are rounded with the least error
        axes = np.linalg.qr(np.random.default_rng(0).normal(size=(plan.size, plan.size)))[0] @ axes
    return {"rows": (matrix @ axes.T).astype("float32"), "projection": axes.astype("float32")}


@fit.register
def _codebooks(plan: plans.Codebooks, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """k-means of each stretch of columns, weighted by counts: what is looked up often is met best."""
    random = np.random.default_rng(0)
    # Of more entities than that, k-means sees a part, the frequent ones with as much weight as they have.
    known, weights = np.arange(plan.input_dim), counts
    if plan.input_dim > SAMPLE:
        known = random.choice(plan.input_dim, SAMPLE, p=counts / counts.sum())
        weights = np.ones(SAMPLE, np.float32)
    choices = np.zeros((plan.input_dim, plan.size), np.uint8)
    rows = np.zeros((plan.size, plan.choices, plan.widths[0]), np.float32)
    first = 0
    for index, width in enumerate(plan.widths):
        part = np.ascontiguousarray(matrix[:, first : first + width], np.float32)
        centres = _k_means(part[known], weights, plan.choices, random)
        choices[:, index] = _nearest(part, centres)
        rows[index, :, :width] = centres
        first += width
    return {"choices": choices, "rows": rows.reshape(-1, plan.widths[0])}


def _k_means(points: np.ndarray, weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Centres with a small ``Σ w ‖x − centre‖²``: Lloyd's steps from points drawn by their weight."""
    places = random.choice(len(points), count, replace=False, p=weights / weights.sum())
    centres = points[places]
    for _ in range(K_MEANS_STEPS):
        nearest = _nearest(points, centres)
        mass = _sums(weights, nearest, count)
        centres = _row_sums(points * weights[:, None], nearest, count) / np.maximum(mass, 1e-12)[:, None]
        if (empty := mass == 0).any():
            centres[empty] = points[random.choice(len(points), empty.sum())]
        centres = centres.astype(np.float32)
    return centres


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The place of each point's nearest centre."""
    half = 0.5 * np.square(centres).sum(1)
    parts = np.array_split(points, len(points) // 8192 + 1)  # what is compared at once stays in the cache
    return np.concatenate([(half - part @ centres.T).argmin(1) for part in parts])


def _kernel(scalars: np.ndarray, matrix: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The rows with the least weighted error for these scalars."""
    weighted = scalars * counts[:, None]
    normal = weighted.T @ scalars
    normal += (1e-4 * np.mean(np.diag(normal)) + 1e-20) * np.eye(len(normal), dtype=np.float32)
    return np.linalg.solve(normal, weighted.T @ matrix).astype(np.float32)


def _values(table: Table, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    from keras import ops

    return ops.convert_to_numpy(dequantize(table, ops.convert_to_tensor(stored), scale))


def _frame(matrix: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """`size` rows that span the matrix's columns, scaled so that scalars of deviation one come near it.

    Its principal axes, and, where there are more rows than columns, the same axes again at half the length: two levels
    of half-steps are what two one-bit scalars are best at.
    """
    scale = np.sqrt(counts / counts.sum())[:, None]
    _, values, axes = np.linalg.svd(scale * matrix, full_matrices=False)
    axes = axes * np.maximum(values, 1e-6)[:, None]
    # Few bits are spent best on directions of equal variance: a rotation of the axes makes them so.
    width = min(size, len(axes))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    frame = turn @ axes[:width]
    while len(frame) < size:
        frame = np.concatenate([frame, 0.5 * frame[-width:]])
    return frame[:size].astype(np.float32)


def _level(table: Table, values: np.ndarray, step: float) -> np.ndarray:
    """The nearest values that a table can store with this step."""
    codes = np.clip(np.round(values / step - table.offset), table.least, table.most)
    return ((codes + table.offset) * step).astype(np.float32)


@fit.register
def _naive(plan: plans.NaiveHashing, matrix: np.ndarray, counts: np.ndarray) -> Values:
    return {"rows": _means(matrix, _codes(plan, "rows"), plan.size, counts)}


@fit.register
def _truncate(plan: plans.TruncateRare, matrix: np.ndarray, counts: np.ndarray) -> Values:
    return {"rows": _means(matrix, _codes(plan, "rows"), plan.size, counts)}


@fit.register
def _reduced(plan: plans.Reduced, matrix: np.ndarray, counts: np.ndarray) -> Values:
    return {"rows": matrix[:, : plan.size].astype("float32")}


@fit.register
def _double(plan: plans.DoubleHashing, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """Halves are means of their buckets; a sum takes turns."""
    first, second = (_codes(plan, name) for name in ("first", "second"))
    if plan.how == "concatenate":
        half = plan.output_dim // 2
        parts = ((matrix[:, :half], first), (matrix[:, half:], second))
        return dict(zip(("first", "second"), (_means(p, c, plan.size, counts) for p, c in parts), strict=True))
    return _additive(matrix, {"first": (first, plan.size), "second": (second, plan.size)}, counts)


@fit.register
def _quotient_remainder(plan: plans.QuotientRemainder, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """As double hashing; a product takes turns, each column by itself."""
    codes = {name: (_codes(plan, name), table.rows) for name, table in plan.tables().items()}
    if plan.how == "add":
        return _additive(matrix, codes, counts)
    (remainder, m), (quotient, q) = codes["remainder"], codes["quotient"]
    if plan.how == "concatenate":
        half = plan.output_dim // 2
        left, right = _means(matrix[:, :half], remainder, m, counts), _means(matrix[:, half:], quotient, q, counts)
        return {"remainder": left, "quotient": right}
    factors = np.ones((q, plan.output_dim), np.float32)
    for _ in range(SWEEPS):
        rows = _ratio(matrix, factors[quotient], remainder, m, counts)
        factors = _ratio(matrix, rows[remainder], quotient, q, counts)
    return {"remainder": rows, "quotient": factors}


@fit.register
def _robe(plan: plans.Robe, matrix: np.ndarray, counts: np.ndarray) -> Values:
    """Each number is the mean of all elements that are read from it."""
    places = _codes(plan, "array").ravel()
    weights = np.repeat(counts, plan.output_dim)
    means = _sums(matrix.ravel() * weights, places, plan.size) / np.maximum(_sums(weights, places, plan.size), 1e-12)
    return {"array": means[:, None].astype("float32")}


def _additive(matrix: np.ndarray, codes: dict[str, tuple[np.ndarray, int]], counts: np.ndarray) -> Values:
    """Sums of rows: each table in its turn takes the means of what the others leave."""
    found = {name: np.zeros((size, matrix.shape[1]), np.float32) for name, (_, size) in codes.items()}
    for _ in range(SWEEPS):
        for name, (code, size) in codes.items():
            rest = matrix - sum(found[other][codes[other][0]] for other in codes if other != name)
            found[name] = _means(rest, code, size, counts)
    return found


def _ratio(matrix: np.ndarray, factors: np.ndarray, code: np.ndarray, size: int, counts: np.ndarray) -> np.ndarray:
    """By column, the row r of each bucket with the least ``Σ c (e − r·f)²``."""
    above = _row_sums(matrix * factors * counts[:, None], code, size)
    below = _row_sums(np.square(factors) * counts[:, None], code, size)
    return (above / np.maximum(below, 1e-12)).astype(np.float32)


def _codes(plan: Plan, name: str) -> np.ndarray:
    """The rows of a table that each entity takes."""
    from keras import ops

    return ops.convert_to_numpy(plan.codes(ops.arange(plan.input_dim, dtype="int32"))[name])


def _sums(values: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(code, values, minlength=size)


def _row_sums(values: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
    return np.stack([_sums(column, code, size) for column in values.T], axis=1)


def _weight(counts: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
    return np.maximum(_sums(counts, code, size), 1e-12)


def _means(values: np.ndarray, code: np.ndarray, size: int, counts: np.ndarray) -> np.ndarray:
    sums = _row_sums(values * counts[:, None], code, size)
    return (sums / _weight(counts, code, size)[:, None]).astype(np.float32)


def _longest(part: np.ndarray, rows: np.ndarray, count: int, counts: np.ndarray) -> np.ndarray:
    """For each bucket the entity whose weighted vector is longest."""
    order = np.argsort(counts * np.einsum("nd,nd->n", part, part), kind="stable")
    chosen = np.zeros(count, np.int64)
    chosen[rows[order]] = order  # the last one written, the longest, stays
    return chosen


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-30)).astype(np.float32)

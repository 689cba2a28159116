"""Linear scores of groups of classes for queries, in closed form: linear discriminant analysis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_efficient.extreme.clusters import CHUNK, group_sums
from keras_efficient.extreme.queries import Queries

__all__ = ["ClassMeans", "class_means", "discriminants"]

PRIOR = 1.0  # queries that a class is taken to have had besides its own, at the place that its weights tell
RIDGE = 1e-2  # of the mean variance, added to every variance


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Where the queries of each class lie.

    Attributes:
        means: (units, d) mean query of a class; of one that was not seen, what its weights tell.
        masses: (units,) how many queries stand behind it, `PRIOR` included.
        moment: (d, d) mean of q·qᵀ over queries.
    """

    means: np.ndarray
    masses: np.ndarray
    moment: np.ndarray


def class_means(queries: Queries, rows: np.ndarray) -> ClassMeans:
    """The means of the classes' queries.

    A linear map from classes' rows to their mean queries, fitted by least squares to those that were seen, stands in
    for classes without queries, and steadies those of few.

    Args:
        queries: with labels.
        rows: (units, d + 1) weights and bias of each class.
    """
    units = len(rows)
    counts = np.bincount(queries.labels, minlength=units).astype(np.float32)
    sums = _label_sums(queries, units)
    guess = _linear_guess(rows, sums, counts)
    means = (sums + PRIOR * guess) / (counts + PRIOR)[:, None]
    weights = np.diff(queries.offsets).astype(np.float32)
    moment = (queries.vectors * weights[:, None]).T @ queries.vectors + PRIOR * guess.T @ guess
    masses = counts + PRIOR
    return ClassMeans(means, masses, moment.astype(np.float64) / masses.sum(dtype=np.float64))


def _label_sums(queries: Queries, units: int) -> np.ndarray:
    """The sum of the queries of each class; a part at a time, since a query may have many."""
    owners, sums = queries.owners, np.zeros((units, queries.vectors.shape[1]), np.float32)
    for start in range(0, len(owners), CHUNK):
        part = slice(start, start + CHUNK)
        present, groups = np.unique(queries.labels[part], return_inverse=True)
        sums[present] += group_sums(queries.vectors[owners[part]], groups, len(present)).astype(np.float32)
    return sums


def _linear_guess(rows: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[w, b, 1] A`` with the least ``Σ_y n_y ‖mean_y − [w_y, b_y, 1] A‖²``."""
    inputs = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
    normal = (inputs * counts[:, None]).T.astype(np.float64) @ inputs
    normal += 1e-3 * np.trace(normal) / len(normal) * np.eye(len(normal)) + 1e-12 * np.eye(len(normal))
    return (inputs @ np.linalg.solve(normal, inputs.T.astype(np.float64) @ sums)).astype(np.float32)


def discriminants(classes: ClassMeans, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and biases of linear scores, ``R q + ρ``, largest for the group that a query's class is likely in.

    With the mean μ_g and the share π_g of a group, and Σ the mean covariance inside of groups:
    ``R_g = Σ⁻¹ μ_g``, ``ρ_g = −½ μ_gᵀ Σ⁻¹ μ_g + log π_g``.

    Args:
        classes: from `class_means`.
        groups: (units,) the group of each class; −1: in none.
        count: of groups. One without a class gets the lowest score of all.

    Returns:
        rows (count, d), biases (count,), float32.
    """
    inside = groups >= 0
    masses = np.where(inside, classes.masses, 0).astype(np.float64)
    mass = np.bincount(groups[inside], masses[inside], minlength=count)
    means = group_sums(classes.means, groups, count, masses) / np.maximum(mass, 1e-30)[:, None]
    share = mass / max(mass.sum(), 1e-30)
    total = classes.moment if inside.all() else _moment_of(classes, masses)
    within = total - (means * share[:, None]).T @ means
    within += RIDGE * max(np.trace(within) / len(within), 1e-12) * np.eye(len(within))
    rows = np.linalg.solve(within, means.T).T
    biases = np.where(mass > 0, -0.5 * np.einsum("gd,gd->g", rows, means) + np.log(np.maximum(share, 1e-30)), -1e9)
    return rows.astype(np.float32), biases.astype(np.float32)


def _moment_of(classes: ClassMeans, masses: np.ndarray) -> np.ndarray:
    """The moment of queries whose classes have these masses: what all have around their classes' means, and theirs."""

    def between(weights: np.ndarray) -> np.ndarray:
        return (classes.means * (weights / weights.sum())[:, None]).T.astype(np.float64) @ classes.means

    return classes.moment - between(classes.masses.astype(np.float64)) + between(masses)

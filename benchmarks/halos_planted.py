"""A set of 670,091 classes with planted structure, as large as Amazon-670K, for `benchmarks.halos`.

Classes are the leaves of a tree: 100 areas, 4,000 topics, 50,000 kinds, 670,091 classes, each with a parent of random
size. A class's mean query is the sum of a normal vector for itself and for each node above it, of the variances
`VARIANCES`; its frequency falls with its rank as rank^−0.9. A query is its class's mean and noise, and the output layer
is the best that there can be for such queries: ``w = μ/σ²``, ``b = −‖μ‖²/2σ² + log p``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NODES = (100, 4_000, 50_000, 670_091)
VARIANCES = (0.50, 0.30, 0.14, 0.06)
DIM = 128
NOISE = 1.5


@dataclass(frozen=True, eq=False)
class Planted:
    """The output layer ``kernel (units, DIM)``, ``bias (units,)``, and where queries come from."""

    kernel: np.ndarray
    bias: np.ndarray
    means: np.ndarray
    cumulated: np.ndarray

    def queries(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (count, DIM) and their classes (count, 1)."""
        random = np.random.default_rng([1, seed])
        classes = np.searchsorted(self.cumulated, random.random(count)).clip(0, len(self.means) - 1)
        noise = random.standard_normal((count, DIM), dtype=np.float32)
        return self.means[classes] + np.float32(NOISE) * noise, classes[:, None].astype(np.int32)


def planted(nodes: tuple[int, ...] = NODES, seed: int = 0) -> Planted:
    """The set, or one of other sizes: nodes at each level, the classes last."""
    random = np.random.default_rng([0, seed])
    means = np.zeros((1, DIM), np.float32)
    for count, variance in zip(nodes, VARIANCES, strict=True):
        sizes = random.dirichlet(np.ones(len(means)))
        # Every node has a child; all others go to parents by their sizes.
        parents = np.concatenate([np.arange(len(means)), random.choice(len(means), count - len(means), p=sizes)])
        own = random.standard_normal((count, DIM), dtype=np.float32)
        means = means[parents] + np.float32(variance**0.5) * own
    means = means[random.permutation(len(means))]
    share = np.arange(1, len(means) + 1) ** -0.9
    share /= share.sum()
    bias = np.log(share) - (means**2).sum(1) / (2 * NOISE**2)
    return Planted(means / np.float32(NOISE**2), bias.astype(np.float32), means, np.cumsum(share))

"""Decisions whose mistakes do not all cost alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from keras_efficient.bayes.data import Data
from keras_efficient.bayes.tasks._inputs import labelled
from keras_efficient.errors import WrongArgument

__all__ = ["RARE_CLASSES", "RareClasses", "decisions"]


def decisions(probabilities: Any, labels: Any, costs: Any) -> dict[str, float]:
    """Decides what has the lowest expected cost, and pays what that costs in truth.

    ```
    decision = argmin_d Σ_classes p(class) · C[class, d]        cost = C[label, decision]
    ```

    Args:
        probabilities: (members, n, classes), or (n, classes).
        labels: (n,) integers.
        costs: C, (classes, decisions), finite. Decisions may be others than the classes, such as to ask somebody.

    Returns:
        `total_cost` (the paper's figure), `mean_cost`, `expected_cost` (the mean that the probabilities foretold).

    Raises:
        WrongArgument: rows that are no distributions, labels or costs that do not belong to them.
    """
    p, y = labelled(probabilities, labels)
    table = np.asarray(costs, np.float64)
    if table.ndim != 2 or table.shape[0] != p.shape[1] or not table.shape[1] or not np.isfinite(table).all():
        raise WrongArgument(f"Costs are finite and ({p.shape[1]} classes, decisions), not {table.shape}.")
    expected = p @ table
    paid = table[y, expected.argmin(axis=1)]
    return {
        "total_cost": float(paid.sum()),
        "mean_cost": float(paid.mean()),
        "expected_cost": float(expected.min(axis=1).mean()),
    }


@dataclass(frozen=True)
class RareClasses:
    """Classes that are rare in training, and dear to miss.

    Attributes:
        classes: which.
        cost: of another decision where one of them is true.
        kept: share of their training examples that is left.
        other_cost: of a wrong decision about another class.

    Raises:
        WrongArgument: costs below 0, or a share that is not above 0 and at most 1.
    """

    classes: tuple[int, ...]
    cost: float
    kept: float
    other_cost: float = 0.1

    def __post_init__(self) -> None:
        if not self.cost >= 0 or not self.other_cost >= 0 or not 0 < self.kept <= 1:
            raise WrongArgument(f"Costs are 0 or more, what is kept above 0 and at most 1: {self}.")

    def costs(self, num_classes: int) -> np.ndarray:
        """C of `decisions`, (classes, classes): 0 where the decision is right.

        Raises:
            WrongArgument: there are fewer classes than are named.
        """
        self._check(num_classes)
        table = np.full((num_classes, num_classes), self.other_cost)
        table[list(self.classes)] = self.cost
        np.fill_diagonal(table, 0.0)
        return table

    def thinned(self, data: Data, seed: int) -> Data:
        """Training data with so few examples of these classes, one of each at least, drawn by chance; order stays.

        Raises:
            WrongArgument: there are fewer classes than are named.
        """
        assert data.num_classes is not None
        self._check(data.num_classes)
        random, keep = np.random.default_rng(seed), np.ones(len(data), bool)
        for number in self.classes:
            places = np.flatnonzero(data.y == number)
            left = max(round(self.kept * len(places)), 1)
            keep[random.permutation(places)[left:]] = False
        return Data(data.x[keep], data.y[keep], data.num_classes)

    def _check(self, num_classes: int) -> None:
        wrong = [number for number in self.classes if not 0 <= number < num_classes]
        if wrong:
            raise WrongArgument(f"Class {wrong[0]} is not one of 0 to {num_classes - 1}.")


# Of the paper: digits 3 and 7; vehicles of the air and the road; tank, rocket and pickup truck by its numbering.
RARE_CLASSES: Mapping[str, RareClasses] = MappingProxyType(
    {
        "mnist": RareClasses((3, 7), cost=100.0, kept=0.01),
        "cifar10": RareClasses((0, 1, 8, 9), cost=1.0, kept=0.1),
        "cifar100": RareClasses((58, 69, 85), cost=1.0, kept=0.1),
    }
)

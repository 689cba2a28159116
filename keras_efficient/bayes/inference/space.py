"""What a tuner may vary of a method: numbers between bounds, and choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from keras_efficient.errors import WrongArgument

__all__ = ["Choice", "Float", "Int", "Space"]


@dataclass(frozen=True)
class Float:
    """A number from `low` to `high`.

    Attributes:
        low, high: bounds, both included.
        log: whether factors count, not differences.

    Raises:
        WrongArgument: bounds that are not finite, not in order, or not above 0 on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`.

    Attributes:
        low, high: bounds, both included.
        log: whether factors count, not differences.

    Raises:
        WrongArgument: bounds that are not whole, not in order, or not above 0 on a logarithmic scale.
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (self.low, self.high)):
            raise WrongArgument(f"Bounds of an Int are whole numbers, not {self.low!r} and {self.high!r}.")
        _check(self)


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        options: all of them.

    Raises:
        WrongArgument: no option, or one twice.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options or any(one in self.options[:place] for place, one in enumerate(self.options)):
            raise WrongArgument(f"A Choice has one option at least, and each once: {self.options!r}.")


Space = dict[str, Float | Int | Choice]  # names of a method's attributes


def _check(bounds: Float | Int) -> None:
    low, high = bounds.low, bounds.high
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise WrongArgument(f"Bounds are finite, and the lower is below the higher: {low!r}, {high!r}.")
    if bounds.log and low <= 0:
        raise WrongArgument(f"On a logarithmic scale bounds are above 0, not {low!r}.")

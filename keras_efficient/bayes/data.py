"""Labelled examples in memory, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["Data"]


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs and classes.

    Attributes:
        x: (examples, …), finite; kept as float32.
        y: (examples,) integers from 0 to `num_classes` − 1.
        num_classes: how many there are; `None`: one more than the largest label.

    Raises:
        WrongArgument: other lengths, no example, NaN or infinity, labels out of range; the first one is named.
    """

    x: np.ndarray
    y: np.ndarray
    num_classes: int | None = None

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x, np.float32), np.asarray(self.y)
        if y.ndim != 1:
            hint = "Of one-hot labels take `argmax(axis=1)`, of a column `y[:, 0]`."
            raise WrongArgument(f"Labels are (examples,) integers, not {y.shape}.", hint=hint)
        if x.ndim < 1 or len(x) != len(y) or not len(y):
            raise WrongArgument(f"Inputs {x.shape} and labels {y.shape} must be as many, and one at least.")
        if not np.issubdtype(y.dtype, np.integer):
            raise WrongArgument(f"Labels must be integers, got {y.dtype}.")
        for start in range(0, len(x), 4096):  # a whole mask of a large set would take as much as a quarter of it
            finite = np.isfinite(x[start : start + 4096]).reshape(len(x[start : start + 4096]), -1).all(axis=1)
            if not finite.all():
                raise WrongArgument(f"Example {start + int(finite.argmin())} has NaN or infinity.")
        classes = int(y.max()) + 1 if self.num_classes is None else self.num_classes
        wrong = (y < 0) | (y >= classes)
        if wrong.any():
            first = int(wrong.argmax())
            raise WrongArgument(f"Label {int(y[first])} of example {first} is not one of 0 to {classes - 1}.")
        for name, value in (("x", x), ("y", y.astype(np.int32)), ("num_classes", classes)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.y)

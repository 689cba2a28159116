"""What every task is given, checked: probabilities of members, and labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["checked", "checked_labels", "labelled", "mean_of"]

TOLERANCE = 1e-3  # of a sum of probabilities: half precision of a thousand classes stays below


def checked(probabilities: Any, name: str = "probabilities") -> np.ndarray:
    """Probabilities as an array (members, n, classes), one member where they are a mean already.

    Raises:
        WrongArgument: another shape, no member or example, one class, or a row that is no distribution: its example and
            its member are named.
    """
    p = np.asarray(probabilities)
    if p.ndim not in (2, 3) or 0 in p.shape or p.shape[-1] < 2 or p.dtype.kind not in "fiu":
        what = f"{p.dtype} {p.shape}"
        raise WrongArgument(
            f"{name} are numbers (members, n, classes) or (n, classes), of 2 classes or more, not {what}."
        )
    p = p[None] if p.ndim == 2 else p
    for number, member in enumerate(p):
        where = f" of member {number}" if len(p) > 1 else ""
        sums = member.sum(axis=1, dtype=np.float64)
        for wrong, what in (
            (~np.isfinite(sums), "has NaN or infinity"),
            ((member < 0).any(axis=1), "has a number below 0"),
            (abs(sums - 1) > TOLERANCE, "does not sum to 1"),
        ):
            if wrong.any():
                first = int(wrong.argmax())
                raise WrongArgument(f"Example {first}{where} in {name} {what}: {member[first][:8]}.")
    return p


def checked_labels(labels: Any, count: int, classes: int, name: str = "labels") -> np.ndarray:
    """Labels as (n,) integers.

    Raises:
        WrongArgument: of other type or number, or out of range: the first one is named.
    """
    y = np.asarray(labels)
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise WrongArgument(f"{name} of {count} examples are as many integers, not {y.dtype} {y.shape}.")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        raise WrongArgument(f"{name}: {int(y[first])} of example {first} is not one of 0 to {classes - 1}.")
    return y.astype(np.int64)


def mean_of(probabilities: Any, name: str = "probabilities") -> np.ndarray:
    """The mean over members in float64, (n, classes)."""
    return checked(probabilities, name).mean(axis=0, dtype=np.float64)


def labelled(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean over members, and labels."""
    p = mean_of(probabilities)
    return p, checked_labels(labels, *p.shape)

"""Words of the command line to values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

import typer

from keras_efficient.errors import WrongArgument

__all__ = ["Shape", "options", "seconds", "shape", "tile"]

Shape = tuple[int, ...] | dict[str, tuple[int, ...]]


def shape(text: str | None) -> Shape | None:
    """``"1080x1920"`` to ``(1080, 1920)``; one axis (a history's length) or more are taken too.

    ``"ids=64,weights=64"``, of a model with several inputs, is ``{"ids": (64,), "weights": (64,)}``.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None:
        return None
    if "=" in text:
        parts = [part.partition("=") for part in text.split(",")]
        names = [name.strip() for name, _, _ in parts]
        if "" in names or len(set(names)) < len(names) or not all(sign for _, sign, _ in parts):
            raise typer.BadParameter(f"{text!r}: write each input's name and size once, as a=64,b=8x3.")
        return {name: _sizes(size) for name, (_, _, size) in zip(names, parts, strict=True)}
    return _sizes(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = re.split("[x×,]", text.strip().lower())
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        known = "a picture's as 1080x1920, a history's as 64, two inputs' as a=64,b=8"
        raise typer.BadParameter(f"{text!r} is no size; write {known}.")
    return tuple(int(size) for size in sizes)


def seconds(number: float | None, flag: str) -> float | None:
    """The number as it is.

    Raises:
        WrongArgument: below 0, infinite or none.
    """
    if number is not None and not (number >= 0 and isfinite(number)):
        raise WrongArgument(f"{flag} {number:g}: give seconds, 0 or more.")
    return number


def options(texts: Sequence[str] | None) -> dict[str, Any]:
    """``["runtime=rtx", "opset=17"]`` to ``{"runtime": "rtx", "opset": 17}``; what is no JSON is text.

    Raises:
        WrongArgument: no NAME=VALUE, or a name twice.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name:
            raise WrongArgument(f"--option {text}: is not NAME=VALUE.", hint="As in --option opset=17.")
        if name in found:
            raise WrongArgument(f"--option {name} is given twice.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def tile(text: str | None) -> tuple[int, int] | Literal["auto"] | None:
    """``"auto"`` as it is, ``"none"`` to `None`, ``"270x480"`` to a pair, ``"256"`` to a square.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None or text == "none":
        return None
    if text == "auto":
        return "auto"
    sizes = _sizes(f"{text}x{text}" if text.isdecimal() else text)
    if len(sizes) != 2:
        raise typer.BadParameter(f"{text!r} is no tile; write auto, none, or HEIGHTxWIDTH.")
    return sizes[0], sizes[1]

"""Words of the command line to values."""

from __future__ import annotations

import re
from typing import Literal

import typer

__all__ = ["shape", "tile"]


def shape(text: str | None) -> tuple[int, ...] | None:
    """``"1080x1920"`` to ``(1080, 1920)``; one axis (a history's length) or more are taken too.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None:
        return None
    sizes = re.split("[x×,]", text.strip().lower())
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"{text!r} is no size; write a picture's as 1080x1920, a history's as 64.")
    return tuple(int(size) for size in sizes)


def tile(text: str | None) -> tuple[int, int] | Literal["auto"] | None:
    """``"auto"`` as it is, ``"none"`` to `None`, ``"270x480"`` to a pair, ``"256"`` to a square.

    Raises:
        typer.BadParameter: anything else.
    """
    if text is None or text == "none":
        return None
    if text == "auto":
        return "auto"
    sizes = shape(f"{text}x{text}" if text.isdecimal() else text)
    if sizes is None or len(sizes) != 2:
        raise typer.BadParameter(f"{text!r} is no tile; write auto, none, or HEIGHTxWIDTH.")
    return sizes[0], sizes[1]

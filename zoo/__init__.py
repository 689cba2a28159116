"""Pretrained models: their cards, and the models themselves.

::

    from keras_efficient import zoo

    zoo.list_models("sesr-*")
    model = zoo.load("sesr-m5-x2")
    zoo.card("sesr-m5-x2").metrics

A zoo is a folder with `cards/NAME.yaml` and `weights/`. Listing models and reading cards imports neither Keras nor
NumPy.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import TYPE_CHECKING

from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.zoo.schema import Card, read_card, write_card

if TYPE_CHECKING:
    import keras

__all__ = ["Card", "card", "list_models", "load", "read_card", "write_card"]

_FOLDER = Path(__file__).resolve().parent


def list_models(pattern: str = "*", *, folder: str | Path | None = None) -> list[str]:
    """Names of the models, in natural order (m3 before m11).

    Args:
        pattern: shell wildcards, such as ``"sesr-*-x2"``.
        folder: another zoo than the one that ships with the package.
    """
    names = (path.name.removesuffix(".yaml") for path in _cards(folder).glob("*.yaml"))
    return sorted((name for name in names if fnmatch.fnmatchcase(name, pattern)), key=_natural)


def card(name: str, *, folder: str | Path | None = None) -> Card:
    """What is known about a model.

    Raises:
        UnknownName: there is no such model; the nearest name is the hint.
        FileProblem: its card does not fit the schema.
    """
    known = list_models(folder=folder)
    if name not in known:
        raise UnknownName("model", name, known, see="keras-efficient zoo list")
    return read_card(_cards(folder) / f"{name}.yaml")


def load(name: str, *, weights: str | Path | None = "pretrained", folder: str | Path | None = None) -> keras.Model:
    """Builds a model and loads its weights: the training form, ready to be used, fine-tuned or exported.

    Args:
        name: one of `list_models()`.
        weights: ``"pretrained"``, `None` (fresh ones), or the path of your own `.weights.h5` for the same model.
        folder: another zoo than the one that ships with the package.

    Returns:
        A functional Keras model; what goes in and comes out is in ``card(name).preprocessing``.

    Raises:
        UnknownName: there is no such model; the nearest name is the hint.
        WrongArgument: `weights` is something else.
        FileProblem: weights that are missing, damaged, changed (both hashes are named), those of another model (both
            shapes are named), or that cannot be downloaded.
    """
    from keras_efficient.zoo import weights as files

    if not (weights is None or isinstance(weights, str | Path)):
        raise WrongArgument(f"weights={weights!r}: takes 'pretrained', None, or the path of a .weights.h5.")
    found = card(name, folder=folder)
    path = files.find(found, _folder(folder)) if weights == "pretrained" else weights
    model = _build(found)
    if path is not None:
        files.load_into(model, path)
    return model


def _build(found: Card) -> keras.Model:
    from keras_efficient import models

    function = getattr(models, found.builder.function, None) if found.builder.function in models.__all__ else None
    if function is None:
        raise FileProblem(
            f"{found.name}.yaml", f"builder.function: no {found.builder.function!r} in keras_efficient.models."
        )
    try:
        return function(**{"name": re.sub(r"[-.]", "_", found.name), **found.builder.arguments})
    except (TypeError, ValueError) as err:
        raise FileProblem(f"{found.name}.yaml", f"builder.arguments: {err}") from err


def _folder(folder: str | Path | None) -> Path:
    return _FOLDER if folder is None else Path(folder)


def _cards(folder: str | Path | None) -> Path:
    cards = _folder(folder) / "cards"
    if folder is not None and not cards.is_dir():
        raise FileProblem(cards, "no such folder.", hint="A zoo is a folder with cards/NAME.yaml and weights/.")
    return cards


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers inside of names by their value."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]

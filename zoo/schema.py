"""A model's card: everything that is known about it, as checked data.

A card is a YAML file. Its schema is the dataclass `Card`: an unknown key, a missing key or a value of another type is
an error that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem

__all__ = [
    "Builder",
    "Card",
    "Export",
    "Metric",
    "Paper",
    "Preprocessing",
    "Recipe",
    "Tensor",
    "TrainedOn",
    "Weights",
    "from_dict",
    "read_card",
    "to_dict",
    "write_card",
]

LARGEST_CARD = 1 << 20  # bytes; a card has some thousand


@dataclass(frozen=True)
class Builder:
    """The function of `keras_efficient.models` that builds the training form, and its arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """A `.weights.h5` of the training form.

    Attributes:
        file: its name in the folder `weights` beside the cards (and in the cache, when it was downloaded).
        sha256: 64 hexadecimal digits.
        size: in bytes.
        url: where it can be downloaded, for files that do not ship with the package.
    """

    file: str
    sha256: str
    size: int
    url: str | None = None


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: as the Keras model has it.
        shape: with the batch axis; `None` is a free axis.
        dtype: such as ``float32``.
        meaning: what the numbers are.
        range: smallest and largest value, where there is one.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    meaning: str
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What a user has to do before and after: the tensors, and further facts of the task such as `scale`."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A measured number, with all that is needed to measure it again."""

    name: str
    value: float
    dataset: str
    protocol: str
    command: str
    unit: str | None = None


@dataclass(frozen=True)
class TrainedOn:
    """A data set that the weights come from, and the terms under which it is available."""

    data: str
    terms: str


@dataclass(frozen=True)
class Recipe:
    """How to make the weights again."""

    command: str
    seed: int
    backend: str | None = None
    commit: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """A file that was exported and measured: `error` is its largest difference from the float32 model."""

    target: str
    precision: str
    bytes: int
    error: float
    sqnr_db: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Paper:
    """Where the method was published."""

    title: str
    url: str
    year: int | None = None


@dataclass(frozen=True)
class Card:
    """All that is known about a zoo model; what nobody measured is not in it.

    Attributes:
        name: what `zoo.load` takes; also the name of the file.
        system: the group it belongs to, such as ``sesr``.
        task: what it does, in the words of model hubs, such as ``image-to-image``.
        summary: one sentence.
        builder: how the model is built.
        weights: the file with its weights.
        preprocessing: the model's inputs and outputs.
        parameters: number of weights of the deployed form.
        metrics: measured quality.
        trained_on: data sets and their terms.
        recipe: how to make the weights again.
        licence: of the weights, as an SPDX identifier.
        limitations: what the model cannot do, and where it missed its aim.
        golden: file in the folder `weights` with inputs and the outputs that belong to them.
        exports: files made of it.
        paper: the publication.
    """

    name: str
    system: str
    task: str
    summary: str
    builder: Builder
    weights: Weights
    preprocessing: Preprocessing
    parameters: int
    metrics: tuple[Metric, ...]
    trained_on: tuple[TrainedOn, ...]
    recipe: Recipe
    licence: str
    limitations: tuple[str, ...]
    golden: str | None = None
    exports: tuple[Export, ...] = ()
    paper: Paper | None = None


def read_card(path: str | Path) -> Card:
    """Reads and checks a card.

    Raises:
        FileProblem: the file is missing, is no YAML, or does not fit the schema (the message names the key).
    """
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_CARD:
            raise FileProblem(path, f"larger than {LARGEST_CARD:,} bytes, which no card is.")
        data = yaml.safe_load(path.read_text("utf-8"))
    except FileProblem:
        raise
    except UnicodeDecodeError as err:
        raise FileProblem(path, "no text in UTF-8.") from err
    except OSError as err:
        raise FileProblem(path, f"cannot be read: {err.strerror or err}.") from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise FileProblem(path, f"no valid YAML{place}: {getattr(err, 'problem', None) or err}.") from err
    card = from_dict(data, path)
    if card.name != path.name.removesuffix(".yaml"):
        raise FileProblem(path, f"name: {card.name!r} is not the name of the file.")
    return card


def from_dict(data: Any, path: str | Path) -> Card:
    """A card from plain values; `path` is named in errors."""
    card = _Reader(Path(path)).value(Card, data, "")
    _check_values(card, Path(path))
    return card


def to_dict(card: Card) -> dict[str, Any]:
    """A card as plain values; what is not there (`None`, empty) is left out, except free axes of shapes."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in items if item not in (None, (), {})}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    values = plain(card)
    return {**values, **{name: values.get(name, []) for name in ("metrics", "trained_on", "limitations")}}


def write_card(card: Card, path: str | Path) -> None:
    """Checks a card and writes it; the file appears whole or not at all.

    Raises:
        FileProblem: a value does not fit the schema, or the file cannot be written.
    """
    import yaml

    path = Path(path)
    values = to_dict(card)
    from_dict(values, path)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(text, "utf-8")


class _Reader:
    """Plain values to dataclasses, by the types of their fields."""

    def __init__(self, path: Path):
        self._path = path

    def value(self, kind: Any, data: Any, key: str) -> Any:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return data
        if dataclasses.is_dataclass(kind):
            return self._record(kind, data, key)
        if origin is types.UnionType:  # X | None
            return None if data is None else self.value(parts[0], data, key)
        if origin is tuple:
            return self._tuple(parts, data, key)
        if origin is Mapping:
            return self._checked(dict, "a mapping", data, key)
        if kind is float:
            # True is an int to Python; a whole number is a fine float.
            self._checked((int, float), "a number", data, key)
            return float(data)
        return self._checked(kind, {str: "text", int: "a whole number"}[kind], data, key)

    def _record(self, kind: Any, data: Any, key: str) -> Any:
        self._checked(dict, "a mapping", data, key)
        hints = typing.get_type_hints(kind)
        unknown = [name for name in data if name not in hints]
        if unknown:
            self._fail(_join(key, unknown[0]), f"is no key of a card here. Known: {', '.join(hints)}")
        values = {}
        for item in dataclasses.fields(kind):
            if item.name in data:
                values[item.name] = self.value(hints[item.name], data[item.name], _join(key, item.name))
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                self._fail(_join(key, item.name), "is missing")
        return kind(**values)

    def _tuple(self, parts: tuple[Any, ...], data: Any, key: str) -> tuple[Any, ...]:
        self._checked(list, "a list", data, key)
        kinds = [parts[0]] * len(data) if parts[-1] is ... else parts
        if len(kinds) != len(data):
            self._fail(key, f"needs {len(kinds)} values, has {len(data)}")
        return tuple(
            self.value(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, data, strict=True))
        )

    def _checked(self, kind: Any, words: str, data: Any, key: str) -> Any:
        if not isinstance(data, kind) or isinstance(data, bool):
            self._fail(key or "the card", f"should be {words}, is {_brief(data)}")
        return data

    def _fail(self, key: str, what: str) -> typing.NoReturn:
        raise FileProblem(self._path, f"{key}: {what}.")


def _check_values(card: Card, path: Path) -> None:
    """What the types cannot say. File names must stay inside their folder: a card may come from somebody else."""
    problems = [
        ("name", not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", card.name), "small letters, digits, '-' and '.' only"),
        ("weights.sha256", not re.fullmatch(r"[0-9a-f]{64}", card.weights.sha256), "64 hexadecimal digits are needed"),
        ("weights.size", card.weights.size < 1, "must be at least 1 byte"),
        ("weights.file", not _is_file_name(card.weights.file, ".weights.h5"), "must be a bare name, *.weights.h5"),
        ("weights.url", not (card.weights.url or "https://").startswith("https://"), "must begin with https://"),
        ("golden", card.golden is not None and not _is_file_name(card.golden, ".npz"), "must be a bare name, *.npz"),
        ("builder.function", not card.builder.function.isidentifier(), "must be the name of a function"),
    ]
    for key, is_wrong, words in problems:
        if is_wrong:
            raise FileProblem(path, f"{key}: {words}.")


def _is_file_name(name: str, suffix: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and name.endswith(suffix)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def _brief(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}..."

"""Readers of interaction files: lists of items a user, MovieLens' ratings, tables in CSV and Parquet.

Text may be plain or gzip, whatever its name says, with or without a byte order mark, with either line ending. Empty
lines are refused, except at the end: they may be a user whose id is missing. Numbers are read by NumPy; only where that
finds something odd are lines looked at one by one, to name the one that is wrong.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import FileProblem, MissingDependency, UnknownName, WrongArgument
from keras_efficient.recsys.interactions import LARGEST_ID, Interactions

__all__ = ["read_lists", "read_movielens", "read_sequences", "read_table"]

Columns = tuple[np.ndarray, ...]

_DUPLICATES = ("keep", "drop", "error")
_PIECE = 2**24  # bytes
# What a packed file may hold: times its size (text of ids has five), and bytes in any case.
_UNPACKED, _LEAST_UNPACKED = 200, 2**30
_SPARSE = 1000  # times the number of pairs: largest id of a file that does not say how many there are
_LONGEST = 18  # digits of a number that is read without a second look: all of them fit 64 bits
_INTEGER = re.compile(rb"-?[0-9]+")
_DECIMAL = re.compile(rb"-?[0-9]{1,30}(\.[0-9]*)?")
_CANONICAL = re.compile(r"0|-?[1-9][0-9]{0,17}")
_MOVIELENS_HEADER = b"userId,movieId,rating,timestamp"


def read_lists(
    path: str | Path,
    num_users: int | None = None,
    num_items: int | None = None,
    first_id: int = 0,
    duplicates: str = "keep",
) -> Interactions:
    """Reads lines of ``user item item …``, separated by spaces or tabs: pairs without times, in the file's order.

    A line may hold a user alone, who has no items then, and a user may have several lines.

    Args:
        path: text, plain or gzip.
        num_users, num_items: how many there are; by default what the largest ids in this file ask for. Parts of one
            data set should get the same numbers.
        first_id: the smallest id in the file, which becomes 0.
        duplicates: what to do about a pair that stands in the file twice: "keep" both, "drop" all but the first, or
            raise an "error".

    Raises:
        FileProblem: the file cannot be read, is empty, or has a line with something else than ids in range (at most
            2³¹ − 2, counted from 0, and without `num_users` and `num_items` not far more than its pairs need); a pair
            that stands twice, where that is an error.
        WrongArgument: another value of `duplicates`, or a negative number.
    """
    if duplicates not in _DUPLICATES:
        raise UnknownName("policy for duplicates", duplicates, _DUPLICATES)
    text = _Text(path)
    found, lines = _read_lines(text, num_users, num_items, first_id)
    if duplicates == "keep":
        return found
    is_first = np.zeros(len(found), bool)
    is_first[np.unique(found.users.astype(np.int64) * found.num_items + found.items, return_index=True)[1]] = True
    if duplicates == "error" and not is_first.all():
        place = np.flatnonzero(~is_first)[0]
        pair = f"user {found.users[place] + first_id} with item {found.items[place] + first_id}"
        raise text.problem(lines[place], f"{pair} stands in the file before.", hint='Read with duplicates="drop".')
    return found.select(is_first)


def read_sequences(path: str | Path, first_id: int = 1) -> Interactions:
    """Reads lines of ``user item item …`` where a user's items are in time order, as SASRec's data are.

    The times are positions in the user's sequence, 0, 1, …: they tell nothing across users. A user may have several
    lines, which follow one another, so files of one ``user item`` a line can be read too.

    Args:
        path: text, plain or gzip.
        first_id: the smallest id in the file, which becomes 0. Item 0 is an item, no padding.

    Raises:
        FileProblem: see `read_lists`.
    """
    found, _ = _read_lines(_Text(path), None, None, first_id)
    index, offsets = found.order()
    times = np.empty(len(found), np.int64)
    times[index] = np.arange(len(found)) - np.repeat(offsets[:-1], np.diff(offsets))
    return Interactions(found.users, found.items, found.num_users, found.num_items, times=times)


def read_movielens(path: str | Path) -> Interactions:
    """Reads ratings of MovieLens, with times: u.data (tabs), ratings.dat (``::``) or ratings.csv, plain or gzip.

    The separator is that of the first line, not of the file's name. Ids count from 1 there and from 0 here: nothing
    else is changed, so ``id + 1`` is MovieLens' own. Films that nobody rated leave gaps in the numbers: ML-100k has
    none, ML-1M has 246 of 3,952, and ratings.csv of the large sets is mostly gaps; `read_table` numbers without gaps.

    Raises:
        FileProblem: the file cannot be read, is empty, or has a line that is not user, item, rating and time.
    """
    text = _Text(path)
    separator = next((s for s in (b"::", b"\t", b",") if s in text.line(1)), None)
    if separator is None:
        raise text.problem(1, "neither tabs, '::' nor commas between user, item, rating and time.")
    header = int(separator == b"," and text.line(1).strip() == _MOVIELENS_HEADER)
    body = text.data.split(b"\n", header)[header]
    if not body:
        raise FileProblem(path, "holds a header and no ratings.")
    body = body if separator == b"\t" else body.replace(separator, b"\t")
    users, items, ratings, times = _by_pieces(text, body, header + 1, _quick_ratings, _careful_ratings)
    for ids, name in ((users, "user"), (items, "item")):
        _check_range(text, ids, np.arange(len(ids)) + header + 1, name, 1, None)
    return Interactions(users - 1, items - 1, int(users.max()), int(items.max()), ratings, times)


def read_table(
    path: str | Path, user: str, item: str, rating: str | None = None, time: str | None = None
) -> tuple[Interactions, np.ndarray, np.ndarray]:
    """Reads a CSV file (with a header, plain or gzip; ``.tsv`` with tabs) or a Parquet file, by names of columns.

    Ids may be text or whole numbers; both are numbered by falling frequency, and at one frequency by first appearance.
    Ids in CSV are text (``007`` is not ``7``), unless every one is a whole number as Python would write it.

    Args:
        path: Parquet by its content, else CSV in UTF-8.
        user, item: columns of ids; none may be missing.
        rating: column of numbers.
        time: column of whole numbers, or of dates. Dates become microseconds since 1970 in CSV, and the column's own
            unit in Parquet.

    Returns:
        interactions: one pair a row, in the file's order.
        users: (num_users,) the file's id of each user.
        items: (num_items,) the file's id of each item.

    Raises:
        FileProblem: the file cannot be read, has no rows, or a row (the header of a CSV file is row 1) with a missing
            id or with something else than a number or a date.
        UnknownName: there is no such column.
        WrongArgument: one column is asked for twice.
        MissingDependency: pyarrow is not installed.
    """
    names = [name for name in (user, item, rating, time) if name is not None]
    if len(set(names)) < len(names):
        raise WrongArgument(f"One column cannot be two things: {', '.join(names)}.")
    table, first_row = _table(path, names)
    if not table.num_rows:
        raise FileProblem(path, "holds no rows.")
    users, user_names = _numbered(path, user, table[user], first_row)
    items, item_names = _numbered(path, item, table[item], first_row)
    ratings = None if rating is None else _converted(path, rating, table[rating], first_row, ("float64",))
    if ratings is not None and (wrong := np.flatnonzero(~(np.abs(ratings) <= np.finfo(np.float32).max))).size:
        raise FileProblem(path, f"row {wrong[0] + first_row}: {rating} is {ratings[wrong[0]]}, it must be finite.")
    kinds = ("int64", "float64", "timestamp[us]")
    times = None if time is None else _converted(path, time, table[time], first_row, kinds)
    found = Interactions(users, items, len(user_names), len(item_names), ratings, times)
    return found, user_names, item_names


class _Text:
    """The bytes of a text file, unpacked, each line ended by a newline, none empty at the end."""

    def __init__(self, path: str | Path):
        self.path = path
        data = _unpacked(path).removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").rstrip()
        if not data:
            raise FileProblem(path, "is empty.")
        self.data = data + b"\n"

    def line(self, number: int) -> bytes:
        """The line of this number, counted from 1."""
        return self.data.split(b"\n", number)[number - 1]

    def problem(self, number: int, reason: str, hint: str | None = None) -> FileProblem:
        line = self.line(int(number)).decode("utf-8", "replace")
        shown = line if len(line) <= 60 else f"{line[:59]}…"
        return FileProblem(self.path, f"line {number}, {shown!r}: {reason}", hint=hint)


def _unpacked(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileProblem(path, f"cannot be read: {error.strerror or error}.") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    most = max(_LEAST_UNPACKED, _UNPACKED * len(data))
    try:
        with gzip.open(io.BytesIO(data)) as file:
            unpacked = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileProblem(path, f"damaged or cut off ({error}).", hint="Fetch the file again.") from error
    if len(unpacked) > most:
        raise FileProblem(path, f"holds more than {_UNPACKED} times its size.", hint="Unpack it, if you trust it.")
    return unpacked


def _read_lines(
    text: _Text, num_users: int | None, num_items: int | None, first_id: int
) -> tuple[Interactions, np.ndarray]:
    """The pairs of ``user item item …`` lines, and the line of each."""
    for name, number in (("num_users", num_users), ("num_items", num_items), ("first_id", first_id)):
        if number is not None and number < 0:
            raise WrongArgument(f"{name} must not be negative, got {number}.")
    values, lines = _by_pieces(text, text.data, 1, _quick_numbers, _careful_numbers)
    is_user = np.ones(len(values), bool)
    is_user[1:] = lines[1:] != lines[:-1]
    users, items = values[is_user], values[~is_user]
    _check_range(text, users, lines[is_user], "user", first_id, num_users)
    _check_range(text, items, lines[~is_user], "item", first_id, num_items)
    num_users = int(users.max()) + 1 - first_id if num_users is None else num_users
    num_items = int(items.max(initial=first_id - 1)) + 1 - first_id if num_items is None else num_items
    lengths = np.diff(np.append(np.flatnonzero(is_user), len(values))) - 1
    found = Interactions(np.repeat(users - first_id, lengths), items - first_id, num_users, num_items)
    return found, lines[~is_user]


def _check_range(text: _Text, ids: np.ndarray, lines: np.ndarray, name: str, first: int, number: int | None) -> None:
    last = LARGEST_ID + first if number is None else number - 1 + first
    wrong = np.flatnonzero((ids < first) | (ids > last))
    if wrong.size:
        raise text.problem(lines[wrong[0]], f"{name} {ids[wrong[0]]} is not from {first} to {last}.")
    # Arrays are made as long as the largest id.
    sparse = np.flatnonzero(ids > _SPARSE * len(ids) + 10_000_000)
    if number is None and sparse.size:
        reason = f"{name} {ids[sparse[0]]} is far more than {len(ids)} ids need."
        raise text.problem(lines[sparse[0]], reason, hint="Number them without gaps, as read_table does.")


def _by_pieces(
    text: _Text, data: bytes, line: int, quick: Callable[..., Columns | None], careful: Callable[..., Columns]
) -> Columns:
    """Columns of all lines, the first of which is number `line`; by pieces, since NumPy takes many bytes a number."""
    pieces, start = [], 0
    while start < len(data):
        end = data.find(b"\n", start + _PIECE) + 1 or len(data)
        piece = data[start:end]
        columns = quick(piece, line)
        pieces.append(careful(text, piece, line) if columns is None else columns)
        line, start = line + piece.count(b"\n"), end
    return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))


def _tokens(data: bytes, separators: bytes, others: bytes = b"") -> Columns | None:
    """Start, end and line (from 0) of each run of digits and `others`; `None` where there is anything else."""
    kinds = np.full(256, 2, np.uint8)
    kinds[list(separators + b"\n")] = 0
    kinds[list(b"0123456789" + others)] = 1
    codes = np.frombuffer(data, np.uint8)
    kind = kinds[codes]
    if kind.max() != 1:
        return None
    edges = np.flatnonzero(np.diff(kind, prepend=np.uint8(0)))  # data ends in a newline: starts and ends take turns
    starts, ends = edges[::2], edges[1::2]
    if (ends - starts).max() > _LONGEST:
        return None
    return starts, ends, np.searchsorted(np.flatnonzero(codes == ord("\n")), starts)


def _strings(data: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The bytes from each start to its end, as an array of byte strings."""
    codes = np.frombuffer(data, np.uint8)
    strings = np.zeros((len(starts), (ends - starts).max()), np.uint8)
    for place in range(strings.shape[1]):
        inside = np.flatnonzero(starts + place < ends)
        strings[inside, place] = codes[starts[inside] + place]
    return strings.view(f"S{strings.shape[1]}")[:, 0]


def _quick_numbers(data: bytes, line: int) -> Columns | None:
    """All whole numbers and the lines they are in; `None` where a line has none, or where there is anything else."""
    tokens = _tokens(data, b" \t")
    if tokens is None:
        return None
    starts, ends, lines = tokens
    if len(np.unique(lines)) != data.count(b"\n"):
        return None
    return _strings(data, starts, ends).astype(np.int64), lines + line


def _careful_numbers(text: _Text, data: bytes, line: int) -> Columns:
    values: list[int] = []
    lines: list[int] = []
    for number, content in enumerate(data[:-1].split(b"\n"), start=line):
        fields = [field for field in re.split(rb"[ \t]+", content) if field]
        if not fields:
            raise text.problem(number, "empty; a user without items has a line with the user's id.")
        values += (_whole(text, number, field) for field in fields)
        lines += [number] * len(fields)
    return np.array(values, np.int64), np.array(lines)


def _quick_ratings(data: bytes, line: int) -> Columns | None:
    """Users, items, ratings, times of lines with tabs; `None` where a line is anything else."""
    tokens = _tokens(data, b"\t", b".")
    rows = data.count(b"\n")
    if tokens is None or len(tokens[0]) != 4 * rows:
        return None
    starts, ends, lines = (array.reshape(rows, 4) for array in tokens)
    # Four fields a line and, by the sum, one separator behind each.
    if (lines != np.arange(rows)[:, None]).any() or (ends - starts).sum() + 4 * rows != len(data):
        return None
    users, items, ratings, times = (_strings(data, starts[:, i], ends[:, i]) for i in range(4))
    try:
        return users.astype(np.int64), items.astype(np.int64), ratings.astype(np.float64), times.astype(np.int64)
    except ValueError:  # a point in a whole number, or two in a rating
        return None


def _careful_ratings(text: _Text, data: bytes, line: int) -> Columns:
    rows = []
    for number, content in enumerate(data[:-1].split(b"\n"), start=line):
        fields = [field.strip(b" ") for field in content.split(b"\t")]
        if len(fields) != 4:
            raise text.problem(number, "not four fields: user, item, rating, time.")
        if not _DECIMAL.fullmatch(fields[2]):
            raise text.problem(number, f"{_shown(fields[2])} is not a rating.")
        user, item, time = (_whole(text, number, fields[i]) for i in (0, 1, 3))
        rows.append((user, item, float(fields[2]), time))
    users, items, ratings, times = zip(*rows, strict=True)
    return np.array(users, np.int64), np.array(items, np.int64), np.array(ratings), np.array(times, np.int64)


def _whole(text: _Text, line: int, field: bytes) -> int:
    if not _INTEGER.fullmatch(field):
        try:
            field.decode()
        except UnicodeDecodeError:
            raise text.problem(line, "not UTF-8 text.") from None
        raise text.problem(line, f"{_shown(field)} is not a whole number.")
    # Longer than Python converts, if someone tries; both are out of every range.
    value = int(field) if len(field) <= 1000 else 2**63
    if not -(2**63) <= value < 2**63:
        raise text.problem(line, f"{_shown(field)} is too large.")
    return value


def _shown(field: bytes) -> str:
    shown = field.decode("utf-8", "replace")
    return repr(shown if len(shown) <= 30 else f"{shown[:29]}…")


def _table(path: str | Path, names: list[str]) -> tuple[Any, int]:
    """The columns of a table as pyarrow reads them, those of CSV as text; the number of its first row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingDependency("pyarrow", "Reading tables", "recsys") from error
    data = pyarrow.BufferReader(_unpacked(path))
    try:
        if data.read(4) != b"PAR1":
            data.seek(0)
            return _csv(path, data, names), 2
        data.seek(0)
        _check_columns(path, names, parquet.read_schema(data).names)
        data.seek(0)
        return parquet.read_table(data, columns=names), 1
    except FileProblem:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        hint = "Save it as UTF-8." if "UTF8" in str(error) else None
        reason = str(error).rstrip(".")
        raise FileProblem(path, f"cannot be read as a table: {reason}.", hint=hint) from error


def _csv(path: str | Path, data: Any, names: list[str]) -> Any:
    import pyarrow
    from pyarrow import csv

    separator = "\t" if ".tsv" in Path(path).suffixes else ","
    read = csv.ReadOptions(use_threads=False)  # errors name the row then
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    convert = csv.ConvertOptions(
        include_columns=names, column_types=dict.fromkeys(names, pyarrow.string()), strings_can_be_null=False
    )
    header = csv.open_csv(data, read_options=read, parse_options=parse).schema.names
    _check_columns(path, names, header)
    data.seek(0)
    return csv.read_csv(data, read_options=read, parse_options=parse, convert_options=convert)


def _check_columns(path: str | Path, names: Iterable[str], known: list[str]) -> None:
    for name in names:
        if known.count(name) > 1:
            raise FileProblem(path, f"has {known.count(name)} columns {name!r}.")
        if name not in known:
            raise UnknownName(f"column of {path}", name, known)


def _numbered(path: str | Path, name: str, column: Any, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each id by falling frequency, and the id of each number."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (types.is_integer(column.type) or types.is_string(column.type) or types.is_large_string(column.type)):
        raise FileProblem(path, f"column {name!r} holds {column.type}, ids must be text or whole numbers.")
    missing = compute.is_null(column)
    if not types.is_integer(column.type):
        missing = compute.or_kleene(missing, compute.equal(column, ""))
    if compute.any(missing).as_py():
        raise FileProblem(path, f"row {compute.index(missing, True).as_py() + first_row}: {name} is missing.")
    encoded = column.dictionary_encode().combine_chunks()
    old = encoded.indices.to_numpy()
    order = np.argsort(-np.bincount(old), kind="stable")  # pyarrow numbers by first appearance
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.arange(len(order), dtype=np.int32)
    names = encoded.dictionary.to_numpy(zero_copy_only=False)[order]
    if first_row == 2 and all(map(_CANONICAL.fullmatch, names)):  # CSV, which has no types
        names = names.astype(np.int64)
    return numbers[old], names


def _converted(path: str | Path, name: str, column: Any, first_row: int, kinds: Iterable[str]) -> np.ndarray:
    """A column by the first of these types that takes all of it; times as int64."""
    import pyarrow

    def convert(values: Any, kind: str) -> np.ndarray:
        values = values.cast(kind)
        return (values if kinds == ("float64",) else values.cast("int64")).to_numpy()

    def fits(values: Any) -> np.ndarray | None:
        for kind in kinds:
            try:
                return convert(values, kind)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
                continue
        return None

    found = None if column.null_count else fits(column)
    if found is not None:
        return found
    for row, value in enumerate(column):
        if not value.is_valid or fits(pyarrow.chunked_array([[value.as_py()]], type=column.type)) is None:
            shown = repr(value.as_py()) if value.is_valid else "missing"
            what = "a number" if kinds == ("float64",) else "a whole number or a date"
            raise FileProblem(path, f"row {row + first_row}: {name} is {shown}, not {what}.")
    raise FileProblem(path, f"column {name!r} holds numbers and dates.")

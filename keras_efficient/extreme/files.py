"""Sparse multi-label data in the text form of the Extreme Classification Repository, a batch at a time.

The first line is ``points features labels``; each line after it a point, ``label,label,… feature:value …``. A point
without labels begins with a space. Ids count from 0.
"""

from __future__ import annotations

import gzip
import math
import mmap
import re
import zlib
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_efficient.errors import FileProblem, WrongArgument

__all__ = ["SparseBatches", "SparseFile"]

MOST_UNPACKED = 2**33  # bytes of a packed file
PIECE = 2**24
_HEADER = re.compile(rb"\s*([0-9]{1,18})\s+([0-9]{1,18})\s+([0-9]{1,18})\s*")
_POINT = re.compile(rb"([0-9]{1,18}(?:,[0-9]{1,18})*)?((?:\s+[0-9]{1,18}:[^\s:]{1,40})*)\s*")


class SparseFile:
    """The points of a file, read where they are asked for; a plain file stays on the disk, a packed one does not.

    Attributes:
        path: the file.
        num_features, num_labels: as its first line says.

    Raises:
        FileProblem: the file cannot be read, has no such first line, or fewer or more points than that says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _contents(self.path)
        self._starts = _line_starts(self._data)
        header = _HEADER.fullmatch(self._line(0)) if len(self._starts) > 1 else None
        if header is None:
            raise self._problem(0, "should be 'points features labels', three numbers.")
        points, self.num_features, self.num_labels = map(int, header.groups())
        if points != len(self):
            what = "is cut off, or has" if len(self) < points else "has"
            raise FileProblem(path, f"{what} {len(self)} points, its first line says {points}.")

    def __len__(self) -> int:
        return len(self._starts) - 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The labels, the features and the values of a point.

        Raises:
            FileProblem: the line is something else; the message has its number and what is in it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"point {index} of {len(self)}")
        point = _POINT.fullmatch(self._line(index + 1))
        if point is None:
            raise self._problem(index + 1, "is not 'label,label feature:value feature:value'")
        pairs = [pair.split(b":") for pair in point.group(2).split()]
        labels = np.array(point.group(1).split(b","), np.int64) if point.group(1) else np.zeros(0, np.int64)
        features = np.array([int(feature) for feature, _ in pairs], np.int64)
        try:
            values = np.array([float(value) for _, value in pairs], np.float32)
        except ValueError:
            raise self._problem(index + 1, "has a value that is no number") from None
        for name, ids, number in (("label", labels, self.num_labels), ("feature", features, self.num_features)):
            if ids.size and ids.max() >= number:
                raise self._problem(index + 1, f"has {name} {ids.max()}, the first line says {number} of them")
        if not np.isfinite(values).all():
            raise self._problem(index + 1, "has a value that is not finite")
        return labels, features, values

    def label_counts(self) -> np.ndarray:
        """How many points have each label: (num_labels,)."""
        counts = np.zeros(self.num_labels, np.int64)
        for index in range(len(self)):
            counts[np.unique(self[index][0])] += 1
        return counts

    def _line(self, number: int) -> bytes:
        return bytes(self._data[self._starts[number] : self._starts[number + 1]]).rstrip(b"\r\n")

    def _problem(self, number: int, reason: str) -> FileProblem:
        text = self._line(number)[:60].decode("utf-8", "replace") if number + 1 < len(self._starts) else ""
        return FileProblem(f"{self.path}, line {number + 1}", f"{reason}: {text!r}")


class SparseBatches(keras.utils.PyDataset):
    """Batches ``({"ids", "weights"}, labels)`` of a file, for `models.ExtremeClassifier` and `extreme.learn_index`.

    Ids are features plus one, and 0 where a point has fewer: (batch, longest point); weights are their values. Labels
    are (batch, most labels), −1 where there are fewer. Widths are powers of two, so that few shapes are compiled; on
    TensorFlow the second batch is twice as wide where it would be as wide as the first.

    Args:
        file: the points.
        batch_size: of them; the last batch may have fewer.
        length: most features of a point; the largest values stay.
        label: whether labels are class numbers (batch,) of one label a point, drawn anew in each epoch: for a softmax.
            Points without a label are left out then.
        shuffle: whether the order of points is drawn anew in each epoch.
        seed: of what is drawn.
    """

    def __init__(
        self,
        file: SparseFile,
        *,
        batch_size: int = 256,
        length: int = 1024,
        label: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        if not isinstance(file, SparseFile):
            raise WrongArgument(f"An extreme.SparseFile is needed, not {type(file).__name__}.")
        for name, value in (("batch_size", batch_size), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise WrongArgument(f"`{name}` must be a whole number from 1 on, not {value!r}.")
        if max(file.num_features, file.num_labels) >= 2**31:
            raise WrongArgument(
                f"{file.path} has {file.num_features} features and {file.num_labels} labels; batches hold int32."
            )
        self.file, self.batch_size, self.length = file, batch_size, length
        self.label, self.shuffle, self.seed, self.epoch = label, shuffle, seed, 0
        self._points = np.arange(len(file))
        if label:
            self._points = np.array([index for index in range(len(file)) if len(file[index][0])], np.int64)

    def __len__(self) -> int:
        return math.ceil(len(self._points) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        x, y = self._batch(index)
        # TensorFlow's `fit` takes the first two shapes for those of all, but where they differ.
        if index == 1 and keras.backend.backend() == "tensorflow":
            first_x, first_y = self._batch(0)
            x = {name: _wider_than(first_x[name], values, 0) for name, values in x.items()}
            y = _wider_than(first_y, y, -1)
        return x, y

    def _batch(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        order = self._points
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        points = [self.file[int(i)] for i in order[index * self.batch_size : (index + 1) * self.batch_size]]
        rows = [_largest(features, values, self.length) for _, features, values in points]
        width = _power_of_two(max((len(features) for features, _ in rows), default=1))
        ids, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
        for row, (features, values) in enumerate(rows):
            ids[row, : len(features)], weights[row, : len(features)] = features + 1, values
        return {"ids": ids, "weights": weights}, self._labels([labels for labels, _, _ in points], index)

    def _labels(self, found: list[np.ndarray], index: int) -> np.ndarray:
        if self.label:
            random = np.random.default_rng([self.seed, self.epoch, index])
            return np.array([random.choice(labels) for labels in found], np.int32)
        labels = np.full((len(found), _power_of_two(max(map(len, found), default=1))), -1, np.int32)
        for row, some in enumerate(found):
            labels[row, : len(some)] = some
        return labels

    def on_epoch_end(self) -> None:
        """Keras calls it: the next epoch draws anew."""
        self.epoch += 1


def _largest(features: np.ndarray, values: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    if len(features) <= length:
        return features, values
    kept = np.sort(np.argpartition(-np.abs(values), length)[:length])
    return features[kept], values[kept]


def _wider_than(first: np.ndarray, values: np.ndarray, fill: int) -> np.ndarray:
    """The values, twice as wide if they are as wide as others."""
    if values.ndim < 2 or values.shape[1] != first.shape[1]:
        return values
    return np.pad(values, [(0, 0), (0, values.shape[1])], constant_values=fill)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _contents(path: Path) -> bytes | mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                return _unpacked(path, file)
            if not path.stat().st_size:
                raise FileProblem(path, "the file is empty.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileProblem:
        raise
    except FileNotFoundError as err:
        raise FileProblem(path, "no such file.") from err
    except (OSError, ValueError) as err:
        raise FileProblem(path, f"cannot be read: {getattr(err, 'strerror', None) or err}.") from err


def _unpacked(path: Path, file: Any) -> bytes:
    parts, size = [], 0
    try:
        with gzip.open(file) as packed:
            while piece := packed.read(PIECE):
                size += len(piece)
                if size > MOST_UNPACKED:
                    raise FileProblem(path, f"holds over {MOST_UNPACKED} bytes once unpacked.", hint="Unpack it first.")
                parts.append(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise FileProblem(path, f"is damaged: {err}.") from err
    return b"".join(parts)


def _line_starts(data: bytes | mmap.mmap) -> np.ndarray:
    """Where each line begins, and the end."""
    ends = [
        start + np.flatnonzero(np.frombuffer(data[start : start + PIECE], np.uint8) == ord("\n"))
        for start in range(0, len(data), PIECE)
    ]
    starts = np.concatenate([[0], np.concatenate(ends) + 1]) if ends else np.zeros(1, np.int64)
    return starts if starts[-1] == len(data) else np.append(starts, len(data))

"""Data sets of the benchmark, read from files that the user has; nothing is downloaded."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from keras_efficient.bayes.corruptions import corrupted
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.tasks import RARE_CLASSES
from keras_efficient.errors import FileProblem, MissingDependency, UnknownName, WrongArgument

__all__ = ["DATASETS", "OUTSIDE", "VARIABLE", "Splits", "load"]

VARIABLE = "KERAS_EFFICIENT_DATA"  # environment variable: the folder of data sets
MOST_EXAMPLES = 1_000_000  # in a file
MOST_BYTES = 1 << 20  # of a picture's file

# (n, height, width, channels) from 0 to 255, and (n,) labels.
Part = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set as networks take it.

    ```
    x = (picture / 255 − mean) / sd
    ```

    Attributes:
        train, test: inputs (n, height, width, channels), and labels.
        mean, sd: (channels,), of pictures from 0 to 1.
    """

    train: Data
    test: Data
    mean: np.ndarray
    sd: np.ndarray

    def outside(self, spec: Mapping[str, Any]) -> np.ndarray:
        """Inputs of another data set's test part, in the size, channels and normalisation of this one.

        Args:
            spec: `{"name": …}`, one of `OUTSIDE`, and its arguments.

        Raises:
            UnknownName, FileProblem, MissingDependency: as `load`.
        """
        shape = self.test.x.shape[1:]
        if spec.get("name") == "noise":
            spec = {"shape": shape, **spec}
        pictures = _pictures_of(spec, OUTSIDE).test[0].astype(np.float32) / 255
        return self._normalised(_fitted(pictures, shape))

    def corrupted(self, name: str, severity: int, seed: int) -> np.ndarray:
        """Inputs of the test part, corrupted: see `keras_efficient.bayes.corruptions`."""
        pictures = np.clip(self.test.x * self.sd + self.mean, 0, 1)
        return self._normalised(corrupted(pictures, name, severity, seed))

    def _normalised(self, pictures: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((pictures - self.mean) / self.sd).astype(np.float32)
        return found


@dataclass(frozen=True, eq=False)
class _Pictures:
    train: Part | None
    test: Part
    mean: tuple[float, ...] = (0.5,)
    sd: tuple[float, ...] = (0.5,)
    num_classes: int = 10


def load(spec: Mapping[str, Any]) -> Splits:
    """The data set that `{"name": …, argument: value, …}` says.

    | name | pictures | train, test | files |
    |---|---|---|---|
    | `digits` | 8 × 8 | 1,347 and 450 | none: it comes with scikit-learn |
    | `mnist` | 28 × 28 | 60,000 and 10,000 | `train-images-idx3-ubyte` and so on, with `.gz` or without |
    | `cifar10` | 32 × 32 × 3 | 50,000 and 10,000, or fewer | `data_batch_1.bin` … `test_batch.bin`, or `train.zip` and
      `test.zip` with pictures `train/airplane/….jpg` |

    Args of all:
        limit: training examples, drawn by chance; `None`: all.
        test_limit: test examples, drawn by chance; `None`: all.

    Args of `mnist` and `cifar10`:
        path: folder with the files, or with a folder of the data set's name that has them; `None`: what the
            environment variable KERAS_EFFICIENT_DATA says.
        imbalanced: whether classes that are dear to miss (`tasks.RARE_CLASSES`) are rare in training: 1 % of MNIST's
            3 and 7, 10 % of CIFAR's vehicles of air and road; before `limit`.

    Raises:
        UnknownName: no such data set or argument.
        FileProblem: a file is missing, damaged, or not what it should be.
        MissingDependency: scikit-learn is not installed.
        WrongArgument: limits below 1.
    """
    found = _pictures_of(spec, DATASETS)
    assert found.train is not None
    mean, sd = (np.asarray(one, np.float32) for one in (found.mean, found.sd))
    train, test = (
        Data((x.astype(np.float32) / 255 - mean) / sd, y, found.num_classes) for x, y in (found.train, found.test)
    )
    return Splits(train, test, mean, sd)


def digits(*, limit: int | None = None, test_limit: int | None = None) -> _Pictures:
    """Optical recognition of handwritten digits, UCI, as scikit-learn has them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise MissingDependency("scikit-learn", "The data set 'digits'", "bayes") from err
    found = load_digits()
    pictures, labels = found.images[..., None] * (255 / 16), found.target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = ((pictures[some], labels[some]) for some in (order[450:], order[:450]))
    return _Pictures(_limited(train, limit), _limited(test, test_limit), (0.3052,), (0.3761,))


def mnist(
    *,
    path: str | None = None,
    imbalanced: bool = False,
    limit: int | None = None,
    test_limit: int | None = None,
) -> _Pictures:
    """Handwritten digits. Source: LeCun, Cortes, Burges; the normalisation is URSABench's."""
    train, test = (_idx_pair(path, "mnist", part) for part in ("train", "t10k"))
    train = _limited(_thinned(train, "mnist") if imbalanced else train, limit)
    return _Pictures(train, _limited(test, test_limit), (0.1307,), (0.3081,))


def notmnist(*, path: str | None = None, test_limit: int | None = None) -> _Pictures:
    """Letters A to J in many fonts, in MNIST's format. Source: Bulatov, 2011."""
    return _Pictures(None, _limited(_idx_pair(path, "notmnist", "t10k"), test_limit))


def cifar10(
    *,
    path: str | None = None,
    imbalanced: bool = False,
    limit: int | None = None,
    test_limit: int | None = None,
) -> _Pictures:
    """Photographs of ten kinds of things. Source: Krizhevsky, 2009; the normalisation is URSABench's."""
    folder = _folder(path, "cifar10", ("test_batch.bin", "test.zip"))
    if (folder / "test_batch.bin").exists():
        batches = [_cifar_batch(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
        train: Part = (np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches]))
        test = _cifar_batch(folder / "test_batch.bin")
    else:
        train, test = _cifar_zip(folder / "train.zip"), _cifar_zip(folder / "test.zip")
    train = _limited(_thinned(train, "cifar10") if imbalanced else train, limit)
    mean, sd = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return _Pictures(train, _limited(test, test_limit), mean, sd)


def noise(*, count: int = 1000, shape: tuple[int, ...] = (28, 28, 1)) -> _Pictures:
    """Pictures without anything in them: each value is uniform from 0 to 255."""
    if count < 1:
        raise WrongArgument(f"Noise has 1 picture or more, not {count!r}.")
    pictures = np.random.default_rng(0).uniform(0, 255, (count, *shape))
    return _Pictures(None, (pictures, np.zeros(count, np.int64)))


DATASETS: Mapping[str, Callable[..., _Pictures]] = MappingProxyType(
    {"digits": digits, "mnist": mnist, "cifar10": cifar10}
)
OUTSIDE: Mapping[str, Callable[..., _Pictures]] = MappingProxyType({**DATASETS, "notmnist": notmnist, "noise": noise})


def _pictures_of(spec: Mapping[str, Any], known: Mapping[str, Callable[..., _Pictures]]) -> _Pictures:
    name = str(spec.get("name"))
    if name not in known:
        raise UnknownName("data set", name, known)
    try:
        return known[name](**{key: value for key, value in spec.items() if key != "name"})
    except TypeError as err:
        raise WrongArgument(f"Data set {name!r}: {err}.") from err


def _limited(part: Part, limit: int | None) -> Part:
    """Some examples, drawn by chance: files may be in the order of classes."""
    if limit is None:
        return part
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise WrongArgument(f"A limit is 1 example or more, not {limit!r}.")
    some = np.sort(np.random.default_rng(0).permutation(len(part[1]))[:limit])
    return part[0][some], part[1][some]


def _thinned(part: Part, name: str) -> Part:
    places = np.arange(len(part[1]), dtype=np.float32)
    kept = RARE_CLASSES[name].thinned(Data(places, part[1], 10), seed=0).x.astype(int)
    return part[0][kept], part[1][kept]


def _fitted(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pictures (n, height, width, channels) in another size, by straight lines between pixels, and other channels."""
    for axis, size in ((1, shape[0]), (2, shape[1])):
        x = _resized(x, axis, size)
    if x.shape[-1] == shape[-1]:
        return x
    return np.repeat(x.mean(axis=-1, keepdims=True), shape[-1], axis=-1)


def _resized(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Means where a side becomes shorter, straight lines where it becomes longer."""
    if x.shape[axis] == size:
        return x
    old = x.shape[axis]
    centres, width = (np.arange(size) + 0.5) * old / size - 0.5, max(old / size, 1.0)
    weights = np.clip(1 - abs(centres[:, None] - np.arange(old)) / width, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    found: np.ndarray = np.moveaxis(np.tensordot(weights.astype(np.float32), x, axes=(1, axis)), 0, axis)
    return found


def _folder(path: str | None, name: str, wanted: tuple[str, ...]) -> Path:
    """The folder that holds one of the wanted files."""
    given = path or os.environ.get(VARIABLE)
    if not given:
        hint = f"Say `path` (on the command line --data), or set {VARIABLE}."
        raise FileProblem(name, "no folder of this data set is known.", hint=hint)
    names = [name, f"{name}-subset", "cifar-10-batches-bin"] if name == "cifar10" else [name]
    tried = [Path(given), *(Path(given) / above / one for above in ("", "cls") for one in names)]
    for folder in tried:
        if any((folder / one).is_file() for one in wanted):
            return folder
    hint = f"`path`, or {VARIABLE}, is the folder with {wanted[0]}, or one that has it in {name}/."
    raise FileProblem(given, f"no {' or '.join(wanted)} of {name!r} is here.", hint=hint)


def _idx_pair(path: str | None, name: str, part: str) -> Part:
    images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    folder = _folder(path, name, (images, f"{images}.gz"))
    # Plain or packed: where neither is there, it is the packed one that is missed.
    plain = [folder / images, folder / labels]
    paths = [one if one.exists() else one.with_name(f"{one.name}.gz") for one in plain]
    x, y = _idx(paths[0], (28, 28)), _idx(paths[1], ())
    if len(x) != len(y):
        raise FileProblem(paths[1], f"has {len(y)} labels for {len(x)} pictures.")
    _check_labels(paths[1], y)
    return x[..., None], y.astype(np.int64)


def _idx(path: Path, sizes: tuple[int, ...]) -> np.ndarray:
    """An array of bytes, (n, *sizes): two zeros, the type 8, the number of sizes, each size in four bytes, values."""
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        axes = 1 + len(sizes)
        head = file.read(4 + 4 * axes)
        if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
            raise FileProblem(path, f"is no idx file of bytes with {axes} axes.")
        shape = tuple(int(one) for one in np.frombuffer(head, ">u4", axes, 4))
        if shape[1:] != sizes or not 1 <= shape[0] <= MOST_EXAMPLES:
            wanted = " × ".join(map(str, (f"1 to {MOST_EXAMPLES:,}", *sizes)))
            raise FileProblem(path, f"holds {' × '.join(map(str, shape))} values, not {wanted}.")
        return np.frombuffer(_exactly(file, path, math.prod(shape)), np.uint8).reshape(shape)


def _cifar_batch(path: Path) -> Part:
    """The binary version: a label and 3 × 32 × 32 values, again and again."""
    size = 1 + 3 * 32 * 32
    with _reading(path):
        count, left = divmod(path.stat().st_size, size)
        if left or not 1 <= count <= MOST_EXAMPLES:
            raise FileProblem(path, f"is no CIFAR-10 batch: it should be a multiple of {size} bytes.")
        with path.open("rb") as file:
            found = np.frombuffer(_exactly(file, path, count * size), np.uint8).reshape(count, size)
    _check_labels(path, found[:, 0])
    return found[:, 1:].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), found[:, 0].astype(np.int64)


_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar_zip(path: Path) -> Part:
    """Pictures in folders that are named by their class."""
    pictures, labels = [], []
    with _reading(path), zipfile.ZipFile(path) as archive:
        entries = sorted((one for one in archive.infolist() if not one.is_dir()), key=lambda one: one.filename)
        if not 1 <= len(entries) <= MOST_EXAMPLES:
            raise FileProblem(path, f"holds {len(entries)} files, not 1 to {MOST_EXAMPLES:,}.")
        for entry in entries:
            label = entry.filename.split("/")[-2] if "/" in entry.filename else ""
            if label not in _CLASSES:
                raise FileProblem(path, f"{entry.filename!r} is in no folder of a class: {', '.join(_CLASSES)}.")
            with archive.open(entry) as file:
                pictures.append(_picture(path, entry.filename, file))
            labels.append(_CLASSES.index(label))
    mixed = np.random.default_rng(0).permutation(len(labels))  # in an archive they are sorted by class
    return np.stack(pictures)[mixed], np.array(labels)[mixed]


def _picture(path: Path, name: str, file: IO[bytes]) -> np.ndarray:
    from PIL import Image

    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise FileProblem(path, f"{name!r} holds over {MOST_BYTES} bytes.")
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as picture:
            if picture.size != (32, 32):
                raise FileProblem(path, f"{name!r} is {picture.size[0]} × {picture.size[1]}, not 32 × 32.")
            return np.asarray(picture.convert("RGB"))
    except FileProblem:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise FileProblem(path, f"{name!r} is no picture: {err}.") from err


def _exactly(file: Any, path: Path, size: int) -> bytes:
    """So many bytes, and then the end; what is compressed may be larger than it says, or endless."""
    content: bytes = file.read(size)
    if len(content) < size:
        raise FileProblem(path, f"ends after {len(content):,} of {size:,} bytes.", hint="Get it again.")
    if file.read(1):
        raise FileProblem(path, f"holds more than its {size:,} bytes.", hint="Get it again.")
    return content


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.max() > 9:
        raise FileProblem(path, f"has the label {labels.max()} at place {int((labels > 9).argmax())}, not 0 to 9.")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file, in our words."""
    try:
        yield
    except FileProblem:
        raise
    except FileNotFoundError as err:
        raise FileProblem(path, "no such file.") from err
    except (OSError, EOFError, NotImplementedError, RuntimeError, zlib.error, zipfile.BadZipFile) as err:
        # The last but two: zip files with a password, or compressed in other ways.
        reason = f"cannot be read: {getattr(err, 'strerror', None) or err}."
        raise FileProblem(path, reason, hint="Get it again.") from err

"""Weights files: found or downloaded, checked, and put into a model; nothing is loaded by halves."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keras_efficient.errors import FileProblem
from keras_efficient.zoo.schema import Card, Weights

if TYPE_CHECKING:
    import h5py
    import keras
    import numpy as np

__all__ = ["cache_folder", "checked", "describe", "find", "load_into", "save", "sha256_of"]

_SUFFIX = ".weights.h5"
_log = logging.getLogger("keras_efficient")


def cache_folder() -> Path:
    """Where downloads are kept: `KERAS_EFFICIENT_HOME`, or the user's cache folder."""
    home = os.environ.get("KERAS_EFFICIENT_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("keras_efficient"))


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: str | Path, *, url: str | None = None) -> Weights:
    """What a card says of a weights file."""
    path = Path(path)
    return Weights(path.name, sha256_of(path), path.stat().st_size, url)


def find(card: Card, folder: Path) -> Path:
    """The checked weights file of a card: beside the cards, in the cache, or downloaded into it.

    Raises:
        FileProblem: not there (and not to be downloaded), or not the file that the card describes.
    """
    beside = folder / "weights" / card.weights.file
    if beside.exists() or not card.weights.url:
        return checked(beside, card.weights)
    cached = cache_folder() / card.weights.file
    if not cached.exists():
        _download(card.weights, cached)
    return checked(cached, card.weights)


def checked(path: Path, expected: Weights) -> Path:
    """Compares size, then SHA-256, with the card's.

    Raises:
        FileProblem: the message names both.
    """
    if not path.is_file():
        raise FileProblem(path, "no such file.", hint="Install the package again, or give weights= a file of your own.")
    size = path.stat().st_size
    # A larger file is not read at all: it may be of any size.
    found = sha256_of(path) if size <= expected.size else f"not computed for {size:,} bytes"
    if size != expected.size or found != expected.sha256:
        raise FileProblem(
            path,
            f"is not the file that the card describes:\n  sha256 {found}, {size:,} bytes, instead of\n"
            f"  sha256 {expected.sha256}, {expected.size:,} bytes.",
            hint="It is damaged or was changed: remove it and install (or download) it again.",
        )
    return path


def load_into(model: keras.Model, path: str | Path) -> None:
    """Loads a `.weights.h5` into a model after comparing every name and shape.

    The file is opened as data only: links to other files, virtual data sets and anything but numbers are refused.

    Raises:
        FileProblem: unreadable, or the weights of another model; the model is unchanged then.
    """
    path = Path(path)
    found = _shapes_in(path)
    expected = _shapes_of(model)
    differences = list(_differences(found, expected))
    if differences:
        more = f"\n  and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise FileProblem(
            path,
            f"holds the weights of another model than {model.name!r}:\n  " + "\n  ".join(differences[:4]) + more,
            hint="Weights fit the training form that wrote them: same builder, same arguments.",
        )
    model.load_weights(path)


def save(model: keras.Model, path: str | Path) -> None:
    """Writes a `.weights.h5` whose larger arrays are in the narrowest number format that has all of their values."""
    import h5py

    with tempfile.TemporaryDirectory(prefix=".saving-", dir=Path(path).parent) as folder:
        whole, packed = (Path(folder) / f"{name}{_SUFFIX}" for name in ("whole", "packed"))
        model.save_weights(whole)
        # A newer layout of groups, which HDF5 has read since 2016, takes a fifth off a file of many small layers.
        with h5py.File(whole, "r") as file, h5py.File(packed, "w", libver=("v110", "v110")) as other:

            def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
                group = isinstance(item, h5py.Group)
                new = other.require_group(name) if group else other.create_dataset(name, data=_narrowest(item[()]))
                new.attrs.update(item.attrs)

            file.visititems(copy)
            other.attrs.update(file.attrs)
        os.replace(packed, path)


def _narrowest(values: np.ndarray) -> np.ndarray:
    """The same values, in float16 or in fewer bytes of an integer where these have all of them."""
    import numpy as np

    if values.nbytes < 2**12:
        return values
    narrower = {"float32": ("float16",), "int32": ("int8", "int16"), "int16": ("int8",)}
    for dtype in narrower.get(str(values.dtype), ()):
        with np.errstate(over="ignore"):
            packed = values.astype(dtype)
        if np.array_equal(packed.astype(values.dtype), values):
            return packed
    return values


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its path in the file, which is read no further than that."""
    import h5py

    if not path.is_file():
        raise FileProblem(path, "no such file.")
    if not path.name.endswith(_SUFFIX):
        raise FileProblem(path, f"no {_SUFFIX} file.", hint="Save weights with model.save_weights('NAME.weights.h5').")
    if path.stat().st_size == 0:
        raise FileProblem(path, "is empty (0 bytes).")
    try:
        with h5py.File(path, "r") as file:
            return _without_optimizer({name: tuple(data.shape) for name, data in _arrays(file, path)})
    except FileProblem:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as err:
        raise FileProblem(path, "is no HDF5 file, or damaged or cut off.", hint="Get or save it again.") from err


def _shapes_of(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """What `_shapes_in` would say of the model's own file, which is written to memory: a full disk ends h5py hard."""
    from keras.src.saving import saving_lib

    # The memory is never closed: what Ctrl-C leaves of the file would write to it while it is taken down, and crash.
    with contextlib.closing(saving_lib.H5IOStore(io.BytesIO(), mode="w")) as store:
        saving_lib._save_state(model, weights_store=store, assets_store=None, inner_path="", visited_saveables=set())
        shapes = {name: tuple(data.shape) for name, data in _arrays(store.h5_file, Path(f"own{_SUFFIX}"))}
    return _without_optimizer(shapes)


def _without_optimizer(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Keras stores the optimizer of a compiled model beside its weights; loading passes over it."""
    return {name: shape for name, shape in shapes.items() if name.strip("/").split("/")[0] != "optimizer"}


def _arrays(group: h5py.Group, path: Path) -> Iterator[tuple[str, h5py.Dataset]]:
    """All data sets below a group; only what `save_weights` writes is let through."""
    import h5py

    for key in group:
        name = f"{group.name.rstrip('/')}/{key}"
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise FileProblem(path, f"{name} is a link, maybe to another file; weights files have none.")
        item = group[key]
        if isinstance(item, h5py.Group):
            yield from _arrays(item, path)
        elif not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiub" or item.external or item.is_virtual:
            raise FileProblem(path, f"{name} is no plain array of numbers.")
        else:
            yield name.removeprefix("/"), item


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """One line for each weight that only one side has, or that has two shapes."""
    for name in sorted(found.keys() | expected.keys()):
        have, want = found.get(name), expected.get(name)
        if have != want:
            in_file = "not in the file" if have is None else f"{have} in the file"
            yield f"{name}: {in_file}, {'not in the model' if want is None else f'{want} in the model'}"


def _download(weights: Weights, place: Path) -> None:
    """Fetches a file into the cache; it appears there only when its hash is right.

    Raises:
        FileProblem: no network, the server's answer, or a wrong hash.
    """
    hint = f"Download {weights.url} by other means, put it to {place}, or give weights= its path."
    if os.environ.get("KERAS_EFFICIENT_OFFLINE", "0") not in ("", "0"):
        raise FileProblem(place, "is not there, and KERAS_EFFICIENT_OFFLINE forbids to download it.", hint=hint)
    import pooch

    _log.info("downloading %s (%s bytes)", weights.url, f"{weights.size:,}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=place.parent) as folder:
            pooch.HTTPDownloader(timeout=30)(weights.url, str(Path(folder) / place.name), None)
            checked(Path(folder) / place.name, weights)
            os.replace(Path(folder) / place.name, place)
    except FileProblem:
        raise
    except (OSError, ValueError) as err:  # requests' errors are OSErrors
        raise FileProblem(place, f"cannot be downloaded from {weights.url} ({type(err).__name__}).", hint=hint) from err

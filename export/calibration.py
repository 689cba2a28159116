"""Real inputs for static quantisation: arrays, a folder of images, a generator or a `tf.data.Dataset`.

The TFLite converter accepts an empty data set, or one of zeros only, without a word and then writes a useless file; one
value that is not finite ends the whole process with a segmentation fault. So the samples are looked at here, before any
converter sees them.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import CalibrationError, FileProblem
from keras_efficient.export.signature import InputSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IMAGE_SUFFIXES", "Calibration", "calibration_from", "image_files", "read_arrays", "to_samples"]

ARRAY_SUFFIXES = (".npy", ".npz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

MAX_SAMPLES = 500  # more of them no longer move a minimum or a maximum
MAX_ELEMENTS = 40_000_000  # input values in all: the calibrator runs the float graph on one thread
FREE_SIZE = 128  # side of the crop for a free image axis


@dataclass(frozen=True)
class Calibration:
    """Samples that fit a model's inputs: each is ``{input name: array with batch axis 1}``.

    Iterating again gives the same samples again; a folder's images are decoded each time, so that they need not all
    be in memory. A sample that is not finite raises `CalibrationError`.

    Args:
        count: how many samples there are, at least one.
        load: gives sample number `i`.
        source: one phrase for the report: where they came from.
    """

    count: int
    load: Callable[[int], dict[str, np.ndarray]]
    source: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self.sample, range(self.count))

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Sample number `index`, once it is sure that its values are finite."""
        return _finite(self.load(index), f"Calibration sample {index}")

    def spread(self, count: int) -> list[dict[str, np.ndarray]]:
        """`count` samples (or all, where there are fewer) at equal distances over the whole set."""
        count = min(count, self.count)
        return [self.sample(number * self.count // count) for number in range(count)]


def calibration_from(data: Any, specs: Sequence[InputSpec]) -> Calibration:
    """Makes a `Calibration` of whatever the caller of `export.save` gave.

    Args:
        data: an array with a batch axis (several inputs: a list or a dict of arrays), a `.npy` file of an array or a
            `.npz` file of arrays by name of the input, a folder of images (one image input: values in [0, 1], or to 255
            where the model scales them itself; RGB for three channels, luma for one), a `tf.data.Dataset`, or an
            iterable of samples or batches.
        specs: the model's inputs with the shapes that the file will have.

    Raises:
        CalibrationError: nothing was given, it holds no sample, a sample does not fit the model or is not finite, or
            all values are the same.
        FileProblem: the folder does not exist or an image cannot be read.
    """
    calibration = _calibration_from(data, specs)
    _refuse_constant(calibration)
    return calibration


def _calibration_from(data: Any, specs: Sequence[InputSpec]) -> Calibration:
    if data is None:
        raise CalibrationError(
            "Static quantisation needs calibration data, and none was given.",
            hint="Pass calibration=: 100 to 500 real inputs as an array, a folder of images, a generator or a tf.data.",
        )
    if isinstance(data, Calibration):
        return data
    if isinstance(data, (str, Path)):
        if Path(data).suffix.lower() not in ARRAY_SUFFIXES:
            return _from_folder(Path(data), specs)
        data = read_arrays(Path(data))
    limit = _sample_limit(specs)
    samples = list(itertools.islice(_samples(data, specs), limit))
    if not samples:
        raise CalibrationError("The calibration data is empty.", hint="Give at least one real input; 100 are better.")
    fitted = [_finite(_fit(sample, specs), f"Calibration sample {number}") for number, sample in enumerate(samples)]
    _same_shapes(fitted)
    pairs = zip(fitted, samples, strict=True)
    changed = sum(any(new[name].shape != old[name].shape for name in new) for new, old in pairs)
    source = f"{len(fitted)} calibration samples"
    if changed:
        source += f" ({changed} of them cropped, or continued by their mirror image, to the size of the input)"
    return Calibration(len(fitted), fitted.__getitem__, source)


def to_samples(data: Any, specs: Sequence[InputSpec], limit: int) -> list[dict[str, np.ndarray]]:
    """At most `limit` single inputs out of `data` (same forms as for calibration), unchanged in size."""
    if isinstance(data, Calibration):
        return data.spread(limit)
    if isinstance(data, (str, Path)):
        if Path(data).suffix.lower() not in ARRAY_SUFFIXES:
            return _from_folder(Path(data), specs).spread(limit)
        data = read_arrays(Path(data))
    samples = list(itertools.islice(_samples(data, specs), limit))
    if not samples:
        raise CalibrationError("`samples` is empty.", hint="Leave it out, or give at least one real input.")
    return [_finite(sample, f"Number {number} of samples=") for number, sample in enumerate(samples)]


def _finite(sample: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    import numpy as np

    for name, array in sample.items():
        wrong = 0 if array.dtype == object else int(np.count_nonzero(~np.isfinite(array)))
        if wrong:
            raise CalibrationError(
                f"{what}: {wrong} of {array.size} values of input {name!r} are infinite or no numbers (float32).",
                hint="Correct it or leave it out: it would spoil the range of every value.",
            )
    return sample


def _refuse_constant(calibration: Calibration) -> None:
    """Ranges cannot be taken from one value; the first real sample ends the search."""
    first: dict[str, Any] = {}
    for sample in calibration:
        for name, array in sample.items():
            if array.size and (array != first.setdefault(name, array.flat[0])).any():
                return
    raise CalibrationError(
        "Calibration data whose values are all the same cannot tell any range.",
        hint="Give real inputs: 100 to 500 of the kind that the model will see.",
    )


def _sample_limit(specs: Sequence[InputSpec]) -> int:
    elements = sum(prod(FREE_SIZE if size is None else size for size in spec.shape[1:]) for spec in specs)
    return max(4, min(MAX_SAMPLES, MAX_ELEMENTS // max(1, elements)))


def _samples(data: Any, specs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Single inputs, batch axis 1, from arrays or from an iterable of samples or batches."""
    import numpy as np

    if isinstance(data, Mapping) or _is_array(data) or _is_list_of_inputs(data, specs):
        yield from _split(data, specs)
        return
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"Calibration data of type {type(data).__name__} is not understood.",
            hint="Give an array, a list or dict of arrays, a folder of images, a generator or a tf.data.Dataset.",
        )
    for item in data:
        if _has_targets(item, specs):
            item = item[0]
        yield from _split(item if isinstance(item, (Mapping, list, tuple)) else np.asarray(item), specs)


def _is_array(data: Any) -> bool:
    return hasattr(data, "__array__") and hasattr(data, "shape")


def _has_targets(item: Any, specs: Sequence[InputSpec]) -> bool:
    """Whether an item of a data set is ``(inputs, targets)`` or ``(inputs, targets, weights)``, as `fit` takes them."""
    if not isinstance(item, tuple) or len(item) not in (2, 3):
        return False
    first = item[0]
    packed = isinstance(first, Mapping) or (isinstance(first, (list, tuple)) and all(map(_is_array, first)))
    return packed or len(specs) != len(item)


def _is_list_of_inputs(data: Any, specs: Sequence[InputSpec]) -> bool:
    """A list with one *batch* for each input, as `model.predict` takes it (and not a list of samples)."""
    if not isinstance(data, (list, tuple)) or len(data) != len(specs) or len(specs) < 2:
        return False
    return all(_is_array(item) and len(item.shape) == len(spec.shape) for item, spec in zip(data, specs, strict=True))


def _split(item: Any, specs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts a batch into single inputs; an array without its batch axis is one input."""
    import numpy as np

    if isinstance(item, Mapping):
        missing = [spec.name for spec in specs if spec.name not in item]
        if missing:
            raise CalibrationError(f"Data for input {missing[0]!r} is missing; given: {', '.join(map(str, item))}.")
        arrays = [np.asarray(item[spec.name]) for spec in specs]
    elif isinstance(item, (list, tuple)):
        if len(item) != len(specs):
            raise CalibrationError(f"The model has {len(specs)} inputs, a sample has {len(item)} arrays.")
        arrays = [np.asarray(value) for value in item]
    elif len(specs) == 1:
        arrays = [np.asarray(item)]
    else:
        names = ", ".join(spec.name for spec in specs)
        raise CalibrationError(f"The model has {len(specs)} inputs ({names}), one array was given.")
    arrays = [_with_batch(array, spec) for array, spec in zip(arrays, specs, strict=True)]
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1:
        raise CalibrationError(f"The inputs' batches differ in size: {sorted(sizes)}.")
    for index in range(sizes.pop()):
        yield {spec.name: array[index : index + 1] for spec, array in zip(specs, arrays, strict=True)}


def _with_batch(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    text = spec.dtype == "string"
    if array.dtype.kind not in ("OSU" if text else "fiub"):
        what = "text" if text else "numbers"
        raise CalibrationError(f"Input {spec.name!r}: values of type {array.dtype} are no {what}.")
    if array.ndim == len(spec.shape) - 1:
        array = array[None]
    if array.ndim != len(spec.shape):
        raise CalibrationError(f"Input {spec.name!r} takes shape {spec.shape}, received {array.shape}.")
    for axis, (have, want) in enumerate(zip(array.shape, spec.shape, strict=True)):
        spatial = len(spec.shape) == 4 and axis in (1, 2)
        if axis and want is not None and have != want and not spatial:
            raise CalibrationError(f"Input {spec.name!r} takes shape {spec.shape}, received {array.shape}.")
    if array.dtype.kind == "f" and "int" in spec.dtype and (array % 1 != 0).any():
        raise CalibrationError(f"Input {spec.name!r} takes integers, received values with fractions.")
    return array.astype(object if text else spec.dtype, copy=False)


def _fit(sample: dict[str, np.ndarray], specs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Crops or extends images to the fixed height and width that the file will have."""
    return {spec.name: _fit_image(sample[spec.name], spec) for spec in specs}


def _fit_image(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The centre of a larger image; a smaller one is continued by its mirror image, which adds no edge of its own."""
    import numpy as np

    if array.ndim != 4:
        return array
    for axis in (1, 2):
        have, want = array.shape[axis], spec.shape[axis]
        if want is None or have == want:
            continue
        if have > want:
            start = (have - want) // 2
            array = np.take(array, range(start, start + want), axis=axis)
        else:
            padding = [(0, 0)] * 4
            padding[axis] = (0, want - have)
            array = np.pad(array, padding, mode="symmetric")
    return array


def _same_shapes(samples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """The converter's calibrator keeps the first sample's shapes."""
    first = {name: array.shape for name, array in samples[0].items()}
    for index, sample in enumerate(samples):
        for name, array in sample.items():
            if array.shape != first[name]:
                raise CalibrationError(
                    f"Calibration sample {index}: input {name!r} has shape {array.shape}, the first {first[name]}.",
                    hint="Give samples of one size, or fix the size with input_shape=.",
                )


def read_arrays(path: Path) -> Any:
    """The array of a `.npy` file, or those of a `.npz` file by name; objects are not read.

    Raises:
        FileProblem: there is no such file, or none of numbers.
    """
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return dict(found)
    except FileNotFoundError as err:
        raise FileProblem(path, "no such file.") from err
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise FileProblem(path, "is no file of numbers.", hint="numpy.save and numpy.savez write such.") from err


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder (not of its sub-folders), sorted by name.

    Raises:
        FileProblem: there is no such folder.
        CalibrationError: it holds no image.
    """
    if not folder.is_dir():
        raise FileProblem(folder, "no such folder.", hint="calibration= takes a folder of images.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise CalibrationError(
            f"{folder}: no image in this folder.",
            hint=f"Looked for {', '.join(IMAGE_SUFFIXES)}; sub-folders are not read.",
        )
    return files


def _from_folder(folder: Path, specs: Sequence[InputSpec]) -> Calibration:
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].shape[-1] not in (1, 3):
        shapes = ", ".join(f"{spec.name} {spec.shape}" for spec in specs)
        raise CalibrationError(
            f"A folder of images fits a model with one image input of 1 or 3 channels; this one takes {shapes}.",
            hint="Give arrays, a .npy or .npz file, or a generator instead.",
        )
    spec = specs[0]
    files = image_files(folder)[: _sample_limit(specs)]

    def load(index: int) -> dict[str, np.ndarray]:
        return {spec.name: _read_image(files[index], spec)}

    return Calibration(len(files), load, f"{len(files)} images of a folder, values in [0, {spec.white:g}]")


def _read_image(path: Path, spec: InputSpec) -> np.ndarray:
    """An image as 1×H×W×C from 0 to white: the centre, at the file's size or, for a free axis, at `FREE_SIZE`."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if spec.shape[-1] == 1 else "RGB"), np.float32)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as err:
        raise FileProblem(path, "not a readable image.", hint="Remove it from the folder.") from err
    pixels = pixels.reshape(1, *pixels.shape[:2], -1) * np.float32(spec.white / 255)
    shape = (1, *(FREE_SIZE if size is None else size for size in spec.shape[1:3]), spec.shape[-1])
    return _fit_image(pixels, InputSpec(spec.name, shape, spec.dtype)).astype(spec.dtype, copy=False)

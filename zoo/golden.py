"""Golden tensors: inputs, and the outputs that a model gave for them when its card was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem

if TYPE_CHECKING:
    import keras
    import numpy as np

__all__ = ["answers", "compare_with_golden", "golden", "read_golden", "write_golden"]

SIDES = {"random": (17, 23), "photo": (40, 56)}  # for free axes; odd ones find what even ones hide
_PHOTO = Path(__file__).resolve().parent.parent / "examples" / "data" / "chelsea.png"


def golden(model: keras.Model, *, photo: str | Path | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Runs a model of one image input on seeded random numbers and on the centre of a photo.

    Args:
        model: N×H×W×C in [0, 1] to one output.
        photo: a picture; by default the demo photo of a checkout.
        seed: of the random numbers.

    Returns:
        ``{"random/input": …, "random/output": …, "photo/input": …, "photo/output": …}``, float32.

    Raises:
        FileProblem: there is no such photo.
    """
    import numpy as np

    _, rows, columns, channels = model.input_shape
    shapes = {kind: (rows or height, columns or width, channels) for kind, (height, width) in SIDES.items()}
    noise = np.random.default_rng(seed).random(shapes["random"], np.float32)
    crop = _crop_of_photo(Path(photo or _PHOTO), shapes["photo"])
    return answers(model, {"random": noise[None], "photo": crop[None]})


def answers(model: keras.Model, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a model of one input on each of some inputs: ``{"NAME/input": …, "NAME/output": …, …}``."""
    sides = ({f"{name}/input": values, f"{name}/output": _run(model, values)} for name, values in inputs.items())
    return {name: values for side in sides for name, values in side.items()}


def write_golden(tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes what `golden` returned as an `.npz`; the file appears whole or not at all."""
    import numpy as np

    with replacing(path, overwrite=True) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **tensors)


def read_golden(path: str | Path) -> dict[str, np.ndarray]:
    """Reads an `.npz` of golden tensors; nothing in it is ever unpickled.

    Raises:
        FileProblem: missing, damaged, or with something else than arrays of numbers.
    """
    import zipfile

    import numpy as np

    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as err:
        raise FileProblem(path, f"no golden tensors can be read ({type(err).__name__}).") from err


def compare_with_golden(model: keras.Model, path: str | Path) -> float:
    """The largest difference between the stored outputs and what `model` gives now.

    It is absolute where the outputs lie in [-1, 1], and else a part of the largest one: rounding grows with the values.
    """
    import numpy as np

    tensors = read_golden(path)
    kinds = [name.removesuffix("/input") for name in tensors if name.endswith("/input")]
    if not kinds:
        raise FileProblem(path, "holds no golden tensors.")

    def difference(kind: str) -> float:
        stored = tensors[f"{kind}/output"]
        return float(np.max(np.abs(_run(model, tensors[f"{kind}/input"]) - stored)) / max(1.0, np.max(np.abs(stored))))

    return max(difference(kind) for kind in kinds)


def _run(model: keras.Model, values: np.ndarray) -> np.ndarray:
    import keras

    from keras_efficient.deploy import answering

    # Of a model that answers from candidates their logits, which its training form does not give.
    outputs = keras.tree.flatten(answering(model)(values, training=False))
    return keras.ops.convert_to_numpy(outputs[0]).astype("float32")


def _crop_of_photo(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    import numpy as np
    from PIL import Image

    height, width, channels = shape
    try:
        with Image.open(path) as photo:
            pixels = np.asarray(photo.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    except OSError as err:
        raise FileProblem(path, "no photo can be read.", hint="Give photo= a picture.") from err
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top < 0 or left < 0:
        raise FileProblem(path, f"is smaller than the model's input, {height}×{width}.")
    return pixels[top : top + height, left : left + width].reshape(shape)

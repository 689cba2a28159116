"""What a user means by a MODEL: a name in the zoo, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.cli.output import out
from keras_efficient.errors import FileProblem, KerasEfficientError, UnknownName, WrongArgument

if TYPE_CHECKING:
    import keras

    from keras_efficient.bayes import Posterior
    from keras_efficient.export.runtime import ExportedModel

__all__ = [
    "ExportedUpscaler",
    "is_file",
    "is_image_model",
    "metadata_of",
    "open_exported",
    "open_keras",
    "open_posterior",
    "part_behind",
]

EXPORTED = (".tflite", ".onnx")
FOR_GPUS = {
    ".bolt": "export.bolt.runtime.load runs it there; to compare on processors, export the model as .onnx too.",
    ".engine": "TensorRT runs it there; to compare on processors, export the model as .onnx too.",
}
_FILES = (".keras", ".h5", *EXPORTED, *FOR_GPUS)


def is_file(model: str) -> bool:
    """Whether a MODEL is a file, there or not, and no name of the zoo."""
    path = Path(model)
    return path.suffix.lower() in _FILES or len(path.parts) > 1 or path.is_file()


def open_keras(model: str) -> keras.Model:
    """A Keras model, from the zoo or from a `.keras` file.

    Raises:
        UnknownName: no such name in the zoo.
        FileProblem: a file that is missing, damaged, or no `.keras` file; one that was exported for a GPU.
    """
    from keras_efficient import zoo

    if not is_file(model):
        zoo.card(model)  # a wrong name is found out before Keras is imported
        _start_keras()
        return zoo.load(model)
    path = Path(model)
    if not path.is_file():
        raise FileProblem(path, "no such file.", hint="keras-efficient zoo list shows the names of pretrained models.")
    if path.suffix.lower() in FOR_GPUS:
        raise FileProblem(
            path, "was exported for a GPU; this command cannot use it.", hint=FOR_GPUS[path.suffix.lower()]
        )
    if path.suffix.lower() != ".keras":
        raise FileProblem(path, "no .keras file.", hint="Save the model with model.save('NAME.keras').")
    if path.stat().st_size == 0:
        raise FileProblem(path, "is empty (0 bytes).")
    _start_keras()
    return _open_keras_file(path)


def _open_keras_file(path: Path) -> keras.Model:
    import keras

    import keras_efficient.layers  # noqa: F401 - registers our layers for files that hold them

    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as err:  # damaged archives end in errors of every kind
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise FileProblem(
            path, f"Keras cannot open it: {reason}", hint="Is it damaged, or made of layers of your own?"
        ) from err


def open_posterior(path: Path) -> Posterior:
    """What `Posterior.save` wrote.

    Raises:
        FileProblem: missing, damaged, or no posterior.
    """
    if not path.is_file():
        raise FileProblem(path, "no such file.", hint="Save the posterior with posterior.save('NAME.zip').")
    _start_keras()
    with out.hushed():
        import keras_efficient.layers  # noqa: F401 - registers our layers for files that hold them
        from keras_efficient.bayes import load_posterior

        return load_posterior(path)


def _start_keras() -> None:
    """Imports Keras and wakes its backend, which writes to stderr for its own sake."""
    with out.stages("starting Keras"), out.hushed():
        import keras

        keras.ops.zeros(1)


def open_exported(path: str | Path, threads: int | None = None) -> ExportedModel:
    """Opens a `.tflite` or `.onnx`."""
    from keras_efficient import export

    with out.hushed():
        return export.load(path, threads=threads)


def metadata_of(name: str, model: keras.Model) -> dict[str, Any]:
    """What an exported file should know of its model: the card's facts, and the numbers that `upscale` needs."""
    found: dict[str, Any] = {}
    if not is_file(name):
        from keras_efficient import zoo
        from keras_efficient.zoo.schema import to_dict

        card = zoo.card(name)
        found = {"card": name, "weights_sha256": card.weights.sha256, **to_dict(card)["preprocessing"].get("facts", {})}
    if is_image_model(model):
        from keras_efficient.superres import receptive_field

        try:
            field = receptive_field(model)
        except KerasEfficientError:
            return found  # a model that looks at the whole picture: it has no halo
        found |= {"scale": field.scale, "halo": field.radius, "multiple": field.multiple}
    return found


def part_behind(model: keras.Model, layer: str) -> keras.Model:
    """What comes after a layer, whose output it takes.

    Raises:
        UnknownName: the model has no such layer.
        WrongArgument: what comes after it needs more than its output, or nothing does.
    """
    import keras

    names = [one.name for one in model.layers]
    if layer not in names:
        raise UnknownName("layer", layer, names)
    try:
        return keras.Model(model.get_layer(layer).output, model.output, name=model.name)
    except (ValueError, AttributeError) as error:
        raise WrongArgument(f"What comes after layer {layer!r} cannot be cut off: it takes more than that.") from error


def is_image_model(model: keras.Model) -> bool:
    """One picture in, one picture out, both gray or both RGB."""
    ends = [*(getattr(model, "inputs", None) or ()), *(getattr(model, "outputs", None) or ())]
    shapes = [tuple(end.shape) for end in ends]
    return len(shapes) == 2 and all(len(shape) == 4 for shape in shapes) and shapes[0][3] == shapes[1][3] in (1, 3)


class ExportedUpscaler:
    """An exported file with the attributes that `keras_efficient.superres` looks for.

    Raises:
        WrongArgument: the file takes something else than one N×H×W×C picture.
    """

    def __init__(self, run: ExportedModel):
        shapes = list(run.input_shapes.values())
        if len(shapes) != 1 or len(shapes[0]) != 4:
            raise WrongArgument(f"{run.path}: takes {shapes}, which is not one picture (N×H×W×C).")
        self._run = run
        self._is_first = True
        self.input_shape = shapes[0]
        self.scale, self.halo, self.multiple = (run.metadata.get(key) for key in ("scale", "halo", "multiple"))

    def __call__(self, image: Any) -> Any:
        if not self._is_first:
            return self._run(image)
        self._is_first = False
        with out.hushed():  # LiteRT speaks when it prepares a model for a size
            return self._run(image)

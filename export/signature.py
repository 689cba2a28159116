"""A model's inputs and outputs as a file's signature: flat, in a fixed order, each with a name, and back again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import UnsupportedLayer, WrongArgument

if TYPE_CHECKING:
    import keras

__all__ = [
    "InputSpec",
    "describe",
    "flat_call",
    "gives_ids",
    "input_specs",
    "input_structure",
    "lookup_of",
    "output_names",
    "output_structure",
    "pack",
    "ranked_outputs",
    "resolve_shapes",
]

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the input.
        shape: in full, with the batch axis (`None`: free).
        dtype: NumPy's, or ``"string"``.
        white: value of a white pixel, where it is a picture: 255 where the model itself scales pixels down, else 1.
    """

    name: str
    shape: Shape
    dtype: str
    white: float = 1.0


def input_specs(model: keras.Model) -> tuple[InputSpec, ...]:
    """The model's inputs in the order in which its structure flattens.

    Raises:
        UnsupportedLayer: the model is no Functional or built Sequential model, or takes text for other layers than
            `StringLookup`.
    """
    tensors = getattr(model, "inputs", None)
    if not tensors:
        raise UnsupportedLayer(
            model.name,
            "it has no symbolic inputs, so its signature is unknown.",
            hint="Export a Functional or a built Sequential model (call it, or begin it with keras.Input).",
        )
    for tensor in tensors:
        if tensor.dtype == "string" and lookup_of(model, tensor) is None:
            raise UnsupportedLayer(
                tensor.name,
                "this input takes text, which exported files can for a StringLookup only.",
                hint="Export the part behind the layers that work on text (Hashing, TextVectorization, …).",
            )
    names = _unique(tensor.name for tensor in tensors)
    shapes = (tuple(tensor.shape) for tensor in tensors)
    return tuple(
        InputSpec(name, shape, _DTYPES.get(tensor.dtype, tensor.dtype), _white(model, tensor))
        for name, shape, tensor in zip(names, shapes, tensors, strict=True)
    )


_PIXELS_KEPT = ("AveragePooling2D", "CenterCrop", "Cropping2D", "Identity", "MaxPooling2D", "Resizing", "ZeroPadding2D")


def _white(model: keras.Model, tensor: keras.KerasTensor) -> float:
    """From the layer that scales pixels, behind others that leave them in their range."""
    import keras
    import numpy as np

    if "int" in tensor.dtype:
        return 255.0
    while len(tensor.shape) == 4:
        takers = list(_takers(model, tensor))
        if len(takers) != 1:
            break
        (layer,) = takers
        kind = type(layer).__name__
        if kind == "Rescaling":
            return 255.0 if np.abs(layer.scale).max() < 1 / 32 else 1.0
        if kind == "Normalization":
            return 255.0 if np.max(layer.mean) > 1 else 1.0
        if isinstance(layer, keras.Model) and len(layer.inputs) == 1:
            tensor = (getattr(layer, "_functional", None) or layer).inputs[0]
        elif kind in _PIXELS_KEPT:
            tensor = layer.output
        else:
            break
    return 1.0


_DTYPES = dict.fromkeys(("float16", "bfloat16", "float64"), "float32")


def lookup_of(model: keras.Model, tensor: keras.KerasTensor) -> Any:
    """The `IntegerLookup` or `StringLookup` that takes an input of the model as it is; `None` where there is none."""
    import keras

    kinds = (keras.layers.IntegerLookup, keras.layers.StringLookup)
    return next((layer for layer in _takers(model, tensor) if isinstance(layer, kinds)), None)


def gives_ids(model: keras.Model, tensor: keras.KerasTensor) -> bool:
    """Whether an embedding table takes an input of the model as it is."""
    return any(isinstance(getattr(layer, "input_dim", None), int) for layer in _takers(model, tensor))


def _takers(model: keras.Model, tensor: keras.KerasTensor) -> Iterator[keras.Layer]:
    for layer in model._flatten_layers():
        if any(tensor is taken for node in layer._inbound_nodes for taken in node.input_tensors):
            yield layer


def output_names(model: keras.Model) -> tuple[str, ...]:
    """A name for each output: the keys where the model returns a dict, else the names of the layers that make them."""
    import keras

    structure = output_structure(model)
    if isinstance(structure, dict):
        return _unique("_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure))
    functional = getattr(model, "_functional", None) or model  # a Sequential's own tensors are numbered by the process
    return _unique(getattr(functional, "output_names", None) or [tensor.name for tensor in model.outputs])


def input_structure(model: keras.Model) -> Any:
    """The model's inputs as they were given to it: one tensor, a list, a dict, or nested."""
    functional = getattr(model, "_functional", None) or model
    return getattr(functional, "_inputs_struct", model.inputs)


def output_structure(model: keras.Model) -> Any:
    """The model's outputs as it returns them."""
    functional = getattr(model, "_functional", None) or model
    return getattr(functional, "_outputs_struct", model.outputs)


def ranked_outputs(model: keras.Model) -> dict[str, str]:
    """The outputs of integers that name what the scores of another output belong to, and that output, by names.

    These are the two outputs of `keras.ops.top_k`, or of a layer that has an ``answer()``.
    """
    makers: dict[tuple[int, int], list[tuple[str, keras.KerasTensor]]] = {}
    for name, tensor in zip(output_names(model), model.outputs, strict=True):
        history = tensor._keras_history
        if _ranks(history.operation) and len(tensor.shape) > 1:
            makers.setdefault((id(history.operation), history.node_index), []).append((name, tensor))
    pairs = [sorted(made, key=lambda one: "int" in one[1].dtype) for made in makers.values() if len(made) == 2]
    return {
        places: scores
        for (scores, first), (places, second) in pairs
        if "float" in first.dtype and "int" in second.dtype and first.shape == second.shape
    }


def rounded_outputs(model: keras.Model) -> frozenset[str]:
    """The outputs of integers that a cast of floats made, such as pixels: one more or less there is rounding."""
    found = set()
    for name, tensor in zip(output_names(model), model.outputs, strict=True):
        history = tensor._keras_history
        if type(history.operation).__name__ == "Cast" and "int" in tensor.dtype:
            (given,) = history.operation._inbound_nodes[history.node_index].input_tensors
            found |= {name} if "float" in given.dtype else set()
    return frozenset(found)


def _ranks(operation: Any) -> bool:
    import keras

    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else ()
    return type(operation).__name__ == "TopK" or any(hasattr(layer, "answer") for layer in layers)


def _unique(names: Any) -> tuple[str, ...]:
    """Names of letters, digits and underscores only, no two alike: every format accepts them."""
    result: list[str] = []
    for name in names:
        clean = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_") or "tensor"
        clean = clean if clean[0].isalpha() else f"t_{clean}"
        count, candidate = 1, clean
        while candidate in result:
            count, candidate = count + 1, f"{clean}_{count}"
        result.append(candidate)
    return tuple(result)


def flat_call(model: keras.Model) -> Callable[..., dict[str, Any]]:
    """The model in inference as ``(*flat inputs) -> {output name: tensor}``."""
    import keras

    names, structure = output_names(model), input_structure(model)

    def call(*flat: Any) -> dict[str, Any]:
        packed = keras.tree.pack_sequence_as(structure, list(flat))
        return dict(zip(names, keras.tree.flatten(model(packed, training=False)), strict=True))

    return call


def describe(model: keras.Model, specs: Sequence[InputSpec]) -> dict[str, Any]:
    """The signature as data for a file's metadata: order of inputs, order and structure of outputs."""
    import keras

    names = list(output_names(model))
    places = keras.tree.pack_sequence_as(output_structure(model), list(range(len(names))))
    return {
        "inputs": [spec.name for spec in specs],
        "outputs": {"names": names, "structure": places},
    }


def pack(flat: Sequence[Any], outputs: Mapping[str, Any] | None) -> Any:
    """Gives flat outputs the structure that `describe` recorded; without a record one output comes bare."""
    if not outputs:
        return flat[0] if len(flat) == 1 else list(flat)

    def place(structure: Any) -> Any:
        if isinstance(structure, dict):
            return {key: place(value) for key, value in structure.items()}
        return [place(value) for value in structure] if isinstance(structure, list) else flat[structure]

    return place(outputs["structure"])


def resolve_shapes(specs: Sequence[InputSpec], given: Any) -> tuple[InputSpec, ...]:
    """Applies the caller's `input_shape` to the model's inputs.

    Args:
        specs: the model's inputs.
        given: `None` (keep the model's shapes, free axes included), or for one input a tuple: ``(H, W)`` for images,
            the shape without, or with the batch axis; for several a dict by name or a list of such tuples. Given
            without a batch axis, the batch is 1.

    Raises:
        WrongArgument: a shape does not fit the model's input.
    """
    if given is None:
        return tuple(specs)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {spec.name for spec in specs})
        if unknown:
            raise WrongArgument(f"input_shape names {unknown[0]!r}; inputs: {', '.join(s.name for s in specs)}.")
        return tuple(_resolve(spec, given[spec.name]) if spec.name in given else spec for spec in specs)
    if given and isinstance(given[0], (list, tuple)):
        if len(given) != len(specs):
            raise WrongArgument(f"input_shape holds {len(given)} shapes, the model has {len(specs)} inputs.")
        return tuple(_resolve(spec, shape) for spec, shape in zip(specs, given, strict=True))
    if len(specs) != 1:
        names = ",".join(f"{spec.name}=64" for spec in specs)
        raise WrongArgument(
            f"The model has {len(specs)} inputs: give input_shape as a dict of shapes by name.",
            hint=f"On the command line: --input-shape {names}.",
        )
    return (_resolve(specs[0], given),)


def _resolve(spec: InputSpec, given: Sequence[int | None]) -> InputSpec:
    given = tuple(given)
    rank = len(spec.shape)
    if len(given) == rank:
        shape = given
    elif len(given) == rank - 1:
        shape = (1, *given)
    elif len(given) == 2 and rank == 4:
        shape = (1, *given, spec.shape[-1])
    else:
        raise WrongArgument(f"input_shape {given} does not fit input {spec.name!r} of shape {spec.shape}.")
    for axis, (want, have) in enumerate(zip(shape, spec.shape, strict=True)):
        if want is not None and (not isinstance(want, int) or want < 1):
            raise WrongArgument(f"input_shape {given}: {want!r} is no size.", hint="Sizes are whole numbers from 1 on.")
        if have is not None and want != have and axis:
            raise WrongArgument(f"input_shape {given} does not fit input {spec.name!r} of shape {spec.shape}.")
    return replace(spec, shape=shape)

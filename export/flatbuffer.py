"""Reads what is inside a `.tflite` file: operators, number formats, the Keras layers they came from, our metadata.

Needs `ai_edge_litert` and NumPy only. The file is never run here.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from keras_efficient.errors import FileProblem

__all__ = [
    "IDENTIFIER",
    "METADATA_KEY",
    "Operator",
    "Tensor",
    "borders",
    "count_bytes_read",
    "count_macs",
    "count_ops",
    "layer_path",
    "operators",
    "pack",
    "read_bytes",
    "read_metadata",
    "unpack",
    "write_metadata",
]

METADATA_KEY = "keras_efficient"
IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # the schema's force_align of Buffer.data: weights must lie so for NPUs and microcontrollers


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: name, number format (``int8``, ``float32``, …), shape, and whether it is a constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: bool


@dataclass(frozen=True)
class Operator:
    """One operator of the graph.

    Attributes:
        name: builtin name such as ``CONV_2D``, or the name of a custom operator.
        custom: whether it is a custom operator (``Flex…``, ``ethos-u``).
        inputs, outputs: its tensors; an omitted optional input is `None`.
        options: the builtin options' object of the schema, or `None`.
        subgraph: index of the subgraph that it belongs to.
    """

    name: str
    custom: bool
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any
    subgraph: int

    @property
    def dtype(self) -> str:
        """Number format of the first input that is no constant, else of the output: what the operator works on."""
        for tensor in (*self.inputs, *self.outputs):
            if tensor is not None and not tensor.constant:
                return tensor.dtype
        return self.outputs[0].dtype if self.outputs else "none"

    @property
    def dtypes(self) -> frozenset[str]:
        """Number formats of everything that it reads or writes."""
        return frozenset(tensor.dtype for tensor in (*self.inputs, *self.outputs) if tensor is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that may tell the Keras layer: of its outputs, then of its weights (a graph's outputs lose theirs)."""
        tensors = (*self.outputs, *(t for t in self.inputs if t is not None and t.constant))
        return tuple(tensor.name for tensor in tensors)

    @property
    def layer(self) -> str:
        """Path of the Keras layer that it came from, as far as the converter kept it."""
        return self.layer_among(()) or self.name

    def layer_among(self, known: Collection[str]) -> str:
        """Path of the Keras layer that it came from, by a model's layer names `known`; empty where nothing tells it."""
        paths = [layer_path(name, known) for name in self.names if not name.startswith(_NAMELESS)]
        return next((path for path in paths if path), "")


_NAMELESS = ("StatefulPartitionedCall", "PartitionedCall", "tfl.", "arith.")


def layer_path(tensor_name: str, known: Collection[str] = ()) -> str:
    """The Keras layer path in a tensor's name: ``functional_1/last_1/convolution;…`` becomes ``last``.

    The converter joins the names of fused operators by ``;``, and TensorFlow appends ``_<n>`` to a scope that it enters
    again. With the names of the model's layers the path is what matches them; without, it is all but the outermost
    scope (the model) and the last piece (the operation).
    """
    pieces = tensor_name.split(";")[0].split(":")[0].split("/")
    matches = [name for piece in pieces if (name := _known_name(piece, known))]
    if known:
        return "/".join(matches)
    inner = pieces[1:-1] or pieces[:-1] or pieces
    return "/".join(_known_name(piece, ()) for piece in inner)


def _known_name(piece: str, known: Collection[str]) -> str:
    """The name of a layer that a scope's name stands for; without `known` the scope's name less its ``_<n>``."""
    plain = re.sub(r"_\d+$", "", piece)
    if not known:
        return plain
    return piece if piece in known else plain if plain in known else ""


def read_bytes(path: str | Path) -> bytes:
    """The file's bytes, once it is sure that it is a `.tflite`.

    Raises:
        FileProblem: missing, unreadable, empty, or no flatbuffer of TFLite.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as err:
        raise FileProblem(path, "no such file.") from err
    except OSError as err:
        raise FileProblem(path, f"cannot be read: {err.strerror or err}.") from err
    if not data:
        raise FileProblem(path, "the file is empty.", hint="Export the model again.")
    if len(data) < 8 or data[4:8] != IDENTIFIER:
        raise FileProblem(path, "not a TFLite file.", hint="Export the model again, or check how it was copied.")
    return data


def unpack(data: bytes | bytearray, path: object = "A .tflite in memory") -> Any:
    """The schema's `ModelT` of a `.tflite`; `path` is where the bytes came from, for the error.

    Raises:
        FileProblem: the bytes are damaged.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    except Exception as err:  # struct.error, IndexError, …: any of them means damaged offsets
        raise FileProblem(path, f"damaged: {type(err).__name__}.", hint="Export the model again.") from err
    for buffer in model.buffers or ():
        if buffer.offset > 1:  # large buffers lie behind the flatbuffer; 0 and 1 mean that this one does not
            if buffer.offset + buffer.size > len(data):
                raise FileProblem(path, "damaged: weights are missing at its end.", hint="Export the model again.")
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


@cache
def _names(enum: str) -> Mapping[int, str]:
    """Names of the schema's enumeration `enum`, by value."""
    from ai_edge_litert import schema_py_generated as schema

    return {value: key for key, value in vars(getattr(schema, enum)).items() if not key.startswith("_")}


def _text(value: bytes | str | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else (value or "")


def operators(model: bytes | Any, shapes: Sequence[tuple[int, ...]] = ()) -> list[Operator]:
    """All operators of a file, in the order of execution, subgraph by subgraph.

    Args:
        model: the file's bytes, or what `unpack` gave.
        shapes: of the main subgraph's tensors in the place of those in the file, which holds 1 for a free axis.
    """
    model = unpack(model) if isinstance(model, (bytes, bytearray)) else model
    return [
        operator
        for index in range(len(model.subgraphs))
        for operator in _operators_of(model, index, () if index else shapes)
    ]


def borders(model: bytes | Any) -> list[Tensor]:
    """The main subgraph's inputs and outputs."""
    model = unpack(model) if isinstance(model, (bytes, bytearray)) else model
    graph = model.subgraphs[0]
    return [_tensor(model, graph, int(position)) for position in (*graph.inputs, *graph.outputs)]


def _tensor(model: Any, graph: Any, position: int, shapes: Sequence[tuple[int, ...]] = ()) -> Tensor:
    raw = graph.tensors[position]
    data = model.buffers[raw.buffer].data if raw.buffer else None
    shape = shapes[position] if position < len(shapes) else () if raw.shape is None else tuple(map(int, raw.shape))
    constant = data is not None and len(data) > 0
    return Tensor(_text(raw.name), _names("TensorType").get(raw.type, str(raw.type)).lower(), shape, constant)


def _operators_of(model: Any, index: int, shapes: Sequence[tuple[int, ...]]) -> Iterator[Operator]:
    graph = model.subgraphs[index]
    builtins = _names("BuiltinOperator")

    def tensors(positions: Any) -> tuple[Tensor | None, ...]:
        found = () if positions is None else positions
        return tuple(_tensor(model, graph, int(i), shapes) if i >= 0 else None for i in found)

    for raw in graph.operators or ():
        code = model.operatorCodes[raw.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        custom = code.customCode is not None
        yield Operator(
            name=_text(code.customCode) if custom else builtins.get(number, str(number)),
            custom=custom,
            inputs=tensors(raw.inputs),
            outputs=tuple(tensor for tensor in tensors(raw.outputs) if tensor is not None),
            options=raw.builtinOptions,
            subgraph=index,
        )


def count_ops(model: bytes | Any) -> dict[str, dict[str, int]]:
    """Operators by name and number format: ``{"CONV_2D": {"int8": 7}}``."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for operator in operators(model):
        counts[operator.name][operator.dtype] += 1
    return {name: dict(counts[name]) for name in sorted(counts)}


def count_macs(model: bytes | Any, shapes: Sequence[tuple[int, ...]] = ()) -> int:
    """Multiply-accumulates of one inference; arguments as for `operators`.

    Counted are convolutions, depthwise and transposed ones, fully connected layers, matrix products and the fused
    recurrent operators; what is inside a loop's body counts once.
    """
    return sum(_macs(operator) for operator in operators(model, shapes))


def count_bytes_read(model: bytes | Any, shapes: Sequence[tuple[int, ...]] = ()) -> int:
    """Bytes of constants that one inference reads: of a table the rows that are taken from it, of all else the whole.

    Arguments as for `operators`. What is inside a loop's body counts once.
    """
    total = 0.0
    for operator in operators(model, shapes):
        table = _TABLES.get(operator.name)
        for place, tensor in enumerate(operator.inputs):
            if tensor is not None and tensor.constant:
                shape = operator.outputs[0].shape if place == table and operator.outputs else tensor.shape
                total += prod(shape) * _BITS.get(tensor.dtype, 32) / 8
    return round(total)


# Where the table is among the inputs of operators that take rows.
_TABLES = {"GATHER": 0, "GATHER_ND": 0, "EMBEDDING_LOOKUP": 1}
_BITS = {
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 64),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 16),
    **dict.fromkeys(("int8", "uint8", "bool", "string"), 8),
    **{"int4": 4, "int2": 2},
}


def _macs(operator: Operator) -> int:
    if not operator.outputs or len(operator.inputs) < 2:
        return 0
    out = prod(operator.outputs[0].shape)
    first, second = operator.inputs[0], operator.inputs[1]
    if second is None or first is None:
        return 0
    match operator.name:
        case "CONV_2D" | "CONV_3D":
            kernel = second.shape  # O×kH×kW×I for 2-D, kD×kH×kW×I×O for 3-D
            return out * prod(kernel[1:] if operator.name == "CONV_2D" else kernel[:-1])
        case "DEPTHWISE_CONV_2D":
            return out * prod(second.shape[1:3])  # kernel 1×kH×kW×C
        case "FULLY_CONNECTED":
            return out * second.shape[-1]  # kernel O×I
        case "TRANSPOSE_CONV" if len(operator.inputs) > 2 and (image := operator.inputs[2]) is not None:
            return prod(image.shape) * prod(second.shape[:3])  # kernel O×kH×kW×I, applied at every input pixel
        case "BATCH_MATMUL":
            transposed = bool(operator.options is not None and operator.options.adjX)
            return out * first.shape[-2 if transposed else -1]
        case "UNIDIRECTIONAL_SEQUENCE_LSTM" | "BIDIRECTIONAL_SEQUENCE_LSTM" | "LSTM":
            steps = prod(first.shape[:-1]) if operator.name != "LSTM" else first.shape[0]
            weights = [t for t in operator.inputs[1:] if t is not None and t.constant and len(t.shape) == 2]
            return steps * sum(prod(weight.shape) for weight in weights)
        case _:
            return 0


def read_metadata(model: bytes | Any, key: str = METADATA_KEY) -> dict[str, Any]:
    """Our JSON entry in the file's metadata, or an empty dict where there is none."""
    model = unpack(model) if isinstance(model, (bytes, bytearray)) else model
    for entry in model.metadata or ():
        if _text(entry.name) == key:
            data = model.buffers[entry.buffer].data
            try:
                found = json.loads(bytes(data).decode("utf-8")) if data is not None else {}
            except ValueError:
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def write_metadata(path: str | Path, values: Mapping[str, Any], key: str = METADATA_KEY) -> None:
    """Puts `values` as one JSON entry into the file's metadata; an older entry of ours is replaced."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model = unpack(read_bytes(path), path)
    model.metadata = list(model.metadata or ())
    entry = next((entry for entry in model.metadata if _text(entry.name) == key), None)
    if entry is None:
        entry = schema.MetadataT()
        entry.name, entry.buffer = key, len(model.buffers)
        model.metadata.append(entry)
        model.buffers.append(schema.BufferT())
    model.buffers[entry.buffer].data = np.frombuffer(json.dumps(values, sort_keys=True).encode("utf-8"), np.uint8)
    Path(path).write_bytes(pack(model))


def pack(model: Any) -> bytes:
    """The bytes of a `ModelT`, every buffer on a 16-byte boundary as the schema demands.

    The generated `BufferT.Pack` aligns to one byte only, which a reader on x86 forgives and an NPU does not.
    """
    import flatbuffers
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    class AlignedBuffer:
        def __init__(self, buffer: Any):
            self.buffer = buffer

        def Pack(self, builder: flatbuffers.Builder) -> int:
            data = self.buffer.data
            vector = None
            if data is not None and len(data):
                raw = np.ascontiguousarray(data, np.uint8)
                builder.StartVector(1, len(raw), _ALIGNMENT)
                builder.head = builder.head - len(raw)
                memoryview(builder.Bytes)[builder.head : builder.head + len(raw)] = raw.data
                vector = builder.EndVector()
            schema.BufferStart(builder)
            if vector is not None:
                schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    buffers = model.buffers
    size = sum(0 if b.data is None else len(b.data) for b in buffers)
    builder = flatbuffers.Builder(size + 65536)
    model.buffers = [AlignedBuffer(buffer) for buffer in buffers]
    try:
        builder.Finish(model.Pack(builder), IDENTIFIER)
    finally:
        model.buffers = buffers
    return bytes(memoryview(builder.Bytes)[builder.head :])  # of Output() it would be a second copy

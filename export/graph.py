"""Rewrites the graph of a `.tflite` whose shapes are fixed: the workshop of the lowerings on quantised files.

A lowering on the file, after quantisation, keeps every bit: its parts share the scales of the tensor that they were cut
from. The same rewrite on the Keras model would be calibrated part by part, and tiles of one image would differ in their
rounding along the seams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from keras_efficient.export import flatbuffer

__all__ = ["Builder", "Graph", "GraphLowering", "Op", "Tensor", "rebuild"]


def _schema() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


@cache
def _names(enumeration: str) -> Mapping[int, str]:
    """Names of one of the schema's enumerations, by value."""
    members = vars(getattr(_schema(), enumeration)).items()
    return {value: key for key, value in members if not key.startswith("_")}


def _name_of(enumeration: str, value: int) -> str:
    return _names(enumeration).get(value, str(value))


def _text(value: bytes | str | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else (value or "")


_NUMPY_TYPES = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float32": np.float32,
}


@dataclass(frozen=True)
class GraphLowering:
    """A named rewrite of a quantised file.

    Args:
        name: as the report shows it.
        function: gives the rewritten graph, or `None` where there is nothing to rewrite.
        summary: one line for people.
    """

    name: str
    function: Callable[[Graph], Graph | None]
    summary: str


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph: its place in the file, shape, number format, scales, and its values where it is constant."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    data: np.ndarray | None

    @property
    def grid(self) -> tuple[Any, ...]:
        """Number format with its scales: two tensors of one grid hold equal values where they hold equal integers."""
        return self.dtype, self.scales, self.zero_points


@dataclass(frozen=True)
class Op:
    """An operator: its name, tensors by index (-1: omitted) and the schema's options object."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any
    raw: Any

    @property
    def output(self) -> int:
        """Its first output."""
        return self.outputs[0]


class Graph:
    """Read access to the main subgraph of a `.tflite`.

    Args:
        model: what `flatbuffer.unpack` gave. It is not changed.
    """

    def __init__(self, model: Any):
        self.model = model
        self._subgraph = model.subgraphs[0]
        self.inputs = tuple(int(i) for i in self._subgraph.inputs)
        self.outputs = tuple(int(i) for i in self._subgraph.outputs)
        self.ops = tuple(self._read(raw) for raw in self._subgraph.operators or ())
        self.producers = {index: op for op in self.ops for index in op.outputs}
        self._tensors: dict[int, Tensor] = {}

    @classmethod
    def from_bytes(cls, data: bytes) -> Graph:
        """The graph of a file's bytes."""
        return cls(flatbuffer.unpack(data))

    def to_bytes(self) -> bytes:
        """The graph as a file."""
        return flatbuffer.pack(self.model)

    @property
    def single(self) -> bool:
        """Whether the file has one subgraph: control flow has more."""
        return len(self.model.subgraphs) == 1

    def _read(self, raw: Any) -> Op:
        code = self.model.operatorCodes[raw.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        name = "CUSTOM" if code.customCode is not None else _name_of("BuiltinOperator", number)
        inputs, outputs = (
            tuple(int(i) for i in (group if group is not None else ())) for group in (raw.inputs, raw.outputs)
        )
        return Op(name, inputs, outputs, raw.builtinOptions, raw)

    def tensor(self, index: int) -> Tensor:
        """The tensor at `index`."""
        if index not in self._tensors:
            self._tensors[index] = self._read_tensor(index)
        return self._tensors[index]

    def _read_tensor(self, index: int) -> Tensor:
        raw = self._subgraph.tensors[index]
        dtype = _name_of("TensorType", raw.type).lower()
        shape = () if raw.shape is None else tuple(int(size) for size in raw.shape)
        stored = self.model.buffers[raw.buffer].data if raw.buffer else None
        data = None
        if stored is not None and len(stored) and dtype in _NUMPY_TYPES:
            data = np.frombuffer(np.asarray(stored, np.uint8).tobytes(), _NUMPY_TYPES[dtype]).reshape(shape)
        grid = raw.quantization
        scales = () if grid is None or grid.scale is None else tuple(float(s) for s in grid.scale)
        zeros = () if grid is None or grid.zeroPoint is None else tuple(int(z) for z in grid.zeroPoint)
        return Tensor(index, _text(raw.name), shape, dtype, scales, zeros, data)

    def is_constant(self, index: int) -> bool:
        """Whether the tensor has its values in the file."""
        raw = self._subgraph.tensors[index]
        stored = self.model.buffers[raw.buffer].data if raw.buffer else None
        return stored is not None and len(stored) > 0

    def is_free(self, index: int) -> bool:
        """Whether the size of one of the tensor's axes is not known before it runs."""
        sizes = self._subgraph.tensors[index].shapeSignature
        return sizes is not None and any(size < 0 for size in sizes)

    def operands(self, op: Op) -> tuple[int, ...]:
        """The inputs of an operator that are computed, not constants."""
        return tuple(i for i in op.inputs if i >= 0 and not self.is_constant(i))

    def without_unused(self) -> Graph:
        """The graph without the operators whose results nobody reads, and without the constants that were theirs."""
        needed, stack = set(), list(self.outputs)
        while stack:
            op = self.producers.get(stack.pop())
            if op is not None and id(op.raw) not in needed:
                needed.add(id(op.raw))
                stack.extend(index for index in op.inputs if index >= 0)
        model, subgraph = copy.copy(self.model), copy.copy(self._subgraph)
        subgraph.operators = [op.raw for op in self.ops if id(op.raw) in needed]
        model.subgraphs = [subgraph, *self.model.subgraphs[1:]]
        read = {index for op in self.ops if id(op.raw) in needed for index in (*op.inputs, *op.outputs) if index >= 0}
        kept = {subgraph.tensors[index].buffer for index in (*read, *self.inputs, *self.outputs)}
        kept |= {tensor.buffer for other in model.subgraphs[1:] for tensor in other.tensors}
        kept |= {entry.buffer for entry in model.metadata or ()}
        empty = _schema().BufferT()
        model.buffers = [buffer if place in kept else empty for place, buffer in enumerate(model.buffers)]
        return Graph(model)

    def consumers(self, index: int) -> tuple[Op, ...]:
        """The operators that read a tensor."""
        return tuple(op for op in self.ops if index in op.inputs)


class Builder:
    """Writes a new graph whose constants, inputs and outputs come from an old one.

    Tensors are named by their index in the new graph. Inputs and outputs keep their names, order and signature.
    """

    def __init__(self, source: Graph):
        self._schema = _schema()
        self.source = source
        self._old = source.model.subgraphs[0]
        self._buffers = list(source.model.buffers)
        self._codes = list(source.model.operatorCodes)
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._constants: dict[Any, int] = {}
        self._interface: dict[int, int] = {}
        self.shapes: list[tuple[int, ...]] = []
        for index in source.inputs:
            self._interface[index] = self._add(copy.copy(self._old.tensors[index]))

    def input(self, index: int) -> int:
        """The new index of the old graph's input."""
        return self._interface[index]

    def constant(self, index: int) -> int:
        """A constant of the old graph, by its old index."""
        if index < 0:
            return -1
        if ("old", index) not in self._constants:
            self._constants["old", index] = self._add(copy.copy(self._old.tensors[index]))
        return self._constants["old", index]

    def array(self, values: np.ndarray, scales: Sequence[float] = (), *, axis: int = 0, name: str = "constant") -> int:
        """A new constant; equal ones are stored once. Scales are by slices of `axis`, zero points are 0."""
        key = (values.tobytes(), values.shape, values.dtype.name, tuple(scales), axis)
        if key not in self._constants:
            buffer, tensor = self._schema.BufferT(), self._schema.TensorT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            self._buffers.append(buffer)
            tensor.name, tensor.shape, tensor.buffer = name, list(values.shape), len(self._buffers) - 1
            tensor.type = getattr(_schema().TensorType, values.dtype.name.upper())
            if len(scales):
                tensor.quantization = self._schema.QuantizationParametersT()
                tensor.quantization.scale = [float(scale) for scale in scales]
                tensor.quantization.zeroPoint = [0] * len(scales)
                tensor.quantization.quantizedDimension = axis
            self._constants[key] = self._add(tensor)
        return self._constants[key]

    def like(self, old: int, shape: Sequence[int], label: str = "") -> int:
        """A new computed tensor with the number format and scales of an old one.

        The name keeps the old one's beginning, by which messages find the Keras layer.
        """
        tensor = copy.copy(self._old.tensors[old])
        tensor.name = f"{_text(tensor.name)};{label}{len(self._tensors)}"
        if tuple(shape) != self.source.tensor(old).shape:
            tensor.shapeSignature = None  # of free axes; kept with the shape
        tensor.shape, tensor.buffer = [int(size) for size in shape], 0
        return self._add(tensor)

    def computed(self, old: int, shape: Sequence[int], dtype: str, scales: Sequence[float] = ()) -> int:
        """A new computed tensor of another number format, named after an old one; zero points are 0."""
        index = self.like(old, shape)
        tensor = self._tensors[index]
        tensor.type, tensor.quantization = getattr(self._schema.TensorType, dtype.upper()), None
        tensor.shapeSignature = None
        if len(scales):
            tensor.quantization = self._schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = list(scales), [0] * len(scales)
        return index

    def options(self, kind: str, **values: Any) -> Any:
        """An options object of the schema, such as ``Conv2D``, with the given fields."""
        options = getattr(self._schema, f"{kind}OptionsT")()
        for field, value in values.items():
            setattr(options, field, value)
        return options

    def emit(self, name: str, inputs: Sequence[int], output: int, options: Any = None, *, version: int = 1) -> int:
        """Adds a builtin operator with an options object of the schema; returns `output`."""
        raw = self._schema.OperatorT()
        raw.opcodeIndex = self._code(name, version)
        raw.inputs, raw.outputs = list(inputs), [output]
        if options is not None:
            raw.builtinOptions = options
            kind = type(options).__name__.removesuffix("T")
            raw.builtinOptionsType = getattr(self._schema.BuiltinOptions, kind)
        self._operators.append(raw)
        return output

    def copy(
        self,
        op: Op,
        values: Mapping[int, int],
        shape: Sequence[int] | None = None,
        *,
        options: Any = None,
        others: Mapping[int, int] | None = None,
    ) -> int:
        """Repeats an old operator on other tensors; returns its first output.

        Args:
            op: of the old graph.
            values: new index by old index; what is missing there is a constant.
            shape: of the outputs, where it is not the old one.
            options: in the place of the old ones.
            others: new tensors by the position of the input that they replace.
        """
        raw = copy.copy(op.raw)
        if options is not None:
            raw.builtinOptions = options
        raw.inputs = [
            others[place] if others and place in others else values[old] if old in values else self.constant(old)
            for place, old in enumerate(op.inputs)
        ]
        raw.outputs = [self.like(old, self.source.tensor(old).shape if shape is None else shape) for old in op.outputs]
        self._operators.append(raw)
        return raw.outputs[0]

    def reshape(self, tensor: int, shape: Sequence[int]) -> int:
        """RESHAPE; nothing where the shape is right already."""
        shape = tuple(int(size) for size in shape)
        if self.shapes[tensor] == shape:
            return tensor
        options = self.options("Reshape", newShape=list(shape))
        return self.emit("RESHAPE", [tensor, self.array(np.array(shape, np.int32))], self._as(tensor, shape), options)

    def crop(self, tensor: int, begin: Sequence[int], size: Sequence[int]) -> int:
        """SLICE; nothing where it takes everything."""
        if tuple(size) == self.shapes[tensor]:
            return tensor
        bounds = [self.array(np.array(values, np.int32)) for values in (begin, size)]
        return self.emit("SLICE", [tensor, *bounds], self._as(tensor, size), self.options("Slice"), version=2)

    def concatenate(self, tensors: Sequence[int], axis: int) -> int:
        """CONCATENATION of tensors that have one grid."""
        if len(tensors) == 1:
            return tensors[0]
        shape = list(self.shapes[tensors[0]])
        shape[axis] = sum(self.shapes[tensor][axis] for tensor in tensors)
        options = self.options("Concatenation", axis=axis)
        return self.emit("CONCATENATION", tensors, self._as(tensors[0], shape), options, version=2)

    def select(self, tensor: int, kernel: np.ndarray) -> int:
        """A convolution that only moves numbers: each output is one input, to the last bit.

        Args:
            tensor: N×H×W×C.
            kernel: O×1×K×C of zeros and ones, at most a single one for each output; its stride along the width is K.

        The one is stored as 64 with the scale 1/64: no other rounding than of a product with a power of two.
        """
        filters, _, width, _ = kernel.shape
        weights = self.array((kernel * 64).astype(np.int8), [1 / 64] * filters, name="select")
        raw = self._tensors[tensor]
        wide = np.int64 if _name_of("TensorType", raw.type).lower() == "int16" else np.int32
        bias = self.array(np.zeros(filters, wide), [float(raw.quantization.scale[0]) / 64] * filters, name="no_bias")
        valid = self._schema.Padding.VALID
        options = self.options("Conv2D", padding=valid, strideH=1, strideW=width, dilationHFactor=1, dilationWFactor=1)
        batch, height, columns, _ = self.shapes[tensor]
        output = self._as(tensor, (batch, height, columns // width, filters))
        version = 3 if wide is np.int32 else 4
        return self.emit("CONV_2D", [tensor, weights, bias], output, options, version=version)

    def finish(self, outputs: Mapping[int, int]) -> Graph:
        """The new graph.

        Args:
            outputs: new index by old index, for every output of the old graph.
        """
        places = {**self._interface, **outputs}
        for old, new in outputs.items():
            self._tensors[new].name = self._old.tensors[old].name
        model, subgraph = copy.copy(self.source.model), copy.copy(self._old)
        subgraph.tensors, subgraph.operators = self._tensors, self._operators
        subgraph.inputs = [places[index] for index in self.source.inputs]
        subgraph.outputs = [places[index] for index in self.source.outputs]
        model.subgraphs, model.buffers, model.operatorCodes = [subgraph], self._buffers, self._codes
        model.signatureDefs = [self._moved(signature, places) for signature in model.signatureDefs or ()]
        return Graph(model)

    def _moved(self, signature: Any, places: Mapping[int, int]) -> Any:
        moved = copy.copy(signature)
        for group in ("inputs", "outputs"):
            entries = [copy.copy(entry) for entry in getattr(signature, group) or ()]
            for entry in entries:
                entry.tensorIndex = places[int(entry.tensorIndex)]
            setattr(moved, group, entries)
        return moved

    def _as(self, tensor: int, shape: Sequence[int]) -> int:
        """A new computed tensor with the number format and scales of a new one."""
        made = copy.copy(self._tensors[tensor])
        made.name = f"{_text(made.name).rsplit(';', 1)[0]};{len(self._tensors)}"
        made.shape, made.shapeSignature, made.buffer = [int(size) for size in shape], None, 0
        return self._add(made)

    def _add(self, tensor: Any) -> int:
        self._tensors.append(tensor)
        self.shapes.append(() if tensor.shape is None else tuple(int(size) for size in tensor.shape))
        return len(self._tensors) - 1

    def _code(self, name: str, version: int) -> int:
        number = getattr(_schema().BuiltinOperator, name)
        for index, code in enumerate(self._codes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number and code.customCode is None:
                if code.version < version:
                    code = self._codes[index] = copy.copy(code)
                    code.version = version
                return index
        code = self._schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        self._codes.append(code)
        return len(self._codes) - 1


Rule = Callable[[Builder, Op, Mapping[int, int]], int | None]


def rebuild(graph: Graph, rule: Rule) -> Graph | None:
    """Repeats a graph operator by operator, those that the rule answers for in another form.

    Args:
        graph: to be rewritten; it is not changed.
        rule: ``(builder, op, values) -> index`` of the new tensor that stands for the operator's output, or `None` to
            repeat the operator; `values` gives new indices by old ones.

    Returns:
        The new graph, or `None` where the rule answered for nothing or the graph has control flow.
    """
    if not graph.single:
        return None
    builder = Builder(graph)
    values = {index: builder.input(index) for index in graph.inputs}
    changed = False
    for op in graph.ops:
        made = rule(builder, op, values)
        changed = changed or made is not None
        if made is None:
            first = builder.copy(op, values)
            values.update((old, first + offset) for offset, old in enumerate(op.outputs))
        else:
            values[op.output] = made
    return builder.finish({index: values[index] for index in graph.outputs}) if changed else None

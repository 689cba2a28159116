"""Runs an ONNX graph with `keras.ops`, so that it has a gradient on TensorFlow and JAX.

It knows the operators of common convolutional networks for pictures and is held to ONNX Runtime. Four-axis values are
kept with their channels last as long as the operators allow it, which is how the backends convolve on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.errors import FileProblem, KerasEfficientError, UnsupportedLayer, WrongArgument
from keras_efficient.video.interpolation import linear

__all__ = ["OnnxGraph"]

MOST_BYTES = 2**30  # of a file
DOMAINS = ("", "ai.onnx")
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class OnnxGraph:
    """A network of an ONNX file as a function of one tensor.

    ```python
    network = OnnxGraph("yolox_nano.onnx")
    outputs = network(x)            # by name
    outputs = network.run(x)        # the same as arrays, several times as fast, without a gradient
    ```

    Attributes:
        input_name, input_shape: of its one input; `None` in the shape where a size is free. The batch is free always: a
            graph that was written for a batch of one is run with any.
        output_names: of its outputs.

    Raises:
        FileProblem: the file cannot be read, or is none.
        UnsupportedLayer: the graph has an operator, or an option of one, that is not known here, or several inputs.
    """

    def __init__(self, path: str | Path):
        self._path, self._session = Path(path), None
        model = _read(Path(path))
        graph = model.graph
        self._opset = max((one.version for one in model.opset_import if one.domain in DOMAINS), default=1)
        constants = {tensor.name: _array(tensor, path) for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in constants]
        if len(inputs) != 1:
            raise UnsupportedLayer(str(path), f"it has {len(inputs)} inputs, one is needed.")
        self.input_name = inputs[0].name
        sizes = [axis.dim_value or None for axis in inputs[0].type.tensor_type.shape.dim]
        self._batch = sizes[0] if sizes else None
        self.input_shape: tuple[int | None, ...] = (None, *sizes[1:])
        self.output_names = tuple(value.name for value in graph.output)
        self._constants = constants
        self._nodes = [_node(node, str(path)) for node in graph.node]

    def __call__(self, x: Any, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """The outputs for ``x``, of the input's shape; by default all of them.

        Raises:
            UnsupportedLayer: an operator has an option, or inputs, that are not known here.
            WrongArgument: ``x`` is of another shape, or an output is unknown.
        """
        wanted = self._wanted(x, outputs)
        values: dict[str, Any] = {**self._constants, "": None, self.input_name: _Value(ops.cast(x, "float32"))}
        for node in self._needed(wanted):
            call = _Call(node, [values[name] for name in node.inputs], self._batch, x.shape[0], self._opset)
            try:
                results = node.run(call)
            except KerasEfficientError:
                raise
            except Exception as error:  # the backends' own have no common kind
                raise call.refusal(f"its inputs cannot be run ({str(error).strip().splitlines()[0]})") from error
            values.update(zip(node.outputs, results, strict=False))
        return {name: _first(values[name]) for name in wanted}

    def run(self, x: Any, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The same by ONNX Runtime.

        Raises:
            FileProblem: it does not take the file.
            WrongArgument: as above.
        """
        wanted = list(self._wanted(x, outputs))
        session, batch = self._runtime(), np.asarray(x, np.float32)
        step = self._batch or max(len(batch), 1)
        parts = [session.run(wanted, {self.input_name: batch[at : at + step]}) for at in range(0, len(batch), step)]
        return {name: np.concatenate(values) for name, values in zip(wanted, zip(*parts, strict=True), strict=True)}

    def _runtime(self) -> Any:
        from keras_efficient.export.targets.onnx import runtime

        if self._session is None:
            try:
                self._session = runtime().InferenceSession(str(self._path), providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's own have no common kind
                raise FileProblem(self._path, "is not taken by ONNX Runtime.") from error
        return self._session

    def _wanted(self, x: Any, outputs: Sequence[str] | None) -> tuple[str, ...]:
        shape = tuple(x.shape)
        fits = len(shape) == len(self.input_shape) and all(
            mine in (None, given) for mine, given in zip(self.input_shape[1:], shape[1:], strict=True)
        )
        if not fits:
            raise WrongArgument(f"The network takes {self.input_shape}, got {shape}.")
        wanted = self.output_names if outputs is None else tuple(outputs)
        made = {self.input_name, *self._constants, *(name for node in self._nodes for name in node.outputs)}
        if unknown := [name for name in wanted if name not in made]:
            raise WrongArgument(f"The graph has no {unknown[0]!r}; its outputs are {', '.join(self.output_names)}.")
        return wanted

    def _needed(self, wanted: Sequence[str]) -> list[_Node]:
        """The nodes that lead to some outputs, in order."""
        names, found = set(wanted), []
        for node in reversed(self._nodes):
            if names & set(node.outputs):
                found.append(node)
                names |= set(node.inputs)
        return found[::-1]


@dataclass(frozen=True)
class _Value:
    """A tensor that depends on the input; of four axes perhaps with that of channels, ONNX's second, at the end."""

    tensor: Any
    is_last: bool = False

    @property
    def rank(self) -> int:
        return len(self.tensor.shape)

    def place(self, axis: int) -> int:
        """Where the tensor has an axis of ONNX's order."""
        axis = axis % self.rank
        return TO_LAST.index(axis) if self.is_last else axis

    def with_tensor(self, tensor: Any) -> _Value:
        """Another tensor, of the same order of axes."""
        return _Value(tensor, self.is_last)


@dataclass(frozen=True)
class _Node:
    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    run: Callable[[_Call], list[Any]]


@dataclass(frozen=True)
class _Call:
    """An operator with its inputs: values, or arrays of which it is known what they hold."""

    node: _Node
    inputs: list[Any]
    declared: int | None  # batch of the graph
    batch: int | None  # and of this call; `None` where it is not known yet
    opset: int  # of the graph, on which it hangs what options mean

    def option(self, name: str, default: Any = None) -> Any:
        return self.node.options.get(name, default)

    def input(self, index: int) -> Any:
        return self.inputs[index] if index < len(self.inputs) else None

    def value(self, index: int) -> _Value:
        """As a tensor, even if it is known."""
        value = self.inputs[index]
        return value if isinstance(value, _Value) else _Value(ops.convert_to_tensor(value))

    def constant(self, index: int) -> np.ndarray:
        value = self.input(index)
        if not isinstance(value, np.ndarray):
            raise self.refusal("an input that should be known depends on the picture")
        return value

    def refusal(self, reason: str) -> UnsupportedLayer:
        return UnsupportedLayer(self.node.name, f"{self.node.kind}: {reason}.", hint="Export the network without it.")


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size > MOST_BYTES:
            raise FileProblem(path, f"is larger than {MOST_BYTES} bytes.")
        model = onnx.load_model(path, load_external_data=False)
    except FileNotFoundError as error:
        raise FileProblem(path, "no such file.") from error
    except (OSError, DecodeError) as error:
        raise FileProblem(path, "cannot be read as ONNX.") from error
    if not model.graph.node:
        raise FileProblem(path, "holds no graph.")
    return model


def _array(tensor: Any, path: str | Path) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        raise FileProblem(path, f"keeps {tensor.name!r} in another file.", hint="Save it with its weights inside.")
    return np.asarray(numpy_helper.to_array(tensor))


def _node(node: Any, path: str) -> _Node:
    from onnx import helper

    name = node.name or (node.output[0] if node.output else node.op_type)
    if node.op_type not in _OPERATORS or node.domain not in DOMAINS:
        known = ", ".join(sorted(_OPERATORS))
        raise UnsupportedLayer(f"{path}: {name}", f"the operator {node.op_type} is not known.", hint=f"Known: {known}.")
    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    options = {key: value.decode() if isinstance(value, bytes) else value for key, value in options.items()}
    return _Node(name, node.op_type, tuple(node.input), tuple(node.output), options, _OPERATORS[node.op_type])


def _first(value: Any) -> Any:
    """A tensor in ONNX's order of axes."""
    if not isinstance(value, _Value):
        return ops.convert_to_tensor(value)
    return ops.transpose(value.tensor, TO_FIRST) if value.is_last else value.tensor


def _last(value: Any) -> Any:
    """A tensor of four axes with the channels at the end."""
    if not isinstance(value, _Value):
        return ops.convert_to_tensor(np.transpose(value, TO_LAST))
    return value.tensor if value.is_last else ops.transpose(value.tensor, TO_LAST)


def _alike(values: Sequence[Any]) -> tuple[list[Any], bool]:
    """Tensors and arrays that are put together element by element, in one order of axes, and whether that is the last.

    Arrays of fewer axes are broadcast as NumPy does it.
    """
    tensors = [value for value in values if isinstance(value, _Value)]
    is_last = any(value.is_last for value in tensors) and all(value.rank == 4 for value in tensors)
    if not is_last:
        return [_first(value) if isinstance(value, _Value) else value for value in values], False
    return [_last(value) if isinstance(value, _Value) else _broadcast_last(value) for value in values], True


def _broadcast_last(array: np.ndarray) -> np.ndarray:
    return np.transpose(array.reshape((1,) * (4 - array.ndim) + array.shape), TO_LAST) if array.size > 1 else array


def _elementwise(function: Callable[..., Any], known: Callable[..., Any]) -> Callable[[_Call], list[Any]]:
    def run(call: _Call) -> list[Any]:
        if all(isinstance(value, np.ndarray) for value in call.inputs):
            return [np.asarray(known(*call.inputs))]
        tensors, is_last = _alike(call.inputs)
        return [_Value(function(*tensors), is_last)]

    return run


def _unary(function: Callable[[Any], Any]) -> Callable[[_Call], list[Any]]:
    def run(call: _Call) -> list[Any]:
        value = call.value(0)
        return [value.with_tensor(function(value.tensor))]

    return run


def _clip(call: _Call) -> list[Any]:
    value = call.value(0)
    least = call.option("min") if call.input(1) is None else float(call.constant(1))
    most = call.option("max") if call.input(2) is None else float(call.constant(2))
    tensor = value.tensor
    if least == 0.0 and most == 6.0:
        return [value.with_tensor(ops.relu6(tensor))]
    tensor = tensor if least is None else ops.maximum(tensor, np.float32(least))
    tensor = tensor if most is None else ops.minimum(tensor, np.float32(most))
    return [value.with_tensor(tensor)]


def _softmax(call: _Call) -> list[Any]:
    value = call.value(0)
    if call.opset >= 13:
        axes = [call.option("axis", -1) % value.rank]
    else:  # all axes from that one on are one
        axes = list(range(call.option("axis", 1) % value.rank, value.rank))
    if 0 in axes:
        raise call.refusal("over the batch")
    places = tuple(map(value.place, axes))
    return [value.with_tensor(ops.softmax(value.tensor, axis=places if len(places) > 1 else places[0]))]


def _pads(call: _Call, kernel: Sequence[int]) -> list[tuple[int, int]]:
    """What is added before and behind rows and columns."""
    if (mode := call.option("auto_pad", "NOTSET")) not in ("NOTSET", "VALID", ""):
        raise call.refusal(f"auto_pad {mode}")
    pads = call.option("pads") or [0] * 2 * len(kernel)
    half = len(pads) // 2
    return [(int(pads[i]), int(pads[half + i])) for i in range(half)]


def _padded(tensor: Any, pads: Sequence[tuple[int, int]], fill: float) -> Any:
    if not any(map(sum, pads)):
        return tensor
    return ops.pad(tensor, [(0, 0), *pads, (0, 0)], constant_values=fill)


def _convolution(call: _Call) -> list[Any]:
    weights = call.constant(1)
    if weights.ndim != 4:
        raise call.refusal(f"of {weights.ndim - 2} axes")
    count, _, *size = weights.shape
    strides, dilations = (tuple(call.option(name) or (1, 1)) for name in ("strides", "dilations"))
    pads, groups, x = _pads(call, size), call.option("group", 1), _last(call.inputs[0])
    reach = [dilation * (width - 1) for dilation, width in zip(dilations, size, strict=True)]
    is_same = strides == (1, 1) and all(pad == (one // 2, one - one // 2) for pad, one in zip(pads, reach, strict=True))
    x = x if is_same else _padded(x, pads, 0.0)
    steps = 1 if strides == (1, 1) else strides
    options = {"strides": steps, "padding": "same" if is_same else "valid", "dilation_rate": dilations}
    if groups == 1:
        x = ops.conv(x, np.transpose(weights, (2, 3, 1, 0)), **options)
    elif groups == x.shape[-1]:
        kernel = weights.reshape(groups, count // groups, *size).transpose(2, 3, 0, 1)
        x = ops.depthwise_conv(x, kernel, **options)
    else:
        parts = zip(ops.split(x, groups, axis=-1), np.split(weights, groups), strict=True)
        x = ops.concatenate(
            [ops.conv(part, np.transpose(some, (2, 3, 1, 0)), **options) for part, some in parts], axis=-1
        )
    return [_Value(x if call.input(2) is None else x + call.constant(2), is_last=True)]


def _pool(function: Callable[..., Any], fill: float) -> Callable[[_Call], list[Any]]:
    def run(call: _Call) -> list[Any]:
        size = tuple(call.option("kernel_shape"))
        strides, pads = tuple(call.option("strides") or (1, 1)), _pads(call, size)
        if call.option("ceil_mode") or any(step != 1 for step in call.option("dilations") or ()):
            raise call.refusal("ceil_mode or dilations")
        if any(map(sum, pads)) and not math.isinf(fill):
            raise call.refusal("padding")
        tensor = _padded(_last(call.inputs[0]), pads, fill)
        return [_Value(function(tensor, size, strides=strides, padding="valid"), is_last=True)]

    return run


def _concat(call: _Call) -> list[Any]:
    axis = call.option("axis")
    if all(isinstance(value, np.ndarray) for value in call.inputs):
        return [np.concatenate(call.inputs, axis=axis)]
    tensors, is_last = _alike(call.inputs)
    place = TO_LAST.index(axis % 4) if is_last else axis
    return [_Value(ops.concatenate(tensors, axis=place), is_last)]


def _slice(call: _Call) -> list[Any]:
    value = call.inputs[0]
    if call.input(1) is None:  # before opset 10
        starts, ends, some, by = *(call.option(name) for name in ("starts", "ends", "axes")), None
    else:
        starts, ends = call.constant(1), call.constant(2)
        some, by = (None if call.input(i) is None else call.constant(i) for i in (3, 4))
    axes = range(len(starts)) if some is None else some
    steps = [1] * len(starts) if by is None else by
    known = isinstance(value, np.ndarray)
    index: list[slice] = [slice(None)] * (value.ndim if known else value.rank)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = int(axis) % len(index) if known else value.place(int(axis))
        behind = None if abs(int(end)) >= 2**31 - 1 else int(end)
        index[place] = slice(int(start), behind, int(step))
    return [value[tuple(index)] if known else value.with_tensor(value.tensor[tuple(index)])]


def _reshape(call: _Call) -> list[Any]:
    value, shape = call.inputs[0], [int(size) for size in call.constant(1)]
    if isinstance(value, np.ndarray):
        return [value.reshape(shape)]
    tensor = _first(value)
    shape = [tensor.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if shape and shape[0] == call.declared:
        shape[0] = ops.shape(tensor)[0] if -1 in shape else -1
    return [_Value(ops.reshape(tensor, shape))]


def _transpose(call: _Call) -> list[Any]:
    value, order = call.value(0), call.option("perm")
    order = tuple(range(value.rank))[::-1] if order is None else tuple(order)
    if order == TO_LAST and value.is_last:
        return [_Value(value.tensor)]
    if order == TO_FIRST and not value.is_last:
        return [_Value(value.tensor, is_last=True)]
    return [_Value(ops.transpose(_first(value), order))]


def _pad(call: _Call) -> list[Any]:
    value = call.value(0)
    if (mode := call.option("mode", "constant")) != "constant":
        raise call.refusal(f"mode {mode}")
    pads = [int(size) for size in (call.option("pads") if call.input(1) is None else call.constant(1))]
    if any(size < 0 for size in pads):
        raise call.refusal("it cuts off")
    fill = call.option("value", 0.0) if call.input(2) is None else float(call.constant(2))
    both: list[tuple[int, int]] = [(0, 0)] * value.rank
    axes = range(value.rank) if call.input(3) is None else call.constant(3).tolist()
    for place, axis in enumerate(axes):
        both[value.place(axis)] = (pads[place], pads[len(axes) + place])
    return [value.with_tensor(ops.pad(value.tensor, both, constant_values=fill))]


def _shape(call: _Call) -> list[Any]:
    value = call.inputs[0]
    if isinstance(value, np.ndarray):
        return [np.array(value.shape, np.int64)]
    shape = [value.tensor.shape[value.place(axis)] for axis in range(value.rank)]
    # A free batch is as the graph has it; what is computed from it is sizes of pictures.
    sizes = [call.declared or 1 if axis == 0 and size is None else size for axis, size in enumerate(shape)]
    if None in sizes:
        raise call.refusal("a size that is not known")
    return [np.array(sizes, np.int64)]


def _resize(call: _Call) -> list[Any]:
    """Rows and columns in another number, linear or nearest: products with two small matrices."""
    value = call.inputs[0]
    is_old = call.node.kind == "Upsample" or (call.node.kind == "Resize" and len(call.inputs) == 2)
    scales = call.input(1 if is_old else 2)
    sizes = call.input(3)
    mode = call.option("mode", "nearest")
    if call.option("antialias"):
        raise call.refusal("antialias")
    if call.option("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refusal("keep_aspect_ratio_policy")
    axes = [axis % 4 for axis in call.option("axes") or range(4)]
    way = "asymmetric" if is_old else call.option("coordinate_transformation_mode", "half_pixel")
    tensor = _last(value)
    # Wanted sizes, and factors, by ONNX's axes: rows are 2, columns 3.
    if sizes is not None and np.size(sizes):
        known = dict(zip(axes, call.constant(3).tolist(), strict=True))
        factors = {axis: size / tensor.shape[axis - 1] for axis, size in known.items() if axis > 1}
    elif scales is not None and np.size(scales):
        factors = dict(zip(axes, call.constant(1 if is_old else 2).astype(np.float64).tolist(), strict=True))
        known = {axis: math.floor(tensor.shape[axis - 1] * factors[axis]) for axis in axes if axis > 1}
    else:
        raise call.refusal("neither sizes nor scales")
    if factors.get(0, 1) != 1 or factors.get(1, 1) != 1 or known.get(1, tensor.shape[3]) != tensor.shape[3]:
        raise call.refusal("channels in another number")
    for axis, size in enumerate(tensor.shape[1:3]):
        wanted, scale = known.get(2 + axis, size), factors.get(2 + axis, 1.0)
        if size == wanted:
            continue
        places = _places(call, way, size, wanted, scale)
        if mode == "nearest":
            tensor = ops.take(tensor, _nearest(call, places, size), axis=1 + axis)
        elif mode == "linear":
            formula = "oh,bhwc->bowc" if axis == 0 else "ow,bhwc->bhoc"
            tensor = ops.einsum(formula, linear(places, size), tensor)
        else:
            raise call.refusal(f"mode {mode}")
    return [_Value(tensor, is_last=True)]


def _places(call: _Call, way: str, size: int, wanted: int, scale: float) -> np.ndarray:
    """Where each of the wanted samples lies between those that there are."""
    steps = np.arange(wanted, dtype=np.float64)
    match way:
        case "asymmetric":
            return steps / scale
        case "half_pixel":
            return (steps + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (steps + 0.5) / scale - 0.5 if wanted > 1 else steps * 0
        case "align_corners":
            return steps * (size - 1) / max(wanted - 1, 1)
    raise call.refusal(f"coordinate_transformation_mode {way}")


def _nearest(call: _Call, places: np.ndarray, size: int) -> np.ndarray:
    match mode := call.option("nearest_mode", "floor" if call.node.kind == "Upsample" else "round_prefer_floor"):
        case "floor":
            found = np.floor(places)
        case "ceil":
            found = np.ceil(places)
        case "round_prefer_floor":
            found = np.ceil(places - 0.5)
        case "round_prefer_ceil":
            found = np.floor(places + 0.5)
        case _:
            raise call.refusal(f"nearest_mode {mode}")
    return found.clip(0, size - 1).astype("int32")


def _constant(call: _Call) -> list[Any]:
    from onnx import numpy_helper

    if call.option("value") is None:
        raise call.refusal("a form other than `value`")
    return [np.asarray(numpy_helper.to_array(call.option("value")))]


_OPERATORS: dict[str, Callable[[_Call], list[Any]]] = {
    "Add": _elementwise(ops.add, np.add),
    "AveragePool": _pool(ops.average_pool, 0.0),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "Conv": _convolution,
    "Div": _elementwise(ops.divide, np.divide),
    "Identity": lambda call: [call.inputs[0]],
    "MaxPool": _pool(ops.max_pool, -math.inf),
    "Mul": _elementwise(ops.multiply, np.multiply),
    "Pad": _pad,
    "Relu": _unary(ops.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _unary(ops.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sub": _elementwise(ops.subtract, np.subtract),
    "Transpose": _transpose,
    "Upsample": _resize,
}

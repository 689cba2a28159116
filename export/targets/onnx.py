"""Target `onnx`: files for ONNX Runtime and everything else that reads ONNX, made by tf2onnx and always checked."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, FileProblem
from keras_efficient.export import signature
from keras_efficient.export.flatbuffer import METADATA_KEY
from keras_efficient.export.runtime import ExportedModel
from keras_efficient.export.targets import Lowered, Option, Request, Target
from keras_efficient.export.targets.tflite import tracing_error, weight_bytes

if TYPE_CHECKING:
    import keras
    import numpy as np

__all__ = ["TARGETS", "OnnxModel", "convert"]

ATTEMPTS = 6
AXES = {3: ("batch", "length"), 4: ("batch", "height", "width"), 5: ("batch", "depth", "height", "width")}


def lower(model: keras.Model, request: Request) -> Iterator[Lowered]:
    """One candidate: what tf2onnx would write wrongly is rewritten first."""
    from keras_efficient.export.lowerings import apply
    from keras_efficient.export.lowerings.arg_extreme import PLAIN_ARG_EXTREMES
    from keras_efficient.export.lowerings.free_upsampling import FREE_UPSAMPLING
    from keras_efficient.export.lowerings.grouped_convolution import DEPTHWISE_CONVOLUTIONS, SPLIT_GROUPED_CONVOLUTIONS
    from keras_efficient.export.lowerings.plain_add import PLAIN_ADD
    from keras_efficient.export.lowerings.plain_gather import CHECKED_GATHER
    from keras_efficient.export.lowerings.take_best import TAKE_BEST
    from keras_efficient.export.lowerings.vocabulary_lookup import VOCABULARY_LOOKUP

    needed = [PLAIN_ARG_EXTREMES, FREE_UPSAMPLING, DEPTHWISE_CONVOLUTIONS, SPLIT_GROUPED_CONVOLUTIONS]
    needed += [CHECKED_GATHER, PLAIN_ADD, TAKE_BEST, VOCABULARY_LOOKUP]
    yield Lowered(*apply(model, needed))


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes `model` (stock layers only) as ONNX; returns notes for the report.

    The graph is frozen first: constants that a layer captured would otherwise become inputs of the file.

    Raises:
        ConversionError: tf2onnx refused the model.
    """
    import onnx

    graph, inputs, outputs = _frozen_graph(model, request)
    proto = _with_right_ranks(lambda: _tf2onnx(graph, inputs, outputs, request), [len(x.shape) for x in model.outputs])
    names = [spec.name for spec in request.inputs]
    _rename(proto.graph, dict(zip((*inputs, *outputs), (*names, *signature.output_names(model)), strict=True)))
    _rewrite_erfc(proto.graph)
    _leave_out_no_seeds(proto.graph)
    _name_free_axes(proto.graph, request)
    proto.producer_name = "keras_efficient"
    proto.producer_version = request.metadata["keras_efficient"]
    onnx.save_model(proto, path)
    layout = ("Inputs and outputs are N×C×H×W in the file; export.load takes and gives N×H×W×C.",)
    return (f"ONNX opset {request.options['opset']}.", *(layout if request.options["layout"] == "nchw" else ()))


def _frozen_graph(model: keras.Model, request: Request) -> tuple[Any, list[str], list[str]]:
    """The model as a TensorFlow graph with constants for variables, and its tensor names in the model's order."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    call, names = signature.flat_call(model), signature.output_names(model)

    def flat(*inputs: Any) -> list[Any]:
        outputs = call(*inputs)
        return [tf.identity(outputs[name]) for name in names]

    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in request.inputs]
    try:
        concrete = tf.function(flat, autograph=False).get_concrete_function(*specs)
    except Exception as err:  # whatever a layer's call raises when TensorFlow traces it
        raise tracing_error(err, request) from err
    frozen = convert_variables_to_constants_v2(concrete, lower_control_flow=False, aggressive_inlining=True)
    inputs = [tensor.name for tensor in frozen.inputs if tensor.dtype != tf.resource]
    return frozen.graph.as_graph_def(), inputs[: len(specs)], [tensor.name for tensor in frozen.outputs]


def _tf2onnx(graph: Any, inputs: list[str], outputs: list[str], request: Request) -> Any:
    import tf2onnx

    nchw = request.options["layout"] == "nchw"
    images = [name for name, spec in zip(inputs, request.inputs, strict=True) if len(spec.shape) == 4]
    # It calls Erfc unsupported, which is rewritten afterwards; and TensorFlow calls deprecated what it uses itself.
    loggers = [logging.getLogger(name) for name in ("tf2onnx", "tensorflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        proto, _ = tf2onnx.convert.from_graph_def(
            graph,
            input_names=inputs,
            output_names=outputs,
            opset=request.options["opset"],
            inputs_as_nchw=images if nchw else None,
            outputs_as_nchw=outputs if nchw else None,
        )
    except Exception as err:  # tf2onnx raises ValueError, RuntimeError, KeyError, AssertionError, …
        raise ConversionError(f"tf2onnx refused the model: {str(err).splitlines()[0][:300]}") from err
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return proto


def _with_right_ranks(attempt: Callable[[], Any], ranks: list[int]) -> Any:
    """The first of some attempts whose outputs have as many axes as the model's.

    tf2onnx's optimiser goes by the numbers in its names, which are others each time: in one of twelve conversions of
    an image network with one channel it loses the last SQUEEZE.
    """
    for _ in range(ATTEMPTS):
        proto = attempt()
        if _ranks(proto) in (ranks, None):
            return proto
    raise ConversionError(f"tf2onnx wrote outputs of {_ranks(proto)} axes, the model's have {ranks}.")


def _ranks(proto: Any) -> list[int] | None:
    """Numbers of axes of the outputs, as the nodes make them; `None` where that is not known before a run."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.value_info[:]
    for value in probe.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        found = [value.type.tensor_type for value in onnx.shape_inference.infer_shapes(probe).graph.output]
    except Exception:  # of an invalid file, which `check` refuses with its reason
        return None
    return [len(value.shape.dim) for value in found] if all(value.HasField("shape") for value in found) else None


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes (loops, conditions)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Renames tensors wherever they are used; a name that is in the way elsewhere gets a suffix."""
    taken = {name for inner in _graphs(graph) for node in inner.node for name in node.output}
    taken |= {tensor.name for inner in _graphs(graph) for tensor in inner.initializer}
    final = {**{new: f"{new}__inner" for new in names.values() if new in taken and new not in names}, **names}
    for inner in _graphs(graph):
        for node in inner.node:
            for field in (node.input, node.output):
                field[:] = [final.get(name, name) for name in field]
        for value in (*inner.input, *inner.output, *inner.value_info, *inner.initializer):
            value.name = final.get(value.name, value.name)


def _rewrite_erfc(graph: Any) -> None:
    """``Erfc(x)``, which TensorFlow's exact GELU becomes and ONNX does not have, as ``1 - Erf(x)``."""
    from onnx import helper

    for inner in _graphs(graph):
        nodes = []
        for node in inner.node:
            if node.op_type != "Erfc":
                nodes.append(node)
                continue
            one, erf = f"{node.output[0]}__one", f"{node.output[0]}__erf"
            nodes += [
                helper.make_node("Constant", [], [one], value=helper.make_tensor(one, 1, [], [1.0])),
                helper.make_node("Erf", list(node.input), [erf], name=erf),
                helper.make_node("Sub", [one, erf], list(node.output), name=node.name),
            ]
        del inner.node[:]
        inner.node.extend(nodes)


def _leave_out_no_seeds(graph: Any) -> None:
    """TensorFlow's seed of 0 is none; in ONNX it would be one, and each session would draw the same."""
    for inner in _graphs(graph):
        for node in inner.node:
            if node.op_type.startswith("Random"):
                kept = [one for one in node.attribute if one.name != "seed" or one.f]
                del node.attribute[:]
                node.attribute.extend(kept)


def _name_free_axes(graph: Any, request: Request) -> None:
    """Free axes are called ``batch``, ``height``, ``width``; on outputs only the batch can be expressed."""
    nchw = request.options["layout"] == "nchw"
    shapes = {spec.name: spec.shape for spec in request.inputs}
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        names = AXES.get(len(dims), ("batch",))
        if nchw and len(dims) == 4:
            names = ("batch", "channels", "height", "width")
        shape = shapes.get(value.name)
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            dim.Clear()
            if axis == 0 and any(spec.shape[0] is None for spec in request.inputs):
                dim.dim_param = "batch"
            elif shape is not None:
                dim.dim_param = names[axis] if axis < len(names) else f"axis_{axis}"
                if len(shapes) > 1 and axis:
                    dim.dim_param = f"{value.name}_{dim.dim_param}"
    del graph.value_info[:]  # its invented names (unk__139) contradict the new ones


def check(path: Path, model: keras.Model, request: Request) -> tuple[str, ...]:
    """Runs ONNX's full checker, and compares the inputs with the model's: tf2onnx writes invalid files silently.

    Raises:
        ConversionError: the file is invalid or has other inputs or outputs.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as err:  # ValidationError, InferenceError, TypeInferenceError
        telling = [line for line in str(err).splitlines() if line.strip()]
        raise ConversionError(f"tf2onnx wrote an invalid file: {telling[0][:300] if telling else err}") from err
    graph = onnx.load(path, load_external_data=False).graph
    initial = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initial]
    if sorted(inputs) != sorted(spec.name for spec in request.inputs):
        raise ConversionError(f"The file takes the inputs {inputs}, the model {[s.name for s in request.inputs]}.")
    weights = sum(_bytes(tensor) for inner in _graphs(graph) for tensor in inner.initializer)
    least = weight_bytes(model)
    if weights < 0.5 * least:  # half: position tables may be cut to the rows in use
        raise ConversionError(f"The file holds {weights} bytes of weights, the model's kernels alone have {least:.0f}.")
    wide = [value.name for value in (*graph.input, *graph.output) if value.type.tensor_type.elem_type == 7]
    return (f"64-bit integers at the borders: {', '.join(wide)}.",) if wide else ()


def _bytes(tensor: Any) -> int:
    """Bytes of an initializer."""
    from onnx import helper

    return prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def inspect(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Nodes by operator and type, and multiply-accumulates at the given input shapes (`None` if a shape is unknown)."""
    import onnx

    return inspected(onnx.load(path), shapes)


def inspected(proto: Any, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """As `inspect`, of a file that is in memory; its input and output shapes are changed."""
    import onnx

    nchw = _metadata(_property(proto)).get("layout") == "nchw"
    for value in proto.graph.input:
        shape = shapes.get(value.name, ())
        shape = (shape[0], shape[3], *shape[1:3]) if nchw and len(shape) == 4 else shape
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=False):
            dim.dim_value = size
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    known, types = _shapes_and_types(graph)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    macs: int | None = 0
    for inner in _graphs(graph):
        for node in inner.node:
            counts[node.op_type][types.get(node.output[0], "unknown")] += 1
            one = _macs(node, known)
            macs = None if macs is None or one is None else macs + one
    return {"ops": {name: dict(counts[name]) for name in sorted(counts)}, "macs": macs}


def _shapes_and_types(graph: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Fully known shapes, and number formats, by tensor name."""
    import onnx

    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}

    def type_name(number: int) -> str:
        name = onnx.TensorProto.DataType.Name(number).lower()
        return {"float": "float32", "double": "float64"}.get(name, name)

    for inner in _graphs(graph):
        for tensor in inner.initializer:
            shapes[tensor.name], types[tensor.name] = tuple(tensor.dims), type_name(tensor.data_type)
        for value in (*inner.input, *inner.output, *inner.value_info):
            tensor_type = value.type.tensor_type
            types[value.name] = type_name(tensor_type.elem_type)
            dims = [dim.dim_value for dim in tensor_type.shape.dim]
            if tensor_type.HasField("shape") and all(size > 0 for size in dims):
                shapes[value.name] = tuple(dims)
    return shapes, types


def _macs(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-accumulates of a node; `None` where a shape that it needs is unknown."""
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU"):
        return 0
    first, weights, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    by_input = node.op_type in ("ConvTranspose", "LSTM", "GRU")
    counted = first if by_input else out
    if weights is None or counted is None:
        return None
    match node.op_type:
        case "Conv" | "ConvTranspose":
            return prod(counted) * prod(weights[1:])  # kernel O×I×kH×kW, transposed I×O×kH×kW
        case "LSTM" | "GRU":
            recurrent = shapes.get(node.input[2], (0,))
            return counted[0] * counted[1] * (prod(weights) + prod(recurrent))  # T×N steps
        case "Gemm":
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            return prod(counted) * weights[1 if transposed else 0]
        case _:
            return prod(counted) * weights[-2 if len(weights) > 1 else 0]


def _metadata(text: str | None) -> dict[str, Any]:
    """Our entry; an empty dict where it is missing or not what we write."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _property(proto: Any) -> str | None:
    return next((item.value for item in proto.metadata_props if item.key == METADATA_KEY), None)


def write_metadata(path: Path, values: Mapping[str, Any]) -> None:
    """Puts `values` as JSON under the key ``keras_efficient`` into `metadata_props`."""
    import onnx

    proto = onnx.load(path)
    put_metadata(proto, values)
    onnx.save_model(proto, path)


def put_metadata(proto: Any, values: Mapping[str, Any]) -> None:
    """As `write_metadata`, of a file that is in memory."""
    kept = [item for item in proto.metadata_props if item.key != METADATA_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    item = proto.metadata_props.add()
    item.key, item.value = METADATA_KEY, json.dumps(values, sort_keys=True)


def runtime() -> Any:
    """ONNX Runtime, told to report nothing of its use to its makers."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


class OnnxModel(ExportedModel):
    """An `.onnx` in ONNX Runtime on the CPU. A file written with ``layout="nchw"`` still takes and gives N×H×W×C here.

    Raises:
        FileProblem: no such file, or not a valid ONNX file.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        onnxruntime = runtime()
        self.path = Path(path)
        self.threads = threads or 1
        if not self.path.is_file():
            raise FileProblem(path, "no such file.")
        if self.path.stat().st_size == 0:
            raise FileProblem(path, "the file is empty.", hint="Export the model again.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            # Without its fallback: that prints to stdout.
            self._session = onnxruntime.InferenceSession(
                self._content(), options, providers=["CPUExecutionProvider"], enable_fallback=False
            )
            self.metadata = _metadata(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
        except FileProblem:
            raise
        except Exception as err:  # onnxruntime's exceptions share no public base; damaged text cannot be decoded
            reason = (str(err).splitlines() or [type(err).__name__])[0]
            raise FileProblem(path, f"ONNX Runtime cannot open it: {reason}", hint="Export the model again.") from err
        self._nchw = self.metadata.get("layout") == "nchw"
        self._last: dict[str, np.ndarray] = {}
        values = {value.name: value for value in self._session.get_inputs()}
        self.input_names = self._ordered("inputs", list(values))
        self.output_names = self._ordered("outputs", [value.name for value in self._session.get_outputs()])
        self.input_shapes = {name: self._shape(values[name].shape) for name in self.input_names}
        self.input_dtypes = {name: _numpy_name(values[name].type) for name in self.input_names}

    def _content(self) -> str | bytes:
        """The file, or what is to be opened of it."""
        return str(self.path)

    def _shape(self, shape: list[Any]) -> tuple[int | None, ...]:
        sizes = tuple(size if isinstance(size, int) else None for size in shape)
        return (sizes[0], *sizes[2:], sizes[1]) if self._nchw and len(sizes) == 4 else sizes

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        swap = {name: self._nchw and array.ndim == 4 for name, array in inputs.items()}
        self._last = {
            name: np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if swap[name] else array
            for name, array in inputs.items()
        }
        found = self._session.run(list(self.output_names), self._last)
        return {
            name: array.transpose(0, 2, 3, 1) if self._nchw and array.ndim == 4 else array
            for name, array in zip(self.output_names, found, strict=True)
        }

    def invoke(self) -> None:
        self._session.run(list(self.output_names), self._last)


def _numpy_name(onnx_type: str) -> str:
    """``tensor(float)`` as ``float32``, ``tensor(int64)`` as ``int64``."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


TARGETS = (
    Target(
        name="onnx",
        suffix=".onnx",
        precisions=("float32",),
        lower=lower,
        convert=convert,
        check=check,
        open=OnnxModel,
        inspect=inspect,
        write_metadata=write_metadata,
        options={
            "opset": Option(18, "ONNX operator set of the file", (15, 16, 17, 18)),
            "layout": Option("nhwc", "order of the axes of image inputs and outputs", ("nhwc", "nchw")),
        },
        default=True,
        summary="ONNX, for ONNX Runtime and GPU compilers",
    ),
)

"""Target `tensorrt`: engines for GPUs, built by TensorRT or TensorRT-RTX from the ONNX file of the target `onnx`.

The network is strongly typed: number formats are written into the ONNX file, and the builder changes none. float16 has
weights in half precision and casts at the borders; int8 has a QuantizeLinear and a DequantizeLinear before each
convolution and product, with scales from calibration data.

Not verified: engines were built, by TensorRT-RTX without a GPU, but none ran. On a machine where an engine cannot run,
what is verified is the ONNX file that it was made from.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.atomic import replacing
from keras_efficient.errors import (
    ConversionError,
    FileProblem,
    KerasEfficientError,
    MissingDependency,
    UnknownName,
    WrongArgument,
)
from keras_efficient.export.flatbuffer import METADATA_KEY
from keras_efficient.export.runtime import ExportedModel
from keras_efficient.export.targets import Built, Option, Request, Target, onnx

if TYPE_CHECKING:
    import keras
    import numpy as np
    import onnx_ir as ir

    from keras_efficient.export.bolt.rewriting import Rewriter

__all__ = ["TARGETS", "EngineModel", "NoTensorRT", "convert", "profile_of"]

OPSET = 18
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "Install it: pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com (the Python index has "
    "only a stub, which fetches the libraries from that index; a GPU and its driver are needed too). Or choose "
    "runtime='rtx', whose wheel is complete.",
    "rtx": "Install it: pip install tensorrt-rtx-cu13 (of the Python index; it builds engines without a GPU too).",
}
RTX_MAGIC = b"vtrt"  # of engines by TensorRT-RTX 1.7
RTX_ARCHITECTURES = (None, "sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
MACHINE_OPTIONS = ("timing_cache", "workspace")  # of the builder's machine: no part of the file's metadata

# Least, usual and most size of a free axis, unless the option `profile` has them.
BATCH, IMAGE, LENGTH = (1, 1, 4), (16, 512, 1920), (1, 128, 512)

# Sums of many numbers, functions that leave float16's range before they come back into it, and operators that ONNX has
# for float32 only or that hold integers.
# fmt: off
IN_FLOAT32 = frozenset((
    "Cast", "CumSum", "DequantizeLinear", "Exp", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax",
    "Multinomial", "NonMaxSuppression", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax", "Sqrt",
))
# fmt: on
FLOAT32_INPUTS = {"Resize": (1, 2)}  # scales
QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class NoTensorRT(MissingDependency):
    """TensorRT is not installed, or not all of it."""

    def __init__(self, runtime: str, reason: str):
        name = MODULES[runtime]
        message = f"TensorRT engines need the package {name!r}, which cannot be imported: {reason}."
        KerasEfficientError.__init__(self, message, hint=INSTALL[runtime])
        self.package, self.extra = name, ""  # no extra of ours: what is installed hangs on the machine


def validate(request: Request) -> None:
    """Refuses options that do not go together, and a machine that cannot build, before any work.

    Raises:
        WrongArgument: an option that the runtime does not have, or sizes that are none.
        MissingDependency: no TensorRT.
        ConversionError: no GPU that TensorRT could build for.
    """
    options = request.options
    rtx = options["runtime"] == "rtx"
    if options["arch"] is not None and not rtx:
        raise WrongArgument("arch= is of runtime='rtx': TensorRT builds for the GPU of this machine.")
    if options["timing_cache"] is not None and rtx:
        raise WrongArgument("timing_cache= is of runtime='tensorrt': TensorRT-RTX times nothing when it builds.")
    workspace = options["workspace"]
    if workspace is not None and (not isinstance(workspace, int) or workspace < 1):
        raise WrongArgument(f"workspace={workspace!r}: MiB, a whole number from 1 on, or None.")
    profile_of(request)
    trt = _module(options["runtime"])
    _builder(trt, _logger(trt))


def profile_of(request: Request) -> dict[str, list[tuple[int, ...]]]:
    """Least, usual and most shape of each input that has a free axis, by name.

    Raises:
        WrongArgument: the option `profile` does not fit the inputs.
    """
    given = request.options["profile"] or {}
    free = {spec.name: spec.shape for spec in request.inputs if None in spec.shape}
    if not isinstance(given, dict) or not set(given) <= set(free):
        raise WrongArgument(f"profile={given!r}: three shapes for each of {list(free)}, by name.")
    found = {}
    for name, shape in free.items():
        ranges = [_range(axis, size, len(shape)) for axis, size in enumerate(shape)]
        shapes = given.get(name, list(zip(*ranges, strict=True)))
        if not _is_profile(shapes, shape):
            raise WrongArgument(
                f"profile of {name!r}: {shapes} are not the least, usual and most shape of {shape}.",
                hint='As in {"image": [[1, 64, 64, 3], [1, 540, 960, 3], [4, 1080, 1920, 3]]}.',
            )
        found[name] = [tuple(one) for one in shapes]
    return found


def _range(axis: int, size: int | None, rank: int) -> tuple[int, int, int]:
    if size is not None:
        return size, size, size
    return BATCH if axis == 0 else IMAGE if rank == 4 else LENGTH


def _is_profile(shapes: Any, shape: tuple[int | None, ...]) -> bool:
    lists = isinstance(shapes, list) and all(isinstance(one, (list, tuple)) for one in shapes)
    if not lists or len(shapes) != 3 or any(len(one) != len(shape) for one in shapes):
        return False
    axes = list(zip(*shapes, strict=True))
    if not all(isinstance(size, int) for sizes in axes for size in sizes):
        return False
    return all(
        1 <= least <= usual <= most and want in (None, least) and want in (None, most)
        for (least, usual, most), want in zip(axes, shape, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------ the ONNX


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes the ONNX file that the engine is made from, in the number formats of the precision; returns notes.

    Raises:
        ConversionError: tf2onnx refused the model, or a kernel is beyond float16's range.
    """
    plain = replace(request, options={"opset": OPSET, "layout": "nhwc"})
    notes = (*onnx.convert(model, plain, path), *onnx.check(path, model, plain))
    if request.precision == "float16":
        return (*notes, *_to_float16(path))
    if request.precision == "int8":
        return (*notes, *_to_int8(path, request))
    return notes


def _to_float16(path: Path) -> tuple[str, ...]:
    """Everything in half precision but `IN_FLOAT32`, with a cast wherever the format changes."""
    import onnx as onnx_package
    import onnx_ir as ir

    from keras_efficient.export.bolt.rewriting import Rewriter, tidied

    model = ir.serde.deserialize_model(onnx_package.shape_inference.infer_shapes(onnx_package.load(path)))
    half: dict[ir.Value, ir.Value] = {}  # of values in float32
    full: dict[ir.Value, ir.Value | None] = {}  # of values that were float32 in the file, and now are not
    for node in list(model.graph):
        rewriter = Rewriter(model, node)
        if not _in_float16(node):
            for inner in _nodes_within(node):
                for index, value in enumerate(inner.inputs):
                    if value in full:
                        # Placed at the first reader, it serves all later ones.
                        full[value] = full[value] or rewriter.op("Cast", [value], to=int(ir.DataType.FLOAT))
                        inner.replace_input_with(index, full[value])
            continue
        for index, value in enumerate(node.inputs):
            if (
                value is not None
                and _is_float32(value)
                and value not in full
                and index not in FLOAT32_INPUTS.get(node.op_type, ())
            ):
                if value not in half:
                    half[value] = _half(rewriter, value)
                node.replace_input_with(index, half[value])
        full.update(dict.fromkeys(filter(_is_float32, node.outputs)))
    for number, value in enumerate(list(model.graph.outputs)):
        if value in full:
            name, value.name = value.name, f"{value.name}__half"
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            model.graph.append(cast)
            cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, value.type, value.shape
            model.graph.outputs[number] = cast.outputs[0]
    tidied(model)
    onnx_package.save_model(ir.serde.serialize_model(model), path)
    return ("Inputs and outputs are float32 in the file.",)


def _in_float16(node: ir.Node) -> bool:
    """Whether a node computes in half precision: not what has graphs inside, nor what makes its format itself."""
    square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]  # of a variance
    alone = all(inner is node for inner in _nodes_within(node))
    plain = node.domain == "" and node.op_type not in IN_FLOAT32 and alone and not square
    return plain and any(_is_float32(value) for value in node.inputs)


def _nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those of the graphs inside it."""
    yield node
    for attribute in node.attributes.values():
        for graph in (attribute.value,) if attribute.type.name == "GRAPH" else ():
            for inner in graph:
                yield from _nodes_within(inner)


def _is_float32(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def _half(rewriter: Rewriter, value: ir.Value) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    from keras_efficient.export.bolt.rewriting import constant

    if (numbers := constant(value)) is None:
        return rewriter.op("Cast", [value], to=int(ir.DataType.FLOAT16))
    most = np.finfo(np.float16).max
    # Single numbers are limits and masks: they end at the largest.
    if numbers.ndim > 1 and np.any(np.isfinite(numbers) & (np.abs(numbers) > most)):
        raise ConversionError(f"Weights {value.name!r} are beyond float16's range.", hint="Use float32.")
    ended = np.where(np.isfinite(numbers), np.clip(numbers, -most, most), numbers)
    return rewriter.constant(ended.astype(np.float16), f"{value.name}__half")


def _to_int8(path: Path, request: Request) -> tuple[str, ...]:
    """Quantisers before all convolutions and products by constants: symmetric, weights with a scale for each filter."""
    import onnx as onnx_package

    assert request.calibration is not None
    onnx.runtime()  # without telemetry
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    proto = onnx_package.load(path)
    chosen = _name_products(proto.graph)
    if not chosen:
        raise ConversionError("No convolution or product of the model can be quantised.", hint="Use float16.")
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a pass of its own that merges batch normalisations; ours are merged
    try:
        quantize_static(
            proto,
            path,
            _Reader(request.calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,  # TensorRT has no zero points
                "WeightSymmetric": True,
                "QuantizeBias": False,  # nor integer biases
                "AddQDQPairToWeight": True,
                "OpTypesToExcludeOutputQuantization": list(QUANTIZED),  # it fuses what is behind them instead
            },
        )
    except Exception as err:  # the quantiser raises ValueError, RuntimeError, and what a session raises
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise ConversionError(f"ONNX Runtime's quantiser refused the model: {reason[:300]}") from err
    finally:
        logger.setLevel(level)
    return (
        f"Symmetric int8 before {len(chosen)} convolutions and products, float32 elsewhere; inputs and outputs too.",
    )


def _name_products(graph: Any) -> list[str]:
    """Names of the nodes that multiply by constant kernels; those without a name get one."""
    constants = {tensor.name for tensor in graph.initializer}
    found = []
    for number, node in enumerate(graph.node):
        if node.op_type in QUANTIZED and node.input[1] in constants:
            node.name = node.name or f"{node.op_type}_{number}"
            found.append(node.name)
    return found


class _Reader:
    """Calibration samples as ONNX Runtime's quantiser reads them."""

    def __init__(self, samples: Any):
        self._left: Iterator[dict[str, np.ndarray]] = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._left)


def check(path: Path, model: keras.Model, request: Request) -> tuple[str, ...]:
    """Runs ONNX's full checker once more: number formats were rewritten.

    Raises:
        ConversionError: an operator does not have the format.
    """
    import onnx as onnx_package

    try:
        onnx_package.checker.check_model(str(path), full_check=True)
    except Exception as err:  # ValidationError, InferenceError, TypeInferenceError
        raise ConversionError(f"The model cannot be written in {request.precision}: {_first([str(err)])}") from err
    return ()


def write_metadata(path: Path, values: Mapping[str, Any]) -> None:
    """Into the ONNX file, without what is of this machine."""
    onnx.write_metadata(path, {name: value for name, value in values.items() if name not in MACHINE_OPTIONS})


def inspect(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Of the ONNX file; it lies beside an engine that was just built."""
    return onnx.inspect(Path(path).with_suffix(".onnx"), shapes)


# ---------------------------------------------------------------------------------------------------------- the engine


def compile_engine(built: Built, request: Request, folder: Path) -> Built:
    """Builds the engine of a converted ONNX file.

    Raises:
        ConversionError: TensorRT cannot read the file, or cannot build the engine; with what it said.
        MissingDependency: no TensorRT.
    """
    source, engine = folder / "model.onnx", folder / "model.engine"
    built.path.replace(source)
    engine.write_bytes(_engine(source, request, {**request.metadata, "lowerings": list(built.lowerings)}))
    trt = _module(request.options["runtime"])
    profile = profile_of(request)
    notes = [f"Engine of {trt.__name__} {trt.__version__}; it runs with that version alone."]
    for name, (least, usual, most) in profile.items():
        notes.append(f"Sizes of {name!r}: {_text(least)} to {_text(most)}, best at {_text(usual)}; profile= sets them.")
    runs = not profile and _runs_here(engine)
    if not runs:
        notes.append("Not verified: the engine did not run here; numbers are of the ONNX file that it was made from.")
    return replace(built, path=engine, runnable=engine if runs else source, notes=(*built.notes, *notes))


def _text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _runs_here(engine: Path) -> bool:
    try:
        EngineModel(engine)
    except KerasEfficientError:
        return False
    return True


def _engine(source: Path, request: Request, metadata: Mapping[str, Any]) -> bytes:
    options = request.options
    trt = _module(options["runtime"])
    log = _logger(trt)
    builder = _builder(trt, log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other networks
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(source.read_bytes()):
        errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        raise ConversionError(f"TensorRT cannot read the ONNX file: {_first([*errors, *log.errors])}")
    # The one text of ours that an engine keeps.
    kept = {name: value for name, value in metadata.items() if name not in MACHINE_OPTIONS}
    network.name = json.dumps({METADATA_KEY: kept}, sort_keys=True)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32
    if options["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace"] << 20)
    if options["arch"] is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(
            getattr(trt.ComputeCapability, options["arch"].replace("_", "").upper()), 0
        ):
            raise ConversionError(f"TensorRT-RTX cannot build for {options['arch']}: {_first(log.errors)}")
    if profile := profile_of(request):
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            shapes.set_shape(name, least, usual, most)
        config.add_optimization_profile(shapes)
    cache = _timing_cache(config, options["timing_cache"])
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ConversionError(f"TensorRT cannot build the engine: {_first(log.errors)}")
    if cache is not None:
        with replacing(options["timing_cache"], overwrite=True) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return bytes(engine)


def _timing_cache(config: Any, path: str | None) -> Any:
    """What earlier builds measured; of another GPU or version it is not taken, and a new one begins."""
    if path is None:
        return None
    before = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(before)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _module(runtime: str) -> Any:
    """TensorRT, or TensorRT-RTX, imported.

    Raises:
        MissingDependency: not installed, or the stub without its libraries.
    """
    if runtime not in MODULES:
        raise UnknownName("runtime of TensorRT", runtime, MODULES)
    try:
        return importlib.import_module(MODULES[runtime])
    except (ImportError, OSError, RuntimeError) as err:  # the stub: a library that cannot be loaded
        raise NoTensorRT(runtime, (str(err).splitlines() or [type(err).__name__])[0]) from err


def _logger(trt: Any) -> Any:
    """Keeps errors, for messages, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except Exception as err:  # pybind11 raises TypeError where the library returns nothing
        reason = _first([*log.errors, str(err)])
        hint = "TensorRT needs a GPU to build: export there, or choose runtime='rtx', which builds without one."
        raise ConversionError(f"TensorRT cannot build on this machine: {reason}", hint=hint) from err


def _first(messages: Sequence[str]) -> str:
    return messages[0].strip().splitlines()[0][:300] if messages and messages[0].strip() else "it gave no reason"


class EngineModel(ExportedModel):
    """An engine on the current GPU. Not verified: it ran on no GPU yet.

    Raises:
        FileProblem: no such file, damaged, or built for another GPU or version.
        MissingDependency: no TensorRT, or no `cuda-bindings`.
        ConversionError: no GPU.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        from keras_efficient.export.bolt.runtime import CudaDevice

        self.path, self.threads = Path(path), threads or 1
        try:
            data = self.path.read_bytes()
        except OSError as err:
            raise FileProblem(path, f"cannot be read: {err.strerror}.") from err
        trt = _module("rtx" if data.startswith(RTX_MAGIC) else "tensorrt")
        self._device = CudaDevice()
        log = _logger(trt)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            hint = "Engines run on the GPU and the TensorRT version that they were built for: export the model there."
            raise FileProblem(path, f"{trt.__name__} {trt.__version__} cannot open it: {_first(log.errors)}", hint=hint)
        self._context = self._engine.create_execution_context()
        self.metadata = _metadata(self._engine.name)
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.input_names = self._ordered("inputs", inputs)
        self.output_names = self._ordered("outputs", [name for name in names if name not in inputs])
        self.input_shapes = {
            name: tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
            for name in self.input_names
        }
        self._dtypes = {name: str(trt.nptype(self._engine.get_tensor_dtype(name)).__name__) for name in names}
        self.input_dtypes = {name: self._dtypes[name] for name in self.input_names}
        self._memory: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        for name, array in inputs.items():
            if not self._context.set_input_shape(name, array.shape):
                raise WrongArgument(f"{self.path.name} was not built for {name!r} of shape {array.shape}.")
            self._place(name, np.ascontiguousarray(array))
        found = {}
        for name in self.output_names:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise ConversionError(f"{self.path.name}: the shape of output {name!r} hangs on values.")
            found[name] = np.zeros(shape, self._dtypes[name])
            self._place(name, found[name])
        self.invoke()
        for name, array in found.items():
            self._device._call("cuMemcpyDtoH", array.ctypes.data, self._memory[name].pointer, array.nbytes)
        return found

    def invoke(self) -> None:
        if not self._context.execute_async_v3(0):
            raise ConversionError(f"TensorRT could not run {self.path.name}.")
        self._device._call("cuCtxSynchronize")

    def _place(self, name: str, array: np.ndarray) -> None:
        """A copy of `array` on the device, as the engine's tensor."""
        self._memory[name] = self._device.weights(array.tobytes())
        self._context.set_tensor_address(name, self._memory[name].pointer)


def _metadata(text: str) -> dict[str, Any]:
    """What `_engine` put into an engine's name; an empty dict for engines of others."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    found = found.get(METADATA_KEY) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


class _Source(onnx.OnnxModel):
    """The ONNX file of an engine in ONNX Runtime, with quantisers computed as they stand: its own integer products
    overflow 16 bits on processors without VNNI, which took 25 dB from a transformer."""

    def __init__(self, path: str | Path, threads: int | None = None):
        super().__init__(path, threads)
        runtime = onnx.runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = ["CPUExecutionProvider"]
        self._session = runtime.InferenceSession(str(path), options, providers=providers, enable_fallback=False)


def open_file(path: str | Path, threads: int | None = None) -> ExportedModel:
    """An engine on the GPU, or the ONNX file that one was made from in ONNX Runtime."""
    return (_Source if Path(path).suffix == ".onnx" else EngineModel)(path, threads)


TARGETS = (
    Target(
        name="tensorrt",
        suffix=".engine",
        precisions=("float32", "float16", "int8"),
        calibrated=("int8",),
        lower=onnx.lower,
        convert=convert,
        check=check,
        compile=compile_engine,
        validate=validate,
        open=open_file,
        inspect=inspect,
        write_metadata=write_metadata,
        options={
            "runtime": Option("tensorrt", "what builds and runs the engine", tuple(MODULES)),
            "arch": Option(None, "TensorRT-RTX: one GPU architecture; by default all that it knows", RTX_ARCHITECTURES),
            "profile": Option(None, "least, usual and most shape of inputs with free axes, by name"),
            "timing_cache": Option(None, "TensorRT: a file that keeps what the builder measured"),
            "workspace": Option(None, "MiB that layers may use besides; by default all memory"),
        },
        default=True,
        summary="TensorRT and TensorRT-RTX engines for NVIDIA GPUs; built here, not run here (not verified)",
    ),
)

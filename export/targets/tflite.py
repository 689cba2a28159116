"""Target `tflite`: LiteRT files for phones and computers, and the conversion that the Ethos-U targets build on."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, FileProblem, KerasEfficientError
from keras_efficient.export import flatbuffer, lowerings, signature
from keras_efficient.export.targets import Lowered, Option, Request, Target

if TYPE_CHECKING:
    import keras

    from keras_efficient.export.graph import GraphLowering

__all__ = [
    "CALIBRATED",
    "PRECISIONS",
    "TARGETS",
    "WIDE_PROBABILITIES",
    "check",
    "convert",
    "convert_plainly",
    "inspect",
    "lower",
    "needed_lowerings",
    "tracing_error",
    "weight_bytes",
    "widened",
]

PRECISIONS = ("float32", "float16", "int8", "int16x8", "dynamic", "int8-weights", "int4-weights")
CALIBRATED = ("int8", "int16x8")
USUAL_STRIDE = 32  # of networks for pictures, from their inputs to their smallest layer
WIDE_PROBABILITIES = Option(False, "int8: give softmaxes, and means of them, in 16 bits", (False, True))


def lower(model: keras.Model, request: Request) -> Iterator[Lowered]:
    """One candidate: what the converter would refuse, or what would run slowly in integers, is rewritten first."""
    yield Lowered(*lowerings.apply(model, needed_lowerings(request)))


def needed_lowerings(request: Request, without: Collection[lowerings.Lowering] = ()) -> list[lowerings.Lowering]:
    """The lowerings that a precision needs, in order, but for those in `without`."""
    from keras_efficient.export.lowerings.arg_extreme import PLAIN_ARG_EXTREMES
    from keras_efficient.export.lowerings.flat_dense import FLAT_DENSE
    from keras_efficient.export.lowerings.free_upsampling import FREE_UPSAMPLING
    from keras_efficient.export.lowerings.grouped_convolution import DEPTHWISE_CONVOLUTIONS
    from keras_efficient.export.lowerings.integer_table import INTEGER_TABLE, WIDE_TABLE_AS_FLOATS
    from keras_efficient.export.lowerings.normalization import INTEGER_NORMALIZATION
    from keras_efficient.export.lowerings.plain_add import PLAIN_ADD
    from keras_efficient.export.lowerings.plain_gather import PLAIN_GATHER
    from keras_efficient.export.lowerings.prelu import OTHER_PRELU_AS_RELU, PRELU_AS_RELU
    from keras_efficient.export.lowerings.take_best import TAKE_BEST
    from keras_efficient.export.lowerings.text_lookup import TEXT_LOOKUP
    from keras_efficient.export.lowerings.transposed_convolution import CONVOLUTION_AND_SHUFFLE
    from keras_efficient.export.lowerings.transposed_shuffle import TRANSPOSED_SHUFFLE
    from keras_efficient.export.lowerings.unrolled_recurrence import UNROLLED_RECURRENCE
    from keras_efficient.export.lowerings.vocabulary_lookup import VOCABULARY_LOOKUP

    needed = [PLAIN_ARG_EXTREMES, FREE_UPSAMPLING, DEPTHWISE_CONVOLUTIONS, CONVOLUTION_AND_SHUFFLE]
    needed.append(WIDE_TABLE_AS_FLOATS if request.precision in CALIBRATED else INTEGER_TABLE)
    needed += [PLAIN_GATHER, PLAIN_ADD, TAKE_BEST, FLAT_DENSE, VOCABULARY_LOOKUP, TEXT_LOOKUP]
    if request.precision in CALIBRATED:
        # Behind a convolution, DOUBLED_CONVOLUTION cures an int8 PReLU better, once the file is quantised.
        needed += [OTHER_PRELU_AS_RELU if request.precision == "int8" else PRELU_AS_RELU, UNROLLED_RECURRENCE]
    if request.precision == "int8":
        needed.append(INTEGER_NORMALIZATION)
    if request.precision == "int16x8":
        needed.append(TRANSPOSED_SHUFFLE)
    return [lowering for lowering in needed if lowering not in without]


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes `model` (stock layers only) as a `.tflite` that LiteRT runs fast; returns notes for the report.

    Raises:
        ConversionError: the converter refused; the message names its reason.
    """
    notes = convert_plainly(model, request, path)
    if request.precision in CALIBRATED:
        return (*notes, *_rewrite_integers(path), *widened(path, request))
    return (*notes, *_rewrite_tables(path, request.precision))


def convert_plainly(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """`convert` without the rewrites for LiteRT: what the converter makes of the model.

    Raises:
        ConversionError: as `convert`.
    """
    from keras_efficient.export import large_tables

    calibrated = request.precision in CALIBRATED  # the model is run, with its own tables
    rounding = request.precision not in ("float32", "float16")
    small, tables = (model, []) if calibrated else large_tables.taken_out(model, rounding=rounding)
    data, notes = _convert_in_some_way(small, request)
    if tables:
        whole = large_tables.put_back(data, tables)
        data, notes = _convert_in_some_way(model, request) if whole is None else (whole, notes)
    path.write_bytes(data)
    if request.precision.endswith("-weights"):
        _quantize_weights(path, request.precision)
    return notes


def _convert_in_some_way(model: keras.Model, request: Request) -> tuple[bytes, tuple[str, ...]]:
    try:
        return _convert_once(model, request), ()
    except ConversionError as err:
        # A recurrent layer's list of time steps can be lowered only when the batch is known.
        if "tensor list" not in str(err).lower() or all(spec.shape[0] is not None for spec in request.inputs):
            raise
        inputs = tuple(replace(spec, shape=(spec.shape[0] or 1, *spec.shape[1:])) for spec in request.inputs)
        note = "The batch is fixed to 1: TFLite's loops cannot have a free one."
        return _convert_once(model, replace(request, inputs=inputs)), (note,)


def _rewrite_integers(path: Path) -> Iterator[str]:
    """Rewrites the quantised file where XNNPACK has no kernel; yields a note for each rewrite."""
    from keras_efficient.export.lowerings.doubled_convolution import DOUBLED_CONVOLUTION
    from keras_efficient.export.lowerings.idle_clips import IDLE_CLIPS

    for summary in _rewrite(path, (IDLE_CLIPS, DOUBLED_CONVOLUTION)):
        yield f"Rewritten after quantisation: {summary}."


def widened(path: Path, request: Request) -> Iterator[str]:
    """Probabilities of a quantised file in 16 bits, where the request wants it; yields a note."""
    from keras_efficient.export.lowerings.wide_probabilities import WIDE_PROBABILITIES as lowering

    if request.precision == "int8" and request.options["wide_probabilities"]:
        notes = [f"Rewritten after quantisation: {summary}." for summary in _rewrite(path, (lowering,))]
        yield from notes or ["No output is a softmax or a mean of some, which could be in 16 bits."]


def _rewrite_tables(path: Path, precision: str) -> Iterator[str]:
    """Rewrites how a float file reads its tables; yields a note for each rewrite."""
    from keras_efficient.export.lowerings.embedding_lookup import EMBEDDING_LOOKUP, ROWS_WIDENED_LATE
    from keras_efficient.export.lowerings.gathered_products import GATHERED_PRODUCTS, ROUNDED_PRODUCTS

    rounded = (ROUNDED_PRODUCTS,) if precision == "dynamic" else ()  # which rounds inputs, as this does
    for summary in _rewrite(path, (EMBEDDING_LOOKUP, ROWS_WIDENED_LATE, *rounded, GATHERED_PRODUCTS)):
        yield f"Rewritten after conversion: {summary}."


def _rewrite(path: Path, chosen: Sequence[GraphLowering]) -> Iterator[str]:
    """Applies lowerings to a file in order; yields the summaries of those that changed it."""
    from keras_efficient.export.graph import Graph

    graph = Graph.from_bytes(path.read_bytes())
    for lowering in chosen:
        rewritten = lowering.function(graph)
        if rewritten is not None:
            graph = rewritten
            path.write_bytes(graph.to_bytes())
            yield lowering.summary


def _convert_once(model: keras.Model, request: Request) -> bytes:
    with tempfile.TemporaryDirectory(prefix="keras_efficient-") as folder:
        save_model(model, request, Path(folder))
        if request.precision in CALIBRATED:
            _refuse_loops(Path(folder), request.precision)
        return _convert_saved_model(folder, request)


def save_model(model: keras.Model, request: Request, folder: Path) -> None:
    """Writes a TensorFlow SavedModel whose signature has the model's input and output names.

    Not `TFLiteConverter.from_keras_model`, which prints to stdout, nor `from_concrete_functions`, which loses the
    weights when it is given the model.
    """
    import keras
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    archive.track(model)
    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in request.inputs]
    try:
        endpoint = archive.add_endpoint("serve", signature.flat_call(model), input_signature=specs)
        endpoint.get_concrete_function()  # traces it now; `write_out` takes that trace
    except Exception as err:  # whatever a layer's call raises when TensorFlow traces it
        raise tracing_error(err, request) from err
    try:
        archive.write_out(str(folder), verbose=False)
    except tf.errors.OpError as err:  # TensorFlow's file system has no errors of the operating system
        reason = (err.message.splitlines() or [type(err).__name__])[0].rpartition("; ")[2]
        hint = "Is the disk of the temporary files full? TMPDIR chooses another."
        raise FileProblem(folder, f"cannot be written: {reason[:200]}.", hint=hint) from err


def tracing_error(err: Exception, request: Request) -> ConversionError:
    """What to tell when TensorFlow cannot trace the model: Keras says in which layer's call it happened, and why."""
    told = re.sub(r"\x1b\[\d*m", "", str(err))
    kind = re.search(r"encountered when calling ([\w.]+)", told)
    node = re.search(r"\{\{node ([^}]+)\}\}", told)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    reason = lines[min(1, len(lines) - 1) if kind else -1] if lines else type(err).__name__
    reason = re.split(r"\.? for '\{\{", reason)[0]  # then follow numbers of the graph
    where = f"Layer {kind.group(1).removesuffix('.call')}" if kind else "The model"
    where += f" {flatbuffer.layer_path(node.group(1))!r}" if kind and node else ""
    sizes = re.search(r"[Dd]imension.* must be equal|[Ii]ncompatible shapes", reason)
    hint = (_whole_sizes_hint(request) if sizes else None) or _free_axes_hint(request)
    return ConversionError(f"{where} cannot be traced: {reason[:200].rstrip('.')}.", hint=hint)


def _whole_sizes_hint(request: Request) -> str | None:
    """What helps where a picture was halved, rounded up, and does not come out as large as it went in."""
    pictures = [spec.shape[1:3] for spec in request.inputs if len(spec.shape) == 4 and None not in spec.shape[1:3]]
    if len(pictures) != 1 or not any((size or 0) % USUAL_STRIDE for size in pictures[0]):
        return None
    height, width = (-(-(size or 0) // USUAL_STRIDE) * USUAL_STRIDE for size in pictures[0])
    given = "×".join(map(str, pictures[0]))
    better = f"{height}×{width}, by input_shape= or --input-shape {height}x{width}"
    return f"{given} may be no multiple of the model's strides: try {better}."


def _free_axes_hint(request: Request) -> str | None:
    """What may help where a layer computes with a shape that is not known."""
    free = any(None in spec.shape[1:] for spec in request.inputs)
    return "Fix the free axes with input_shape=." if free else None


def _refuse_loops(folder: Path, precision: str) -> None:
    """The calibrator dies of a segmentation fault on a loop, and would take the caller's process with it."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for function in saved.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            if node.op in ("While", "StatelessWhile"):
                raise ConversionError(
                    f"Layer {flatbuffer.layer_path(node.name)!r} is a loop, which {precision} cannot have.",
                    hint="Fix the number of time steps (at most 200 are written out), or choose precision dynamic.",
                )


def _convert_saved_model(folder: str, request: Request) -> bytes:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    match request.precision:
        case "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        case "dynamic":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        case "int8":
            _quantize_fully(converter, request, tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.int8)
        case "int16x8":
            ops = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
            _quantize_fully(converter, request, ops, tf.int16)
    try:
        return converter.convert()
    except KerasEfficientError:  # of the calibration data
        raise
    except Exception as err:  # ConverterError, ValueError, RuntimeError: whatever the converter met
        reason = _reason(err)
        message = f"The TFLite converter refused the model: {_unquantised_layer(reason, folder, request)}{reason}"
        raise ConversionError(message, hint=_free_axes_hint(request)) from err


def _unquantised_layer(reason: str, folder: str, request: Request) -> str:
    """The layer of the operator that the quantiser has no rule for: it names the operator only, the float file both."""
    unruled = re.search(r"not yet supported for op: '(\w+)'", reason)
    if unruled is None or request.precision not in CALIBRATED:
        return ""
    operators = flatbuffer.operators(_convert_saved_model(folder, replace(request, precision="float32")))
    layer = next((operator.layer for operator in operators if operator.name == unruled.group(1)), None)
    return f"layer {layer!r}: " if layer else ""


def _quantize_fully(converter: Any, request: Request, ops: Any, dtype: Any) -> None:
    """All operators, inputs and outputs in integers. Naming the operator set makes an operator without an integer
    kernel an error; without it that operator would silently stay float."""
    import tensorflow as tf

    calibration = request.calibration
    assert calibration is not None, "the pipeline gives calibrated precisions their data"
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: _feeds(calibration, request)
    converter.target_spec.supported_ops = [ops]
    if all(spec.dtype == "float32" for spec in request.inputs):
        converter.inference_input_type = dtype
    converter.inference_output_type = dtype


def _feeds(calibration: Any, request: Request) -> Iterator[Any]:
    for sample in calibration:
        yield dict(sample) if len(request.inputs) > 1 else [sample[request.inputs[0].name]]


def _reason(err: Exception) -> str:
    """What a converter's error says of the operator and its place, without its trace of locations."""
    text = str(err)
    operator = re.search(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)
    if operator:
        place = re.search(r'"([^"@:]+)@', text)
        where = f"{flatbuffer.layer_path(place.group(1))}: " if place else ""
        return f"{where}TFLite has no operator for TensorFlow's {operator.group(1)}."
    if "gather.cc" in text and "indices" in text:
        return "an id of the calibration data is outside of its table."
    lines = [line.strip().removeprefix("<unknown>:0:").strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("error: loc(", "note: "))]
    for words in ("not yet supported", "Lowering tensor list", "error:", "failed"):
        for line in telling:
            if words in line:
                return line.removeprefix("error:").strip()[:300]
    return (telling or lines or [type(err).__name__])[0][:300]


def _quantize_weights(path: Path, precision: str) -> None:
    """Weights in 8 or 4 bits, activations float: ai-edge-quantizer's weight-only recipes."""
    from ai_edge_quantizer import quantizer, recipe

    chosen = recipe.weight_only_wi8_afp32() if precision == "int8-weights" else recipe.weight_only_wi4_afp32()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes and times
        work = quantizer.Quantizer(str(path))
        work.load_quantization_recipe(chosen)
        quantized = work.quantize().quantized_model
    path.write_bytes(bytes(quantized))


def check(path: Path, model: keras.Model, request: Request) -> tuple[str, ...]:
    """Refuses a file that the converter wrote without complaint although it is not what was asked for.

    Returns:
        Notes on what is allowed and worth knowing.

    Raises:
        ConversionError: the file lacks its weights, needs TensorFlow's kernels, or is not all integers.
    """
    data = flatbuffer.read_bytes(path)
    graph = flatbuffer.unpack(data)
    operators = flatbuffer.operators(graph)
    known = {operation.name for operation in lowerings.operations(model)} - {model.name}
    for operator in operators:
        if operator.name in ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"):
            where = _where(operator, known, operators)
            raise ConversionError(f"{where}: its weights are not in the file ({operator.name}).")
        if operator.custom:
            where = _where(operator, known, operators)
            raise ConversionError(f"{where}: {operator.name} is no operator of TFLite's own.")
    if request.precision in CALIBRATED:
        _refuse_float(operators, known, request.precision)
    _refuse_widened_tables(operators, known)
    least = weight_bytes(model, _WEIGHT_BYTES[request.precision])
    if len(data) < 0.5 * least:  # half: position tables may be cut to the rows in use
        raise ConversionError(f"The file has {len(data)} bytes, its weights alone need {least:.0f}.")
    return _notes(graph, operators, request)


_WEIGHT_BYTES = {"float32": 4, "float16": 2, "int4-weights": 0.5}
_WEIGHT_BYTES |= dict.fromkeys(("int8", "int16x8", "dynamic", "int8-weights"), 1)


def _refuse_float(operators: list[flatbuffer.Operator], known: Collection[str], precision: str) -> None:
    """An operator without an integer kernel stays float between DEQUANTIZE and QUANTIZE: it is the one to name."""
    floats = [op for op in operators if any(dtype.startswith("float") for dtype in op.dtypes)]
    if not floats:
        return
    named = next((op for op in floats if op.name not in ("QUANTIZE", "DEQUANTIZE")), floats[0])
    raise ConversionError(
        f"{_where(named, known, operators)}: {named.name} has no {precision} kernel, it would stay float.",
        hint="Replace the layer, or choose precision float16, dynamic or int8-weights. "
        'Ids of an embedding need keras.Input(shape, dtype="int32").',
    )


def _refuse_widened_tables(operators: list[flatbuffer.Operator], known: Collection[str]) -> None:
    """A table that is widened before rows are taken from it is copied into memory as a whole."""
    widened = {
        (op.subgraph, op.outputs[0].name): op
        for op in operators
        if op.name == "DEQUANTIZE" and op.inputs[0] is not None and op.inputs[0].constant
    }
    for operator in operators:
        if operator.name in ("GATHER", "EMBEDDING_LOOKUP"):
            for tensor in operator.inputs:
                maker = None if tensor is None else widened.get((operator.subgraph, tensor.name))
                table = None if maker is None else maker.inputs[0]
                if table is not None:
                    where = _where(operator, known, operators)
                    size = "×".join(map(str, table.shape))
                    raise ConversionError(f"{where}: its whole table ({table.dtype}, {size}) would be widened at once.")


def _where(operator: flatbuffer.Operator, known: Collection[str], operators: list[flatbuffer.Operator]) -> str:
    """The layer that an operator came from, or, where the converter dropped its name, the nearest one before it."""
    if path := operator.layer_among(known):
        return f"Layer {path!r}"
    makers = {tensor.name: maker for maker in operators for tensor in maker.outputs}
    for _ in operators:
        names = [tensor.name for tensor in operator.inputs if tensor is not None and not tensor.constant]
        before = next((makers[name] for name in names if name in makers), None)
        if before is None:
            break
        if path := before.layer_among(known):
            return f"After layer {path!r}"
        operator = before
    return "Somewhere in the model"


def weight_bytes(model: keras.Model, float_bytes: float = 4) -> float:
    """Least bytes of the distinct kernels and tables; vectors may be folded away, equal ones are stored once.

    Args:
        model: as it is converted.
        float_bytes: of a float in the file. Signed integers count as packed as far as their values allow, unsigned ones
            as they are.
    """
    import hashlib

    import numpy as np

    from keras_efficient.export.lowerings.table_layers import narrowest_bits

    distinct = {}
    for weight in model.weights:
        if len(weight.shape) > 1:
            values = np.asarray(weight)
            size = values.itemsize if values.dtype.kind in "ub" else float_bytes
            if values.dtype.kind == "i":
                size = min(values.itemsize, narrowest_bits(values) / 8)
            distinct[hashlib.blake2b(np.ascontiguousarray(values).data).digest()] = size * values.size
    return sum(distinct.values())


def _notes(graph: Any, operators: list[flatbuffer.Operator], request: Request) -> tuple[str, ...]:
    notes = []
    wide = [tensor.name for tensor in flatbuffer.borders(graph) if tensor.dtype == "int64"]
    if wide:
        notes.append(f"64-bit integers at the borders ({', '.join(wide)}): microcontrollers and NPUs want 32.")
    if request.precision in ("dynamic", "int8-weights", "int4-weights"):
        constants = {
            t.dtype for op in operators for t in op.inputs if t is not None and t.constant and len(t.shape) > 1
        }
        if any(op.name == "GATHER" and _is_float_table(op.inputs[0]) for op in operators):
            text = f"Tables of embeddings are float32: {request.precision} leaves them so, or gains too little."
            notes.append(text if request.precision == "dynamic" else f"{text} dynamic stores them in 8 bits.")
        elif not constants & {"int8", "int4", "int2", "uint8", "int16"}:
            notes.append("No weight was quantised: all of them are too small to gain by it. The file is float32.")
    return tuple(notes)


def _is_float_table(tensor: flatbuffer.Tensor | None) -> bool:
    return tensor is not None and tensor.constant and tensor.dtype == "float32" and tensor.shape[-1:] > (1,)


def inspect(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Operators in a `.tflite`, multiply-accumulates and bytes read of one inference at the given input shapes."""
    from keras_efficient.export.runtime import LiteRTModel

    model = flatbuffer.unpack(flatbuffer.read_bytes(path))
    run_time_shapes = LiteRTModel(path, delegate=False).tensor_shapes(shapes)
    return {
        "ops": flatbuffer.count_ops(model),
        "macs": flatbuffer.count_macs(model, run_time_shapes),
        "bytes_read": flatbuffer.count_bytes_read(model, run_time_shapes),
    }


def open_file(path: Path, threads: int | None = None) -> Any:
    """The file as a callable."""
    from keras_efficient.export.runtime import LiteRTModel

    return LiteRTModel(path, threads)


TARGETS = (
    Target(
        name="tflite",
        suffix=".tflite",
        precisions=PRECISIONS,
        calibrated=CALIBRATED,
        text=tuple(precision for precision in PRECISIONS if precision not in CALIBRATED),
        lower=lower,
        convert=convert,
        check=check,
        open=open_file,
        inspect=inspect,
        write_metadata=flatbuffer.write_metadata,
        options={"wide_probabilities": WIDE_PROBABILITIES},
        default=True,
        summary="LiteRT (TensorFlow Lite) on phones, microcontrollers and computers",
    ),
)

"""From a Keras model to a verified file: read `save` from top to bottom."""

from __future__ import annotations

import errno
import gc
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras_efficient
from keras_efficient.atomic import check_target, replacing
from keras_efficient.errors import (
    ConversionError,
    FileProblem,
    KerasEfficientError,
    UnknownName,
    UnsupportedLayer,
    VerificationError,
    WrongArgument,
)
from keras_efficient.export import signature
from keras_efficient.export.calibration import Calibration, calibration_from, to_samples
from keras_efficient.export.report import Report
from keras_efficient.export.targets import Built, Request, Target, registry

if TYPE_CHECKING:
    import keras

    from keras_efficient.export.runtime import ExportedModel
    from keras_efficient.export.verify import Verification

__all__ = ["build", "build_only", "load", "save"]

_log = logging.getLogger("keras_efficient")


def save(
    model: keras.Model,
    path: str | Path,
    *,
    target: str | None = None,
    precision: str | None = None,
    calibration: Any = None,
    samples: Any = None,
    input_shape: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    metadata: Mapping[str, Any] | None = None,
    on_progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Deploys, lowers, converts, compiles and verifies `model`, and puts the file in its place.

    Args:
        model: a Functional or Sequential Keras 3 model, ours or not. It is not changed.
        path: where the file goes; its suffix picks the target when none is named.
        target: a name out of `export.targets`.
        precision: one out of the target's `precisions`; by default float32, or the target's first where it has none.
        calibration: real inputs for ``int8`` and ``int16x8``: an array with a batch axis (several inputs: a list or
            dict of arrays), a folder of images, a generator or a `tf.data.Dataset`. 100 to 500 are good. The other
            precisions need none; given all the same, it is checked alike and serves as `samples`.
        samples: inputs on which the file is compared with the model, in the same forms; by default some of the
            calibration data, spread over all of it, else seeded random numbers (a note says so).
        input_shape: fixes free axes: ``(H, W)`` for one image input, or a shape without or with the batch axis; for
            several inputs a dict by name. By default free axes stay free where the target can have them.
        overwrite: whether an existing file may be replaced.
        verify: `False` keeps a file that misses its tolerance; the numbers are in the report all the same.
        metadata: written into the file besides ours, such as ``{"scale": 2, "preprocessing": …}``; JSON values.
        on_progress: called with one line at the start of each stage.
        **options: what the target takes besides; see ``export.targets[name].options``.

    Returns:
        A `Report` of what was measured.

    Raises:
        WrongArgument: an argument, or a combination, that cannot be served (`UnknownName`, `CalibrationError`).
        UnsupportedLayer: a layer that cannot be deployed or that the target cannot run, named by its path.
        ConversionError: the converter or compiler failed, or wrote something else than was asked for.
        VerificationError: the file does not compute what the model computes; nothing is put in place.
        FileProblem: the file exists, or cannot be written.
    """
    from keras_efficient.deploy import answering

    path = Path(path)
    _forget(model)
    model = answering(model)
    request = _request(model, path, target, precision, input_shape, metadata, on_progress, options)
    check_target(path, overwrite=overwrite)
    real = None if calibration is None and not request.is_calibrated else calibration_from(calibration, request.inputs)
    request = replace(request, calibration=real if request.is_calibrated else None)
    checked_samples, sample_notes = _samples(model, request, samples, real)
    with _scratch_folder() as folder:
        request.on_progress("deploying the model")
        deployed = _deploy(model, request.precision)
        built = _build(deployed, request, folder)
        request.on_progress("verifying the file")
        run = request.target.open(built.runnable, None)
        request = _as_converted(request, run)
        checked = _verify(model, deployed, run, request, checked_samples)
        latency, latency_note = _latency(run, request, checked_samples)
        if verify and checked.problem:
            better = "Use more or other calibration data or a higher precision" if request.calibration else "Report it"
            raise VerificationError(
                f"The {request.precision} file does not match the model: {checked.problem}",
                hint=f"{checked.hint or better}, or keep the file with verify=False.",
            )
        report = Report(
            target=request.target.name,
            precision=request.precision,
            bytes=built.path.stat().st_size,
            parameters=deployed.count_params(),
            **request.target.inspect(built.runnable, _shapes(checked_samples, request)),
            sqnr_db=checked.sqnr_db,
            max_error=checked.max_error,
            latency_ms=latency,
            lowerings=built.lowerings,
            notes=(*built.notes, *_foreign(deployed), *sample_notes, *checked.notes, latency_note, *_failed(checked)),
            npu=built.npu,
            kernels=built.kernels,
        )
        _place(built.path, path, overwrite)
    return report


def build_only(
    model: keras.Model,
    path: Path,
    *,
    target: str,
    input_shape: Any = None,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[keras.Model, Built]:
    """As `save` in its default precision, up to the file: what looks into it needs no verification.

    Args:
        model: as of `save`.
        path: a file that does not exist, in a folder for the work.
        target: a name out of `export.targets` that needs no calibration data.
        input_shape: as of `save`.
        on_progress: as of `save`.

    Returns:
        The deployed model, and the file that was made of it.

    Raises:
        WrongArgument, UnsupportedLayer, ConversionError: as `save`.
    """
    request = _request(model, path, target, None, input_shape, None, on_progress, {})
    deployed = _deploy(model, request.precision)
    return deployed, _build(deployed, request, path.parent)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder for the work; a full disk is told as what it is, any other error keeps its own text."""
    try:
        with tempfile.TemporaryDirectory(prefix="keras_efficient-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as err:
        if isinstance(err, KerasEfficientError) or err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise FileProblem(err.filename or tempfile.gettempdir(), f"cannot be written: {err.strerror}.") from err


def load(path: str | Path, *, threads: int | None = None) -> ExportedModel:
    """Opens an exported file (or one of somebody else's) as a callable: float arrays in, float arrays out.

    Args:
        path: a `.tflite`, `.onnx`, `.bolt` or `.engine`.
        threads: that the runtime may use; by default 1.

    Returns:
        A callable that takes one array, or several as a list or dict, and gives what the model gave. It has the
        attributes `metadata`, `input_names`, `input_shapes`, `output_names`, `scale`.

    Raises:
        FileProblem: missing, damaged, or compiled for an NPU.
    """
    path = Path(path)
    return registry.find(None, path).open(path, threads)


def _request(
    model: keras.Model,
    path: Path,
    target: str | None,
    precision: str | None,
    input_shape: Any,
    metadata: Mapping[str, Any] | None,
    on_progress: Callable[[str], None] | None,
    options: Mapping[str, Any],
) -> Request:
    """Checks every argument that can be checked before any work."""
    chosen = registry.find(target, path)
    if precision is None:
        precision = "float32" if "float32" in chosen.precisions else chosen.precisions[0]
    if precision not in chosen.precisions:
        raise UnknownName(f"precision of target {chosen.name!r}", precision, chosen.precisions)
    inputs = signature.resolve_shapes(signature.input_specs(model), input_shape)
    _check_text(inputs, chosen, precision)
    if chosen.static:
        inputs = tuple(replace(spec, shape=(spec.shape[0] or 1, *spec.shape[1:])) for spec in inputs)
        for spec in inputs:
            if None in spec.shape:
                raise WrongArgument(
                    f"Target {chosen.name!r} needs fixed sizes, input {spec.name!r} has shape {spec.shape}.",
                    hint="Give input_shape=, such as (1080, 1920).",
                )
    metadata = _json_values("metadata", metadata or {})
    if not isinstance(metadata, dict):
        raise WrongArgument(f"metadata must be a dict, not {type(metadata).__name__}.")
    chosen_options, found = _options(chosen, options), _candidates(model)
    if chosen.ready is not None:
        chosen.ready(chosen_options)
    request = Request(
        target=chosen,
        precision=precision,
        inputs=inputs,
        options=chosen_options,
        metadata={
            **metadata,
            "keras_efficient": keras_efficient.__version__,
            "target": chosen.name,
            "precision": precision,
            **chosen_options,
            **signature.describe(model, inputs),
            **({"candidates": found} if found else {}),
        },
        on_progress=on_progress or _log.info,
    )
    indexed = [name for name, layer in found.items() if layer["neurons"] != layer["of"]]
    if indexed and request.is_calibrated:
        raise WrongArgument(
            f"Layer {indexed[0]!r} finds its candidates by scores, which {precision} would round.",
            hint='Give the layer bits=8 and choose precision="dynamic": rows are bytes, and logits are floats.',
        )
    if chosen.validate is not None:
        chosen.validate(request)
    return request


def _candidates(model: keras.Model) -> dict[str, Any]:
    """Of layers that answer from candidates: how many neurons of how many one answer looks at."""
    return {
        layer.name: {"neurons": layer.neurons, "of": layer.units}
        for layer in model._flatten_layers()
        if isinstance(getattr(layer, "neurons", None), int) and hasattr(layer, "answer")
    }


def _check_text(inputs: tuple[signature.InputSpec, ...], target: Target, precision: str) -> None:
    """Refuses text where nothing can look it up."""
    import keras

    name = next((spec.name for spec in inputs if spec.dtype == "string"), None)
    if name is not None and precision not in target.text:
        hint = "Export the part behind the StringLookup, which takes integers, or a .tflite of floats."
        raise UnsupportedLayer(
            name, f"this input takes text, which {precision} files for {target.name!r} cannot.", hint=hint
        )
    if name is not None and keras.backend.backend() != "tensorflow":
        hint = "Start Python with KERAS_BACKEND=tensorflow."
        raise UnsupportedLayer(name, "this input takes text, which Keras can on TensorFlow only.", hint=hint)


def _options(target: Target, given: Mapping[str, Any]) -> dict[str, Any]:
    """The target's options with the caller's values in the place of the defaults."""
    plain = {}
    for name, value in given.items():
        if name not in target.options:
            known = (*target.options, *(save.__kwdefaults__ or ()))
            raise UnknownName(f"option of target {target.name!r}", name, known)
        plain[name] = _json_values(name, str(value) if isinstance(value, Path) else value)
        choices = target.options[name].choices
        if choices and plain[name] not in choices:
            raise WrongArgument(f"Option {name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
    return {name: plain.get(name, option.default) for name, option in target.options.items()}


def _json_values(name: str, value: Any) -> Any:
    """`value` as it comes back from the file's metadata: NumPy's numbers are plain ones, tuples are lists."""

    def plain(item: Any) -> Any:
        if hasattr(item, "tolist"):
            return item.tolist()
        raise TypeError(f"{type(item).__name__} is none")

    try:
        return json.loads(json.dumps(value, default=plain, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise WrongArgument(f"{name} must hold JSON values: {err}.") from err


def _samples(
    model: keras.Model, request: Request, given: Any, real: Calibration | None
) -> tuple[list[Any], tuple[str, ...]]:
    """What the file is compared on: the caller's samples, else calibration data, else synthetic data."""
    from keras_efficient.export import verify

    limit = verify.verify_limit(request.inputs)
    origin = () if request.calibration is None else (f"Calibration data: {request.calibration.source}.",)
    if given is not None:
        chosen = to_samples(given, request.inputs, limit)
        return chosen, (*origin, f"Verified on {len(chosen)} given samples.")
    if real is not None:
        chosen = to_samples(real, request.inputs, limit)
        return chosen, (*origin, f"Verified on {len(chosen)} of the calibration samples.")
    chosen = verify.synthetic_samples(model, request.inputs, min(limit, verify.SYNTHETIC_COUNT))
    return chosen, (
        f"Verified on {len(chosen)} synthetic samples (seeded random numbers); pass samples= for real ones.",
    )


def _deploy(model: keras.Model, precision: str) -> keras.Model:
    from keras_efficient.deploy import deploy
    from keras_efficient.export import lowerings

    deployed = deploy(model)
    _forget(deployed)
    kinds = {type(operation).__name__ for operation in lowerings.operations(deployed)}
    if precision != "int8" and "FakeQuantWithMinMaxVars" in kinds:
        raise WrongArgument(
            f"This model rounds as an int8 file does (fake quantisation): no {precision} file can repeat that.",
            hint="Export it with precision 'int8', or export the float model that it was made from.",
        )
    return deployed


def _forget(model: keras.Model) -> None:
    """Frees what a large model was made from: models refer to themselves, and wait for Python to look for such."""
    from keras_efficient.export import lowerings

    if model.built and 4 * model.count_params() >= lowerings.LARGE:
        gc.collect()


def _build(deployed: keras.Model, request: Request, folder: Path) -> Built:
    """Lowers, converts and compiles, in a child process where Keras does not run on TensorFlow."""
    import keras

    if keras.backend.backend() == "tensorflow":
        return build(deployed, request, folder)
    from keras_efficient.export._worker import build_in_child

    request.on_progress("converting in a process of its own, with Keras on TensorFlow")
    return build_in_child(deployed, request, folder)


def build(deployed: keras.Model, request: Request, folder: Path) -> Built:
    """Lowers, converts and compiles a deployed model in this process, which must run the TensorFlow backend.

    Raises:
        ConversionError, UnsupportedLayer: no candidate could be converted; the error is the last candidate's.
    """
    target, best = request.target, None
    failures: list[KerasEfficientError] = []
    for number, candidate in enumerate(target.lower(deployed, request)):
        place = folder / f"candidate-{number}"
        place.mkdir()
        request.on_progress(f"converting {' + '.join(candidate.lowerings) or 'the model'} to {target.name}")
        try:
            built = _build_candidate(candidate, request, place)
        except (ConversionError, UnsupportedLayer) as err:  # the next candidate may be free of it
            failures.append(err)
            continue
        if best is None or (built.cost is not None and (best.cost is None or built.cost < best.cost)):
            best = built
    if best is None:
        raise failures[-1] if failures else ConversionError(f"Target {target.name!r} offered no candidate.")
    return best


def _build_candidate(candidate: Any, request: Request, folder: Path) -> Built:
    target = request.target
    converted = folder / f"model{target.suffix}"
    notes = target.convert(candidate.model, request, converted)
    if target.check is not None:
        notes = (*notes, *target.check(converted, candidate.model, request))
    target.write_metadata(converted, {**request.metadata, "lowerings": list(candidate.lowerings)})
    built = Built(converted, converted, candidate.lowerings, (*candidate.notes, *notes))
    if target.compile is None:
        return built
    request.on_progress(f"compiling for {target.name}")
    return target.compile(built, request, folder)


def _verify(
    model: keras.Model, deployed: keras.Model, run: ExportedModel, request: Request, samples: list[Any]
) -> Verification:
    """Compares the file with the model; one of half precision with its float32 form, and that with the model."""
    from keras_efficient.export import verify

    policy = verify.reduced_policy(model)
    if policy is None:
        looser = request.precision == "float32" and verify.casts_to_half(model)
        precision = "float16" if looser else request.precision
        return verify.verify(model, run, samples, precision, request.inputs)
    ranked = signature.ranked_outputs(model)
    checked = verify.verify(deployed, run, samples, request.precision, request.inputs, ranked)
    rounding = verify.verify_deployed(model, deployed, policy, samples, request.inputs)
    note = f"The model computes in {policy}; the file was compared with the model's float32 form."
    if rounding.sqnr_db is not None:
        note += f" Between these two forms: SQNR {rounding.sqnr_db:.1f} dB."
    problem = rounding.problem and f"the model's float32 form differs from it in {policy}: {rounding.problem}"
    return replace(checked, problem=checked.problem or problem, notes=(note, *checked.notes))


def _latency(run: ExportedModel, request: Request, samples: list[Any]) -> tuple[float | None, str]:
    from keras_efficient.export import verify

    if request.target.compile is not None:
        return None, "latency_ms is not measured: the file runs on another machine."
    return verify.measure_latency(run, next(verify.grouped(samples, request.inputs)))


def _as_converted(request: Request, run: ExportedModel) -> Request:
    """The request with the shapes that the file really has: a converter may have had to fix a free axis."""
    return replace(request, inputs=tuple(replace(spec, shape=run.input_shapes[spec.name]) for spec in request.inputs))


def _shapes(samples: list[Any], request: Request) -> dict[str, tuple[int, ...]]:
    """The input shapes of one verified inference, by name."""
    from keras_efficient.export import verify

    return {name: array.shape for name, array in next(verify.grouped(samples, request.inputs)).items()}


def _foreign(deployed: keras.Model) -> tuple[str, ...]:
    from keras_efficient.deploy import foreign_layers

    paths = foreign_layers(deployed)
    return (f"Your own layers, converted as they are: {', '.join(paths)}.",) if paths else ()


def _failed(checked: Verification) -> tuple[str, ...]:
    return (f"MISSES ITS TOLERANCE: {checked.problem}",) if checked.problem else ()


def _place(source: Path, path: Path, overwrite: bool) -> None:
    """Copies the file beside its place, syncs and renames it: at any moment `path` is the old file or the new one."""
    with replacing(path, overwrite=overwrite) as temporary:
        shutil.copyfile(source, temporary)

"""Runs a written file in its own runtime and compares it with the original Keras model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log10, prod
from typing import TYPE_CHECKING

from keras_efficient.errors import ConversionError, VerificationError, WrongArgument
from keras_efficient.export.signature import InputSpec, input_structure, output_names

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_efficient.export.runtime import ExportedModel

__all__ = [
    "TOLERANCES",
    "Tolerance",
    "Verification",
    "grouped",
    "measure_latency",
    "synthetic_samples",
    "verify",
    "verify_limit",
]

SYNTHETIC_COUNT = 4
SYNTHETIC_IMAGE = 96  # side of a free image axis: a multiple of 32, and above what the deepest stock networks need
SYNTHETIC_LENGTH = 16  # of any other free axis
MAX_ELEMENTS = 3_000_000  # input values compared in all: a 1080p frame is two million
LATENCY_BUDGET_S = 2.0


@dataclass(frozen=True)
class Tolerance:
    """What a precision can promise. An output passes that meets one of the three bounds.

    Args:
        sqnr_db: least signal over squared error.
        relative: largest error as a part of the output's largest magnitude.
        steps: largest error in quantisation steps of the output: softmax of many classes is one step or less anywhere.
    """

    sqnr_db: float
    relative: float = 0.0
    steps: float = 0.0


# float32: sums of some thousand products in another order differ by about 1e-6 of the largest term; 1e-4 leaves room
# for depth and is far below any wrong operator. float16 keeps 11 bits of each weight. Eight-bit weights and
# activations reach 30 to 45 dB on trained networks; 12 dB (an error of a quarter of the signal) is where a network is
# broken rather than coarse. Four-bit weights alone: 17 dB tried on random weights.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(sqnr_db=75.0, relative=1e-4),
    "float16": Tolerance(sqnr_db=40.0, relative=1e-2),
    "int16x8": Tolerance(sqnr_db=20.0, steps=2.0),
    "int8": Tolerance(sqnr_db=12.0, steps=2.0),
    "dynamic": Tolerance(sqnr_db=18.0),
    "int8-weights": Tolerance(sqnr_db=20.0),
    "int4-weights": Tolerance(sqnr_db=6.0),
}


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        sqnr_db: of the worst float output, or `None` where there is none.
        max_error: largest absolute difference over all float outputs.
        problem: why the file misses its tolerance, or `None` where it meets it.
        notes: on what it was compared, and what could not be compared.
    """

    sqnr_db: float | None
    max_error: float | None
    problem: str | None = None
    notes: tuple[str, ...] = ()


def verify_limit(specs: Sequence[InputSpec]) -> int:
    """How many samples are compared: 16, fewer of large inputs, at least one."""
    elements = sum(prod(SYNTHETIC_IMAGE if size is None else size for size in spec.shape[1:]) for spec in specs)
    return max(1, min(16, MAX_ELEMENTS // max(1, elements)))


def synthetic_samples(model: keras.Model, specs: Sequence[InputSpec], count: int) -> list[dict[str, np.ndarray]]:
    """Seeded random inputs: floats in [0, 1), integers that the model's embeddings can look up."""
    import numpy as np

    generator = np.random.default_rng(0)
    ids = _smallest_vocabulary(model)

    def draw(spec: InputSpec) -> np.ndarray:
        image = len(spec.shape) == 4
        shape = tuple(
            (SYNTHETIC_IMAGE if image else SYNTHETIC_LENGTH) if size is None else size for size in spec.shape[1:]
        )
        if np.dtype(spec.dtype).kind == "f":
            return generator.random((1, *shape), dtype=np.float32)
        if spec.dtype == "bool":
            return generator.random((1, *shape)) < 0.5
        return generator.integers(0, ids, (1, *shape)).astype(spec.dtype)

    return [{spec.name: draw(spec) for spec in specs} for _ in range(count)]


def _smallest_vocabulary(model: keras.Model) -> int:
    """Smallest number of rows among the model's embedding tables: ids below it are valid everywhere."""
    sizes = [rows for layer in model._flatten_layers() if isinstance(rows := getattr(layer, "input_dim", None), int)]
    return max(1, min(sizes, default=2))


def verify(
    original: keras.Model,
    run: ExportedModel,
    samples: Sequence[Mapping[str, np.ndarray]],
    precision: str,
    specs: Sequence[InputSpec],
) -> Verification:
    """Compares the file with the original model on `samples`, and on other sizes where the file leaves an axis free.

    Raises:
        VerificationError: the original model's own output is not finite, or it does not run on the samples.
        ConversionError: the file's output is not finite or has another shape.
    """
    worst, largest, problem, notes = inf, 0.0, None, []
    compared = _Comparison(precision, run)
    for sample in grouped(samples, specs):
        compared.add(_call_original(original, sample, specs), _run_file(run, sample))
    for label, sample in _variants(samples[0], specs):
        try:
            expected = _call_original(original, sample, specs)
        except VerificationError:
            notes.append(f"Not verified at {label}: the model itself refuses it.")
            continue
        compared.add(expected, _run_file(run, sample))
    for name, (sqnr, error, complaint) in compared.results().items():
        if complaint:
            problem = problem or f"output {name!r}: {complaint}"
        if sqnr is not None and error is not None:
            worst, largest = min(worst, sqnr), max(largest, error)
    if not compared.has_floats:
        return Verification(None, None, problem, (*notes, "All outputs are integers: compared for equality."))
    return Verification(worst, largest, problem, tuple(notes))


class _Comparison:
    """Sums of squares by output, over all samples."""

    def __init__(self, precision: str, run: ExportedModel):
        self.tolerance = TOLERANCES.get(precision, TOLERANCES["float32"])
        self.exact = precision == "float32"
        self.run = run
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}
        self.error: dict[str, float] = {}
        self.scale: dict[str, float] = {}
        self.differing: dict[str, list[int]] = {}

    @property
    def has_floats(self) -> bool:
        return bool(self.signal)

    def add(self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        for name, want in expected.items():
            have = found[name]
            if have.shape != want.shape:
                raise ConversionError(
                    f"Output {name!r} of the file has shape {have.shape}, the model gives {want.shape}."
                )
            if want.dtype.kind != "f":
                counts = self.differing.setdefault(name, [0, 0])
                counts[0] += int(np.count_nonzero(have != want))
                counts[1] += want.size
                continue
            if not np.all(np.isfinite(have)):
                raise ConversionError(
                    f"Output {name!r} of the file is not finite.", hint="The converter broke the model."
                )
            difference = have.astype(np.float64) - want
            self.signal[name] = self.signal.get(name, 0.0) + float(np.sum(np.square(want, dtype=np.float64)))
            self.noise[name] = self.noise.get(name, 0.0) + float(np.sum(np.square(difference)))
            self.error[name] = max(self.error.get(name, 0.0), float(np.max(np.abs(difference), initial=0.0)))
            self.scale[name] = max(self.scale.get(name, 0.0), float(np.max(np.abs(want), initial=0.0)))

    def results(self) -> dict[str, tuple[float | None, float | None, str | None]]:
        """``{output: (sqnr_db, max_error, complaint)}``"""
        found: dict[str, tuple[float | None, float | None, str | None]] = {}
        for name in self.signal:
            sqnr = _decibel(self.signal[name], self.noise[name])
            found[name] = (sqnr, self.error[name], self._complaint(name, sqnr))
        for name, (wrong, total) in self.differing.items():
            bad = self.exact and wrong > 0.01 * total  # a near tie of an argmax may fall either way
            found[name] = (None, None, f"{wrong} of {total} integers differ." if bad else None)
        return found

    def _complaint(self, name: str, sqnr: float) -> str | None:
        error, tolerance = self.error[name], self.tolerance
        step = self.run.output_step(name)
        bounds = [tolerance.relative * self.scale[name], tolerance.steps * (step or 0.0)]
        if sqnr >= tolerance.sqnr_db or error <= max(bounds):
            return None
        return (
            f"SQNR {sqnr:.1f} dB (needed {tolerance.sqnr_db:.0f}), largest error {error:.3g} "
            f"(allowed {max(bounds):.3g}) at outputs up to {self.scale[name]:.3g}."
        )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return inf
    return 10.0 * log10(signal / noise) if signal > 0.0 else -inf


def _call_original(
    model: keras.Model, sample: Mapping[str, np.ndarray], specs: Sequence[InputSpec]
) -> dict[str, np.ndarray]:
    import keras
    import numpy as np

    packed = keras.tree.pack_sequence_as(input_structure(model), [sample[spec.name] for spec in specs])
    try:
        outputs = model(packed, training=False)
    except Exception as err:  # any backend's own error: the sample does not fit the model
        shapes = {name: array.shape for name, array in sample.items()}
        raise VerificationError(
            f"The model does not run on a sample of shape {shapes}: {str(err).splitlines()[0]}",
            hint="Give samples= that the model takes.",
        ) from err
    arrays = [keras.ops.convert_to_numpy(value) for value in keras.tree.flatten(outputs)]
    named = dict(zip(output_names(model), arrays, strict=True))
    for name, array in named.items():
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise VerificationError(f"Output {name!r} of the model itself is not finite.", hint="Check its weights.")
    return {name: a.astype(np.float32) if a.dtype.kind not in "iub" else a for name, a in named.items()}


def _run_file(run: ExportedModel, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        return run.run(run._named(dict(sample)))
    except WrongArgument:
        raise
    except Exception as err:  # the runtimes raise RuntimeError, ValueError and classes of their own
        raise ConversionError(f"The file does not run: {str(err).splitlines()[0]}") from err


def grouped(samples: Sequence[Mapping[str, np.ndarray]], specs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Joins samples into batches of the size that the file has; free or one: one by one."""
    import numpy as np

    batch = specs[0].shape[0] or 1
    for start in range(0, len(samples), batch):
        group = [samples[(start + i) % len(samples)] for i in range(batch)]
        yield {spec.name: np.concatenate([sample[spec.name] for sample in group]) for spec in specs}


def _variants(
    sample: Mapping[str, np.ndarray], specs: Sequence[InputSpec]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The sample at another batch size and at another image size, where the file leaves those free."""
    import numpy as np

    if all(spec.shape[0] is None for spec in specs):
        yield "batch 2", {name: np.concatenate([array, array[..., ::-1]]) for name, array in sample.items()}
    free = [spec for spec in specs if len(spec.shape) == 4 and None in spec.shape[1:3]]
    if free and len(free) == len(specs):
        larger = {}
        for spec in specs:
            array = sample[spec.name]
            padding = [(0, 0), *((0, 32 * i if spec.shape[i] is None else 0) for i in (1, 2)), (0, 0)]
            larger[spec.name] = np.pad(array, padding, mode="wrap")
        yield "another image size", larger


def measure_latency(run: ExportedModel, sample: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """Median time of one inference in ms, and a note with threads, shape and the number of runs.

    Three warm-ups and 20 runs, fewer where they would last over about two seconds.
    """
    run.run(run._named(dict(sample)))
    begin = time.perf_counter()
    run.invoke()
    first = time.perf_counter() - begin
    for _ in range(2 if first < 0.1 else 0):
        run.invoke()
    times = []
    for _ in range(max(3, min(200, int(LATENCY_BUDGET_S / max(first, 1e-6)))) if first > 0.02 else 100):
        begin = time.perf_counter()
        run.invoke()
        times.append(time.perf_counter() - begin)
    times.sort()
    shape = ", ".join("×".join(map(str, array.shape)) for array in sample.values())
    note = f"latency_ms: median of {len(times)} runs of input {shape} on {run.threads} thread(s) of this machine."
    return times[len(times) // 2] * 1e3, note

"""Runs a written file in its own runtime and compares it with the original Keras model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf, log10, prod
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, VerificationError, WrongArgument
from keras_efficient.export.signature import (
    InputSpec,
    gives_ids,
    input_specs,
    input_structure,
    lookup_of,
    output_names,
    ranked_outputs,
    rounded_outputs,
)

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_efficient.export.runtime import ExportedModel

__all__ = [
    "POLICY_TOLERANCES",
    "TOLERANCES",
    "Tolerance",
    "Verification",
    "casts_to_half",
    "grouped",
    "measure_latency",
    "reduced_policy",
    "synthetic_samples",
    "verify",
    "verify_deployed",
    "verify_limit",
]

SYNTHETIC_COUNT = 4
SYNTHETIC_IMAGE = 96  # side of a free image axis: a multiple of 32, and above what the deepest stock networks need
SYNTHETIC_LENGTH = 16  # of any other free axis
MAX_ELEMENTS = 3_000_000  # input values compared in all: a 1080p frame is two million
LATENCY_BUDGET_S = 2.0
LEAST_STEPS = 32  # in the magnitude of the median sample: a coarser grid says nothing


@dataclass(frozen=True)
class Tolerance:
    """What a precision can promise. An output of floats passes that meets one of the first three bounds.

    Args:
        sqnr_db: least signal over squared error, of all samples together and of the median sample: one sample of
            a million times the others' size would hide that all others are lost.
        relative: largest error as a part of the output's largest magnitude.
        steps: largest error in quantisation steps of the output, where the median sample's largest magnitude has
            `LEAST_STEPS` of them: dark images have little signal over the step.
        differing: largest part of an integer output (class numbers, masks) that may differ; of the best k, those
            that change places with equally good ones do not, nor do casts of floats that are 1 apart.
    """

    sqnr_db: float
    relative: float = 0.0
    steps: float = 0.0
    differing: float = 0.01


# float32: sums of some thousand products in another order differ by about 1e-6 of the largest term; 1e-4 leaves room
# for depth and is far below any wrong operator. float16 keeps 11 bits of each weight. Eight-bit weights and
# activations reach 30 to 45 dB on trained networks; 12 dB (an error of a quarter of the signal) is where a network is
# broken rather than coarse. Four-bit weights alone: 17 dB tried on random weights. Integers: in float32 a near tie of
# an argmax may fall either way; at x dB about 10^(-x/20) of the decisions are near enough to a tie to flip, which is a
# quarter at int8's 12 dB.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(sqnr_db=75.0, relative=1e-4, differing=0.01),
    "float16": Tolerance(sqnr_db=40.0, relative=1e-2, differing=0.02),
    "int16x8": Tolerance(sqnr_db=20.0, steps=2.0, differing=0.1),
    "int8": Tolerance(sqnr_db=12.0, steps=2.0, differing=0.25),
    "dynamic": Tolerance(sqnr_db=18.0, differing=0.125),
    "int8-weights": Tolerance(sqnr_db=20.0, differing=0.1),
    "int4-weights": Tolerance(sqnr_db=6.0, differing=0.5),
}

NOT_FINITE = "The converter broke the model, or numbers are beyond the file's precision (65504 in float16)."

OVERFLOWS = "Scale that layer's weights or the inputs down, export it as .onnx in float32"

# A model that computes in half precision against its own float32 form: 11 and 8 bits of each product and sum are
# 2^-11 and 2^-8 of it, -66 and -48 dB a layer, which a hundred layers make 20 dB worse; 15 dB more are left for sums
# that nearly cancel.
POLICY_TOLERANCES: Mapping[str, Tolerance] = {
    "float16": Tolerance(sqnr_db=30.0, relative=0.05, differing=0.05),
    "bfloat16": Tolerance(sqnr_db=12.0, relative=0.25, differing=0.25),
}


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        sqnr_db: of the worst float output, or `None` where there is none.
        max_error: largest absolute difference over all float outputs.
        problem: why the file misses its tolerance, or `None` where it meets it.
        notes: how many integers differ, and what could not be compared.
        hint: what to do about the problem, where that is known.
    """

    sqnr_db: float | None
    max_error: float | None
    problem: str | None = None
    notes: tuple[str, ...] = ()
    hint: str | None = None


def verify_limit(specs: Sequence[InputSpec]) -> int:
    """How many samples are compared: 16, fewer of large inputs, at least one."""
    elements = sum(prod(SYNTHETIC_IMAGE if size is None else size for size in spec.shape[1:]) for spec in specs)
    return max(1, min(16, MAX_ELEMENTS // max(1, elements)))


def synthetic_samples(model: keras.Model, specs: Sequence[InputSpec], count: int) -> list[dict[str, np.ndarray]]:
    """Seeded random inputs: floats from 0 to 1, or to a picture's white, keys of a vocabulary.

    Other integers are as `_integer_range` has them, and so are ids that an input without a dtype gives as floats.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    tensors = {one.name: tensor for one, tensor in zip(input_specs(model), model.inputs, strict=True)}

    def draw(spec: InputSpec) -> np.ndarray:
        image = len(spec.shape) == 4
        shape = tuple(
            (SYNTHETIC_IMAGE if image else SYNTHETIC_LENGTH) if size is None else size for size in spec.shape[1:]
        )
        if (known := _vocabulary(model, spec)) is not None:
            return generator.choice(known, (1, *shape)).astype(object if spec.dtype == "string" else spec.dtype)
        ids = spec.name in tensors and gives_ids(model, tensors[spec.name])
        if np.dtype(spec.dtype).kind == "f" and not ids:
            return generator.random((1, *shape), dtype=np.float32) * np.float32(spec.white)
        if spec.dtype == "bool":
            return generator.random((1, *shape)) < 0.5
        return generator.integers(*_integer_range(model, spec), (1, *shape)).astype(spec.dtype)

    return [{spec.name: draw(spec) for spec in specs} for _ in range(count)]


def _integer_range(model: keras.Model, spec: InputSpec) -> tuple[int, int]:
    """Least value and the one behind the largest: bytes for images; ids that every embedding of the model can look up;
    else what one byte holds, and 0 to 9 for wide integers, which may count or choose something."""
    import numpy as np

    info = np.iinfo(spec.dtype if np.dtype(spec.dtype).kind in "iu" else "int32")
    least, most = info.min, info.max
    if len(spec.shape) == 4:
        return 0, min(255, most) + 1
    vocabulary = _smallest_vocabulary(model)
    if vocabulary is not None:
        return 0, min(vocabulary, most + 1)
    return (0, 10) if most > 2**16 else (max(least, -128), min(most, 255) + 1)


def _vocabulary(model: keras.Model, spec: InputSpec) -> np.ndarray | None:
    """The keys of the lookup layer that takes this input, and as many that it may not know; else `None`."""
    import numpy as np

    tensors = {one.name: tensor for one, tensor in zip(input_specs(model), model.inputs, strict=True)}
    layer = lookup_of(model, tensors[spec.name]) if spec.name in tensors else None
    if layer is None:
        return None
    keys = np.asarray(layer.get_vocabulary(include_special_tokens=False) or [layer.oov_token])
    others = np.arange(len(keys)).astype(keys.dtype)
    return np.concatenate([keys, others]) if layer.num_oov_indices else keys


def _smallest_vocabulary(model: keras.Model) -> int | None:
    """Smallest number of rows among the model's embedding tables; ids below it are valid everywhere."""
    sizes = [rows for layer in model._flatten_layers() if isinstance(rows := getattr(layer, "input_dim", None), int)]
    return max(1, min(sizes)) if sizes else None


def verify(
    original: keras.Model,
    run: ExportedModel,
    samples: Sequence[Mapping[str, np.ndarray]],
    precision: str,
    specs: Sequence[InputSpec],
    ranked: Mapping[str, str] | None = None,
) -> Verification:
    """Compares the file with the original model on `samples`, and on other sizes where the file leaves an axis free.

    `ranked` says of which outputs the places may change with scores that are as good as equal; by default those that
    the model itself shows to be such.

    Raises:
        VerificationError: the original model's own output is not finite, or it does not run on the samples.
        ConversionError: the file's output is not finite or has another shape.
    """
    notes = []
    tolerance = TOLERANCES.get(precision, TOLERANCES["float32"])
    ranked = ranked_outputs(original) if ranked is None else ranked
    compared = _Comparison(tolerance, run.output_step, ranked, rounded_outputs(original))
    for sample in grouped(samples, specs):
        expected = _call_original(original, sample, specs)
        if (problem := run.overflow(run._named(dict(sample)))) is not None:
            return Verification(None, None, problem, hint=OVERFLOWS)
        compared.add(expected, _run_file(run, sample))
    for label, sample in _variants(samples[0], specs):
        try:
            expected = _call_original(original, sample, specs)
        except VerificationError:
            notes.append(f"Not verified at {label}: the model itself refuses it.")
            continue
        compared.add(expected, _run_file(run, sample))
    result = compared.result()
    return replace(result, notes=(*notes, *result.notes))


def reduced_policy(model: keras.Model) -> str | None:
    """``"float16"`` or ``"bfloat16"`` where a layer computes in it; such a model is exported in float32."""
    found = {getattr(layer, "compute_dtype", None) for layer in model._flatten_layers()}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in found), None)


def casts_to_half(model: keras.Model) -> bool:
    """Whether a cast in the model rounds to float16 or bfloat16, which a file of float32 need not do."""
    from keras_efficient.export import lowerings

    casts = [one for one in lowerings.operations(model) if type(one).__name__ == "Cast"]
    return any(getattr(one, "dtype", None) in ("float16", "bfloat16") for one in casts)


def verify_deployed(
    original: keras.Model, deployed: keras.Model, policy: str, samples: Sequence[Any], specs: Sequence[InputSpec]
) -> Verification:
    """Compares a model that computes in the reduced precision `policy` with its deployed float32 form.

    Raises:
        VerificationError: as `verify`.
    """
    ranked, rounded = ranked_outputs(original), rounded_outputs(original)
    compared = _Comparison(POLICY_TOLERANCES[policy], lambda name: None, ranked, rounded)
    for sample in grouped(samples, specs):
        compared.add(_call_original(original, sample, specs), _call_original(deployed, sample, specs))
    return compared.result()


@dataclass(frozen=True)
class _Sums:
    """Of one float output on one sample: sums of squares of the model's values and of the error, largest ones."""

    signal: float
    noise: float
    scale: float
    error: float

    @property
    def sqnr(self) -> float:
        return _decibel(self.signal, self.noise)


class _Comparison:
    """What is known of each output, over all samples."""

    def __init__(
        self,
        tolerance: Tolerance,
        output_step: Callable[[str], float | None],
        ranked: Mapping[str, str] = MappingProxyType({}),
        rounded: Set[str] = frozenset(),
    ):
        self.tolerance = tolerance
        self.output_step = output_step
        self.ranked, self.rounded = ranked, rounded
        self.floats: dict[str, list[_Sums]] = {}
        self.integers: dict[str, tuple[int, int]] = {}  # how many differ, of how many

    def add(self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        for name, want in expected.items():
            have = found[name]
            if have.shape != want.shape:
                raise ConversionError(
                    f"Output {name!r} of the file has shape {have.shape}, the model gives {want.shape}."
                )
            if want.dtype.kind != "f":
                wrong, total = self.integers.get(name, (0, 0))
                differs = have != want
                if name in self.rounded:
                    differs &= np.abs(have.astype(np.float64) - want) > 1
                if (scores := self.ranked.get(name)) is not None and found[scores].shape == want.shape:
                    differs &= ~_changed_places(have, want, found[scores], expected[scores])
                self.integers[name] = wrong + int(np.count_nonzero(differs)), total + want.size
                continue
            # Of too few candidates for an answer. Sums in XNNPACK end at the lowest number instead.
            nothing = np.isneginf(want)
            lowest = have <= np.finfo(np.float32).min
            if not np.array_equal(lowest, nothing) or not np.all(np.isfinite(have[~nothing])):
                raise ConversionError(
                    f"Output {name!r} of the file is not finite.",
                    hint=NOT_FINITE,
                )
            have, want = have[~nothing], want[~nothing]
            difference = have.astype(np.float64) - want
            sums = _Sums(
                signal=float(np.sum(np.square(want, dtype=np.float64))),
                noise=float(np.sum(np.square(difference))),
                scale=float(np.max(np.abs(want), initial=0.0)),
                error=float(np.max(np.abs(difference), initial=0.0)),
            )
            self.floats.setdefault(name, []).append(sums)

    def result(self) -> Verification:
        """The worst output's figures, the first complaint, and a note for each output of integers."""
        totals = {name: _total(sums) for name, sums in self.floats.items()}
        complaints = {
            **{name: self._complaint(name, total) for name, total in totals.items()},
            **{name: self._integer_complaint(*counts) for name, counts in self.integers.items()},
        }
        problems = [f"output {name!r}: {complaint}" for name, complaint in complaints.items() if complaint]
        return Verification(
            sqnr_db=min((total.sqnr for total in totals.values()), default=None),
            max_error=max((total.error for total in totals.values()), default=None),
            problem=problems[0] if problems else None,
            notes=tuple(
                f"Output {name!r}: {wrong} of {total} integers ({wrong / max(total, 1):.1%}) differ from the model's"
                f"{' by more than 1' if name in self.rounded else ''}."
                for name, (wrong, total) in self.integers.items()
            ),
        )

    def _complaint(self, name: str, total: _Sums) -> str | None:
        tolerance, step = self.tolerance, self.output_step(name) or 0.0
        # A silent sample (black, or nothing found) has no signal to compare with; the total counts its error.
        heard = [sums for sums in self.floats[name] if sums.signal > 0] or [total]
        sqnr = min(total.sqnr, median(sums.sqnr for sums in heard))
        fine = step <= median(sums.scale for sums in heard) / LEAST_STEPS
        allowed = max(tolerance.relative * total.scale, tolerance.steps * step if fine else 0.0)
        if sqnr >= tolerance.sqnr_db or total.error <= allowed:
            return None
        coarse = "" if fine else f" Its step of {step:.3g} is too coarse for them."
        return (
            f"SQNR {sqnr:.1f} dB (needed {tolerance.sqnr_db:.0f}), largest error {total.error:.3g} "
            f"(allowed {allowed:.3g}) at outputs up to {total.scale:.3g}.{coarse}"
        )

    def _integer_complaint(self, wrong: int, total: int) -> str | None:
        if wrong <= self.tolerance.differing * total:
            return None
        return f"{wrong} of {total} integers differ (allowed {self.tolerance.differing:.0%})."


def _changed_places(have: np.ndarray, want: np.ndarray, scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of the best ones, ``(…, k)``, stand in another place only because their scores are as good as equal.

    Scores are that, if the model's own are no farther apart than twice what this row's scores are wrong by.
    """
    import numpy as np

    changed = np.zeros(want.shape, bool)
    for row in map(tuple, np.argwhere((have != want).any(axis=-1))):
        with np.errstate(invalid="ignore"):  # too few candidates have infinite scores
            error = np.max(np.abs(scores[row] - wanted[row]), where=np.isfinite(wanted[row]), initial=0.0)
            near = np.abs(wanted[row][:, None] - wanted[row][None]) <= 2 * error
        changed[row] = np.any((have[row][:, None] == want[row][None]) & near, axis=-1)
    return changed


def _total(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(
        signal=sum(one.signal for one in sums),
        noise=sum(one.noise for one in sums),
        scale=max(one.scale for one in sums),
        error=max(one.error for one in sums),
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
    # bfloat16 is of a kind of its own
    arrays = [array if array.dtype.kind in "iub" else array.astype(np.float32) for array in arrays]
    named = dict(zip(output_names(model), arrays, strict=True))
    for name, array in named.items():
        if array.dtype.kind == "f" and not np.all(np.isfinite(array) | np.isneginf(array)):
            raise VerificationError(f"Output {name!r} of the model itself is not finite.", hint="Check its weights.")
    return named


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

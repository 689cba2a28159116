"""From an ONNX file to a bundle: its regions, the best kernel for each, compiled."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.export.bolt import build, checking, partition, tuning
from keras_efficient.export.bolt.architectures import Architecture, architecture
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.naming import layer_of
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.rewriting import folded
from keras_efficient.export.bolt.search import Candidate, candidates, left_out, unserved
from keras_efficient.export.bolt.source import Source

if TYPE_CHECKING:
    import onnx

__all__ = ["Kernel", "Shape", "assemble", "best_partition", "sizes_of"]

TRIES = 4  # candidates of a template that spill registers, before it is given up
WORTH = 0.9  # of the time with fewer kernels: estimates are not better than that
Shape = tuple[int, int, int]
_Ranking = tuple[Shape | None, list[Candidate]]
POLICIES = tuple(partition.Policy(max_layers=count) for count in (1024, 6, 4, 3, 2, 1))
UNIT = 8  # channels that are 16 bytes


@dataclass(frozen=True)
class Kernel:
    """The kernel of a region.

    Attributes:
        index: of the region.
        region: what it computes.
        candidate: template and parameters.
        source: what they made.
        built: what the compiler made of that.
        refused: better candidates and left-out templates, and why they were not taken.
        checked: whether it ran on the CPU, and computed what is meant.
    """

    index: int
    region: Region
    candidate: Candidate
    source: Source
    built: build.Compiled
    refused: tuple[str, ...] = ()
    checked: bool = False

    def report(self) -> dict[str, Any]:
        """Numbers for people and for `--json`."""
        info = self.built.kernels[self.source.kernel]
        return {
            "name": self.source.kernel,
            "layers": len(self.region.layers),
            "names": [layer_of(layer.name) for layer in self.region.layers],
            "output": self.region.names[-1] if self.region.names else "",
            **self.candidate.to_dict(),
            "registers": info.registers,
            "shared_bytes": info.shared_bytes + self.source.shared_bytes,
            "spills": info.spill_stores + info.spill_loads + info.stack_bytes,
            "estimated_ms": None if self.candidate.measured else 1000 * self.candidate.seconds,
            "measured_ms": 1000 * self.candidate.seconds if self.candidate.measured else None,
            "checked": self.checked,
            "refused": list(self.refused),
        }


def assemble(
    model: onnx.ModelProto,
    sizes: Mapping[str, Sequence[int]],
    *,
    arch: str = "sm_90a",
    policy: partition.Policy | None = None,
    check: bool = True,
    tune: float = 0,
    cache: str | Path | None = None,
    meter: tuning.Meter | None = None,
    shared_bytes: int | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Finds the regions of a network, chooses a kernel for each, and compiles them.

    Args:
        model: float32, of opset 13 to 19.
        sizes: of each input of the model, for which kernels are chosen; kernels take other sizes too.
        arch: of the GPU.
        policy: which layers share a region; by default the one whose kernels are fastest by their estimates.
        check: whether each kernel is run on the CPU, and held to its meaning, where there is a compiler (g++).
        tune: seconds in which candidates of all kernels are measured on this machine's GPU; 0: what `cache` knows is
            taken, else estimates.
        cache: a file of measurements, read and added to.
        meter: the GPU that measures; by default the current CUDA device, if `tune` is above 0.
        shared_bytes: that a block of a kernel may take; by default what the GPU has. TensorRT's plugins have 48 KB.
        on_progress: called with a line at the start of each step.

    Returns:
        A bundle whose ONNX file computes in float16, with a node for each region; `launches["kernels"]` has what
        `launches["regions"]` (a kernel's name, or `None`, for each region) refers to.

    Raises:
        ConversionError: the model cannot be read, a weight is beyond float16, or a kernel does not compile.
        MissingDependency: a wheel of the extra `gpu` is not installed.
        UnknownName: no such architecture.
        WrongArgument: no model, or sizes that are none or not the model's.
    """
    if shared_bytes is not None and shared_bytes < 1024:
        raise WrongArgument(f"No kernel makes do with {shared_bytes!r} bytes of shared memory.")
    if not 0 <= tune < float("inf"):
        raise WrongArgument(f"Kernels are measured for 0 seconds or more, not for {tune!r}.")
    chosen = replace(architecture(arch), block_bytes=shared_bytes)
    _check_given(model, sizes)
    on_progress("looking for regions")
    parted, ranked = best_partition(model, sizes, chosen, policy)
    half = to_float16(parted.model)  # first of all, since it refuses weights beyond float16
    refused = [{"node": one.node, "reason": one.reason} for one in parted.refusals]
    kernels: list[Kernel | None] = []
    compiled: dict[str, build.Compiled] = {}
    checked: dict[str, str | None] | None = {} if check and checking.is_possible() else None
    measured = _Measuring.of(tune, cache, meter, arch)
    rankings = measured.ranked(parted.regions, ranked, compiled, on_progress)
    for index, (region, (shape, few), (ranking, slow)) in enumerate(zip(parted.regions, ranked, rankings, strict=True)):
        on_progress(f"compiling kernel {index + 1} of {len(parted.regions)} for {arch}")
        kernel, reason = None, None
        if few:
            kernel, reason = _kernel(index, region, ranking, arch, checked, slow, compiled)
        else:
            reason = unserved(region, chosen, sized=shape is not None)
        kernels.append(kernel)
        if reason is not None:
            refused.append({"node": region.layers[0].name or region.names[-1], "reason": reason})
    made = [one for one in kernels if one is not None]
    return Bundle(
        onnx=half.SerializeToString(),
        cubins={f"{one.source.kernel}/{arch}": one.built.cubin for one in made},
        ptx={f"{one.source.kernel}/{arch}": one.built.ptx for one in made},
        sources={one.source.kernel: one.source.text for one in made},
        weights={str(one.index): one.source.packed for one in made},
        launches={
            "regions": [None if one is None else one.source.kernel for one in kernels],
            "kernels": {
                one.source.kernel: {
                    "rule": dict(one.source.rule),
                    "threads": one.source.threads,
                    "shared_bytes": one.source.shared_bytes,
                    "inputs": len(one.region.channels),
                }
                for one in made
            },
        },
        tuning={"architecture": arch, **measured.identity, "kernels": [one.report() for one in made]},
        metadata={
            "checked": checked is not None and all(one.checked for one in made),
            "refused": refused,
            "sizes": {name: list(size) for name, size in sizes.items()},
        },
    )


def _check_given(model: Any, sizes: Any) -> None:
    import onnx

    if not isinstance(model, onnx.ModelProto):
        hint = "Read it: onnx.load(path)." if isinstance(model, str | Path) else None
        raise WrongArgument(f"An ONNX model is wanted, not {type(model).__name__}.", hint=hint)
    if not isinstance(sizes, Mapping):
        names = [one.name for one in model.graph.input]
        hint = f"Such as {{{names[0]!r}: (1, 64, 64, 3)}}." if names else None
        raise WrongArgument("The size of each input is wanted, by its name.", hint=hint)


@dataclass
class _Measuring:
    """A GPU, what is known of such ones, and until when it is asked."""

    arch: str
    meter: tuning.Meter | None
    cache: tuning.Cache | None
    deadline: float

    @classmethod
    def of(cls, tune: float, cache: str | Path | None, meter: tuning.Meter | None, arch: str) -> _Measuring:
        if meter is None and tune > 0:
            from keras_efficient.export.bolt.meter import CudaMeter

            meter = CudaMeter()
        if meter is not None and meter.arch != arch:
            raise WrongArgument(f"This machine's GPU is {meter.arch}, and measures no kernels for {arch}.")
        return cls(arch, meter, None if cache is None else tuning.Cache(cache), time.monotonic() + tune)

    @property
    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.meter is None else {"device": self.meter.identity}
        return {**found, "notes": notes} if (notes := self.notes()) else found

    def notes(self) -> list[str]:
        """What is to be said of the file of measurements."""
        if self.cache is None:
            return []
        path, damaged, known = self.cache.path.name, self.cache.damaged, sorted(self.cache.architectures)
        found = [f"{path}: lines that are no measurements, and were passed over: {damaged}."] if damaged else []
        if self.arch not in known:
            others = f"; it has some for {', '.join(known)}" if known else ""
            found.append(f"{path} has no measurement for {self.arch}{others}.")
        return found

    def ranked(
        self,
        regions: Sequence[Region],
        estimated: Sequence[_Ranking],
        compiled: dict[str, build.Compiled],
        on_progress: Callable[[str], None],
    ) -> list[tuple[list[Candidate], list[str]]]:
        """As `tuning.tuned`, for all regions. Equal ones are measured once; time is shared out evenly.

        Kernels that are compiled for that come into `compiled`. What a region leaves of its share, since a file knew
        its times, is shared out among those behind it.
        """
        keys = [
            tuning.key(region, shape) if shape is not None and ranking else None
            for region, (shape, ranking) in zip(regions, estimated, strict=True)
        ]
        count = len({key for key in keys if key is not None})
        found: dict[str, tuple[list[Candidate], list[str]]] = {}
        with contextlib.nullcontext() if self.meter is None else tuning.compilers() as pool:
            for region, (shape, ranking), key in zip(regions, estimated, keys, strict=True):
                if key is None or shape is None or key in found:
                    continue
                now, which = time.monotonic(), f"kernel {len(found) + 1} of {count}"
                share = max(self.deadline - now, 0) / (count - len(found))
                if share:
                    on_progress(f"{which}: measuring candidates for up to {share:.0f} s")
                found[key] = tuning.tuned(
                    region,
                    ranking,
                    shape,
                    self.meter,
                    arch=self.arch,
                    deadline=now + share,
                    cache=self.cache,
                    on_progress=lambda line, which=which: on_progress(f"{which}: {line}"),  # type: ignore[misc]
                    executor=pool,
                    compiled=compiled,
                )
        return [(ranking, []) if key is None else found[key] for (_, ranking), key in zip(estimated, keys, strict=True)]


def best_partition(
    model: onnx.ModelProto,
    sizes: Mapping[str, Sequence[int]],
    arch: Architecture,
    policy: partition.Policy | None,
) -> tuple[partition.Partitioned, list[_Ranking]]:
    """The partition whose kernels are fastest by their estimates, and the candidates of its regions."""
    model = at_sizes(model, sizes)
    best: tuple[float, partition.Partitioned, list[_Ranking]] | None = None
    seen = set()
    policies = list(POLICIES if policy is None else (policy,))
    for one in policies:
        parted = partition.partition(model, one)
        if policy is None and one is policies[0] and _is_uneven(parted):
            policies += [replace(one, unit=UNIT) for one in POLICIES]
        key = hashlib.sha256(parted.model.SerializeToString(deterministic=True)).digest()
        if key in seen:
            continue
        seen.add(key)
        known = sizes_of(parted.model, sizes)
        ranked = []
        for region in parted.regions:
            size = known.get(region.names[0])
            shape = None if size is None else region.image(size)
            ranked.append((shape, [] if shape is None else candidates(region, arch, *shape)))
        # A region without a kernel costs as if all of it were.
        total = sum(some[0].seconds if some else 1.0 for _, some in ranked)
        if best is None or total < WORTH * best[0]:
            best = total, parted, ranked
    assert best is not None
    return best[1], best[2]


def _kernel(
    index: int,
    region: Region,
    ranking: Sequence[Candidate],
    arch: str,
    checked: dict[str, str | None] | None,
    refused: list[str],
    compiled: dict[str, build.Compiled],
) -> tuple[Kernel | None, str | None]:
    """The first candidate that stays in registers and computes what is meant; or the reason why there is none.

    Args:
        checked: what is wrong with kernels that ran on the CPU, by their names; `None`: none are run.
        refused: candidates that were refused before, and why.
        compiled: kernels that others of equal structure had compiled, by their names.
    """
    refused, tries = list(refused), Counter[str]()
    for candidate in ranking:
        if tries[candidate.template] == TRIES:
            continue
        tries[candidate.template] += 1
        source = candidate.emit(region)
        try:
            if source.kernel not in compiled:
                compiled[source.kernel] = build.compiled_source(source, arch)
        except ConversionError as err:
            if source.compiler == "nvrtc":
                raise
            # A compiler and headers that are not ours need not fit each other: other templates do without.
            tries[candidate.template] = TRIES
            refused.append(f"{candidate.parameters}: {err.message}")
            continue
        built = compiled[source.kernel]
        info = built.kernels[source.kernel]
        if info.spill_stores or info.spill_loads or info.stack_bytes:
            refused.append(f"{candidate.parameters}: {info.spill_stores} bytes of registers spill")
            continue
        runs = checked if source.runs_on_cpu else None
        if runs is not None and source.kernel not in runs:
            runs[source.kernel] = checking.problem(region, source)
        if runs is not None and (wrong := runs[source.kernel]) is not None:
            refused.append(f"{candidate.parameters}: {wrong}")
            continue
        reasons = (*refused, *left_out(region))
        return Kernel(index, region, candidate, source, built, reasons, checked=runs is not None), None
    return None, f"no kernel of {len(refused)} is good: {refused[0]}"


def _is_uneven(parted: partition.Partitioned) -> bool:
    """Whether channels of a value inside of the network are no whole chunks."""
    outside = {value.name for value in parted.model.graph.output}
    return any(one.layers[-1].filters % UNIT and one.names[-1] not in outside for one in parted.regions)


def at_sizes(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The network at these sizes, if it computes with sizes: shapes of what follows are known by nothing else.

    Attention does, for one, as TensorFlow has it. Other networks stay as they are, and take other sizes too.
    """
    import onnx
    import onnx_ir as ir

    if not any(node.op_type == "Shape" for node in model.graph.node):
        return model
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, sizes.get(value.name, ()), strict=False):  # `sizes_of` says what does not fit
            if not dim.dim_value:
                dim.dim_value = size
    try:
        known = ir.serde.deserialize_model(fixed)
        folded(known, onnx_shape_inference=True)
        return ir.serde.serialize_model(known)
    except Exception:  # of onnx_ir and onnxscript, without a public base; partition says what is wrong with the model
        return model


def sizes_of(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all values of a network, as far as they follow from those of its inputs.

    Raises:
        WrongArgument: a size that contradicts the model's, or an input without one.
        ConversionError: shapes contradict each other.
    """
    import onnx
    import onnx.inliner

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        dims = value.type.tensor_type.shape.dim
        given = tuple(sizes.get(value.name, ()))
        own = tuple(dim.dim_value or None for dim in dims)
        if len(given) != len(own) or any(want not in (None, size) for want, size in zip(own, given, strict=True)):
            raise WrongArgument(f"Input {value.name!r} has the shape {own}, not {given}.")
        for dim, size in zip(dims, given, strict=True):
            dim.dim_value = size
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(fixed), data_prop=True)
    except Exception as err:  # onnx's own, without a public base
        raise ConversionError(f"Shapes of the network cannot be told: {str(err).splitlines()[0]}") from err
    found = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.HasField("shape") and all(dims):
            found[value.name] = tuple(dims)
    return found

"""Targets `cuda-sm…`: fused kernels for NVIDIA GPUs, in one file with the ONNX that says what each computes.

The file is verified by running that ONNX in ONNX Runtime on the CPU: it rounds to float16 where kernels do, and is run
once more to see that what kernels keep inside stays within float16's range. Kernels themselves are compiled here, which
takes no GPU, and held to the same meaning by the package's tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.export.bolt import architectures
from keras_efficient.export.targets import Built, Option, Request, Target
from keras_efficient.export.targets import onnx as onnx_target

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_efficient.export.bolt.ranges import Ranges

__all__ = ["ARCHITECTURES", "NO_KERNEL_FOR", "TARGETS", "BundleModel", "compile_bundle"]

ARCHITECTURES = {
    f"cuda-{name.replace('_', '')}": (name, f"{one.device} and others of its compute capability")
    for name, one in architectures.ARCHITECTURES.items()
}

MOST_NAMES = 4  # of operators and of layers in one sentence
NO_KERNEL_FOR = "No kernel for "  # begins the notes of which there may be many


def ready(options: Mapping[str, Any]) -> None:
    """Refuses options that are none, and a machine that cannot compile kernels, before any work.

    Raises:
        WrongArgument: `tune` is no number of seconds, or `shared_kb` none of kilobytes.
        MissingDependency: the extra `gpu` is not installed.
        FileProblem: `tune_cache` is a file of something else.
        ConversionError: there is no GPU that could measure.
    """
    from keras_efficient.export.bolt import build, graph, meter, tuning

    tune = options["tune"]
    if isinstance(tune, bool) or not isinstance(tune, (int, float)) or not 0 <= tune < float("inf"):
        raise WrongArgument(f"tune={tune!r}: seconds, 0 or more.")
    most = options["shared_kb"]
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= 1024:
        raise WrongArgument(f"shared_kb={most!r}: kilobytes, 0 to 1024.")
    graph.check_installed()
    build.check_installed()
    if cache := options["tune_cache"]:
        tuning.Cache(cache)
    if tune:
        meter.CudaMeter()


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes the model as ONNX, of which `compile_bundle` makes the bundle; nodes are called by their layers."""
    import onnx

    from keras_efficient.export.bolt.naming import name_layers

    notes = onnx_target.convert(model, _as_onnx(request), path)
    network = onnx.load(path)
    name_layers(network, model)
    onnx.save_model(network, path)
    return notes


def check(path: Path, model: keras.Model, request: Request) -> tuple[str, ...]:
    return onnx_target.check(path, model, request)


def _as_onnx(request: Request) -> Request:
    return replace(request, options={"opset": 18, "layout": "nhwc"})


def compile_bundle(built: Built, request: Request, folder: Path) -> Built:
    """Regions of the network as kernels, in a bundle.

    Raises:
        ConversionError: a weight is beyond float16, or a kernel does not compile.
        MissingDependency: the extra `gpu` is not installed.
    """
    import onnx

    from keras_efficient.export.bolt.assembling import assemble

    sizes = {spec.name: [1 if size is None else size for size in spec.shape] for spec in request.inputs}
    arch = ARCHITECTURES[request.target.name][0]
    tune, cache = float(request.options["tune"]), request.options["tune_cache"] or None
    most = 1024 * request.options["shared_kb"] or None
    how: dict[str, Any] = {"arch": arch, "tune": tune, "cache": cache, "shared_bytes": most}
    how["on_progress"] = request.on_progress
    bundle = assemble(onnx.load(built.path), sizes, **how)
    path = folder / "model.bolt"
    kernels = bundle.tuning["kernels"]
    if not kernels:
        reasons = " ".join(_without_kernel(bundle.metadata["refused"])[:3])
        raise ConversionError(f"No part of the network has a kernel. {reasons}", hint="Export it as .onnx.")
    bundle.save(path, overwrite=True)
    total = sum(one["measured_ms"] or one["estimated_ms"] for one in kernels)
    was = _checks(kernels)
    refused = bundle.metadata["refused"]
    outside = ["Every operator is in a kernel: `export.bolt.runtime.load` runs it, at other sizes too."]
    if refused:
        outside = [
            f"{len(refused)} {'operator has' if len(refused) == 1 else 'operators have'} no kernel, and no time is "
            "counted for that; `export.bolt.ort.session` runs all."
        ]
    parts = bundle.launches["regions"]
    if None in parts:
        outside.append(f"{len(parts) - parts.count(None)} of {len(parts)} fused parts have a kernel (`Fused` in ops).")
    measured = sum(one["measured_ms"] is not None for one in kernels)
    basis = f"{measured} of {len(kernels)} times measured on this GPU, the others estimates"
    basis = basis if measured else "an estimate; they ran on no GPU yet"
    notes = [
        f"{len(kernels)} {'kernel' if len(kernels) == 1 else 'kernels'} for {arch}, {was}.",
        f"{total:.3g} ms together, {basis}.",
        *bundle.tuning.get("notes", ()),
        *outside,
        *_without_kernel(refused),
    ]
    return replace(built, path=path, runnable=path, notes=(*built.notes, *notes), kernels=tuple(kernels), cost=total)


def _without_kernel(refused: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each Keras layer that has operators without a kernel, or for all layers of which it holds."""
    from keras_efficient.export.bolt.naming import layer_of
    from keras_efficient.export.bolt.partition import NO_KERNEL, NOTHING_TO_JOIN

    unknown = {layer_of(one["node"]) for one in refused if one["reason"].endswith(NO_KERNEL)}
    reasons: dict[str, dict[str, None]] = {}
    operators: dict[str, list[str]] = {}
    for one in refused:
        layer, (operator, _, rest) = layer_of(one["node"]), one["reason"].partition(": ")
        others = reasons.setdefault(layer, {})
        if rest == NO_KERNEL or (rest == NOTHING_TO_JOIN and layer in unknown):
            operators.setdefault(layer, []).append(operator)
        else:
            others[one["reason"]] = None
    alike: dict[str, list[str]] = {}
    for layer, others in reasons.items():
        plain = operators.get(layer, [])
        kinds = list(dict.fromkeys(plain))
        named = ", ".join(kinds[:MOST_NAMES]) + (", …" if len(kinds) > MOST_NAMES else "")
        count = f" ({len(plain)} operators)" if len(plain) > 1 else ""
        what = "; ".join([*([f"{named}{count}"] if plain else []), *others])
        alike.setdefault(what, []).append(layer)
    found = []
    for what, layers in alike.items():
        more = f" and {len(layers) - MOST_NAMES} more layers" if len(layers) > MOST_NAMES else ""
        found.append(f"{NO_KERNEL_FOR}{', '.join(layers[:MOST_NAMES])}{more}: {what}.")
    return found


def _checks(kernels: Sequence[Mapping[str, Any]]) -> str:
    """How many ran on the CPU."""
    checked = sum(one["checked"] for one in kernels)
    if checked == len(kernels):
        return "each run on the CPU and compared"
    alone = sum(one["template"] == "cutlass" for one in kernels)
    if checked + alone < len(kernels):
        return "not checked, since g++ is missing"
    return f"{checked} run on the CPU and compared, {alone} by CUTLASS not checked on the CPU"


class BundleModel(onnx_target.OnnxModel):
    """A `.bolt` by its ONNX file, in ONNX Runtime on the CPU; `export.bolt.runtime.load` runs it on a GPU.

    Raises:
        FileProblem: no such file, or damaged.
    """

    _ranges: Ranges | None = None

    def _content(self) -> bytes:
        from keras_efficient.export.bolt.bundle import Bundle

        return Bundle.load(self.path).onnx

    def overflow(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        from keras_efficient.export.bolt.ranges import Ranges

        if self._ranges is None:
            self._ranges = Ranges(self._content())
        return self._ranges.problem(inputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        # ONNX Runtime's processors compute half precision in float32, where nothing overflows.
        most, found = np.finfo(np.float16).max, super().run(inputs)
        beyond = {name: np.abs(one) > most for name, one in found.items() if one.dtype == np.float32}
        made = _of_regions(self._content()) if any(where.any() for where in beyond.values()) else frozenset()
        return {
            name: np.where(beyond[name], np.copysign(np.inf, one), one) if name in beyond and name in made else one
            for name, one in found.items()
        }


def _of_regions(network: bytes) -> frozenset[str]:
    """The outputs of a file that are what a region makes: those are in half precision, other operators in float32."""
    import onnx

    from keras_efficient.export.bolt.standard import FUSED

    graph = onnx.load_from_string(network).graph
    makers = {name: node for node in graph.node for name in node.output}
    found = set()
    for output in graph.output:
        node = makers.get(output.name)
        while node is not None and node.op_type in ("Cast", "Identity", "Reshape", "Transpose"):
            node = makers.get(node.input[0])
        found |= {output.name} if node is not None and node.op_type == FUSED else set()
    return frozenset(found)


def inspect(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Nodes by operator and type, and multiply-accumulates of what regions are made of."""
    import onnx
    import onnx.inliner

    from keras_efficient.export.bolt.bundle import Bundle
    from keras_efficient.export.bolt.standard import FUSED

    proto = onnx.load_from_string(Bundle.load(path).onnx)
    whole = onnx_target.inspected(onnx.inliner.inline_local_functions(proto), shapes)
    counts: dict[str, dict[str, int]] = {}
    for node in proto.graph.node:
        kind = "float16" if node.op_type == FUSED else next(iter(whole["ops"].get(node.op_type, ())), "unknown")
        kinds = counts.setdefault(node.op_type, {})
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"ops": counts, "macs": whole["macs"]}


TARGETS = tuple(
    Target(
        name=name,
        suffix=".bolt",
        precisions=("float16",),
        lower=onnx_target.lower,
        convert=convert,
        check=check,
        compile=compile_bundle,
        ready=ready,
        open=BundleModel,
        inspect=inspect,
        write_metadata=onnx_target.write_metadata,  # before it is compiled; the bundle has that ONNX
        options={
            "tune": Option(0, "seconds in which kernels are measured on this machine's GPU; 0: none are"),
            "shared_kb": Option(0, "kilobytes of shared memory that a kernel may take; 0: what the GPU has"),
            "tune_cache": Option("", "a file of measurements, which is read and added to"),
        },
        static=True,
        default=name == "cuda-sm90a",
        summary=f"Fused kernels for {summary}",
    )
    for name, (_, summary) in ARCHITECTURES.items()
)

"""Targets `cuda-sm…`: fused kernels for NVIDIA GPUs, in one file with the ONNX that says what each computes.

The file is verified by running that ONNX in ONNX Runtime on the CPU: it rounds to float16 where kernels do. Kernels
themselves are compiled here, which takes no GPU, and held to the same meaning by the package's tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.export.targets import Built, Request, Target
from keras_efficient.export.targets import onnx as onnx_target

if TYPE_CHECKING:
    import keras

__all__ = ["ARCHITECTURES", "TARGETS", "BundleModel", "compile_bundle"]

ARCHITECTURES = {
    "cuda-sm80": ("sm_80", "A100 and other GPUs of compute capability 8.0"),
    "cuda-sm86": ("sm_86", "GPUs of compute capability 8.6"),
    "cuda-sm89": ("sm_89", "GPUs of compute capability 8.9"),
    "cuda-sm90a": ("sm_90a", "H100 and H200"),
}


def convert(model: keras.Model, request: Request, path: Path) -> tuple[str, ...]:
    """Writes the model as ONNX, of which `compile_bundle` makes the bundle."""
    return onnx_target.convert(model, _as_onnx(request), path)


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
    bundle = assemble(onnx.load(built.path), sizes, arch=arch, on_progress=request.on_progress)
    path = folder / "model.bolt"
    bundle.save(path, overwrite=True)
    kernels = bundle.tuning["kernels"]
    estimate = sum(one["estimated_ms"] for one in kernels)
    was = "each held to its meaning on the CPU" if bundle.metadata["checked"] else "not checked, since g++ is missing"
    notes = [
        f"{len(kernels)} kernels for {arch}, {was}; they ran on no GPU yet.",
        f"Kernels were chosen by an estimate: {estimate:.3f} ms in all.",
        *(f"No kernel for {one['node']}: {one['reason']}." for one in bundle.metadata["refused"]),
    ]
    return replace(built, path=path, runnable=path, notes=(*built.notes, *notes), kernels=tuple(kernels), cost=estimate)


class BundleModel(onnx_target.OnnxModel):
    """A `.bolt` by its ONNX file, in ONNX Runtime on the CPU; `export.bolt.runtime.load` runs it on a GPU.

    Raises:
        FileProblem: no such file, or damaged.
    """

    def _content(self) -> bytes:
        from keras_efficient.export.bolt.bundle import Bundle

        return Bundle.load(self.path).onnx


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
        open=BundleModel,
        inspect=inspect,
        write_metadata=onnx_target.write_metadata,  # before it is compiled; the bundle has that ONNX
        static=True,
        default=name == "cuda-sm90a",
        summary=f"Fused kernels for {summary}",
    )
    for name, (_, summary) in ARCHITECTURES.items()
)

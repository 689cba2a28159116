"""A bundle's kernels as TensorRT plugins, compiled ahead of time (`tensorrt.plugin`, TensorRT 10.7 and later).

    plugged = trt.plugins(bundle)                # registers them
    parser.parse(plugged.model.SerializeToString())     # of a strongly typed network

Not verified: written after TensorRT's documentation, and tested with a stand-in for it; no engine was built or run with
them. TensorRT takes PTX, flat arguments (inputs, integers, outputs), and a grid of + - × ÷ of the inputs' sizes; blocks
have at most 48 KB of shared memory. The number of bands of the template `strip` is no such formula: it is fixed for the
bundle's sizes, and kernels stay right at others.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.assembling import sizes_of
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.grids import band, formulas
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.standard import DOMAIN, FUSED

if TYPE_CHECKING:
    import onnx

__all__ = ["Plugged", "plugins"]

MOST_SHARED = 48 << 10  # whether TensorRT raises a kernel's limit is not documented

_registered: set[str] = set()


@dataclass(frozen=True)
class Plugged:
    """A bundle's network for TensorRT.

    Attributes:
        model: the ONNX file; nodes of plugins have the attribute `plugin_namespace`, and their packed weights as the
            last input. Other regions are in standard operators.
        plugins: names, with their namespace.
        refusals: of regions with a kernel that is no plugin: the node's name, and the reason.
    """

    model: onnx.ModelProto
    plugins: tuple[str, ...]
    refusals: Mapping[str, str]


@dataclass(frozen=True)
class _Plugin:
    id: str
    kernel: str
    ptx: bytes
    entry: Mapping[str, Any]
    region: Region
    band: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*(f"x{number}" for number in range(self.entry["inputs"])), "packed")


def plugins(bundle: Bundle, *, processors: int | None = None) -> Plugged:
    """Registers the kernels of a bundle as plugins; a second time does nothing.

    Args:
        bundle: of `assembling.assemble`, with PTX.
        processors: multiprocessors of the GPU, for the strip's bands; by default of the architecture's largest one.

    Raises:
        MissingDependency: no TensorRT, or one without `tensorrt.plugin`.
    """
    import onnx.inliner

    from keras_efficient.export.targets.tensorrt import NoTensorRT

    try:
        import tensorrt.plugin as api
    except (ImportError, OSError, RuntimeError) as err:
        raise NoTensorRT("tensorrt", (str(err).splitlines() or [""])[0]) from err
    arch = bundle.tuning["architecture"]
    processors = processors or architecture(arch).processors
    model = onnx.load_from_string(bundle.onnx)
    known = sizes_of(model, bundle.metadata["sizes"])
    told = (bundle.launches, bundle.ptx, bundle.metadata["sizes"], arch, processors)
    namespace = f"bolt_{hashlib.sha256(bundle.onnx + repr(told).encode()).hexdigest()[:12]}"
    made, refusals = [], {}
    for node in [one for one in model.graph.node if one.domain == DOMAIN and one.op_type == FUSED]:
        attributes = {one.name: one for one in node.attribute}
        index, region = attributes["region"].i, spec.outline(spec.parsed(attributes["spec"].s.decode()))
        if (kernel := bundle.launches["regions"][index]) is None:
            continue
        entry, ptx = bundle.launches["kernels"][kernel], bundle.ptx.get(f"{kernel}/{arch}")
        shape = known.get(node.input[0])
        if ptx is None or shape is None or entry["shared_bytes"] > MOST_SHARED or "together" in entry["rule"]:
            refusals[node.name] = _reason(entry, ptx)
            continue
        rows = band(entry["rule"], *region.image(shape), processors)
        one = _Plugin(f"{namespace}::region_{index}", kernel, ptx, entry, region, rows)
        _rewrite(model.graph, node, one, bundle.weights[str(index)])
        made.append(one)
    for one in made:
        if one.id not in _registered:
            _register(api, one)
            _registered.add(one.id)
    return Plugged(onnx.inliner.inline_local_functions(model), tuple(one.id for one in made), refusals)


def _reason(entry: Mapping[str, Any], ptx: bytes | None) -> str:
    if ptx is None:
        return "the bundle has no PTX of it, and TensorRT takes nothing else"
    if entry["shared_bytes"] > MOST_SHARED:
        more = f"plugins have {MOST_SHARED}: assemble the bundle with shared_bytes={MOST_SHARED}"
        return f"it takes {entry['shared_bytes']} bytes of shared memory; {more}"
    if "together" in entry["rule"]:
        return "its blocks are in clusters, which plugins do not say how to launch"
    return "the size of its input is not known"


def _rewrite(graph: Any, node: Any, plugin: _Plugin, packed: bytes) -> None:
    """Makes a region's node the plugin's."""
    from onnx import helper, numpy_helper

    words = np.frombuffer(packed + bytes(-len(packed) % 4), np.int32)  # bits that no converter touches
    graph.initializer.append(numpy_helper.from_array(words, f"{node.name}__packed"))
    namespace, name = plugin.id.split("::")
    inputs = [*node.input[: plugin.entry["inputs"]], f"{node.name}__packed"]
    found = {"plugin_namespace": namespace, "plugin_version": "1"}
    node.CopyFrom(helper.make_node(name, inputs, list(node.output), name=node.name, domain=DOMAIN, **found))


def _register(api: Any, plugin: _Plugin) -> None:
    """The plugin's three functions. TensorRT reads their signatures, so each input has a name there."""
    region = plugin.region

    def sizes(tensor: Any) -> tuple[Any, Any, Any]:
        return region.image([tensor.shape_expr[axis] for axis in range(len(tensor.shape_expr))])

    def describe(*tensors: Any) -> Any:
        shape, out = tensors[0].shape_expr, tensors[0].like()
        found = region.output_shape(*sizes(tensors[0]))
        inner = [shape[axis] for axis in range(len(shape) - 1)] if region.rows else found[:-1]  # rows have many axes
        out.shape_expr = api.ShapeExprs.from_tuple((*inner, found[-1]))
        return out

    def formats(*tensors: Any) -> Any:
        return [api.AutoTuneCombination(", ".join(["FP16"] * plugin.entry["inputs"] + ["INT32", "FP16"]), "LINEAR")]

    def implement(*tensors: Any) -> Any:
        n, height, width = sizes(tensors[0])
        grid, integers = formulas(plugin.entry["rule"], n, height, width, plugin.band)
        parameters = api.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = map(api.SymInt32, grid)
        parameters.block_x, parameters.shared_mem = plugin.entry["threads"], plugin.entry["shared_bytes"]
        extra = api.SymIntExprs.from_tuple([api.SymInt32(one) for one in (height, width, *integers)])
        return plugin.kernel, plugin.ptx, parameters, extra

    desc = api.TensorDesc
    kernel = tuple[str | bytes, str | bytes, api.KernelLaunchParams, api.SymIntExprs]
    api.register(plugin.id)(_signed(describe, desc, plugin.inputs, (), desc))
    api.autotune(plugin.id)(_signed(formats, desc, plugin.inputs, ("outputs",), list[api.AutoTuneCombination]))
    api.aot_impl(plugin.id)(_signed(implement, desc, plugin.inputs, ("outputs", "tactic"), kernel))


def _signed(function: Callable[..., Any], desc: Any, inputs: Sequence[str], others: Sequence[str], result: Any) -> Any:
    """`function`, telling that it takes tensors of these names, and more behind them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    tensors = [inspect.Parameter(name, kind, annotation=desc) for name in inputs]
    more = [inspect.Parameter(name, kind) for name in others]
    function.__signature__ = inspect.Signature([*tensors, *more], return_annotation=result)  # type: ignore[attr-defined]
    return function

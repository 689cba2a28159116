"""A network as regions, each one node of the file, and what stays with standard operators, each with its reason.

A region starts at a convolution or a product by a constant matrix, takes what works on single numbers behind it, then,
where the policy lets it, the next layer, and so on. It is cut back to the last place where one value is all that the
rest of the network reads. The nodes are

    y = keras_efficient.bolt::Fused(x, further inputs, weights, …)    attributes: spec, region; metadata: layers' names

and their meaning stands in the file, as a function in standard operators for each structure: any runtime runs it.
Images are N×H×W×C, rows …×C (all axes but the last are rows). Transposes stand where a neighbour wants N×C×H×W.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.aligning import aligned
from keras_efficient.export.bolt.folding import bounds, per_channel
from keras_efficient.export.bolt.graph import check_installed, normalised_ir
from keras_efficient.export.bolt.layout import NCHW, NHWC, sink_transposes
from keras_efficient.export.bolt.phases import why_not_phases
from keras_efficient.export.bolt.region import Activate, Add, Layer, Region
from keras_efficient.export.bolt.rewriting import Rewriter, constant, integer, integers, source, text, tidied
from keras_efficient.export.bolt.shapes import Shapes
from keras_efficient.export.bolt.standard import DOMAIN, FUSED, LAYER_NAMES, region_function

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["NOTHING_TO_JOIN", "NO_KERNEL", "Partitioned", "Policy", "Refusal", "partition"]

ONE_NODE = {
    "HardSwish": "hard_swish",
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Tanh": "tanh",
    "Gelu": "gelu",
    "GeluTanh": "gelu_tanh",
    "Silu": "silu",
}
STEPS = frozenset((*ONE_NODE, "Add", "Clip", "DepthToSpace", "LeakyRelu", "PRelu"))
LAYERS = frozenset(("Conv", "MatMul"))
NO_KERNEL = "no kernel has this operator"
NOTHING_TO_JOIN = "there is no layer before it that it could join"
MOST_ELEMENTS = (1 << 31) - 1


@dataclass(frozen=True)
class Policy:
    """Which layers share a region.

    Attributes:
        max_channels: layers that keep the image's size, not depthwise and not dilated, follow each other in one region
            as long as none has more channels than this; 0: none do.
        max_kernel: height and width of kernels in such a chain.
        max_second: a layer and a 1×1 convolution behind it, or two products by matrices, are one region if neither
            makes more channels than this; 0: none are.
        max_layers: of a region.
        max_shuffle: block of a depth to space.
        unit: inside of the network, channels are padded to a multiple of it; 1: they stay.
    """

    max_channels: int = 64
    max_kernel: int = 5
    max_second: int = 256
    max_layers: int = 1024
    max_shuffle: int = 8
    unit: int = 1


@dataclass(frozen=True)
class Refusal:
    """A node that stays as it is.

    Attributes:
        node: its name, or that of its first output.
        reason: with its operator.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Partitioned:
    """A network in regions.

    Attributes:
        model: the file; a region's node has the attribute `region`, its index in `regions`.
        regions: in the order of the file.
        refusals: of all nodes that are in no region, transposes left out.
    """

    model: onnx.ModelProto
    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]


class _Refused(Exception):
    """Why a node cannot be in a region."""


@dataclass(frozen=True)
class _Added:
    """A value that is added, and its channels."""

    value: ir.Value
    channels: int


@dataclass
class _Layer:
    """A layer as it grows."""

    reads: ir.Value
    weights: np.ndarray
    bias: np.ndarray
    rows: bool = False
    depthwise: bool = False
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    steps: list[Activate | _Added] = field(default_factory=list)
    name: str = ""

    def made(self, value: int = 0, steps: Sequence[Activate | Add] = ()) -> Layer:
        given = (self.weights, self.bias, self.stride, self.dilation, self.padding, self.depthwise)
        return Layer(value, *given, steps=tuple(steps), name=self.name)


@dataclass(frozen=True)
class _Move:
    """One node taken into a region.

    Attributes:
        node: in the graph.
        what: a new layer, a bias, an activation, a value that is added, or the block of a depth to space.
    """

    node: ir.Node
    what: _Layer | np.ndarray | Activate | _Added | int


def partition(model: onnx.ModelProto, policy: Policy | None = None) -> Partitioned:
    """Finds the regions of a network, and makes each of them one node.

    Args:
        model: any ONNX model of opset 13 to 19; it is not changed. `graph.normalised` is done here.
        policy: which layers share a region; `Policy()` by default.

    Raises:
        ConversionError: the model cannot be read.
        MissingDependency: the extra `gpu` is not installed.
    """
    check_installed()
    import onnx_ir as ir

    inner = normalised_ir(model)
    if (policy or Policy()).unit > 1:
        aligned(inner, (policy or Policy()).unit)
    found = _Search(inner, policy or Policy())
    for node in list(inner.graph):
        if node.graph is not None and node not in found.taken and _is(node, LAYERS):
            found.grow(node)
    refusals = tuple(found.refusals())
    moved: dict[ir.Value, ir.Value] = {}
    nodes = [_fused(inner, moves, index, moved) for index, moves in enumerate(found.regions)]
    sink_transposes(inner)
    tidied(inner)
    order = {node: index for index, node in enumerate(inner.graph)}
    regions = []
    for index, (node, region) in enumerate(sorted(nodes, key=lambda pair: order[pair[0]])):
        node.attributes["region"] = ir.AttrInt64("region", index)
        names = [value.name for value in (*node.inputs[: len(region.channels)], node.outputs[0]) if value is not None]
        regions.append(Region(region.layers, region.channels, region.shuffle, region.rows, tuple(map(str, names))))
    inner.ir_version = max(inner.ir_version or 0, 10)  # the first that has overloads
    return Partitioned(ir.serde.serialize_model(inner), tuple(regions), refusals)


def _is(node: ir.Node, kinds: frozenset[str]) -> bool:
    return node.domain in ("", DOMAIN) and node.op_type in kinds


class _Search:
    """Regions of one model, found from its first node to its last."""

    def __init__(self, model: ir.Model, policy: Policy):
        self.model, self.policy, self.shapes = model, policy, Shapes(model)
        self.order = {node: index for index, node in enumerate(model.graph)}
        self.regions: list[list[_Move]] = []
        self.taken: set[ir.Node] = set()
        self.reasons: dict[ir.Node, str] = {}

    def grow(self, node: ir.Node) -> None:
        """A region that starts at a layer, or the layer's refusal."""
        try:
            moves = [_Move(node, self.layer(node))]
        except _Refused as err:
            self.reasons[node] = str(err)
            return
        closed = 1 if self.is_closed(moves) else 0
        while (move := self.next(moves)) is not None:
            moves.append(move)
            closed = len(moves) if self.is_closed(moves) else closed
        moves = moves[: closed or 1]
        self.regions.append(moves)
        self.taken |= {move.node for move in moves}

    def is_closed(self, moves: list[_Move]) -> bool:
        """Whether only the last value is read by others; no region goes on behind an output of the file."""
        inside = {move.node for move in moves}
        inner = [move.node.outputs[0] for move in moves[:-1]]
        return all(use.node in inside for value in inner for use in value.uses())

    def next(self, moves: list[_Move]) -> _Move | None:
        """What comes behind the last value: a step if it is its only reader, else a layer.

        So what is amid a layer and its steps has no other readers, and cannot be a skip's source.
        """
        last = moves[-1].node.outputs[0]
        free = {use.node for use in last.uses()} & self.order.keys() - self.taken  # others read it inside of a loop
        readers = sorted(free, key=lambda node: self.order[node])
        if last.is_graph_output() or not readers or isinstance(moves[-1].what, int):
            return None
        if len(last.uses()) == 1 and _is(readers[0], STEPS):
            try:
                return _Move(readers[0], self.step(readers[0], last, moves))
            except _Refused as err:
                self.reasons[readers[0]] = str(err)
                return None
        for node in readers:
            if _is(node, LAYERS) and node.inputs[0] is last:
                try:
                    layer = self.layer(node)
                except _Refused:
                    continue  # it is refused when its own turn comes
                if self.joins([move.what for move in moves if isinstance(move.what, _Layer)], layer):
                    return _Move(node, layer)
        return None

    def joins(self, layers: list[_Layer], second: _Layer) -> bool:
        """Whether a layer may be in the region of these, by the policy."""
        every = [*layers, second]
        if len(every) > self.policy.max_layers:
            return False
        widest = max(max(one.made().channels, one.made().filters) for one in every)
        if widest <= self.policy.max_channels and all(self.is_small(one) for one in every):
            return True
        pointwise = second.rows or (
            second.weights.shape[:2] == (1, 1) and second.made().is_same and not second.depthwise
        )
        wide = max(one.made().filters for one in every)
        # A depthwise layer multiplies no matrices; no template has a product behind one.
        first = len(layers) == 1 and not layers[0].depthwise and layers[0].rows == second.rows
        return first and pointwise and wide <= self.policy.max_second

    def is_small(self, layer: _Layer) -> bool:
        """Whether it may be in a chain, its channels aside."""
        plain = layer.made().is_same and layer.dilation == (1, 1) and not layer.depthwise and not layer.rows
        return plain and max(layer.weights.shape[:2]) <= self.policy.max_kernel

    # ------------------------------------------------------------------------------------------------ single nodes

    def layer(self, node: ir.Node) -> _Layer:
        """A layer, without what is behind it; `_Refused` says why not."""
        weights = constant(node.inputs[1])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if constant(node.inputs[0]) is not None or weights is None or (bias is not None and constant(bias) is None):
            raise _Refused(f"{node.op_type}: its weights are not constant")
        if weights.dtype != np.float32:
            raise _Refused(f"{node.op_type}: its weights are {weights.dtype}; float32 is wanted")
        if max(self.shapes.elements(node.inputs[0]), self.shapes.elements(node.outputs[0])) > MOST_ELEMENTS:
            raise _Refused(f"{node.op_type}: it reads or makes more than 2³¹ numbers")
        found = self.product(node, weights) if node.op_type == "MatMul" else self.convolution(node, weights)
        if bias is not None:
            found.bias = np.asarray(constant(bias), np.float32)
        found.name = node.name or str(node.outputs[0].name)
        return found

    def product(self, node: ir.Node, weights: np.ndarray) -> _Layer:
        if weights.ndim != 2:
            raise _Refused(f"MatMul: a matrix with {weights.ndim} axes")
        if (self.shapes.rank(node.inputs[0]) or 0) < 2:
            raise _Refused("MatMul: its input has a shape that is not known, or one axis")
        return _Layer(source(node), weights[None, None], np.zeros(weights.shape[1], np.float32), rows=True)

    def convolution(self, node: ir.Node, weights: np.ndarray) -> _Layer:
        if weights.ndim != 4:
            raise _Refused(f"Conv: a convolution over {weights.ndim - 2} axes; two are taken")
        group, depthwise = integer(node, "group", 1), False
        if group > 1:
            depthwise = weights.shape[1] == 1 and len(weights) == group
            if not depthwise:
                raise _Refused(f"Conv: a convolution of {group} groups that is not depthwise")
        if text(node, "auto_pad", "NOTSET") != "NOTSET":
            raise _Refused("Conv: its padding hangs on a size that is free (SAME with a stride): fix the input's size")
        sizes = [integers(node, name, (1, 1)) for name in ("strides", "dilations")]
        padding = integers(node, "pads", (0, 0, 0, 0))
        if min(padding) < 0:
            raise _Refused("Conv: negative padding")
        turned = weights.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
        return _Layer(
            source(node),
            turned,
            np.zeros(len(weights), np.float32),
            depthwise=depthwise,
            stride=(sizes[0][0], sizes[0][1]),
            dilation=(sizes[1][0], sizes[1][1]),
            padding=(padding[0], padding[1], padding[2], padding[3]),
        )

    def step(self, node: ir.Node, last: ir.Value, moves: list[_Move]) -> np.ndarray | Activate | _Added | int:
        """What a node does to each number of `last`; `_Refused` says why it cannot be in the region."""
        layer = next(move.what for move in reversed(moves) if isinstance(move.what, _Layer))
        filters, kind = layer.made().filters, node.op_type
        if kind in ONE_NODE:
            return Activate(ONE_NODE[kind])
        if kind == "Clip":
            if (limits := bounds(node)) is None:
                raise _Refused("Clip: its limits are not constant")
            return Activate("clip", low=limits[0], high=limits[1])
        if kind == "LeakyRelu":
            slope = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 0.01
            return Activate("prelu", np.array([slope], np.float32))
        if kind == "PRelu":
            slopes = constant(node.inputs[1]) if node.inputs[0] is last else None
            found = None if slopes is None else _slopes(slopes, filters, rows=layer.rows)
            if found is None:
                raise _Refused("PRelu: its slopes are not one, or one for each channel")
            return Activate("prelu", found)
        if kind == "DepthToSpace":
            block = integer(node, "blocksize", 1)
            if text(node, "mode", "DCR") != "DCR":
                raise _Refused("DepthToSpace: of columns and rows (CRD); depth first (DCR) is taken")
            if block > self.policy.max_shuffle:
                raise _Refused(f"DepthToSpace: a block of {block}; up to {self.policy.max_shuffle} are taken")
            return block
        return self.added(node, last, moves, layer)

    def added(self, node: ir.Node, last: ir.Value, moves: list[_Move], layer: _Layer) -> np.ndarray | _Added:
        """The other summand: a bias of rows, or a value."""
        other = source(node, 1 if node.inputs[0] is last else 0)
        filters = layer.made().filters
        if (numbers := constant(other)) is not None:
            shift = per_channel(numbers, filters, rows=layer.rows)
            if shift is None or moves[-1].what is not layer:
                raise _Refused("Add: of a constant that is no bias")
            return shift
        mine, wanted, its = self.shapes[last], self.shapes[node.outputs[0]], self.shapes[other]
        axis = -1 if layer.rows else 1
        if not its or not mine:
            raise _Refused("Add: the shape of what is added is not known")
        narrow = tuple((*one[:axis], 1, *one[axis:][1:]) for one in mine)
        if mine != wanted or its not in (mine, narrow):
            raise _Refused("Add: what is added has another size, and is not one channel")
        return _Added(other, its[0][axis])

    def refusals(self) -> Iterator[Refusal]:
        """Of all nodes in no region, in the graph's order."""
        for node in self.model.graph:
            if node in self.taken or node.op_type in ("Transpose", "Constant", "Identity") or _is_border(node):
                continue
            yield Refusal(node.name or str(node.outputs[0].name), self.reasons.get(node) or self.why(node))

    def why(self, node: ir.Node) -> str:
        if node.domain == "" and node.op_type == "ConvTranspose":
            return f"ConvTranspose: {why_not_phases(node)}"
        if node.domain == "" and node.op_type == "Cast":
            return _why_cast(node)
        if not _is(node, STEPS):
            return f"{node.op_type}: {NO_KERNEL}"
        return f"{node.op_type}: {NOTHING_TO_JOIN}"


def _is_border(node: ir.Node) -> bool:
    """Whether a cast only makes an input or an output of the file from one float to another, as kernels do anyway.

    Others between floats were left out by `widening`.
    """
    import onnx_ir as ir

    if node.domain != "" or node.op_type != "Cast":
        return False
    given, to = source(node), ir.DataType(node.attributes["to"].as_int())
    if given.is_graph_input():
        return given.dtype is not None and given.dtype.is_floating_point() and to.is_floating_point()
    return node.outputs[0].is_graph_output() and to in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _why_cast(node: ir.Node) -> str:
    """Of a cast from or to integers: kernels read and write float16 alone."""
    import onnx_ir as ir

    given, to = source(node), ir.DataType(node.attributes["to"].as_int())
    if to.is_floating_point():
        dtype = given.dtype
        kind = "no float" if dtype is None else dtype.name.lower()
        read = f"input {given.name!r}" if given.is_graph_input() else "what it reads"
        return f"Cast: {read} is {kind}, and kernels read float16"
    return f"Cast: to {to.name.lower()}, and kernels write float16"


def _slopes(numbers: np.ndarray, filters: int, *, rows: bool) -> np.ndarray | None:
    if numbers.size == 1 and numbers.ndim <= (1 if rows else 4):
        return numbers.reshape(1).astype(np.float32)
    return per_channel(numbers.astype(np.float32), filters, rows=rows)


# ------------------------------------------------------------------------------------------------- regions as nodes


def _fused(model: ir.Model, moves: list[_Move], index: int, moved: dict[ir.Value, ir.Value]) -> tuple[ir.Node, Region]:
    """Puts a region's node in the place of its moves.

    Args:
        moved: values of the graph as it was, and what stands in their place since earlier regions became nodes.
    """
    import onnx_ir as ir

    region, inputs = _region(moves)
    inputs = [moved.get(one, one) for one in inputs]
    last = moves[-1].node
    rewriter, body = Rewriter(model, last), region_function(region)
    model.functions.setdefault(body.identifier(), body)
    model.graph.opset_imports[DOMAIN] = 1
    given = inputs if region.rows else [rewriter.op("Transpose", [one], perm=NHWC) for one in inputs]
    name = f"region_{index}"
    weights = [rewriter.constant(one, f"{name}__{number}") for number, one in enumerate(spec.arrays(region))]
    attributes: dict[str, str | int] = {"spec": spec.written(spec.spec(region)), "region": index}
    made = ir.node(FUSED, [*given, *weights], attributes, domain=DOMAIN, overload=body.overload, name=name)
    made.metadata_props[LAYER_NAMES] = json.dumps([layer.name for layer in region.layers])
    model.graph.insert_before(last, made)
    value = made.outputs[0] if region.rows else rewriter.op("Transpose", [made.outputs[0]], perm=NCHW)
    moved[last.outputs[0]] = value
    rewriter.replace(last.outputs[0], value)
    model.graph.remove([move.node for move in moves], safe=True)
    return made, region


def _region(moves: list[_Move]) -> tuple[Region, list[ir.Value]]:
    """The region that moves make, and its inputs in the graph."""
    layers: list[_Layer] = []
    outputs: list[ir.Value] = []
    shuffle = 1
    for move in moves:
        if isinstance(move.what, _Layer):
            layers.append(replace(move.what, steps=[]))
            outputs.append(move.node.outputs[0])
            continue
        if isinstance(move.what, int):
            shuffle = move.what
        elif isinstance(move.what, np.ndarray):
            layers[-1].bias = layers[-1].bias + move.what
        else:
            layers[-1].steps.append(move.what)
        outputs[-1] = move.node.outputs[0]
    inputs = {layers[0].reads: layers[0].made().channels}
    for step in (step for layer in layers for step in layer.steps):
        if isinstance(step, _Added) and step.value not in outputs:
            inputs[step.value] = step.channels
    number = {value: index for index, value in enumerate((*inputs, *outputs))}
    made = []
    for layer in layers:
        steps = [Add(number[one.value]) if isinstance(one, _Added) else one for one in layer.steps]
        made.append(layer.made(number[layer.reads], steps))
    return Region(tuple(made), tuple(inputs.values()), shuffle, layers[0].rows), list(inputs)

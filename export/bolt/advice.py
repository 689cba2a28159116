"""What would make a network faster on its GPU, or better at the same speed: activations, channels, 1×1 layers.

All numbers are estimates, as those that kernels are chosen by. A range has what is hidden behind other work at one end,
and at the other what is added to the kernel's time.

Source: Xing et al., MLSys 2022, https://arxiv.org/abs/2110.15238, section 3.4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.export.bolt import graph, spec
from keras_efficient.export.bolt.architectures import Architecture
from keras_efficient.export.bolt.assembling import Shape, best_partition, sizes_of
from keras_efficient.export.bolt.naming import layer_of, name_layers
from keras_efficient.export.bolt.partition import NO_KERNEL, ONE_NODE, Partitioned
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region
from keras_efficient.export.bolt.search import Candidate, candidates, unserved
from keras_efficient.export.bolt.templates.tile import one_by_one

if TYPE_CHECKING:
    import keras
    import onnx

__all__ = ["Advice", "Gain", "advise", "check_installed", "converted"]

UNIT = 8  # numbers that a copy of 16 bytes moves: kernels compute in float16 (of int8, which none has, it were 16)
MOST_KEPT = 256  # channels of a first product that a pair keeps, up to 64 of them in registers
FREE = 0.02  # of a kernel's time, that nobody notices
WORTH = 0.01  # of a kernel's time, below which a gain is left out

# Instructions for each number, counted by hand from CUDA's functions; exponentials and reciprocals as 8, by their rate.
INSTRUCTIONS = {
    "relu": 1,
    "clip": 2,
    "prelu": 4,
    "hard_swish": 6,
    "silu": 24,
    "sigmoid": 24,
    "gelu": 30,
    "gelu_tanh": 36,
    "tanh": 30,
    "softplus": 36,
}
NOT_FUSED = frozenset(
    (
        *ONE_NODE,
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Celu",
        "Elu",
        "HardSigmoid",
        "Mish",
        "Selu",
        "Softsign",
        "ThresholdedRelu",
    )
)


@dataclass(frozen=True)
class Gain:
    """Milliseconds that are saved; below 0, that are lost.

    Attributes:
        low_ms, high_ms: the least and the most.
        of_ms: what the kernel takes now; `None`: it is no kernel of ours.
        basis: where the numbers are from.
    """

    low_ms: float
    high_ms: float
    of_ms: float | None = None
    basis: Literal["estimated"] = "estimated"

    def __str__(self) -> str:
        saves = self.high_ms > 0
        ends = (self.low_ms, self.high_ms) if saves else (-self.high_ms, -self.low_ms)
        of = "" if self.of_ms is None else f" of {self.of_ms:.4f}"
        return f"{'saves' if saves else 'costs'} {_range(ends)}{of} ms, {self.basis}"


@dataclass(frozen=True)
class Advice:
    """Something to know of one layer.

    Attributes:
        kind: "activation": which ones are free here, or one that no kernel has; "channels": a number of channels that
            is no multiple of 8; "pointwise": a 1×1 layer behind this one, in its kernel; "refused": no kernel has it.
        layer: its path in the Keras model; of other models' files the name of its node.
        what: in words.
        gain: in time, of all layers together; `None`: unknown.
        layers: all of which it is said, if these are several.
    """

    kind: Literal["activation", "channels", "pointwise", "refused"]
    layer: str
    what: str
    gain: Gain | None = None
    layers: tuple[str, ...] = ()


def advise(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]], arch: Architecture) -> tuple[Advice, ...]:
    """What to change in a network; first what concerns its layers, in their order, then what is in no kernel.

    Args:
        model: float32, of opset 13 to 19.
        sizes: of each input of the model.
        arch: of the GPU.

    Raises:
        ConversionError: the model cannot be read.
        MissingDependency: the extra `gpu` is not installed.
        WrongArgument: a size that contradicts the model's, or an input without one.
    """
    check_installed()
    parted, ranked = best_partition(model, sizes, arch, None)
    found = _Adviser(arch)
    advice: list[Advice] = []
    for region, (shape, ranking) in zip(parted.regions, ranked, strict=True):
        layers = [layer_of(layer.name) for layer in region.layers]
        if shape is None or not ranking:
            advice.append(_without_kernel(region, layers, shape, arch))
            continue
        here = _Here(region, layers, shape, ranking[0])
        advice += [*found.activations(here), *found.channels(here), *found.pointwise(here)]
    known = sizes_of(parted.model, sizes)
    return (*advice, *_refused(parted, known, arch))


def check_installed() -> None:
    """Whether networks can be taken apart.

    Raises:
        MissingDependency: the extra `gpu` is not installed.
    """
    graph.check_installed("Advice for GPUs")


def converted(
    model: keras.Model, input_shape: Any = None, on_progress: Callable[[str], None] = lambda line: None
) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """A Keras model as `advise` takes it: its ONNX file, and the sizes of its inputs.

    Args:
        model: a Functional or Sequential model; it is not changed.
        input_shape: as of `export.save`; a free batch is 1.
        on_progress: called with a line at the start of each step.

    Raises:
        WrongArgument: a size is missing, or does not fit.
        UnsupportedLayer: a layer that cannot be deployed.
        ConversionError: the converter failed.
    """
    import onnx

    from keras_efficient.deploy import answering
    from keras_efficient.export import pipeline, signature

    model = answering(model)
    specs = signature.resolve_shapes(signature.input_specs(model), input_shape)
    sizes = {}
    for one in specs:
        sizes[one.name] = tuple(side or 0 for side in (one.shape[0] or 1, *one.shape[1:]))
        if 0 in sizes[one.name]:
            raise WrongArgument(
                f"Advice is for sizes, and input {one.name!r} has shape {one.shape}.",
                hint="Give input_shape=, or --input-shape, such as 1080x1920.",
            )
    with tempfile.TemporaryDirectory(prefix="keras_efficient-") as folder:
        path = Path(folder) / "model.onnx"
        deployed, built = pipeline.build_only(model, path, target="onnx", input_shape=sizes, on_progress=on_progress)
        network = onnx.load(built.path)
    name_layers(network, deployed)
    return network, sizes


# ------------------------------------------------------------------------------------------------------------- refusals


def _without_kernel(region: Region, layers: Sequence[str], shape: Shape | None, arch: Architecture) -> Advice:
    reason = unserved(region, arch, sized=shape is not None)
    behind = f" (and {len(layers) - 1} layers behind it)" if len(layers) > 1 else ""
    return Advice("refused", layers[0], f"no template serves it{behind}: {reason}")


def _refused(parted: Partitioned, known: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[Advice]:
    """What is in no kernel, once for each reason; of activations, what their own passes over memory take."""
    nodes = {name: node for node in parted.model.graph.node for name in (*node.output, node.name)}
    alike: dict[tuple[bool, str], list[tuple[str, Gain | None]]] = {}
    for one in parted.refusals:
        node = nodes.get(one.node)
        activates = node is not None and node.op_type in NOT_FUSED
        gain = None
        if activates and node is not None and (shape := known.get(node.output[0])) is not None:
            traffic = 2 * 2 * prod(shape) / arch.memory_rate
            gain = Gain(1000 * arch.launch, 1000 * (arch.launch + traffic))
        alike.setdefault((activates, one.reason), []).append((layer_of(one.node), gain))
    for (activates, reason), found in alike.items():
        layers = tuple(dict.fromkeys(name for name, _ in found))
        gains = [gain for _, gain in found if gain is not None]
        times = f"{len(found)} times " if len(found) > 1 else ""
        if not activates:
            yield Advice("refused", layers[0], f"{times}{reason}", layers=layers)
            continue
        more = f"; these are: {', '.join(ACTIVATIONS)}" if reason.endswith(NO_KERNEL) else ""
        total = Gain(sum(one.low_ms for one in gains), sum(one.high_ms for one in gains)) if gains else None
        yield Advice("activation", layers[0], f"{times}not fused: {reason}{more}", total, layers)


# -------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class _Here:
    """A region with the names of its layers, the size of its first input, and its kernel."""

    region: Region
    names: Sequence[str]
    shape: Shape
    best: Candidate

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each value; of an input that is only added, unknown and not asked for."""
        sizes = [self.shape[1:]] * len(self.region.channels)
        for layer in self.region.layers:
            sizes.append(layer.size(*sizes[layer.value]))
        return sizes

    @property
    def numbers(self) -> list[int]:
        """Of each layer's output."""
        outputs = self.sizes[len(self.region.channels) :]
        return [self.shape[0] * prod(size) * one.filters for size, one in zip(outputs, self.region.layers, strict=True)]


class _Adviser:
    """Estimates for one architecture; equal structures are searched once."""

    def __init__(self, arch: Architecture):
        self.arch = arch
        self.known: dict[tuple[str, Shape], Candidate | None] = {}

    def best(self, region: Region, shape: Shape) -> Candidate | None:
        key = spec.written(spec.spec(region)), shape
        if key not in self.known:
            self.known[key] = next(iter(candidates(region, self.arch, *shape, limit=1)), None)
        return self.known[key]

    def issued(self, instructions: float) -> float:
        """Seconds in which the GPU issues them."""
        return instructions / (self.arch.lanes * self.arch.processors * self.arch.clock)

    # ------------------------------------------------------------------------------------------------------ activations

    def activations(self, here: _Here) -> Iterator[Advice]:
        """For each layer whose last activation is ReLU or ReLU6: what else that could be."""
        for layer, name, numbers in zip(here.region.layers, here.names, here.numbers, strict=True):
            last = next((step for step in reversed(layer.steps) if isinstance(step, Activate)), None)
            if last is None or not (last.kind == "relu" or (last.low, last.high) == (0, 6)):
                continue
            costs = {
                kind: self.issued(numbers * max(INSTRUCTIONS[kind] - INSTRUCTIONS[last.kind], 0))
                for kind in ACTIVATIONS
                if kind != last.kind
            }
            free = [kind for kind, cost in costs.items() if cost <= FREE * here.best.seconds]
            rest = [f"{kind} up to {cost / here.best.seconds:.0%}" for kind, cost in costs.items() if kind not in free]
            mine = "relu6" if last.kind == "clip" else last.kind
            what = f"{mine}: {', '.join(free) or 'nothing else'} would cost nothing more"
            what += f"; {', '.join(rest)}" if rest else ""
            yield Advice("activation", name, what, self.gain(here, -max(costs.values()), 0))

    # --------------------------------------------------------------------------------------------------------- channels

    def channels(self, here: _Here) -> Iterator[Advice]:
        """For each value of a tile's region whose channels are no multiple of 8: the time if they were."""
        if here.best.template != "tile":
            return
        inputs, shape = len(here.region.channels), here.shape
        before = self.alone(here.region, shape, here.best)
        for value, has in ((0, here.region.channels[0]), *zip(count(inputs), _filters(here.region))):
            wanted = ceil(has / UNIT) * UNIT
            is_shuffled = value == inputs + len(here.region.layers) - 1 and here.region.shuffle > 1
            if has == wanted or is_shuffled:  # a shuffle's channels are pixels
                continue
            wide = _widened(here.region, value, wanted)
            best = self.best(wide, shape)
            if best is None:
                continue
            after = self.alone(wide, shape, best)
            low, high = sorted(one - other for one, other in zip(before, after, strict=True))
            if high < WORTH * before[1]:
                continue
            side, number = ("in", 0) if value < inputs else ("out", value - inputs)
            now, then = (_range((1000 * ends[0], 1000 * ends[1])) for ends in (before, after))
            more = wide.macs / here.region.macs - 1
            what = f"{has} channels {side}: with {wanted}, {more:.0%} more products, {then} instead of {now} ms"
            yield Advice("channels", here.names[number], what, self.gain(here, low, high))

    def alone(self, region: Region, shape: Shape, best: Candidate) -> tuple[float, float]:
        """The least and the most that its estimate may be, which is amid them: see `tile.one_by_one`."""
        if best.template != "tile":
            return best.seconds, best.seconds
        places = shape[0] * prod(region.layers[0].size(*shape[1:]))
        waited, issued = one_by_one(region, best.parameters, self.arch, places)
        return max(best.seconds - issued / 2, waited), max(best.seconds + issued / 2, waited)

    # -------------------------------------------------------------------------------------------------------- pointwise

    def pointwise(self, here: _Here) -> Iterator[Advice]:
        """For a layer with a larger kernel, alone in its region: what a 1×1 behind it costs in the same kernel."""
        (layer, *more), shape = here.region.layers, here.shape
        filters = layer.filters
        if more or layer.kernel == (1, 1) or filters > MOST_KEPT:
            return
        second = Layer(
            len(here.region.channels), np.zeros((1, 1, filters, filters), np.float32), np.zeros(filters, np.float32)
        )
        pair = replace(here.region, layers=(layer, replace(second, steps=(Activate("relu"),))))
        best = self.best(pair, shape)
        if best is None:
            return
        macs = here.numbers[0] * filters
        # By instructions of 16 × 8 × 16 on four quarters of each multiprocessor.
        least = macs / 2048 * self.arch.product_cycles / 4 / self.arch.processors / self.arch.clock
        low, high = sorted((max(best.seconds - here.best.seconds, 0.0), least))
        in_registers = best.template == "warpgroup" or getattr(best.parameters, "second", "") == "registers"
        keeps = "registers" if in_registers else "shared memory"
        out = here.sizes[-1]
        apart = self.best(Region((replace(second, value=0),), (filters,)), (shape[0], *out))
        what = f"a 1×1 of {filters} to {filters} channels behind it in the same kernel, by {keeps}"
        what += f"; as a kernel of its own {1000 * apart.seconds:.4f} ms" if apart is not None else ""
        yield Advice("pointwise", here.names[0], what, self.gain(here, -high, -low))

    @staticmethod
    def gain(here: _Here, low: float, high: float) -> Gain:
        return Gain(1000 * low + 0.0, 1000 * high + 0.0, 1000 * here.best.seconds)


def _range(milliseconds: tuple[float, float]) -> str:
    first, last = (f"{round(end, 4) + 0.0:.4f}" for end in milliseconds)  # + 0.0: of -0.0
    return first if first == last else f"{first} to {last}"


def _filters(region: Region) -> list[int]:
    return [layer.filters for layer in region.layers]


def _widened(region: Region, value: int, wanted: int) -> Region:
    """The region with so many channels of a value; what is added to it has as many."""
    inputs = len(region.channels)
    channels, layers = list(region.channels), []
    if value < inputs:
        channels[value] = wanted
    for number, layer in enumerate(region.layers, inputs):
        weights, bias, steps = layer.weights, layer.bias, layer.steps
        if layer.value == value:
            weights = _padded(weights, 2, wanted)
        if number == value:
            weights, bias = _padded(weights, 3, wanted), _padded(bias, 0, wanted)
            steps = tuple(_padded_step(step, wanted) for step in steps)
            for step in steps:
                if isinstance(step, Add) and step.value < inputs and channels[step.value] > 1:
                    channels[step.value] = wanted
        layers.append(replace(layer, weights=weights, bias=bias, steps=steps))
    return replace(region, layers=tuple(layers), channels=tuple(channels))


def _padded_step(step: Activate | Add, wanted: int) -> Activate | Add:
    if isinstance(step, Add) or step.slopes is None or step.slopes.size == 1:
        return step
    return replace(step, slopes=_padded(step.slopes, 0, wanted))


def _padded(array: np.ndarray, axis: int, wanted: int) -> np.ndarray:
    return np.pad(array, [(0, wanted - size if number == axis else 0) for number, size in enumerate(array.shape)])

"""How far a fully convolutional Keras model looks, derived from its layers: the halo that tiles need."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from keras_efficient.errors import UnsupportedLayer, WrongArgument

__all__ = ["ReceptiveField", "receptive_field"]

# Layers and operations whose result at a pixel depends on that pixel alone.
_POINTWISE = frozenset(
    """
    Abs Absolute Activation ActivityRegularization Add AlphaDropout Average BatchNormalization Cast Clip Concatenate
    Dense Divide Dropout ELU Elu Exp FakeQuantize GaussianDropout GaussianNoise Gelu HardSigmoid HardSwish Hardtanh
    Identity InputLayer LeakyReLU LeakyRelu Log Maximum Minimum Mish Multiply Negative PReLU Power ReLU Relu Relu6
    Rescaling Round Sigmoid Silu Softplus Softsign SpatialDropout2D Sqrt Square Subtract Swish Tanh TrueDivide
    """.split()  # noqa: SIM905
)
_POOLING = frozenset({"AveragePooling2D", "MaxPooling2D"})


@dataclass(frozen=True)
class ReceptiveField:
    """What tiling needs to know of a model.

    Attributes:
        radius: the pixels of the result that belong to input pixel p depend on p − radius … p + radius at most.
        multiple: somewhere the model works at 1/multiple of the input's resolution: tiles must start at multiples.
        scale: output pixels for one input pixel.
    """

    radius: int
    multiple: int
    scale: int


@dataclass(frozen=True)
class _Reach:
    """Pixel o of a tensor depends on the input's pixels o·step − before … o·step + after (along one axis)."""

    before: Fraction = Fraction(0)
    after: Fraction = Fraction(0)
    step: Fraction = Fraction(1)


def receptive_field(model) -> ReceptiveField:
    """Walks through a functional or Sequential Keras model of one input and one output, both N×H×W×C.

    Convolutions (transposed, depthwise and collapsible ones too), pooling, padding, cropping, up-sampling, pixel
    shuffles and everything pointwise are known.

    Raises:
        UnsupportedLayer: a layer that mixes pixels in a way not known here; give the halo by hand then.
        WrongArgument: not such a model.
    """
    graph = _graph(model)
    if graph is None or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise WrongArgument(
            "The receptive field can be derived for a functional Keras model of one input and one output only.",
            hint="Give the halo: the radius of the receptive field in input pixels (m + 4 for SESR with m blocks).",
        )
    fields = [_field(graph, axis) for axis in (0, 1)]
    if fields[0].scale != fields[1].scale:
        raise WrongArgument(f"The model scales height by {fields[0].scale} and width by {fields[1].scale}.")
    return ReceptiveField(max(f.radius for f in fields), math.lcm(*(f.multiple for f in fields)), fields[0].scale)


def _field(graph, axis: int) -> ReceptiveField:
    steps: set[Fraction] = set()
    reach = _through(graph, [_Reach()], axis, steps)[0]
    if reach.step.numerator != 1:
        raise WrongArgument(f"The model's result is {1 / reach.step} times as large as its input, not a whole number.")
    scale = reach.step.denominator
    after = math.floor(Fraction(scale - 1, scale) + reach.after)
    multiple = math.lcm(*(step.numerator for step in steps), 1)
    return ReceptiveField(max(math.floor(reach.before), after, 0), multiple, scale)


def _graph(model):
    """The functional graph of a model, or None for anything else."""
    graph = getattr(model, "_functional", None) or model
    return graph if hasattr(graph, "_nodes_by_depth") else None


def _through(graph, inputs: list[_Reach], axis: int, steps: set[Fraction]) -> list[_Reach]:
    known = {id(tensor): reach for tensor, reach in zip(graph.inputs, inputs, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            sources = [known[id(tensor)] for tensor in node.input_tensors]
            nested = _graph(node.operation)
            if nested is not None:
                results = _through(nested, sources, axis, steps)
            else:
                results = [_after(node.operation, sources, axis)] * len(node.output_tensors)
            for tensor, reach in zip(node.output_tensors, results, strict=True):
                known[id(tensor)] = reach
                steps.add(reach.step)
    return [known[id(tensor)] for tensor in graph.outputs]


def _after(operation, sources: list[_Reach], axis: int) -> _Reach:
    """The reach behind one layer or operation."""
    kind = type(operation).__name__
    reach = _merged(operation, sources)
    if getattr(operation, "data_format", "channels_last") == "channels_first":
        raise _unknown(operation, "channels_first is not supported")
    if kind in ("Conv2DTranspose", "Convolution2DTranspose"):
        return _transposed(operation, reach, axis)
    if hasattr(operation, "kernel_size") or kind in _POOLING:
        return _windowed(operation, reach, axis)
    if kind in ("DepthToSpace", "UpSampling2D"):
        factor = operation.block_size if kind == "DepthToSpace" else operation.size[axis]
        extra = 0 if kind == "DepthToSpace" or operation.interpolation == "nearest" else 2
        return _Reach(
            reach.before + reach.step * Fraction(factor - 1, factor) + extra * reach.step,
            reach.after + extra * reach.step,
            reach.step / factor,
        )
    if kind == "SpaceToDepth":
        size = operation.block_size
        return _Reach(reach.before, reach.after + (size - 1) * reach.step, reach.step * size)
    if kind in ("ZeroPadding2D", "Cropping2D"):
        first = operation.padding[axis][0] if kind == "ZeroPadding2D" else -operation.cropping[axis][0]
        return replace(reach, before=reach.before + first * reach.step, after=reach.after - first * reach.step)
    if kind in _POINTWISE and getattr(operation, "axis", -1) in (-1, 3):
        return reach
    raise _unknown(operation, f"what {kind} does to pixels is not known")


def _windowed(operation, reach: _Reach, axis: int) -> _Reach:
    kernel = operation.pool_size if type(operation).__name__ in _POOLING else operation.kernel_size
    stride = _entry(operation.strides, axis)
    width = (_entry(kernel, axis) - 1) * _entry(getattr(operation, "dilation_rate", 1), axis) + 1
    padding = max(width - stride, 0) // 2 if operation.padding == "same" else 0
    return _Reach(
        reach.before + padding * reach.step, reach.after + (width - 1 - padding) * reach.step, reach.step * stride
    )


def _transposed(operation, reach: _Reach, axis: int) -> _Reach:
    stride = _entry(operation.strides, axis)
    width = (_entry(operation.kernel_size, axis) - 1) * _entry(operation.dilation_rate, axis) + 1
    padding = max(width - stride, 0) // 2 if operation.padding == "same" else 0
    step = reach.step / stride
    # One more on either side: backends put the odd pixel of SAME differently.
    return _Reach(reach.before + (width - padding) * step, reach.after + (padding + 1) * step, step)


def _merged(operation, sources: list[_Reach]) -> _Reach:
    if len({reach.step for reach in sources}) != 1:
        raise _unknown(operation, "its inputs have different resolutions, or none")
    return _Reach(max(r.before for r in sources), max(r.after for r in sources), sources[0].step)


def _entry(value, axis: int) -> int:
    return value if isinstance(value, int) else value[axis]


def _unknown(operation, reason: str) -> UnsupportedLayer:
    return UnsupportedLayer(operation.name, f"{reason}, so the halo cannot be derived.", hint="Give it: halo=….")

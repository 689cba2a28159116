"""Clips that a quantised tensor's range makes already.

A model that ends in a clip to [0, 1] leaves RELU and MINIMUM in the file, although the scale 1/255 with the zero point
-128 can hold nothing else: two passes over the whole image. The same holds for a ReLU that is fused into a convolution:
where a reshape follows, Vela takes it out again and gives it a pass of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, Tensor, rebuild

__all__ = ["IDLE_CLIPS", "without_idle_clips"]

_FUSED = {1: "RELU", 3: "RELU6"}  # the schema's ActivationFunctionType


def without_idle_clips(graph: Graph) -> Graph | None:
    """Leaves out every RELU, RELU6, MINIMUM and MAXIMUM, alone or fused, that changes no integer of its input."""

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        if _is_idle(graph, op):
            return values[graph.operands(op)[0]]
        if _is_fused_idle(graph, op):
            options = copy.copy(op.options)
            options.fusedActivationFunction = 0
            return builder.copy(op, values, options=options)
        return None

    return rebuild(graph, rule)


def _is_fused_idle(graph: Graph, op: Op) -> bool:
    name = _FUSED.get(getattr(op.options, "fusedActivationFunction", 0))
    return name is not None and len(op.outputs) == 1 and _holds_nothing_else(name, graph.tensor(op.output))


def _holds_nothing_else(activation: str, result: Tensor) -> bool:
    """Whether the tensor's range is within the activation's."""
    if result.dtype not in ("int8", "int16") or len(result.scales) != 1:
        return False
    limits, zero = np.iinfo(result.dtype), result.zero_points[0]
    return zero == limits.min and (activation == "RELU" or (limits.max - zero) * result.scales[0] <= 6.0)


def _is_idle(graph: Graph, op: Op) -> bool:
    operands = graph.operands(op)
    if op.name not in ("RELU", "RELU6", "MINIMUM", "MAXIMUM") or len(operands) != 1:
        return False
    source, result = graph.tensor(operands[0]), graph.tensor(op.output)
    if source.grid != result.grid or source.shape != result.shape or len(source.scales) != 1:
        return False
    if source.dtype not in ("int8", "int16"):
        return False
    if op.name in _FUSED.values():
        return _holds_nothing_else(op.name, result)
    limits = np.iinfo(source.dtype)
    bound = next(graph.tensor(index) for index in op.inputs if index not in operands)
    if bound.data is None or bound.grid != source.grid:
        return False
    return bool(np.all(bound.data >= limits.max) if op.name == "MINIMUM" else np.all(bound.data <= limits.min))


IDLE_CLIPS = GraphLowering(
    name="leave-out-idle-clips",
    function=without_idle_clips,
    summary="clips that the quantised range makes already are left out",
)

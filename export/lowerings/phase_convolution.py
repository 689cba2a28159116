"""A transposed convolution of a quantised file as the convolutions of its phases and a depth-to-space.

An NPU runs TRANSPOSE_CONV on the enlarged grid, where most of what it multiplies are inserted zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, Tensor, rebuild
from keras_efficient.export.lowerings.transposed_convolution import phase_kernels

__all__ = ["PHASE_CONVOLUTION", "phase_convolution"]


def phase_convolution(graph: Graph) -> Graph | None:
    """Every TRANSPOSE_CONV with SAME padding, stride r in both directions and an output r times the input.

    Output pixel ``r·Y + p`` is the sum over inputs ``Y + d`` with the tap ``t = p + pad - r·d``: for each of the r²
    phases (p, q) an ordinary convolution, whose channels DEPTH_TO_SPACE lays side by side. The sums are the same;
    a runtime's two kernels may round a tie to different sides.
    """

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        return _rewritten(graph, builder, op, values) if _applies(graph, op) else None

    return rebuild(graph, rule)


def _applies(graph: Graph, op: Op) -> bool:
    if op.name != "TRANSPOSE_CONV" or op.options.padding != 0 or op.options.strideH != op.options.strideW:
        return False
    if any(graph.tensor(index).data is None for index in op.inputs if index != op.inputs[2] and index >= 0):
        return False
    source, result, block = graph.tensor(op.inputs[2]), graph.tensor(op.output), op.options.strideH
    return block > 1 and result.shape[1:3] == (block * source.shape[1], block * source.shape[2])


def _rewritten(graph: Graph, builder: Builder, op: Op, values: Mapping[int, int]) -> int:
    weights, source, block = graph.tensor(op.inputs[1]), graph.tensor(op.inputs[2]), op.options.strideH
    kernel = _phase_kernels(weights, block)
    filters = len(kernel)
    scales = np.resize(np.asarray(weights.scales, np.float64), filters)
    if len(op.inputs) > 3 and op.inputs[3] >= 0:
        old_bias = graph.tensor(op.inputs[3])
        assert old_bias.data is not None
        values_of_bias, bias_scales = old_bias.data, np.resize(np.asarray(old_bias.scales, np.float64), filters)
    else:
        values_of_bias = np.zeros(weights.shape[0], np.int64 if source.dtype == "int16" else np.int32)
        bias_scales = scales * source.scales[0]
    inputs = [
        values[op.inputs[2]],
        builder.array(kernel, scales.tolist(), name="phases"),
        builder.array(np.resize(values_of_bias, filters), bias_scales.tolist(), name="phases_bias"),
    ]
    options = builder.options("Conv2D", padding=0, strideH=1, strideW=1, dilationHFactor=1, dilationWFactor=1)
    options.fusedActivationFunction = getattr(op.options, "fusedActivationFunction", 0)
    phases = builder.like(op.output, (*source.shape[:3], filters))
    builder.emit("CONV_2D", inputs, phases, options, version=4 if source.dtype == "int16" else 3)
    result = builder.like(op.output, graph.tensor(op.output).shape)
    return builder.emit("DEPTH_TO_SPACE", [phases], result, builder.options("DepthToSpace", blockSize=block), version=2)


def _phase_kernels(weights: Tensor, block: int) -> np.ndarray:
    """(r²·O)×K×K×I out of O×k×k×I, channels in the order (row phase, column phase, O)."""
    assert weights.data is not None
    return np.ascontiguousarray(phase_kernels(weights.data.transpose(1, 2, 0, 3), block).transpose(3, 0, 1, 2))


PHASE_CONVOLUTION = GraphLowering(
    name="transposed-convolution-as-shuffle",
    function=phase_convolution,
    summary="an enlarging transposed convolution becomes a convolution and a depth-to-space",
)

"""PRELU behind a convolution, in a quantised file, as the maximum of two convolutions.

``prelu(x) = max(x, a·x)`` for slopes ``a ≤ 1``, and a convolution with the kernel ``K`` and the bias ``b`` that gives x
gives ``a·x`` with ``a·K`` and ``a·b``: the same integers, with other scales. Both sums are rounded once, onto the grid
of the result, and MAXIMUM takes one of them. PRELU rounds twice, x onto its own grid and then the result; and LiteRT
runs it outside XNNPACK, by a scalar kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, rebuild

__all__ = ["DOUBLED_CONVOLUTION", "doubled_convolution"]

_SMALLEST_SLOPE = 1e-6  # scales are positive; far below it, the product is zero on every grid


def doubled_convolution(graph: Graph) -> Graph | None:
    """Every int8 PRELU with one slope ``a ≤ 1`` a channel whose input comes from a CONV_2D and goes nowhere else."""
    replaced = {id(op.raw): convolution for op in graph.ops if (convolution := _convolution(graph, op)) is not None}

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        convolution = replaced.get(id(op.raw))
        return None if convolution is None else _maximum(graph, builder, op, convolution, values)

    rewritten = rebuild(graph, rule) if replaced else None
    return None if rewritten is None else rewritten.without_unused()


def _convolution(graph: Graph, op: Op) -> Op | None:
    """The convolution that a PRELU can be merged with, or `None`."""
    if op.name != "PRELU":
        return None
    source, slopes, result = graph.tensor(op.inputs[0]), graph.tensor(op.inputs[1]), graph.tensor(op.output)
    made = graph.producers.get(op.inputs[0])
    fits = (
        result.dtype == "int8"
        and slopes.data is not None
        and slopes.data.size == source.shape[-1]
        and made is not None
        and made.name == "CONV_2D"
        and made.options.fusedActivationFunction == 0
        and len(graph.consumers(op.inputs[0])) == 1
        and op.inputs[0] not in graph.outputs
        and all(graph.tensor(index).data is not None for index in made.inputs[1:])
        and len(made.inputs) == 3
        and _slopes(graph, op).max() <= 1
    )
    return made if fits else None


def _slopes(graph: Graph, op: Op) -> np.ndarray:
    stored = graph.tensor(op.inputs[1])
    assert stored.data is not None
    return (stored.data.reshape(-1).astype(np.float64) - stored.zero_points[0]) * stored.scales[0]


def _maximum(graph: Graph, builder: Builder, op: Op, convolution: Op, values: Mapping[int, int]) -> int:
    kernel, bias = (graph.tensor(index) for index in convolution.inputs[1:])
    assert kernel.data is not None
    assert bias.data is not None
    slopes = _slopes(graph, op)
    signs = np.where(slopes < 0, -1, 1)
    sizes = np.maximum(np.abs(slopes), _SMALLEST_SLOPE)
    scaled = {
        1: builder.array(
            (kernel.data * signs[:, None, None, None]).astype(np.int8),
            (sizes * kernel.scales).tolist(),
            name="a_kernel",
        ),
        2: builder.array((bias.data * signs).astype(bias.data.dtype), (sizes * bias.scales).tolist(), name="a_bias"),
    }
    shape = graph.tensor(op.output).shape
    sides = []
    for others in (None, scaled):
        side = copy.copy(convolution.raw)
        side.outputs = [op.output]  # on the grid of the result, not on the old one of the sum
        plain = Op(convolution.name, convolution.inputs, (op.output,), convolution.options, side)
        sides.append(builder.copy(plain, values, shape, others=others))
    return builder.emit("MAXIMUM", sides, builder.like(op.output, shape), builder.options("MaximumMinimum"), version=2)


DOUBLED_CONVOLUTION = GraphLowering(
    name="prelu-as-doubled-convolution",
    function=doubled_convolution,
    summary="PReLU behind a convolution becomes the maximum of two convolutions: one rounding instead of two",
)

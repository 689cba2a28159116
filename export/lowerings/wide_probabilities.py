"""Softmaxes and sigmoids at the end of an int8 file, and means and multiples of them, in 16 bits.

An int8 SOFTMAX or LOGISTIC has the scale 1/256 and nothing else: a confident network's mistakes, and what several
networks differ by, are below its step. In 16 bits the scale is 1/32768. The sums before it stay what they were: their
integers times 128, with a scale 1/128 as large. What is k at most has the scale k/32768.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, rebuild

__all__ = ["WIDE_PROBABILITIES", "wide_probabilities"]

_FINER = 128  # int8 times this stays within int16
_STEP = 1 / 32768  # of an int16 SOFTMAX and LOGISTIC: LiteRT has it written into its kernels
_HALF = 2**14  # stands for a factor's value: any integer may


def wide_probabilities(graph: Graph) -> Graph | None:
    """Every int8 output that is a SOFTMAX or LOGISTIC, or sums and multiples of some that nothing else reads."""
    found: dict[int, float] = {}  # by tensor: its largest value
    for output in graph.outputs:
        found |= _summed(graph, output) or {}

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        if op.output not in found:
            return None
        shape, scale = graph.tensor(op.output).shape, found[op.output] * _STEP
        if op.name in _ENDS:
            source = graph.tensor(op.inputs[0])
            wide = builder.computed(source.index, source.shape, "int16", [source.scales[0] / _FINER])
            inputs = [builder.emit("QUANTIZE", [values[source.index]], wide, builder.options("Quantize"), version=2)]
            options = op.options
        elif op.name == "ADD":
            inputs = [values[index] for index in op.inputs]
            options = copy.copy(op.options)
            options.potScaleInt16 = False
        else:
            inputs = [values[index] if index in values else _factor(graph, builder, index) for index in op.inputs]
            options = op.options
        output = builder.computed(op.output, shape, "int16", [scale])
        return builder.emit(op.name, inputs, output, options, version=_VERSIONS[op.name])

    return rebuild(graph, rule) if found else None


_ENDS = ("SOFTMAX", "LOGISTIC")
_VERSIONS = {"SOFTMAX": 3, "LOGISTIC": 3, "ADD": 3, "MUL": 4}  # that take int16


def _summed(graph: Graph, index: int) -> dict[int, float] | None:
    """Largest values of a tensor and of those that it is made of; `None`: it is made of other things, too."""
    op = graph.producers.get(index)
    if op is None or graph.tensor(index).dtype != "int8":
        return None
    if op.name in _ENDS:
        return {index: 1.0}
    sources = graph.operands(op)
    is_multiple = op.name == "MUL" and len(sources) == 1 and np.prod(_other(graph, op).shape, dtype=int) == 1
    is_sum = op.name == "ADD" and len(sources) == 2
    if not (is_multiple or is_sum) or op.options.fusedActivationFunction:
        return None
    found: dict[int, float] = {}
    for source in sources:
        part = _summed(graph, source) if len(graph.consumers(source)) == 1 and source not in graph.outputs else None
        if part is None or (is_sum and graph.producers[source].name == "MUL"):
            return None
        found |= part
    if is_sum:
        return {**found, index: sum(found[source] for source in sources)}
    factor = _value(graph, _other(graph, op).index)
    return {**found, index: factor * found[sources[0]]} if factor > 0 else None


def _other(graph: Graph, op: Op):
    return graph.tensor(next(index for index in op.inputs if index not in graph.operands(op)))


def _value(graph: Graph, index: int) -> float:
    """Of a constant of one number."""
    tensor = graph.tensor(index)
    assert tensor.data is not None
    return float((tensor.data.item() - tensor.zero_points[0]) * tensor.scales[0])


def _factor(graph: Graph, builder: Builder, index: int) -> int:
    values = np.full(graph.tensor(index).shape, _HALF, np.int16)
    return builder.array(values, [_value(graph, index) / _HALF], name="part")


WIDE_PROBABILITIES = GraphLowering(
    name="wide-probabilities",
    function=wide_probabilities,
    summary="softmaxes and sigmoids at the end, and means of them, are in 16 bits",
)

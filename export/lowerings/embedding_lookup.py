"""Tables in a float file that are read row by row, by operators that the converter does not know or does not use.

Integers: the converter writes GATHER, CAST and MUL, with a byte for each number. LiteRT's EMBEDDING_LOOKUP does all
three, and reads tables of 4 and 2 bits. Tables of 8 bits keep the three, which are faster: 1.7 µs for 64 rows of 64
numbers in LiteRT 2.3, where the lookup takes 4.4 µs.

Half precision: the converter widens the whole table in front of the GATHER, which at run time is a float32 copy of it
in memory; behind the GATHER, only the rows that were asked for are widened.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_efficient.export.graph import Graph, GraphLowering, Op
from keras_efficient.export.lowerings.table_layers import narrowest_bits

__all__ = ["EMBEDDING_LOOKUP", "ROWS_WIDENED_LATE", "embedding_lookup", "rows_widened_late"]

_VERSION = 4  # of the operator: the first that reads 4 bits, and the one that LiteRT gives 2 bits too


def embedding_lookup(graph: Graph) -> Graph | None:
    """EMBEDDING_LOOKUP for every constant int8 table that 4 bits can hold, and that is read for scaled floats only."""
    return _in_every_subgraph(graph, _look_up)


def rows_widened_late(graph: Graph) -> Graph | None:
    """GATHER from float16 and then DEQUANTIZE, in the place of DEQUANTIZE and then GATHER."""
    return _in_every_subgraph(graph, _widen_late)


def _in_every_subgraph(graph: Graph, change: Callable[[Any, Any], bool]) -> Graph | None:
    """The graph with its subgraphs changed by ``change(model, subgraph)``, which says whether it did anything.

    Not `graph.rebuild`: that gives up where there are loops, and a recommender may well have one behind its tables.
    """
    model = copy.copy(graph.model)
    model.buffers, model.operatorCodes = list(model.buffers), list(model.operatorCodes)
    model.subgraphs = [copy.copy(subgraph) for subgraph in model.subgraphs]
    for subgraph in model.subgraphs:
        subgraph.tensors = [copy.copy(tensor) for tensor in subgraph.tensors or ()]
        subgraph.operators = [copy.copy(operator) for operator in subgraph.operators or ()]
    changed = [change(model, subgraph) for subgraph in model.subgraphs]
    return Graph(model) if any(changed) else None


def _view(model: Any, subgraph: Any) -> Graph:
    """Read access to one subgraph."""
    alone = copy.copy(model)
    alone.subgraphs = [subgraph]
    return Graph(alone)


@dataclass(frozen=True)
class _Lookup:
    """A gather of integers with the operators that turn them into floats."""

    gather: Op
    cast: Op
    product: Op | None
    scale: float


def _look_up(model: Any, subgraph: Any) -> bool:
    graph = _view(model, subgraph)
    idle: set[int] = set()
    tables = _tables(graph)
    for table, lookups in tables.items():
        shared = len({lookup.scale for lookup in lookups}) == 1
        _store(model, subgraph.tensors[table], graph.tensor(table).data, lookups[0].scale if shared else 1.0)
        code = _code(model, "EMBEDDING_LOOKUP", _VERSION)
        for lookup in lookups:
            product = lookup.product if shared else None
            raw = lookup.gather.raw
            raw.opcodeIndex, raw.builtinOptions, raw.builtinOptionsType = code, None, 0
            raw.inputs = [lookup.gather.inputs[1], table]
            raw.outputs = [(product or lookup.cast).output]
            idle |= {id(op.raw) for op in (lookup.cast, product) if op is not None}
    subgraph.operators = [raw for raw in subgraph.operators if id(raw) not in idle]
    return bool(tables)


def _tables(graph: Graph) -> Mapping[int, Sequence[_Lookup]]:
    """Lookups by the index of their table; tables that are read in another way as well are left out."""
    found: dict[int, list[_Lookup]] = defaultdict(list)
    for op in graph.ops:
        lookup = _lookup(graph, op)
        if lookup is not None:
            found[op.inputs[0]].append(lookup)
    return {table: lookups for table, lookups in found.items() if len(lookups) == len(graph.consumers(table))}


def _lookup(graph: Graph, op: Op) -> _Lookup | None:
    if op.name != "GATHER" or op.options.axis != 0 or op.options.batchDims != 0:
        return None
    table, ids = (graph.tensor(index) for index in op.inputs)
    plain = table.data is not None and table.dtype == "int8" and not table.scales and len(table.shape) == 2
    if not plain or not _packs(table.data) or ids.dtype != "int32" or len(ids.shape) != 1:
        return None
    cast = _only_reader(graph, op.output)
    if cast is None or cast.name != "CAST" or graph.tensor(cast.output).dtype != "float32":
        return None
    product = _only_reader(graph, cast.output)
    factor = None if product is None else _factor(graph, product, cast.output)
    return _Lookup(op, cast, None, 1.0) if factor is None else _Lookup(op, cast, product, factor)


def _only_reader(graph: Graph, index: int) -> Op | None:
    readers = graph.consumers(index)
    return readers[0] if len(readers) == 1 and index not in graph.outputs else None


def _factor(graph: Graph, op: Op, operand: int) -> float | None:
    """What an operator multiplies `operand` by, where it does nothing else and that is one positive constant."""
    if op.name != "MUL" or op.options.fusedActivationFunction != 0 or op.inputs[0] == op.inputs[1]:
        return None
    other = next(index for index in op.inputs if index != operand)
    maker = graph.producers.get(other)
    half = maker is not None and _widens(graph, maker)
    values = _half_precision(graph, maker.inputs[0]) if half and maker is not None else graph.tensor(other).data
    if values is None or values.size != 1 or len(values.shape) > 2 or values.dtype.kind != "f":
        return None
    factor = float(values.reshape(()))
    return factor if 0 < factor < np.inf else None


def _packs(codes: Any) -> bool:
    """Whether the numbers are of few bits, and every row begins with a byte: LiteRT finds no other."""
    bits = narrowest_bits(codes)
    return bits < 8 and codes.shape[1] * bits % 8 == 0


def _store(model: Any, tensor: Any, codes: Any, scale: float) -> None:
    """Packs a table and gives it its scale."""
    from ai_edge_litert import schema_py_generated as schema

    bits = narrowest_bits(codes)
    buffer, grid = schema.BufferT(), schema.QuantizationParametersT()
    buffer.data = _packed(codes, bits)
    grid.scale, grid.zeroPoint = [scale], [0]
    old = tensor.buffer
    tensor.type = getattr(schema.TensorType, f"INT{bits}")
    tensor.buffer, tensor.quantization = len(model.buffers), grid
    model.buffers.append(buffer)
    if not any(other.buffer == old for subgraph in model.subgraphs for other in subgraph.tensors):
        model.buffers[old] = schema.BufferT()


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of ``8 // bits`` numbers each, the first in the lowest bits."""
    each = 8 // bits
    numbers = codes.reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    return np.bitwise_or.reduce([numbers[place::each] << np.uint8(bits * place) for place in range(each)])


def _code(model: Any, name: str, version: int) -> int:
    """The place of an operator in the file's list; it is added where it is missing."""
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, name)
    for place, code in enumerate(model.operatorCodes):
        if code.builtinCode == number and code.version == version:
            return place
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _widen_late(model: Any, subgraph: Any) -> bool:
    graph = _view(model, subgraph)
    operators = []
    for op in graph.ops:
        operators.append(op.raw)
        maker = graph.producers.get(op.inputs[0]) if op.name == "GATHER" else None
        if maker is None or not _widens(graph, maker):
            continue
        operators.append(copy.copy(maker.raw))
        operators[-1].inputs, operators[-1].outputs = [_narrow_copy(subgraph, op.output)], [op.output]
        op.raw.inputs, op.raw.outputs = [maker.inputs[0], op.inputs[1]], list(operators[-1].inputs)
    changed = len(operators) > len(graph.ops)
    read = {int(index) for raw in operators for index in raw.inputs} | set(graph.outputs)
    if changed:  # an operator without outputs, such as the one that fills a hash table, is no idle one
        subgraph.operators = [raw for raw in operators if not len(raw.outputs) or read & {*map(int, raw.outputs)}]
    return changed


def _widens(graph: Graph, op: Op | None) -> bool:
    """Whether an operator turns a constant of half precision into float32."""
    return op is not None and op.name == "DEQUANTIZE" and _half_precision(graph, op.inputs[0]) is not None


def _half_precision(graph: Graph, index: int) -> np.ndarray | None:
    tensor = graph.tensor(index)
    if tensor.dtype != "float16" or not graph.is_constant(index):
        return None
    stored = graph.model.buffers[graph.model.subgraphs[0].tensors[index].buffer].data
    return np.asarray(stored, np.uint8).view(np.float16).reshape(tensor.shape)


def _narrow_copy(subgraph: Any, index: int) -> int:
    """A new tensor like another one, of half precision."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = copy.copy(subgraph.tensors[index])
    tensor.type, tensor.name = schema.TensorType.FLOAT16, f"{_text(tensor.name)};half"
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


def _text(name: bytes | str | None) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else (name or "")


EMBEDDING_LOOKUP = GraphLowering(
    name="embedding-lookup",
    function=embedding_lookup,
    summary="integer tables are packed to 4 or 2 bits and read by LiteRT's EMBEDDING_LOOKUP",
)
ROWS_WIDENED_LATE = GraphLowering(
    name="rows-widened-late",
    function=rows_widened_late,
    summary="of half-precision tables only the rows that are looked up are widened",
)

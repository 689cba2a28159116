"""Networks that compute in half precision here and there, as networks of float32: regions round anyway.

Mixed precision leaves convolutions of float16 between casts. Widened they are convolutions as all others, the casts are
gone, and what `partition` makes of them computes in float16 again. Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.rewriting import Rewriter, nodes_of, source
from keras_efficient.export.bolt.standard import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["to_float32"]

TYPES = ("to", "dtype")  # attributes that name a number format


def to_float32(model: ir.Model) -> None:
    """Everything inside of float16 and bfloat16 is float32, and casts between floats that do nothing are gone.

    A network with functions of others' is left as it is: they may compute in half precision inside.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    if not _has_halves(model) or any(one.domain != DOMAIN for one in model.functions.values()):
        return
    common.ShapeInferencePass()(model)  # tells the types of what is inside
    inputs, outputs = ([value.dtype for value in values] for values in (model.graph.inputs, model.graph.outputs))
    for graph in _graphs(model):
        _widen_values(graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        _widen_attributes(node)
    for value, dtype in zip(list(model.graph.inputs), inputs, strict=True):
        if _is_half(dtype):
            _cast_behind(model, value, dtype)
    _drop_casts(model)
    for index, dtype in enumerate(outputs):
        if _is_half(dtype) and model.graph.outputs[index].producer() is not None:
            _cast_at_the_end(model, index, dtype)


def _is_half(dtype: ir.DataType | None) -> bool:
    import onnx_ir as ir

    return dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _has_halves(model: ir.Model) -> bool:
    """Whether something of the model is in half precision: an input, a constant, or what an attribute makes so."""
    import onnx_ir as ir

    if any(_is_half(value.dtype) for value in model.graph.inputs):
        return True
    if any(_is_half(value.dtype) for graph in _graphs(model) for value in graph.initializers.values()):
        return True
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return any(_names_half(one) or _holds_half(one) for node in nodes for one in node.attributes.values())


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and those inside of nodes (loops, conditions)."""
    yield model.graph
    yield from model.graph.subgraphs()


def _names_half(attribute: ir.Attr) -> bool:
    import onnx_ir as ir

    is_type = attribute.name in TYPES and attribute.type == ir.AttributeType.INT
    return is_type and _is_half(ir.DataType(attribute.as_int()))


def _holds_half(attribute: ir.Attr) -> bool:
    import onnx_ir as ir

    return attribute.type == ir.AttributeType.TENSOR and _is_half(attribute.as_tensor().dtype)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_values(graph: ir.Graph) -> None:
    import onnx_ir as ir

    for value in graph.initializers.values():
        if value.const_value is not None and _is_half(value.dtype):
            value.const_value = _widened(value.const_value)
    inside = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *inside):
        if _is_half(value.dtype):
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen_attributes(node: ir.Node) -> None:
    import onnx_ir as ir

    for name, attribute in list(node.attributes.items()):
        if _names_half(attribute):
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif _holds_half(attribute):
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))


def _cast_behind(model: ir.Model, value: ir.Value, dtype: ir.DataType | None) -> None:
    """An input is in half precision again, and its readers read it in float32."""
    import onnx_ir as ir

    first, uses = next(iter(model.graph), None), list(value.uses())
    if first is None:
        return
    wide = Rewriter(model, first).op("Cast", [value], to=int(ir.DataType.FLOAT))
    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)


def _cast_at_the_end(model: ir.Model, index: int, dtype: ir.DataType | None) -> None:
    """An output is in half precision again; what else reads it reads it in float32."""
    import onnx_ir as ir

    value = model.graph.outputs[index]
    node = ir.node("Cast", [value], {"to": int(dtype or ir.DataType.FLOAT16)})
    model.graph.append(node)
    made = node.outputs[0]
    made.name, value.name = value.name, f"{value.name}__wide"
    made.shape, made.type = value.shape, None if dtype is None else ir.TensorType(dtype)
    model.graph.outputs[index] = made


def _drop_casts(model: ir.Model) -> None:
    """Casts from float32 to float32, which others were."""
    import onnx_ir as ir

    wide = ir.DataType.FLOAT
    for node in nodes_of(model, "Cast"):
        if node.attributes["to"].as_int() == wide and source(node).dtype == wide:
            Rewriter(model, node).replace(node.outputs[0], source(node))
            model.graph.remove(node, safe=True)

"""Regions in float16: their weights and tensors in half, casts where a neighbour is no region."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.naming import layer_of
from keras_efficient.export.bolt.rewriting import Rewriter, constant, producer, source, tidied
from keras_efficient.export.bolt.standard import DOMAIN, FUSED, LAYER_NAMES

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["to_float16"]


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file of `partition` whose regions compute in float16; what is between regions stays in float32.

    Raises:
        ConversionError: a weight is NaN, or beyond float16's range.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    inner = ir.serde.deserialize_model(model)
    for node in [one for one in inner.graph if one.domain == DOMAIN and one.op_type == FUSED]:
        rewriter = Rewriter(inner, node)
        for index in range(len(node.inputs)):
            value = source(node, index)
            if (numbers := constant(value)) is None:
                node.replace_input_with(index, _half(rewriter, value))
                continue
            if np.isnan(numbers).any():
                raise ConversionError(
                    f"Layer {_layer(node, index)!r} has a weight that is NaN.", hint="Train it again."
                )
            if not np.all(np.abs(numbers) <= np.finfo(np.float16).max):
                raise ConversionError(
                    f"Layer {_layer(node, index)!r} has a weight beyond float16's range, which kernels compute in.",
                    hint="Scale its weights down, or export it as .onnx in float32.",
                )
            node.replace_input_with(index, rewriter.constant(numbers.astype(np.float16), f"{value.name}__half"))
        output = node.outputs[0]
        after = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT)})
        inner.graph.insert_after(node, after)
        uses, widened = [use for use in output.uses() if use.node is not after], after.outputs[0]
        if output.is_graph_output():
            rewriter.replace(output, widened)
            after.replace_input_with(0, output)
        else:
            for use in uses:
                use.node.replace_input_with(use.idx, widened)
        output.shape = output.type = None
        for narrow in [use.node for use in widened.uses() if _narrows(use.node)]:  # an output of the file in float16
            rewriter.replace(narrow.outputs[0], output)
            inner.graph.remove(narrow, safe=True)
    common.RemoveUnusedNodesPass()(inner)
    common.CommonSubexpressionEliminationPass(size_limit=0)(inner)
    tidied(inner)
    return ir.serde.serialize_model(inner)


def _layer(node: ir.Node, index: int) -> str:
    """The layer that an input of a region's node is a weight of."""
    structure = spec.parsed(node.attributes["spec"].as_string())
    owner = spec.owners(structure)[index - len(structure["channels"])]
    return layer_of(json.loads(node.metadata_props[LAYER_NAMES])[owner])


def _half(rewriter: Rewriter, value: ir.Value) -> ir.Value:
    """`value` in float16; what was widened only for its readers is taken as it was, and integers are cast once."""
    import onnx_ir as ir

    if (before := producer(value, "Cast")) is not None:
        narrow = source(before)
        region = narrow.producer()
        if narrow.is_graph_input() and narrow.dtype is not None:
            if narrow.dtype == ir.DataType.FLOAT16:
                return narrow
            if narrow.dtype.is_integer():
                return rewriter.op("Cast", [narrow], to=int(ir.DataType.FLOAT16))
        if region is not None and region.domain == DOMAIN and region.op_type == FUSED:
            return narrow
    return rewriter.op("Cast", [value], to=int(ir.DataType.FLOAT16))


def _narrows(node: ir.Node) -> bool:
    import onnx_ir as ir

    return node.domain == "" and node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16

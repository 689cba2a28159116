"""N×H×W×C and N×C×H×W: what only moves numbers is made transposes, and transposes go where they cancel each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.rewriting import (
    Rewriter,
    attributes_of,
    constant,
    integers,
    nodes_of,
    producer,
    sole_producer,
    source,
)
from keras_efficient.export.bolt.standard import BINARY, DOMAIN, OURS, UNARY

if TYPE_CHECKING:
    import onnx_ir as ir

    from keras_efficient.export.bolt.shapes import Shapes

__all__ = [
    "NCHW",
    "NHWC",
    "axes_kept",
    "plain_scalars",
    "products_of_rows",
    "reshapes",
    "sink_transposes",
]

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def plain_scalars(model: ir.Model, shapes: Shapes) -> None:
    """Constants with one number have no axes where that changes nothing."""
    for node in nodes_of(model, *BINARY - {"PRelu"}):
        for index, value in enumerate(node.inputs):
            numbers, other = constant(value), node.inputs[1 - index] if len(node.inputs) == 2 else None
            if numbers is None or other is None or numbers.size > 1:
                continue
            if 0 < numbers.ndim <= (shapes.rank(other) or 0):
                node.replace_input_with(index, Rewriter(model, node).constant(numbers.reshape(()), value))


def reshapes(model: ir.Model, shapes: Shapes) -> None:
    """Reshapes that change nothing are left out; those that only move axes of size 1 are transposes."""
    kinds = ("Reshape", "Squeeze", "Unsqueeze")
    for node in nodes_of(model, *kinds):
        wanted, before = shapes[node.outputs[0]], node.inputs[0]
        best: tuple[ir.Value, tuple[int, ...] | None] | None = None
        while wanted and before is not None:
            found = shapes[before]
            if found == wanted:
                best = (before, None)
            for perm in (NCHW, NHWC) if best is None and found and len(found[0]) == 4 else ():
                moving = [axis for axis in perm if any(one[axis] != 1 for one in found)]
                if moving == sorted(moving) and wanted == tuple(tuple(one[axis] for axis in perm) for one in found):
                    best = (before, perm)
            reshape = producer(before, *kinds)
            before = None if reshape is None else reshape.inputs[0]
        if best is not None:
            rewriter = Rewriter(model, node)
            value, turn = best
            if turn is not None:
                value = rewriter.op("Transpose", [value], perm=turn)
                shapes.learn(value, node.outputs[0])
            rewriter.replace(node.outputs[0], value)


def axes_kept(model: ir.Model, shapes: Shapes) -> None:
    """What loses leading axes of size 1 only to get them back by a sum or a product with the whole keeps them."""
    for node in nodes_of(model, "Add", "Div", "Mul", "Sub"):
        wanted = shapes[node.outputs[0]]
        for index, value in enumerate(node.inputs):
            reshape = producer(value, "Reshape", "Squeeze")
            whole = None if reshape is None else source(reshape)
            if whole is None or not wanted or shapes[whole] != wanted or shapes[node.inputs[1 - index]] != wanted:
                continue
            pairs = zip(shapes[value], wanted, strict=False)
            if shapes[value] and all((1,) * (len(full) - len(one)) + one == full for one, full in pairs):
                node.replace_input_with(index, whole)


def products_of_rows(model: ir.Model, shapes: Shapes) -> None:
    """A product of a matrix of rows, made from more axes and given more axes behind it, is one of more axes."""
    for node in nodes_of(model, "Reshape"):
        product = sole_producer(node.inputs[0], "MatMul")
        rows = None if product is None else producer(product.inputs[0], "Reshape")
        matrix = None if product is None else constant(product.inputs[1])
        if product is None or rows is None or matrix is None or matrix.ndim != 2:
            continue
        whole = source(rows)
        found, inner, wanted = shapes[whole], shapes[product.inputs[0]], shapes[node.outputs[0]]
        if not found or not inner or len(inner[0]) != 2 or any(one[-1] != len(matrix) for one in found):
            continue
        if wanted == tuple((*one[:-1], matrix.shape[1]) for one in found):
            rewriter = Rewriter(model, node)
            rewriter.replace(node.outputs[0], rewriter.op("MatMul", [whole, product.inputs[1]], name=product.name))


def sink_transposes(model: ir.Model) -> None:
    """Transposes go behind whatever works on single numbers, until they meet their opposite or anything else."""
    import onnx_ir.passes.common as common

    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is not None and (_cancelled(model, node) or _sunk(model, node)):
                changed = True
        common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass(size_limit=0)(model)


def _perm(value: ir.Value | None) -> tuple[int, ...] | None:
    node = None if value is None else value.producer()
    return integers(node, "perm", ()) or None if node is not None and node.op_type == "Transpose" else None


def _cancelled(model: ir.Model, node: ir.Node) -> bool:
    """Two transposes as one, or as none."""
    if node.op_type != "Transpose":
        return False
    second, first = _perm(node.outputs[0]), _perm(node.inputs[0])
    if second is not None and second == tuple(range(len(second))):
        Rewriter(model, node).replace(node.outputs[0], source(node))
        model.graph.remove(node, safe=True)
        return True
    if first is None or second is None:
        return False
    both = tuple(first[axis] for axis in second)
    before = producer(node.inputs[0], "Transpose")
    assert before is not None
    whole, rewriter = source(before), Rewriter(model, node)
    idle = both == tuple(range(len(both)))
    rewriter.replace(node.outputs[0], whole if idle else rewriter.op("Transpose", [whole], perm=both))
    model.graph.remove(node, safe=True)
    return True


def _sunk(model: ir.Model, node: ir.Node) -> bool:
    """``op(Transpose(x))`` as ``Transpose(op(x))``."""
    unary = node.op_type in (UNARY if node.domain == "" else OURS) and node.domain in ("", DOMAIN)
    if not unary and not (node.domain == "" and node.op_type in BINARY):
        return False
    count = 1 if unary else len(node.inputs)
    moving = [value for value in node.inputs[:count] if constant(value) is None]
    perms = {_perm(value) for value in moving}
    perm = perms.pop() if len(perms) == 1 else None
    if perm is None:
        return False
    rewriter, inputs = Rewriter(model, node), []
    for value in node.inputs[:count]:
        numbers, before = constant(value), producer(value, "Transpose")
        if numbers is None:
            inputs.append(None if before is None else source(before))
        elif numbers.size == 1:
            inputs.append(value if numbers.ndim == 0 else rewriter.constant(numbers.reshape(()), value))
        elif numbers.ndim > len(perm):
            return False
        else:
            full = numbers.reshape((1,) * (len(perm) - numbers.ndim) + numbers.shape)
            inputs.append(rewriter.constant(full.transpose(np.argsort(perm)), value))
    inputs += node.inputs[count:]
    made = rewriter.op(node.op_type, inputs, domain=node.domain, name=node.name, **attributes_of(node))
    rewriter.replace(node.outputs[0], rewriter.op("Transpose", [made], perm=perm))
    model.graph.remove(node, safe=True)
    return True

"""Reading and changing a graph of onnx_ir."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Rewriter",
    "attributes_of",
    "constant",
    "folded",
    "integer",
    "integers",
    "nodes_of",
    "producer",
    "sole_producer",
    "text",
    "tidied",
]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A constant's numbers; `None` for what is computed, or missing."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute that is one integer."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def integers(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """An attribute of integers."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else tuple(default)


def text(node: ir.Node, name: str, default: str) -> str:
    """An attribute of text."""
    return node.attributes[name].as_string() if name in node.attributes else default


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def sole_producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The same, if `value` is made for one reader only."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return producer(value, *kinds) if alone else None


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Attributes of a convolution, with those left out that the weights tell."""
    found = {name: one.value for name, one in node.attributes.items() if name not in ("kernel_shape", "auto_pad")}
    return {name: tuple(one) if isinstance(one, list | tuple) else one for name, one in found.items()}


def nodes_of(model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
    """Nodes of the main graph, as it is now, of these operators."""
    for node in list(model.graph):
        if node.graph is not None and node.domain == "" and (not kinds or node.op_type in kinds):
            yield node


class Rewriter:
    """Makes nodes before `node`, and puts a value in the place of another."""

    def __init__(self, model: ir.Model, node: ir.Node):
        self.graph, self.node = model.graph, node

    def constant(self, numbers: np.ndarray, name: str) -> ir.Value:
        """A new initializer; names are made different from all others."""
        import onnx_ir as ir

        taken, free = self.graph.initializers, name
        while free in taken:
            name_and_number = free.rsplit("~", 1)
            free = f"{name_and_number[0]}~{int(name_and_number[1]) + 1 if len(name_and_number) > 1 else 1}"
        value = ir.Value(name=free, const_value=ir.tensor(np.array(numbers, order="C"), name=free))
        value.shape, value.type = ir.Shape(numbers.shape), ir.TensorType(ir.DataType.from_numpy(numbers.dtype))
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node, which may have the name of the one that it replaces."""
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, domain=domain, name=name)
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Everything that reads `old` reads `new`; an output of the file keeps its name."""
        if old.is_graph_output():
            if new.is_graph_output() or new.is_graph_input() or new.const_value is not None:
                new = self.op("Identity", [new])
            name, old.name = old.name, f"{old.name}__before"
            new.name, new.shape, new.type = name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def folded(model: ir.Model, **options: Any) -> None:
    """Constants folded by the library, which prints a line on each node that it cannot fold."""
    from onnxscript.optimizer import fold_constants

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        fold_constants(model, **options)
    finally:
        logger.setLevel(level)


def tidied(model: ir.Model) -> None:
    """What nobody reads is gone, nodes are in order, and shapes inside are forgotten."""
    import onnx_ir.passes.common as common

    for one in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        one(model)
    for node in model.graph:  # what was known of a value may have been another's
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None

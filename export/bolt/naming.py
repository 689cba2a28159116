"""Nodes of an ONNX file that Keras layers became, with the layers' names: what a user can find in the model.

tf2onnx names a node by TensorFlow's scopes, ``functional_1/block_1/conv2d_3_1/convolution``. Scopes are layers, each
with a number behind it, since Keras enters it twice. Some nodes have other names: of a convolution that a batch
normalisation went into that of the latter, of what was folded none at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import onnx

__all__ = ["layer_of", "name_layers"]

NUMBERED = " #"  # stands before the number of a node among those of its layer
WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def name_layers(network: onnx.ModelProto, model: keras.Model) -> None:
    """Gives each node the path of its layer: ``block/conv2d_3``, and ``p_re_lu``, ``p_re_lu #2``, … where it has more.

    Args:
        network: what tf2onnx made; its nodes' names are changed.
        model: what it was made of.
    """
    known = {layer.name: type(layer).__name__ for layer in model._flatten_layers(include_self=False)}
    readers = {name: node.name for node in reversed(network.graph.node) for name in node.input}
    times = Counter(name for node in network.graph.node for name in node.input)
    taken: Counter[str] = Counter()
    for node in sorted(network.graph.node, key=_rank):
        paths = [_path(node.name, known)]
        if node.op_type in WITH_WEIGHTS:  # by weights, or else a bias, that are no other layer's as well
            paths += [_path(name, known) for name in node.input[1:] if times[name] == 1]
        told = [path for path in paths if path]
        plain = [path for path in told if known[path.rsplit("/", 1)[-1]] != "BatchNormalization"]
        path = (plain if node.op_type in WITH_WEIGHTS and plain else told)[:1]
        name = path[0] if path else _without_path(node, readers, known)
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}{NUMBERED}{taken[name]}"


def _rank(node: onnx.NodeProto) -> int:
    """The layer's name is its product's, and never that of a transpose that was put before it."""
    return 0 if node.op_type in WITH_WEIGHTS else 2 if node.op_type == "Transpose" else 1


def layer_of(name: str) -> str:
    """The layer's path in a node's name."""
    return re.sub(rf"{NUMBERED}\d+$", "", name)


def _path(name: str, known: Mapping[str, str]) -> str:
    """The layers whose scopes are in a name, from the outermost; empty if there are none."""
    found = []
    for piece in name.split(":")[0].split("/")[1:]:  # the first one is the model
        plain = re.sub(r"_\d+$", "", piece)
        found += [one for one in (plain, piece) if one in known][:1]
    return "/".join(found)


def _without_path(node: onnx.NodeProto, readers: Mapping[str, str], known: Mapping[str, str]) -> str:
    """Of an operation outside of layers: its kind, and the layer behind it."""
    behind = next((_path(readers[name], known) for name in node.output if name in readers), "")
    return f"{node.op_type} before {behind}" if behind else node.op_type

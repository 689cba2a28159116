"""How large the numbers inside of regions get: kernels keep them in float16, which ends at 65504.

ONNX Runtime computes half precision in float32 on processors, where nothing overflows, and what a ReLU6, a sigmoid or a
normalisation makes of infinity looks like any other number. So the file is run once more, all in float32, and says of
each layer its largest output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.naming import layer_of
from keras_efficient.export.bolt.rewriting import Rewriter, constant
from keras_efficient.export.bolt.standard import DOMAIN, FUSED, LAYER_NAMES, region_function
from keras_efficient.export.bolt.widening import to_float32

__all__ = ["MOST", "Ranges"]

MOST = float(np.finfo(np.float16).max)


class Ranges:
    """A bundle's ONNX file that tells how large its numbers are."""

    def __init__(self, network: bytes):
        import onnx

        from keras_efficient.export.targets.onnx import runtime

        measured, self._places = _measured(network)
        onnxruntime = runtime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        content = onnx.ModelProto.SerializeToString(measured)
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def problem(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        """The first place whose numbers float16 does not hold, in words; `None` if all of them fit."""
        for place, largest in zip(self._places, self._session.run(None, dict(inputs)), strict=True):
            if not largest <= MOST:
                return f"{place} numbers up to {float(largest):.3g}, and kernels keep at most {MOST:.0f} (float16)."
        return None


def _measured(network: bytes) -> tuple[Any, list[str]]:
    """The file with the largest magnitudes as its outputs, and for each of them the beginning of a sentence."""
    import onnx
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    model, places, found = ir.serde.deserialize_model(onnx.load_from_string(network)), list[str](), list[ir.Value]()
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != FUSED:
            continue
        structure = spec.parsed(node.attributes["spec"].as_string())
        count = len(structure["channels"])
        weights = [np.asarray(constant(value)) for value in node.inputs[count:]]
        body = region_function(spec.region_of(structure, weights), ranges=True)
        model.functions.setdefault(body.identifier(), body)
        layers = json.loads(node.metadata_props.get(LAYER_NAMES, "[]")) or [node.name] * len(structure["layers"])
        places += [f"Layer {layer_of(layers[0])!r} reads"] * count
        places += [f"Layer {layer_of(name)!r} makes" for name in layers]
        made = ir.node(
            FUSED,
            node.inputs,
            {name: node.attributes[name] for name in ("spec", "region")},
            domain=DOMAIN,
            overload=body.overload,
            num_outputs=1 + count + len(structure["layers"]),
        )
        model.graph.insert_before(node, made)
        Rewriter(model, node).replace(node.outputs[0], made.outputs[0])
        model.graph.remove(node, safe=True)
        found += made.outputs[1:]
    to_float32(model)
    model.graph.outputs.clear()
    for number, value in enumerate(found):
        value.name, value.type = f"largest_{number}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(())
        model.graph.outputs.append(value)
    common.RemoveUnusedNodesPass()(model)
    return ir.serde.serialize_model(model), places

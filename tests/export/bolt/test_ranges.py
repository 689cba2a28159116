"""What leaves float16's range inside of a region is found, and its layer named."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.partition import partition
from keras_efficient.export.bolt.ranges import Ranges

pytest.importorskip("onnx_ir", reason="kernels need the extra gpu")


def ranges(*nodes, weights, rows=False):
    """Of nodes ``(kind, more inputs, name)`` in a row, as they are in a bundle."""
    made, last = [], "x"
    for kind, more, name in nodes:
        made.append(helper.make_node(kind, [last, *more], [name], name=name))
        last = name
    shape = ["n", 3] if rows else ["n", 3, 4, 5]
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(one, np.float32), name) for name, one in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return Ranges(to_float16(partition(model).model).SerializeToString())


def square(scale):
    """A 1×1 convolution that multiplies each of three channels."""
    return np.eye(3)[:, :, None, None] * scale


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (1, None),
        (65, None),
        (66, "Layer 'b' makes numbers up to 6.6e+04, and kernels keep at most 65504 (float16)."),
        (-66, "Layer 'b' makes numbers up to 6.6e+04, and kernels keep at most 65504 (float16)."),
        (7e4, "Layer 'a' reads numbers up to 7e+04, and kernels keep at most 65504 (float16)."),
        (np.nan, "Layer 'a' reads numbers up to nan, and kernels keep at most 65504 (float16)."),
    ],
)
def test_the_first_layer_beyond_the_range_is_named(size, problem):
    found = ranges(
        ("Conv", ["one"], "a"),
        ("Conv", ["large"], "b"),
        ("Conv", ["small"], "c"),
        ("Sigmoid", [], "y"),
        weights={"one": square(1), "large": square(1000), "small": square(1e-3)},
    )
    assert found.problem({"x": np.full((2, 3, 4, 5), size, np.float32)}) == problem


def test_sums_are_kept_in_float32_up_to_the_last_step():
    """What a clip brings back before the layer's output is stored was never in float16."""
    weights = {"large": square(1000), "small": square(1e-3), "none": 0, "six": 6}
    clipped = ("Conv", ["large"], "a"), ("Clip", ["none", "six"], "b"), ("Conv", ["small"], "y")
    assert ranges(*clipped, weights=weights).problem({"x": np.full((1, 3, 4, 5), 1000, np.float32)}) is None


def test_what_others_make_for_a_region():
    found = ranges(
        ("MatMul", ["one"], "a"),
        ("Exp", [], "b"),
        ("MatMul", ["small"], "c"),
        ("Tanh", [], "y"),
        weights={"one": np.eye(3), "small": np.eye(3) * 1e-3},
        rows=True,
    )
    assert found.problem({"x": np.full((7, 3), 11, np.float32)}) is None
    assert found.problem({"x": np.full((7, 3), 12, np.float32)}).startswith("Layer 'c' reads numbers up to 1.63e+05")

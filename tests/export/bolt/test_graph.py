"""ONNX files in one spelling: each rule on a graph of a few nodes, which must compute the same as before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt.graph import normalised
from keras_efficient.export.bolt.standard import DOMAIN, FUSED

RNG = np.random.default_rng(0)


def network(*nodes, shape, constants=None, dtype=TensorProto.FLOAT, outputs=("y",), opset=18):
    """A model of nodes ``(kind, inputs, output, attributes)`` from `x` to `y`; strings in `shape` are free sizes."""
    made = [helper.make_node(kind, inputs, [output], **attributes) for kind, inputs, output, attributes in nodes]
    weights = [numpy_helper.from_array(np.asarray(one), name) for name, one in (constants or {}).items()]
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def kinds(model) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def same(model, *, sizes=None):
    """The normalised model, after it was found valid and to compute what `model` computes."""
    shape = [
        dim.dim_value or (sizes or {}).get(dim.dim_param, 2) for dim in model.graph.input[0].type.tensor_type.shape.dim
    ]
    found = normalised(model)
    onnx.checker.check_model(found, full_check=True)
    x = RNG.normal(0, 2, shape).astype("float32")
    for before, after in zip(run(model, x), run(found, x), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    return found


def normal(*shape):
    return RNG.normal(0, 1, shape).astype("float32")


def conv(output="c", x="x", weights="w", **attributes):
    return ("Conv", [x, weights], output, attributes)


# -------------------------------------------------------------------------------------------------------- activations


def test_prelu_out_of_five_nodes():
    slopes = normal(1, 3, 1, 1)
    assert (slopes > 0).any()
    assert (slopes < 0).any()
    found = same(
        network(
            ("Relu", ["x"], "above", {}),
            ("Neg", ["x"], "turned", {}),
            ("Relu", ["turned"], "below", {}),
            ("Mul", ["below", "minus_slopes"], "scaled", {}),
            ("Add", ["above", "scaled"], "y", {}),
            shape=[1, 3, 4, 5],
            constants={"minus_slopes": -slopes},
        )
    )
    assert kinds(found) == {"PRelu": 1}


@pytest.mark.parametrize("spelling", ["erf", "erfc", "root"])
def test_exact_gelu(spelling):
    nodes = {
        "erf": [
            ("Mul", ["x", "root_half"], "s", {}),
            ("Erf", ["s"], "e", {}),
            ("Add", ["e", "one"], "p", {}),
            ("Mul", ["x", "half"], "h", {}),
            ("Mul", ["h", "p"], "y", {}),
        ],
        "erfc": [
            ("Neg", ["x"], "n", {}),
            ("Mul", ["n", "root_half"], "s", {}),
            ("Erf", ["s"], "e", {}),
            ("Sub", ["one", "e"], "p", {}),
            ("Mul", ["x", "half"], "h", {}),
            ("Mul", ["p", "h"], "y", {}),
        ],
        "root": [
            ("Div", ["x", "root_two"], "s", {}),
            ("Erf", ["s"], "e", {}),
            ("Add", ["e", "one"], "p", {}),
            ("Mul", ["x", "p"], "h", {}),
            ("Mul", ["h", "half"], "y", {}),
        ],
    }
    numbers = {"root_half": np.sqrt(0.5), "root_two": np.sqrt(2), "half": 0.5, "one": 1.0}
    constants = {name: np.full((1, 1), one, "float32") for name, one in numbers.items()}
    assert kinds(same(network(*nodes[spelling], shape=[7, 5], constants=constants))) == {"Gelu": 1}


def test_other_factors_are_no_gelu():
    numbers = {"factor": 0.7, "half": 0.5, "one": 1.0}
    nodes = [
        ("Mul", ["x", "factor"], "s", {}),
        ("Erf", ["s"], "e", {}),
        ("Add", ["e", "one"], "p", {}),
        ("Mul", ["x", "half"], "h", {}),
        ("Mul", ["h", "p"], "y", {}),
    ]
    constants = {name: np.float32(one) for name, one in numbers.items()}
    assert "Gelu" not in kinds(same(network(*nodes, shape=[7, 5], constants=constants)))


def test_silu_and_hard_swish():
    silu = network(("Sigmoid", ["x"], "s", {}), ("Mul", ["s", "x"], "y", {}), shape=[3, 4])
    assert kinds(same(silu)) == {"Silu": 1}
    numbers = {"three": 3.0, "none": 0.0, "six": 6.0, "sixth": 1 / 6}
    swish = network(
        ("Add", ["three", "x"], "a", {}),
        ("Clip", ["a", "none", "six"], "b", {}),
        ("Mul", ["b", "sixth"], "c", {}),
        ("Mul", ["x", "c"], "y", {}),
        shape=[3, 4],
        constants={name: np.float32(one) for name, one in numbers.items()},
    )
    assert kinds(same(swish)) == {"HardSwish": 1}


def test_clips_behind_each_other_are_one():
    found = same(
        network(
            ("Relu", ["x"], "a", {}),
            ("Min", ["a", "one"], "b", {}),
            ("Max", ["none", "b"], "y", {}),
            shape=[3, 4],
            constants={"one": np.ones((1, 1), "float32"), "none": np.zeros((1, 1), "float32")},
        )
    )
    assert kinds(found) == {"Clip": 1}


# ------------------------------------------------------------------------------------------------ scales and shifts


def test_scales_and_shifts_of_channels_go_into_a_convolution():
    found = same(
        network(
            conv(pads=[1, 1, 1, 1]),
            ("Mul", ["c", "scale"], "a", {}),
            ("Add", ["shift", "a"], "b", {}),
            ("Sub", ["b", "less"], "d", {}),
            ("Div", ["d", "part"], "y", {}),
            shape=[1, 3, 6, 5],
            constants={
                "w": normal(4, 3, 3, 3),
                "scale": normal(1, 4, 1, 1),
                "shift": normal(4, 1, 1),
                "less": np.float32(0.3),
                "part": np.full((1, 1, 1, 1), 3, "float32"),
            },
        )
    )
    assert kinds(found) == {"Conv": 1}


def test_scales_and_shifts_go_into_a_product():
    found = same(
        network(
            ("Gemm", ["x", "w", "b"], "g", {"transB": 1, "alpha": 0.5, "beta": 2.0}),
            ("Mul", ["g", "scale"], "a", {}),
            ("Add", ["a", "shift"], "y", {}),
            shape=["n", 5],
            constants={"w": normal(4, 5), "b": normal(4), "scale": normal(4), "shift": normal(1, 4)},
        )
    )
    assert kinds(found) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("behind", ["Conv", "ConvTranspose", "Gemm"])
def test_batch_normalisation_is_folded(behind):
    first = {
        "Conv": conv(),
        "ConvTranspose": ("ConvTranspose", ["x", "w"], "c", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        "Gemm": ("Gemm", ["x", "w"], "c", {}),
    }[behind]
    weights = {"Conv": normal(4, 3, 3, 3), "ConvTranspose": normal(3, 4, 4, 4), "Gemm": normal(3, 4)}[behind]
    found = same(
        network(
            first,
            ("BatchNormalization", ["c", "g", "b", "m", "v"], "y", {"epsilon": 0.01}),
            shape=["n", 3] if behind == "Gemm" else ["n", 3, 7, 6],
            constants={"w": weights, "g": normal(4), "b": normal(4), "m": normal(4), "v": np.abs(normal(4)) + 0.1},
        )
    )
    left = {"Conv": ["Conv"], "ConvTranspose": ["Conv", "DepthToSpace"], "Gemm": ["MatMul", "Add"]}
    assert kinds(found) == Counter(left[behind])


def test_scales_before_a_product_go_into_it():
    """A constant of one number too; they stay where the sum has another reader."""
    nodes = [
        ("Relu", ["x"], "r", {}),
        ("Mul", ["r", "scale"], "a", {}),
        ("Add", ["a", "shift"], "b", {}),
        ("MatMul", ["b", "w"], "c", {}),
        ("Add", ["c", "bias"], "y", {}),
    ]
    constants = {"w": normal(5, 4), "scale": normal(5), "shift": np.float32(0.4), "bias": normal(4)}
    assert kinds(same(network(*nodes, shape=["n", 5], constants=constants))) == {"Relu": 1, "MatMul": 1, "Add": 1}
    kept = network(*nodes, shape=["n", 5], constants=constants, outputs=("y", "b"))
    assert kinds(same(kept)) == {"Relu": 1, "Mul": 1, "Add": 2, "MatMul": 1}


def test_a_bias_stays_before_the_next_product():
    nodes = [("MatMul", ["x", "w"], "a", {}), ("Add", ["a", "b"], "c", {}), ("MatMul", ["c", "w"], "y", {})]
    found = same(network(*nodes, shape=["n", 5], constants={"w": normal(5, 5), "b": normal(5)}))
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Add", "MatMul"]


def test_padding_of_layers_behind_each_other():
    found = same(
        network(
            conv(auto_pad="SAME_UPPER"),
            conv("y", "c", "v", auto_pad="SAME_UPPER", strides=[2, 2]),
            shape=["n", 3, 7, 8],
            constants={"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3)},
        )
    )
    assert all("auto_pad" not in {one.name for one in node.attribute} for node in found.graph.node)


def test_shared_weights_are_not_changed_for_others():
    found = same(
        network(
            conv("c"),
            conv("d"),
            ("Mul", ["c", "scale"], "y", {}),
            ("Relu", ["d"], "z", {}),
            shape=[1, 3, 6, 5],
            constants={"w": normal(4, 3, 3, 3), "scale": normal(4, 1, 1)},
            outputs=("y", "z"),
        )
    )
    assert len(found.graph.initializer) > 1


@pytest.mark.parametrize("outputs", [("y", "c"), ("y", "z")])
def test_what_others_read_is_not_folded(outputs):
    found = same(
        network(
            conv(),
            ("Mul", ["c", "scale"], "y", {}),
            ("Relu", ["c"], "z", {}),
            shape=[1, 3, 6, 5],
            constants={"w": normal(4, 3, 3, 3), "scale": normal(4, 1, 1)},
            outputs=outputs,
        )
    )
    assert kinds(found)["Mul"] == (1 if "c" in outputs or "z" in outputs else 0)


def test_a_scale_of_rows_of_an_image_is_not_one_of_channels():
    found = same(
        network(
            conv(pads=[1, 1, 1, 1]),
            ("Mul", ["c", "scale"], "y", {}),
            shape=[1, 3, 4, 4],
            constants={"w": normal(4, 3, 3, 3), "scale": normal(1, 1, 4, 1)},
        )
    )
    assert kinds(found) == {"Conv": 1, "Mul": 1}


# ---------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("stride", "shape"), [(1, ["n", 3, "h", "w"]), (2, ["n", 3, 7, 8]), (3, ["n", 3, 7, 8])])
def test_padding_is_explicit(mode, stride, shape):
    found = same(
        network(
            conv("y", auto_pad=mode, strides=[stride, stride]),
            shape=shape,
            constants={"w": normal(4, 3, 4, 3)},
        ),
        sizes={"h": 9, "w": 11},
    )
    (node,) = found.graph.node
    assert "pads" in {one.name for one in node.attribute}


def test_padding_that_hangs_on_a_free_size_stays():
    model = network(
        conv("y", auto_pad="SAME_UPPER", strides=[2, 2]), shape=["n", 3, "h", "w"], constants={"w": normal(4, 3, 3, 3)}
    )
    for size in (8, 9):
        (node,) = same(model, sizes={"h": size, "w": size}).graph.node
        assert "pads" not in {one.name for one in node.attribute}


def test_zeros_around_an_image_are_padding():
    found = same(
        network(
            ("Pad", ["x", "sizes"], "p", {}),
            conv("y", "p", pads=[0, 1, 0, 0]),
            shape=["n", 3, "h", "w"],
            constants={"w": normal(4, 3, 3, 3), "sizes": np.array([0, 0, 1, 2, 0, 0, 3, 0])},
        ),
        sizes={"h": 9, "w": 11},
    )
    assert kinds(found) == {"Conv": 1}


# ----------------------------------------------------------------------------------------------------------- layout


def test_transposes_go_behind_single_numbers_and_cancel():
    found = same(
        network(
            ("Transpose", ["x"], "t", {"perm": [0, 3, 1, 2]}),
            ("Mul", ["t", "scale"], "a", {}),
            ("Transpose", ["a"], "b", {"perm": [0, 2, 3, 1]}),
            ("Sigmoid", ["b"], "c", {}),
            ("Add", ["c", "x"], "y", {}),
            shape=["n", "h", "w", 3],
            constants={"scale": normal(3, 1, 1)},
        ),
        sizes={"h": 4, "w": 5},
    )
    assert kinds(found) == {"Mul": 1, "Sigmoid": 1, "Add": 1}


def test_reshapes_of_one_channel_are_transposes():
    found = same(
        network(
            ("Unsqueeze", ["x", "one"], "u", {}),
            ("Reshape", ["u", "all"], "r", {}),
            ("Reshape", ["r", "back"], "b", {}),
            ("Squeeze", ["b", "one"], "y", {}),
            shape=["n", "h", "w", 1],
            constants={"one": np.array([1]), "all": np.array([0, 0, 0, 0]), "back": np.array([0, 0, 0, 0, 1])},
        ),
        sizes={"h": 4, "w": 5},
    )
    assert not kinds(found) - Counter({"Identity": 1})


def test_a_reshape_that_moves_numbers_stays():
    found = same(
        network(("Reshape", ["x", "to"], "y", {}), shape=[1, 4, 6, 2], constants={"to": np.array([1, 2, 4, 6])})
    )
    assert kinds(found) == {"Reshape": 1}


@pytest.mark.parametrize(("rows", "left"), [(1, {"MatMul": 1, "Add": 1}), (2, {"MatMul": 1, "Reshape": 1, "Add": 1})])
@pytest.mark.parametrize("kind", ["Squeeze", "Reshape"])
def test_an_axis_that_comes_back_in_a_sum_is_kept(rows, left, kind):
    """As TensorFlow writes a residual of rows at batch 1; of more rows there is nothing to be left out."""
    if rows > 1:
        kind = "Reshape"
    to = {"Squeeze": [0], "Reshape": [8] if rows == 1 else [1, 2, 8]}[kind]
    nodes = [("MatMul", ["x", "w"], "a", {}), (kind, ["a", "to"], "b", {}), ("Add", ["x", "b"], "y", {})]
    found = same(network(*nodes, shape=[rows, 8], constants={"w": normal(8, 8), "to": np.array(to)}))
    assert kinds(found) == left


# ------------------------------------------------------------------------------------------------ before convolutions


@pytest.mark.parametrize("weights", [normal(4, 3, 3, 3), normal(3, 1, 3, 3)], ids=["dense", "depthwise"])
def test_factors_of_channels_before_a_convolution_go_into_it(weights):
    group = 3 if weights.shape[1] == 1 else 1
    found = same(
        network(
            ("Div", ["x", "deviation"], "a", {}),
            conv("y", "a", group=group, pads=[1, 1, 1, 1]),
            shape=["n", 3, 5, 6],
            constants={"w": weights, "deviation": normal(3, 1, 1) + 3},
        )
    )
    assert kinds(found) == {"Conv": 1}


def test_a_shift_before_a_convolution_goes_into_its_bias_where_nothing_is_padded():
    for pads, others in (([0, 0, 0, 0], 0), ([1, 1, 1, 1], 1)):
        found = same(
            network(
                ("Transpose", ["x"], "t", {"perm": [0, 3, 1, 2]}),
                ("Sub", ["t", "mean"], "a", {}),
                ("Mul", ["a", "scale"], "b", {}),
                ("Conv", ["b", "w", "bias"], "y", {"pads": pads}),
                shape=["n", 6, 5, 3],
                constants={
                    "w": normal(4, 3, 3, 3),
                    "bias": normal(4),
                    "mean": normal(3, 1, 1) + 1,
                    "scale": normal(3, 1, 1),
                },
            )
        )
        assert kinds(found) == {"Transpose": 1, "Conv": 1 + others}


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_factors_that_float16_could_not_hold_in_weights_stay(scale):
    nodes = ("Mul", ["x", "scale"], "a", {}), conv("y", "a")
    weights = {"w": normal(4, 3, 3, 3), "scale": np.float32(scale)}
    assert kinds(same(network(*nodes, shape=["n", 3, 5, 6], constants=weights))) == {"Mul": 1, "Conv": 1}


def test_what_no_region_takes_stays_behind_a_shuffle():
    found = same(
        network(
            conv(),
            ("Sigmoid", ["c"], "g", {}),
            ("DepthToSpace", ["g"], "s", {"blocksize": 2}),
            ("Mul", ["s", "most"], "m", {}),
            ("Round", ["m"], "y", {}),
            shape=["n", 3, 5, 6],
            constants={"w": normal(8, 3, 3, 3), "most": np.float32(255)},
        )
    )
    assert [node.op_type for node in found.graph.node] == ["Conv", "Sigmoid", "DepthToSpace", "Mul", "Round"]


# ------------------------------------------------------------------------------------------- transposed convolution


@pytest.mark.parametrize(
    ("size", "stride", "pads", "more"),
    [
        (2, 2, [0, 0, 0, 0], 0),
        (3, 2, [0, 0, 1, 1], 0),
        (3, 2, [1, 1, 1, 1], 1),
        (4, 2, [1, 1, 1, 1], 0),
        (9, 2, [3, 3, 4, 4], 0),
        (9, 3, [3, 3, 3, 3], 0),
        (5, 3, [0, 1, 2, 1], 0),
        (3, 1, [1, 1, 1, 1], 0),
        (3, 4, [0, 0, 0, 0], 1),
    ],
)
def test_transposed_convolution_is_one_of_phases(size, stride, pads, more):
    found = same(
        network(
            (
                "ConvTranspose",
                ["x", "w", "b"],
                "c",
                {"strides": [stride, stride], "pads": pads, "output_padding": [more, more]},
            ),
            ("PRelu", ["c", "slopes"], "y", {}),
            shape=["n", 3, "h", "w"],
            constants={"w": normal(3, 2, size, size), "b": normal(2), "slopes": normal(2, 1, 1)},
        ),
        sizes={"h": 4, "w": 5},
    )
    expected = ["Conv", "PRelu", "DepthToSpace"] if stride > 1 else ["Conv", "PRelu"]
    assert [node.op_type for node in found.graph.node] == expected


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_transposed_convolution_with_automatic_padding(mode):
    found = same(
        network(
            ("ConvTranspose", ["x", "w"], "y", {"strides": [2, 2], "auto_pad": mode}),
            shape=["n", 3, "h", "w"],
            constants={"w": normal(3, 2, 5, 5)},
        ),
        sizes={"h": 4, "w": 5},
    )
    assert kinds(found) == {"Conv": 1, "DepthToSpace": 1}


# ----------------------------------------------------------------------------------------------------------- errors


def test_normal_models_stay():
    model = network(
        conv(auto_pad="SAME_UPPER"),
        ("Relu", ["c"], "r", {}),
        ("Min", ["r", "one"], "m", {}),
        ("DepthToSpace", ["m"], "s", {"blocksize": 2}),
        ("Mul", ["s", "scale"], "y", {}),
        shape=["n", 3, "h", "w"],
        constants={"w": normal(8, 3, 3, 3), "one": np.float32(1), "scale": normal(2, 1, 1)},
    )
    once = normalised(model)
    twice = normalised(once)
    assert [node.op_type for node in twice.graph.node] == [node.op_type for node in once.graph.node]


def test_opsets_that_are_not_read():
    with pytest.raises(ConversionError, match="opset 11"):
        normalised(network(("Relu", ["x"], "y", {}), shape=[1], opset=11))


def test_no_model():
    model = network(("Relu", ["nothing"], "y", {}), shape=[1])
    model.graph.node[0].output[0] = "x"
    with pytest.raises(ConversionError, match="no valid ONNX"):
        normalised(model)


def test_a_file_in_regions_already():
    model = network(("Relu", ["x"], "y", {}), shape=[1])
    model.graph.node[0].op_type, model.graph.node[0].domain = FUSED, DOMAIN
    with pytest.raises(ConversionError, match="in regions already"):
        normalised(model)

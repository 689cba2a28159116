"""The interpreter of ONNX graphs: held to ONNX Runtime on real networks and on single operators, with a gradient."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import ops
from onnx import TensorProto, helper, numpy_helper

from keras_efficient.errors import FileProblem, UnsupportedLayer, WrongArgument
from keras_efficient.video.onnx_graph import OnnxGraph

pytestmark = pytest.mark.contract
NETWORKS = {
    "yolox_nano": 255,
    "deeplabv3_mnv2_dm05_voc_257": 1,
    "road_segmentation_adas_0001": 255,
    "pose_landmark_lite": 1,
}


def written(path, nodes, shape, constants=(), outputs=("y",), opset=13):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def both(path, x):
    graph = OnnxGraph(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {graph.input_name: x})
    found = graph(x)
    for name, array in graph.run(x).items():
        np.testing.assert_array_equal(array, dict(zip(graph.output_names, wanted, strict=True))[name])
    return [(ops.convert_to_numpy(found[name]), want) for name, want in zip(graph.output_names, wanted, strict=True)]


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_are_those_of_onnx_runtime(data_dir, name):
    path = data_dir / "models" / f"{name}.onnx"
    x = np.random.default_rng(0).random((1, *OnnxGraph(path).input_shape[1:])).astype("float32") * NETWORKS[name]
    for found, want in both(path, x):
        assert found.shape == want.shape
        np.testing.assert_allclose(found, want, atol=1e-3 * max(np.abs(want).max(), 1e-3))


def test_a_batch_is_its_pictures(data_dir):
    graph = OnnxGraph(data_dir / "models" / "yolox_nano.onnx")
    x = np.random.default_rng(0).random((2, 3, 416, 416)).astype("float32") * 255
    together = ops.convert_to_numpy(graph(x)["output"])
    for index in range(2):
        alone = ops.convert_to_numpy(graph(x[index : index + 1])["output"])[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-3)
    np.testing.assert_allclose(graph.run(x)["output"], together, atol=1e-2)
    with pytest.raises(WrongArgument, match="takes"):
        graph.run(x[:, :1])


RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(6, 4, 3, 3)).astype("float32")
DEPTHWISE = RNG.normal(size=(8, 1, 3, 3)).astype("float32")
GROUPED = RNG.normal(size=(6, 2, 3, 3)).astype("float32")
BIAS = RNG.normal(size=6).astype("float32")
SLICE = [("s", np.array([1, 8])), ("e", np.array([4, -9])), ("a", np.array([1, 2])), ("t", np.array([2, -3]))]


def node(kind, *inputs, **options):
    return helper.make_node(kind, ["x", *inputs], ["y"], **options)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (node("Conv", "w", "b", pads=[1, 1, 1, 1]), [("w", WEIGHTS), ("b", BIAS)]),
        (node("Conv", "w", strides=[2, 1], pads=[0, 1, 2, 1]), [("w", WEIGHTS)]),
        (node("Conv", "w", dilations=[2, 2], pads=[2, 2, 2, 2]), [("w", WEIGHTS)]),
        (node("Conv", "w", group=4, pads=[1, 1, 1, 1]), [("w", DEPTHWISE)]),
        (node("Conv", "w", group=4, strides=[2, 2], pads=[1, 1, 1, 1]), [("w", DEPTHWISE)]),
        (node("Conv", "w", group=2), [("w", GROUPED)]),
        (node("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0]), []),
        (node("AveragePool", kernel_shape=[2, 3], strides=[2, 2]), []),
        (node("Clip", "l", "h"), [("l", np.float32(-0.5)), ("h", np.float32(0.25))]),
        (node("Add", "c"), [("c", BIAS[:4].reshape(4, 1, 1))]),
        (node("Mul", "c"), [("c", np.float32(3))]),
        (node("Sub", "c"), [("c", RNG.normal(size=(1, 4, 9, 1)).astype("float32"))]),
        (node("Div", "c"), [("c", np.full((1,), 3, "float32"))]),
        (node("Pad", "p", "v"), [("p", np.array([0, 1, 2, 0, 0, 0, 1, 3])), ("v", np.float32(7))]),
        (node("Slice", "s", "e", "a", "t"), SLICE),
        (node("Softmax", axis=1), []),
        (node("Reshape", "s"), [("s", np.array([1, -1, 9]))]),
        (node("Reshape", "s"), [("s", np.array([0, 2, 2, -1]))]),
        (node("Transpose", perm=[0, 2, 3, 1]), []),
        (node("Transpose", perm=[0, 3, 1, 2]), []),
        (node("Transpose"), []),
        (node("Resize", "", "s", mode="linear"), [("s", np.array([1, 1, 2.5, 0.6], "float32"))]),
        (
            node("Resize", "", "", "z", mode="linear", coordinate_transformation_mode="align_corners"),
            [("z", np.array([1, 4, 17, 5]))],
        ),
        (
            node("Resize", "", "s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
            [("s", np.array([1, 1, 2, 3], "float32"))],
        ),
        (node("Resize", "", "", "z", mode="nearest"), [("z", np.array([1, 4, 14, 3]))]),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)
def test_operators_are_those_of_onnx_runtime(tmp_path, node, constants):
    """Alone, and behind a convolution, whose output is kept with the channels at the end."""
    x = RNG.normal(size=(1, 4, 9, 10)).astype("float32")
    for found, want in both(written(tmp_path / "a.onnx", [node], x.shape, constants), x):
        np.testing.assert_allclose(found, want, atol=1e-5)
    first = helper.make_node("Conv", ["x", "first"], ["inner"])
    second = onnx.NodeProto()
    second.CopyFrom(node)
    second.input[0] = "inner"
    more = [*constants, ("first", RNG.normal(size=(4, 4, 1, 1)).astype("float32"))]
    for found, want in both(written(tmp_path / "b.onnx", [first, second], x.shape, more), x):
        np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "constants", "opset"),
    [
        (node("Softmax"), [], 11),
        (node("Softmax", axis=2), [], 11),
        (node("Softmax", axis=-1), [], 11),
        (node("Softmax"), [], 13),
        (node("Resize", "", "", "z", axes=[3, 2]), [("z", np.array([5, 18]))], 18),
        (node("Resize", "", "s", axes=[-2], mode="linear"), [("s", np.array([1.5], "float32"))], 18),
        (node("Pad", "p", "", "a"), [("p", np.array([1, 0, 2, 3])), ("a", np.array([3, -2]))], 18),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)
def test_what_hangs_on_the_opset(tmp_path, node, constants, opset):
    x = RNG.normal(size=(1, 4, 9, 10)).astype("float32")
    for found, want in both(written(tmp_path / "a.onnx", [node], x.shape, constants, opset=opset), x):
        np.testing.assert_allclose(found, want, atol=1e-5)
    first = helper.make_node("Conv", ["x", "first"], ["inner"])
    second = onnx.NodeProto()
    second.CopyFrom(node)
    second.input[0] = "inner"
    more = [*constants, ("first", RNG.normal(size=(4, 4, 1, 1)).astype("float32"))]
    for found, want in both(written(tmp_path / "b.onnx", [first, second], x.shape, more, opset=opset), x):
        np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Transpose", "Softmax"])
def test_what_is_made_of_constants(tmp_path, kind):
    nodes = [helper.make_node(kind, ["c"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
    x, c = (RNG.normal(size=(3, 3)).astype("float32") for _ in range(2))
    for found, want in both(written(tmp_path / "a.onnx", nodes, x.shape, [("c", c)]), x):
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_sizes_that_are_computed_from_sizes(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["s", "two", "four"], ["hw"]),
        helper.make_node("Mul", ["hw", "factor"], ["more"]),
        helper.make_node("Concat", ["one", "more"], ["sizes"], axis=0),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["z"], mode="nearest"),
        helper.make_node("Concat", ["z", "z"], ["y"], axis=1),
    ]
    constants = [
        (name, np.array(value)) for name, value in (("two", [2]), ("four", [4]), ("factor", [2, 3]), ("one", [1, 4]))
    ]
    x = RNG.normal(size=(1, 4, 3, 2)).astype("float32")
    for found, want in both(written(tmp_path / "a.onnx", nodes, x.shape, constants), x):
        np.testing.assert_array_equal(found, want)


def test_the_gradient_is_that_of_differences(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["m"]),
        helper.make_node("Resize", ["m", "", "f"], ["r"], mode="linear"),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    constants = [("w", WEIGHTS), ("b", BIAS), ("f", np.array([1, 1, 2, 2], "float32")), ("shape", np.array([1, -1]))]
    graph = OnnxGraph(written(tmp_path / "a.onnx", nodes, (1, 4, 8, 8), constants))
    x = RNG.normal(size=(1, 4, 8, 8)).astype("float32")

    def loss(x):
        return ops.sum(ops.square(graph(x)["y"]))

    if keras.backend.backend() == "jax":
        import jax

        found = jax.jit(jax.grad(loss))(x)
    else:
        import tensorflow as tf

        value = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(value)
            total = loss(value)
        found = tape.gradient(total, value)
    found = ops.convert_to_numpy(found)
    for place in [(0, 0, 0, 0), (0, 3, 7, 7), (0, 1, 4, 3)]:
        step = np.zeros_like(x)
        step[place] = 0.01
        difference = (float(loss(x + step)) - float(loss(x - step))) / 0.02
        assert found[place] == pytest.approx(difference, rel=0.01, abs=0.02)


def test_what_is_refused(tmp_path):
    with pytest.raises(FileProblem, match="no such file"):
        OnnxGraph(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(FileProblem, match="cannot be read as ONNX"):
        OnnxGraph(tmp_path / "bad.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(FileProblem, match="holds no graph"):
        OnnxGraph(tmp_path / "empty.onnx")
    path = written(tmp_path / "a.onnx", [helper.make_node("Cosh", ["x"], ["y"], name="odd")], (1, 2))
    with pytest.raises(UnsupportedLayer, match=r"a.onnx: odd.*the operator Cosh is not known"):
        OnnxGraph(path)
    path = written(tmp_path / "a.onnx", [node("MaxPool", kernel_shape=[2, 2], ceil_mode=1)], (1, 2, 5, 5))
    with pytest.raises(UnsupportedLayer, match="MaxPool: ceil_mode"):
        OnnxGraph(path)(np.zeros((1, 2, 5, 5), "float32"))
    sizes = [("z", np.array([1, 2, 3, 3]))]
    for odd, why in (
        (node("Resize", "", "", "z", mode="linear", antialias=1), "Resize: antialias"),
        (node("Softmax", axis=0), "Softmax: over the batch"),
        (node("Add", "z"), "Add: its inputs cannot be run"),
    ):
        path = written(tmp_path / "a.onnx", [odd], (1, 2, 5, 5), sizes, opset=18)
        with pytest.raises(UnsupportedLayer, match=why):
            OnnxGraph(path)(np.zeros((1, 2, 5, 5), "float32"))
    path = written(tmp_path / "a.onnx", [node("Relu")], (1, 2, 5, 5))
    with pytest.raises(WrongArgument, match=r"takes \(None, 2, 5, 5\), got \(1, 2, 5, 6\)"):
        OnnxGraph(path)(np.zeros((1, 2, 5, 6), "float32"))
    with pytest.raises(WrongArgument, match="has no 'z'; its outputs are y"):
        OnnxGraph(path)(np.zeros((1, 2, 5, 5), "float32"), ["z"])


def test_weights_in_other_files_are_not_opened(tmp_path):
    path = written(tmp_path / "a.onnx", [node("Add", "c")], (1, 4), [("c", np.zeros(4, "float32"))])
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileProblem, match="keeps 'c' in another file"):
        OnnxGraph(path)

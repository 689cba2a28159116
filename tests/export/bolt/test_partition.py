"""Networks as regions: they compute what Keras computes, in ONNX Runtime and by the reference, and refusals say why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers as L
from keras import ops
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from keras_efficient import export, models
from keras_efficient.deploy import deploy
from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.export import signature
from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.partition import Partitioned, Policy, partition
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import Add
from keras_efficient.export.bolt.standard import DOMAIN, FUSED
from keras_efficient.export.targets import Request
from keras_efficient.export.targets.onnx import convert

RNG = np.random.default_rng(0)


# --------------------------------------------------------------------------------------------------------- networks


def randomised(model: keras.Model) -> keras.Model:
    """All weights at random: zero biases, equal slopes and fresh statistics would hide what is lost."""
    generator = np.random.default_rng(1)
    for weight in model.weights:
        name = weight.path.rsplit("/", 1)[-1]
        if name in ("moving_variance", "gamma"):
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
        elif name == "alpha":
            weight.assign(generator.uniform(-0.5, 0.5, weight.shape))
        elif name in ("beta", "bias", "moving_mean"):
            weight.assign(generator.normal(0, 0.1, weight.shape))
    return model


def rep_vgg():
    """Blocks of 3×3 and 1×1 with batch normalisation each, as they are trained."""
    x = inputs = keras.Input((20, 16, 3))
    for filters, stride in ((16, 2), (24, 1), (80, 2)):
        wide = L.BatchNormalization()(L.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x))
        narrow = L.BatchNormalization()(L.Conv2D(filters, 1, stride, padding="same", use_bias=False)(x))
        x = L.ReLU()(L.Add()([wide, narrow]))
    x = L.Dense(7)(L.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def resnet():
    """Like ResNet-18: basic blocks, with and without a projection."""

    def block(x, filters, stride):
        y = L.ReLU()(L.BatchNormalization()(L.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x)))
        y = L.BatchNormalization()(L.Conv2D(filters, 3, padding="same", use_bias=False)(y))
        if stride > 1 or x.shape[-1] != filters:
            x = L.BatchNormalization()(L.Conv2D(filters, 1, stride, use_bias=False)(x))
        return L.ReLU()(L.Add()([x, y]))

    inputs = keras.Input((32, 32, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(64, 7, 2, padding="same")(inputs)))
    x = L.MaxPooling2D(3, 2, padding="same")(x)
    for filters, stride in ((64, 1), (64, 1), (128, 2), (128, 1)):
        x = block(x, filters, stride)
    return keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def mlp():
    x = inputs = keras.Input((20,))
    for width, activation in ((64, "relu"), (32, "hard_swish"), (300, "tanh"), (5, None)):
        x = L.BatchNormalization()(L.Dense(width, activation=activation)(x))
    return keras.Model(inputs, x)


def bert():
    """The products of a transformer's layer, with both kinds of GELU, on rows of free number."""
    inputs = keras.Input((None, 48))
    x = L.Dense(48)(L.Dense(192, activation="gelu")(inputs)) + inputs
    y = L.Dense(48)(ops.gelu(L.Dense(320)(x), approximate=True)) + x
    return keras.Model(inputs, y)


def mobile():
    """Depthwise, ReLU6, SiLU, a transposed convolution in the middle of a network."""
    inputs = keras.Input((None, None, 3))
    x = L.Conv2D(24, 3, padding="same", activation="silu")(inputs)
    x = L.ReLU(6.0)(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    x = L.Conv2D(40, 1, activation="softplus")(x)
    x = L.PReLU(shared_axes=[1, 2])(L.BatchNormalization()(L.Conv2DTranspose(72, 4, 2, padding="same")(x)))
    x = L.LeakyReLU(0.2)(L.Conv2D(8, 3, padding="same", dilation_rate=2)(x))
    return keras.Model(inputs, L.Conv2D(2, 3, padding="same", activation="sigmoid")(x))


def applications(name, size):
    return getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classifier_activation=None)


def sesr(variant, scale=2, **options):
    return deploy(randomised(models.SESR(scale, variant, expansion=16, **options)))


NETWORKS = {
    "sesr_m3": (lambda: sesr("m3"), (2, 13, 17, 1)),
    "sesr_m5": (lambda: sesr("m5"), (2, 13, 17, 1)),
    "sesr_m5_fixed_x4": (lambda: sesr("m5", 4, input_shape=(9, 14)), (1, 9, 14, 1)),
    "sesr_xl": (lambda: sesr("xl"), (1, 13, 17, 1)),
    "sesr_rgb": (lambda: sesr("m3", channels=3), (1, 13, 17, 3)),
    "fsrcnn": (lambda: models.FSRCNN(2), (1, 13, 17, 1)),
    "fsrcnn_x3": (lambda: models.FSRCNN(3, depth=2, channels=3, input_shape=(8, 9)), (2, 8, 9, 3)),
    "rep_vgg": (rep_vgg, (2, 20, 16, 3)),
    "resnet": (resnet, (2, 32, 32, 3)),
    "mlp": (mlp, (9, 20)),
    "bert": (bert, (2, 5, 48)),
    "mobile": (mobile, (2, 13, 18, 3)),
    "resnet50": (lambda: applications("ResNet50", 64), (1, 64, 64, 3)),
    "mobilenet_v2": (lambda: applications("MobileNetV2", 32), (2, 32, 32, 3)),
}


# Of ResNet-50 the conversion alone lasts 20 seconds, on a busy machine two minutes.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "resnet50" else name for name in NETWORKS]


def converted(model, path):
    """As `export.save` writes it, without all that is compared and measured besides."""
    options = {"opset": 18, "layout": "nhwc"}
    request = Request(
        export.targets["onnx"], "float32", signature.input_specs(model), None, options, {"keras_efficient": "0"}
    )
    convert(model, request, path)
    return onnx.load(path)


class Case:
    """A network, its file, its regions, and inputs with the outputs that Keras computes."""

    def __init__(self, name: str, path):
        make, shape = NETWORKS[name]
        model = randomised(make())
        self.model = converted(model, path)
        self.found = partition(self.model)
        self.x = np.random.default_rng(2).uniform(-1, 1, shape).astype("float32")
        self.y = keras.ops.convert_to_numpy(model(self.x, training=False))
        keras.backend.clear_session()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return cache(lambda name: Case(name, folder / f"{name}.onnx"))


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def error(found, wanted):
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


class _Fused(OpRun):
    """A region's node by the reference, out of what the node itself has."""

    op_domain = DOMAIN

    def _run(self, *inputs, spec=None, region=None):
        structure = parsed(spec)
        count = len(structure["channels"])
        whole = region_of(structure, inputs[count:])
        given = [one.reshape(-1, one.shape[-1]) if whole.rows else one for one in inputs[:count]]
        y = computed(whole, given).astype("float32")
        return (y.reshape(*inputs[0].shape[:-1], -1) if whole.rows else y,)


_Fused.__name__ = FUSED
parsed, region_of = spec.parsed, spec.region_of


def by_reference(found: Partitioned, x):
    model = onnx.ModelProto()
    model.CopyFrom(found.model)
    kept = [one for one in model.functions if one.name != FUSED]
    del model.functions[:]
    model.functions.extend(kept)
    return ReferenceEvaluator(model, new_ops=[_Fused]).run(None, {model.graph.input[0].name: x})[0]


def kinds(model) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


# --------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("name", NAMES)
def test_regions_compute_what_keras_computes(case, name):
    one = case(name)
    onnx.checker.check_model(one.found.model, full_check=True)
    assert error(run(one.found.model, one.x), one.y) < 1e-5
    assert error(by_reference(one.found, one.x), one.y) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_regions_in_half(case, name):
    one = case(name)
    model = to_float16(one.found.model)
    onnx.checker.check_model(model)
    for node in model.graph.node:
        if node.op_type == FUSED:
            types = {i.data_type for i in model.graph.initializer if i.name in node.input}
            assert types == {TensorProto.FLOAT16}
    assert error(run(model, one.x), one.y) < 2e-3  # what is asked of kernels


def test_regions_next_to_each_other_have_no_cast_between_them(case):
    assert kinds(to_float16(case("rep_vgg").found.model))["Cast"] == 4  # around the mean
    assert kinds(to_float16(case("sesr_m5").found.model))["Cast"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_structures_are_read_back(case, name):
    found = case(name).found
    nodes = [node for node in found.model.graph.node if node.op_type == FUSED]
    weights = {one.name: numpy_helper.to_array(one) for one in found.model.graph.initializer}
    assert len(nodes) == len(found.regions) > 0
    for index, (node, region) in enumerate(zip(nodes, found.regions, strict=True)):
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        structure = spec.parsed(given["spec"].decode())
        assert given["region"] == index
        assert structure == spec.spec(region)
        assert node.overload == spec.structure_hash(structure)
        assert region.names == (*node.input[: len(region.channels)], node.output[0])
        arrays = [weights[name] for name in node.input[len(region.channels) :]]
        again = spec.region_of(structure, arrays)
        for one, two in zip(spec.arrays(again), spec.arrays(region), strict=True):
            np.testing.assert_array_equal(one, two)


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "layers"),
    [("sesr_m3", 5), ("sesr_m5", 7), ("sesr_m5_fixed_x4", 7), ("sesr_xl", 13), ("fsrcnn", 8), ("fsrcnn_x3", 6)],
)
def test_small_networks_are_one_region(case, name, layers):
    found = case(name).found
    (region,) = found.regions
    assert len(region.layers) == layers
    assert kinds(found.model) == {FUSED: 1}
    assert not found.refusals
    assert len(found.model.functions) == 1


def test_work_of_sesr(case):
    """Multiply-accumulates for each pixel, as in the paper."""
    for name, macs in (("sesr_m3", 8912), ("sesr_m5", 13520), ("sesr_xl", 105376)):
        assert case(name).found.regions[0].macs == macs


@pytest.mark.slow
def test_resnet50_is_folded_and_in_regions(case):
    found = case("resnet50").found
    left = kinds(found.model)
    assert sum(len(region.layers) for region in found.regions) == 54
    assert sum(len(region.layers) for region in found.regions if not region.rows) == 53
    assert not left.keys() & {"BatchNormalization", "Mul", "Add", "Conv", "MatMul", "Relu"}
    assert left["Transpose"] <= 2  # around the maximum, which is N×C×H×W


def test_mobilenet_is_in_regions(case):
    found = case("mobilenet_v2").found
    assert sum(len(region.layers) for region in found.regions) == 53
    assert {node.op_type for node in found.model.graph.node} == {FUSED, "ReduceMean"}


def test_products(case):
    assert [len(region.layers) for region in case("bert").found.regions] == [2, 1, 1]
    assert [len(region.layers) for region in case("mlp").found.regions] == [2, 1, 1]
    assert [region.rows for region in case("mlp").found.regions] == [True] * 3
    first, second, _ = case("bert").found.regions
    assert [step.kind for step in first.layers[0].steps] == ["gelu"]
    assert [step.kind for step in second.layers[0].steps] == ["gelu_tanh"]


def test_skips_from_before_a_region_are_inputs(case):
    *_, last = case("bert").found.regions
    assert last.channels == (320, 48)
    assert Add(1) in last.layers[0].steps
    regions = case("sesr_rgb").found.regions
    assert [region.channels for region in regions] == [(3, 12)]


def test_equal_structures_are_one_function(case):
    found = case("resnet").found
    structures = {spec.structure_hash(spec.spec(region)) for region in found.regions}
    assert len(structures) < len(found.regions)
    assert {one.overload for one in found.model.functions if one.name == FUSED} == structures


# ------------------------------------------------------------------------------------------------ policy and refusals


def network(*nodes, shape=("n", 3, "h", "w"), constants=None, outputs=("y",), more=None):
    """A model of nodes ``(kind, inputs, output, attributes)`` from `x`, N×C×H×W, to `y`."""
    made = [helper.make_node(kind, inputs, [output], name=output, **rest) for kind, inputs, output, rest in nodes]
    weights = [numpy_helper.from_array(np.asarray(one), name) for name, one in (constants or {}).items()]
    inputs = {"x": shape, **(more or {})}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, one) for name, one in inputs.items()]
    made_outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(made, "test", given, made_outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def normal(*shape):
    return RNG.normal(0, 1, shape).astype("float32")


def conv(output, x="x", weights="w", pads=(1, 1, 1, 1), **rest):
    return ("Conv", [x, weights], output, {"pads": list(pads), **rest})


def chain(count=3, channels=3, size=3):
    names = ["x", *(f"c{i}" for i in range(1, count)), "y"]
    pads = (size // 2,) * 4
    nodes = [conv(after, before, f"w{i}", pads) for i, (before, after) in enumerate(pairwise(names))]
    weights = {f"w{i}": normal(channels, 3 if i == 0 else channels, size, size) for i in range(count)}
    return network(*nodes, constants=weights)


@pytest.mark.parametrize(
    ("policy", "model", "layers"),
    [
        (Policy(), chain(), [3]),
        (Policy(max_channels=0), chain(), [1, 1, 1]),
        (Policy(max_channels=8), chain(channels=9), [1, 1, 1]),
        (Policy(max_kernel=3), chain(size=5), [1, 1, 1]),
        (Policy(max_channels=0), chain(size=1), [2, 1]),
        (Policy(max_channels=0, max_second=8), chain(size=1, channels=9), [1, 1, 1]),
        (Policy(max_channels=0, max_second=0), chain(size=1), [1, 1, 1]),
    ],
)
def test_policy(policy, model, layers):
    assert [len(region.layers) for region in partition(model, policy).regions] == layers


@pytest.mark.parametrize(
    "attributes", [{"dilations": [2, 2], "pads": (2, 2, 2, 2)}, {"strides": [2, 2]}, {"pads": (0, 0, 1, 1)}]
)
def test_chains_have_plain_layers_only(attributes):
    """Strides, dilation and images that shrink: such a layer is a region of its own."""
    model = network(conv("c"), conv("d", "c", **attributes), conv("y", "d"), constants={"w": normal(3, 3, 3, 3)})
    assert [len(region.layers) for region in partition(model).regions] == [1, 1, 1]


@pytest.mark.parametrize("outputs", [("y", "c2"), ("y", "z")])
def test_what_others_read_ends_a_region(outputs):
    model = network(
        conv("c1"),
        ("Relu", ["c1"], "c2", {}),
        conv("y", "c2"),
        ("Softmax", ["c2"], "z", {"axis": 1}),
        constants={"w": normal(3, 3, 3, 3)},
        outputs=outputs,
    )
    found = partition(model)
    assert [len(region.layers) for region in found.regions] == [1, 1]
    assert_same(model, found)


def test_a_value_amid_a_layer_is_no_skip():
    """What is read before and behind its activation ends the region: a region has a layer's value once."""
    model = network(
        conv("c1"),
        ("Relu", ["c1"], "r", {}),
        conv("c2", "r"),
        ("Add", ["c2", "c1"], "y", {}),
        constants={"w": normal(3, 3, 3, 3)},
    )
    found = partition(model)
    assert [len(region.layers) for region in found.regions] == [1, 1]
    assert_same(model, found)


def test_depth_to_space_ends_a_region():
    model = network(
        conv("c"),
        ("DepthToSpace", ["c"], "s", {"blocksize": 2}),
        ("PRelu", ["s", "slopes"], "p", {}),
        conv("y", "p", "v"),
        constants={"w": normal(12, 3, 3, 3), "v": normal(4, 3, 3, 3), "slopes": normal(3, 1, 1)},
    )
    found = partition(model)
    assert [(region.shuffle, len(region.layers)) for region in found.regions] == [(2, 1), (1, 1)]
    assert_same(model, found)


def test_one_channel_is_added_to_all():
    model = network(
        conv("c"), ("Add", ["one", "c"], "y", {}), constants={"w": normal(4, 3, 3, 3)}, more={"one": ("n", 1, "h", "w")}
    )
    (region,) = partition(model).regions
    assert region.channels == (3, 1)
    assert_same(model, partition(model))


def assert_same(model, found, tolerance=1e-4):
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value or {"n": 2, "h": 7, "w": 10}[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (RNG.integers(0, 256, shape) if dtype == np.uint8 else normal(*shape)).astype(dtype)
    model, outputs = onnx.shape_inference.infer_shapes(model), []
    for one in (model, found.model):
        session = onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, feeds))
    for wanted, had in zip(*outputs, strict=True):
        assert had.dtype == wanted.dtype
        np.testing.assert_allclose(had.astype("f8"), wanted.astype("f8"), rtol=tolerance, atol=tolerance)


W = {"w": normal(4, 3, 3, 3)}
REFUSED = {
    "groups": ([conv("y", group=2)], {"w": normal(4, 2, 3, 3)}, (1, 4, 8, 8), "2 groups that is not depthwise"),
    "one axis": ([conv("y", pads=(1, 1))], {"w": normal(4, 3, 3)}, ("n", 3, "w"), "over 1 axes"),
    "free size": (
        [("Conv", ["x", "w"], "y", {"strides": [2, 2], "auto_pad": "SAME_UPPER"})],
        W,
        ("n", 3, "h", "w"),
        "hangs on a size that is free",
    ),
    "weights": ([conv("y", weights="x")], {}, (3, 3, 3, 3), "weights are not constant"),
    "bias": ([("Conv", ["x", "w", "b"], "y", {})], W, (1, 3, 8, 8), "weights are not constant"),
    "negative padding": ([conv("y", pads=(-1, 0, 0, 0))], W, (1, 3, 8, 8), "negative padding"),
    "too large": ([conv("y")], W, ("n", 3, 1 << 16, 1 << 14), "more than 2³¹"),
    "matrices": ([("MatMul", ["x", "w"], "y", {})], {"w": normal(2, 5, 4)}, (2, 3, 5), "a matrix with 3 axes"),
    "vector": ([("MatMul", ["x", "w"], "y", {})], {"w": normal(5, 4)}, (5,), "or one axis"),
    "columns first": (
        [conv("c"), ("DepthToSpace", ["c"], "y", {"blocksize": 2, "mode": "CRD"})],
        W,
        (1, 3, 8, 8),
        "(CRD)",
    ),
    "block": (
        [conv("c"), ("DepthToSpace", ["c"], "y", {"blocksize": 9})],
        {"w": normal(81, 3, 3, 3)},
        (1, 3, 4, 4),
        "a block of 9",
    ),
    "slopes": (
        [conv("c"), ("PRelu", ["c", "s"], "y", {})],
        {**W, "s": normal(4, 8, 8)},
        (1, 3, 8, 8),
        "slopes are not one",
    ),
    "limits": (
        [conv("c"), ("ReduceMax", ["c"], "m", {"keepdims": 0}), ("Clip", ["x", "", "m"], "y", {})],
        W,
        (1, 3, 8, 8),
        "Clip: there is no layer before it",
    ),
    "free limits": (
        [conv("c"), ("ReduceMax", ["x"], "m", {"keepdims": 0}), ("Clip", ["c", "", "m"], "y", {})],
        W,
        (1, 3, 8, 8),
        "limits are not constant",
    ),
    "constant": (
        [conv("c"), ("Add", ["c", "s"], "y", {})],
        {**W, "s": normal(4, 8, 8)},
        (1, 3, 8, 8),
        "a constant that is no bias",
    ),
    "smaller": (
        [
            conv("c"),
            ("ReduceMean", ["x", "axes"], "m", {}),
            conv("d", "m", "v", (0, 0, 0, 0)),
            ("Add", ["c", "d"], "y", {}),
        ],
        {**W, "v": normal(4, 3, 1, 1), "axes": np.array([2, 3])},
        (1, 3, 8, 8),
        "another size, and is not one channel",
    ),
    "unknown": ([("Relu", ["x"], "y", {})], {}, (1, 3, 8, 8), "Relu: there is no layer before it"),
    "operator": (
        [("MaxPool", ["x"], "y", {"kernel_shape": [2, 2]})],
        {},
        (1, 3, 8, 8),
        "MaxPool: no kernel has this operator",
    ),
}
TRANSPOSED = {
    "weights": ({}, None, "weights are not constant"),
    "axes": ({}, normal(3, 2, 3), "over 1 axes"),
    "groups": ({"group": 3, "pads": [0, 0, 1, 1]}, normal(3, 2, 3, 3), "of groups"),
    "dilation": ({"dilations": [2, 2]}, normal(3, 2, 3, 3), "with dilation"),
    "strides": ({"strides": [2, 1]}, normal(3, 2, 3, 3), "two strides"),
    "size": ({"output_shape": [8, 8]}, normal(3, 2, 3, 3), "size of its output"),
    "no multiple": ({}, normal(3, 2, 3, 3), "no multiple of its input"),
    "gaps": ({"auto_pad": "SAME_UPPER", "strides": [3, 3]}, normal(3, 2, 2, 2), "with gaps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_reasons(name):
    nodes, constants, shape, reason = REFUSED[name]
    more = {"b": (4,)} if name == "bias" else {}
    found = partition(network(*nodes, shape=shape, constants=constants, more=more))
    assert any(reason in one.reason for one in found.refusals), found.refusals
    named = {one.node for one in found.refusals}
    assert named <= {node.name for node in found.model.graph.node}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_that_stay(name):
    attributes, weights, reason = TRANSPOSED[name]
    shape = (1, 3, 5) if name == "axes" else (3, 3, 5, 5)
    node = (
        "ConvTranspose",
        ["x", "x" if weights is None else "w"],
        "y",
        {"strides": [1 if name == "axes" else 2] * (len(shape) - 2), **attributes},
    )
    if name in ("axes", "weights"):
        node[3]["strides"] = [1] * (len(shape) - 2)
    found = partition(network(node, shape=shape, constants={} if weights is None else {"w": weights}))
    (refusal,) = found.refusals
    assert refusal.reason.startswith("ConvTranspose: ")
    assert reason in refusal.reason


# ------------------------------------------------------------------------------------------------------------- casts


def types(model):
    return [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]


def typed(model, *, half=("x", "y")):
    """The model, with these inputs and outputs in half precision, and the shapes and types of all else."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return onnx.shape_inference.infer_shapes(model)


def halves(*names, channels=3):
    return {name: (normal(channels, 3 if name == "w0" else channels, 3, 3) / 4).astype("float16") for name in names}


def test_mixed_precision_is_one_region():
    """Convolutions of float16 between casts, a skip, and a last layer of float32, as autocasting leaves them."""
    model = network(
        ("Cast", ["x"], "xh", {"to": TensorProto.FLOAT16}),
        conv("c", "xh", "w0"),
        ("Relu", ["c"], "r", {}),
        conv("d", "r", "w1"),
        ("Add", ["d", "r"], "e", {}),
        ("Cast", ["e"], "wide", {"to": TensorProto.FLOAT}),
        conv("y", "wide"),
        constants={**halves("w0", "w1"), "w": normal(4, 3, 3, 3)},
    )
    found = partition(typed(model, half=()))
    assert [len(region.layers) for region in found.regions] == [3]
    assert not found.refusals
    assert_same(model, found, tolerance=5e-3)  # the model itself rounds
    assert "Cast" not in kinds(found.model)


def test_a_network_of_half_precision_keeps_its_ends():
    """It is fused, its inputs and outputs stay float16, and in float16 nothing is cast but what is not fused."""
    nodes = [conv("c", "x", "w0"), ("MaxPool", ["c"], "p", {"kernel_shape": [2, 2]}), conv("y", "p", "w1")]
    model = typed(network(*nodes, constants=halves("w0", "w1"), outputs=("y", "p")), half=("x", "y", "p"))
    found = partition(model)
    assert [one.reason for one in found.refusals] == ["MaxPool: no kernel has this operator"]
    assert [len(region.layers) for region in found.regions] == [1, 1]
    half = to_float16(found.model)
    for one in (found.model, half):
        onnx.checker.check_model(one)
        assert types(one) == [TensorProto.FLOAT16] * 3
    assert_same(model, found, tolerance=5e-3)
    assert_same(model, replace(found, model=half), tolerance=1e-2)


def test_bfloat16_and_casts_without_effect():
    """Cast there and back is nothing; what is an output in between keeps its type."""
    model = network(
        conv("c", weights="w0"),
        ("Cast", ["c"], "short", {"to": TensorProto.BFLOAT16}),
        ("Cast", ["short"], "wide", {"to": TensorProto.FLOAT}),
        conv("d", "wide", "w1"),
        ("Cast", ["d"], "y", {"to": TensorProto.FLOAT16}),
        constants={name: one.astype("float32") for name, one in halves("w0", "w1").items()},
    )
    found = partition(typed(model, half=("y",)))
    assert [len(region.layers) for region in found.regions] == [2]
    assert not found.refusals
    half = to_float16(found.model)
    assert types(half) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    casts = [helper.get_node_attr_value(node, "to") for node in half.graph.node if node.op_type == "Cast"]
    assert casts == [TensorProto.FLOAT16], "of the input alone"


def test_halves_inside_of_conditions():
    branch = helper.make_graph(
        [helper.make_node("Cast", ["c"], ["narrow"], to=TensorProto.FLOAT16)],
        "narrow",
        [],
        [helper.make_tensor_value_info("narrow", TensorProto.FLOAT16, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["also"], to=TensorProto.FLOAT16)],
        "also",
        [],
        [helper.make_tensor_value_info("also", TensorProto.FLOAT16, None)],
    )
    model = network(
        conv("c"),
        ("ReduceSum", ["x"], "sum", {"keepdims": 0}),
        ("Cast", ["sum"], "positive", {"to": TensorProto.BOOL}),
        ("If", ["positive"], "chosen", {"then_branch": branch, "else_branch": other}),
        ("Cast", ["chosen"], "y", {"to": TensorProto.FLOAT}),
        constants={"w": normal(3, 3, 3, 3)},
    )
    found = partition(typed(model, half=()))
    assert len(found.regions) == 1
    assert_same(model, found, tolerance=5e-3)


def test_pictures_of_bytes_are_scaled_by_the_first_layer():
    """Only their cast is left; where borders are padded with zeros, a shift is a layer of its own."""
    for shift, layers in (((0, 0, 0), 1), ((-1, -0.5, -2), 2)):
        nodes = [
            ("Cast", ["x"], "f", {"to": TensorProto.FLOAT}),
            ("Mul", ["f", "scale"], "s", {}),
            ("Add", ["s", "shift"], "a", {}),
            ("Transpose", ["a"], "t", {"perm": [0, 3, 1, 2]}),
            conv("y", "t"),
        ]
        constants = {"w": normal(4, 3, 3, 3), "scale": np.float32(1 / 127.5)}
        constants["shift"] = np.float32(0) if not any(shift) else np.array(shift, "float32")
        model = network(*nodes, shape=("n", "h", "w", 3), constants=constants)
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
        found = partition(model)
        assert [len(region.layers) for region in found.regions] == [layers]
        assert [one.reason for one in found.refusals] == ["Cast: input 'x' is uint8, and kernels read float16"]
        assert_same(model, found)
        half = to_float16(found.model)
        assert kinds(half) == {"Cast": 2, FUSED: 1, "Transpose": 1}
        assert_same(model, replace(found, model=half), tolerance=2e-2)


def test_pixels_of_bytes_leave_their_layers_fused():
    """What makes integers stays behind the region, and behind its shuffle; no transpose is between."""
    model = network(
        conv("c"),
        ("DepthToSpace", ["c"], "s", {"blocksize": 2}),
        ("Sigmoid", ["s"], "g", {}),
        ("Mul", ["g", "most"], "m", {}),
        ("Round", ["m"], "r", {}),
        ("Cast", ["r"], "b", {"to": TensorProto.UINT8}),
        ("Transpose", ["b"], "y", {"perm": [0, 2, 3, 1]}),
        constants={"w": normal(12, 3, 3, 3) / 9, "most": np.float32(255)},
    )
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    found = partition(model)
    (region,) = found.regions
    assert region.shuffle == 2
    assert kinds(found.model) == {"Transpose": 1, FUSED: 1, "Mul": 1, "Round": 1, "Cast": 1}
    reasons = ["Mul: no kernel", "Round: no kernel", "Cast: to uint8, and kernels write float16"]
    assert all(one.reason.startswith(reason) for one, reason in zip(found.refusals, reasons, strict=True))
    assert_same(model, found, tolerance=1)


def test_weights_beyond_half():
    """The layer is named whose they are, in a region of several."""
    slopes = {"s": normal(3, 1, 1)}
    nodes = [conv("a"), ("PRelu", ["a", "s"], "p", {}), conv("b", "p", "v"), conv("y", "b")]
    for weights, layer in (({"v": normal(3, 3, 3, 3) * 1e6, **slopes}, "b"), ({"s": slopes["s"] * 1e6}, "a")):
        found = partition(network(*nodes, constants={"w": normal(3, 3, 3, 3), "v": normal(3, 3, 3, 3), **weights}))
        assert [len(region.layers) for region in found.regions] == [3]
        with pytest.raises(ConversionError, match=f"Layer '{layer}' has a weight beyond float16"):
            to_float16(found.model)


def test_weights_that_are_nan():
    weights = normal(3, 3, 3, 3)
    weights[0, 0, 0, 0] = np.nan
    found = partition(network(conv("y"), constants={"w": weights}))
    with pytest.raises(ConversionError, match=r"Layer 'y' has a weight that is NaN\."):
        to_float16(found.model)


# ------------------------------------------------------------------------------------------- structures from anybody


def structure():
    (region,) = partition(chain(2)).regions
    return spec.spec(region)


def changed(path, value):
    found = structure()
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["version"], True),
        (["rows"], 1),
        (["rows"], True),
        (["shuffle"], 0),
        (["shuffle"], 2),
        (["shuffle"], 1.0),
        (["channels"], []),
        (["channels"], [3, "3"]),
        (["layers"], []),
        (["layers"], "ab"),
        (["layers", 0], None),
        (["layers", 0, "value"], 1),
        (["layers", 0, "value"], -1),
        (["layers", 1, "channels"], 4),
        (["layers", 0, "kernel"], [3]),
        (["layers", 0, "kernel"], [3, 1000]),
        (["layers", 0, "stride"], [0, 1]),
        (["layers", 0, "padding"], [-1, 0, 0, 0]),
        (["layers", 1, "filters"], 1 << 60),
        (["layers", 0, "depthwise"], "no"),
        (["layers", 0, "more"], 1),
        (["layers", 0, "steps"], {}),
        (["layers", 0, "steps"], [[]]),
        (["layers", 0, "steps"], [{"kind": "exp"}]),
        (["layers", 0, "steps"], [{"kind": "relu", "low": 1}]),
        (["layers", 0, "steps"], [{"kind": ["relu"]}]),
        (["layers", 0, "steps"], [{"kind": "prelu", "slopes": 2}]),
        (["layers", 0, "steps"], [{"kind": "clip", "low": float("nan"), "high": None}]),
        (["layers", 0, "steps"], [{"kind": "clip", "low": 2, "high": 1}]),
        (["layers", 0, "steps"], [{"kind": "clip", "low": "0", "high": 1}]),
        (["layers", 0, "steps"], [{"add": 1}]),
        (["layers", 0, "steps"], [{"add": 0.0}]),
    ],
)
def test_structures_are_checked(path, value):
    with pytest.raises(WrongArgument):
        spec.shapes(changed(path, value))


def test_too_many_weights_are_found_before_they_are_made():
    found = changed(["layers", 0, "filters"], 1 << 20)
    found["layers"][0].update(kernel=[255, 255])
    with pytest.raises(WrongArgument, match="weights"):
        spec.shapes(found)


@pytest.mark.parametrize("text", ["", "[", "null", "[]", "{}", "[" * 100000, "1" * 5000, "x" * (1 << 21), b"{}"])
def test_texts_that_are_no_structure(text):
    with pytest.raises(WrongArgument):
        spec.parsed(text)


def test_texts_cut_short():
    text = spec.written(structure())
    assert spec.parsed(text) == structure()
    for length in range(len(text)):
        with pytest.raises(WrongArgument):
            spec.parsed(text[:length])


def test_arrays_of_other_shapes():
    (region,) = partition(chain(2)).regions
    arrays = spec.arrays(region)
    for wrong in (
        arrays[:-1],
        [*arrays, arrays[0]],
        [arrays[0][:2], *arrays[1:]],
        [arrays[0].astype("float64"), *arrays[1:]],
    ):
        with pytest.raises(WrongArgument):
            spec.region_of(structure(), wrong)

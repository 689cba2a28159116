"""What Bolt advises, of networks whose answers are known."""

from __future__ import annotations

import re
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_efficient.errors import MissingDependency, WrongArgument
from keras_efficient.export.bolt.advice import Gain, _Adviser, _widened, advise, check_installed, converted
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.partition import Policy, partition
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region

from .kernels import conv, prelu

RNG = np.random.default_rng(0)
H200 = architecture("sm_90a")
SIDE = 56  # of pictures
pytest.importorskip("onnx_ir", reason="advice needs the extra gpu")


def network(channels, *nodes):
    """Of nodes as (operator, attributes) in a row, from x to y; a convolution's weights as (filters, kernel)."""
    made, weights, last, width = [], [], "x", channels
    for number, (operator, values) in enumerate(nodes):
        inputs, out = [last], "y" if number == len(nodes) - 1 else f"v{number}"
        if operator == "Conv":
            filters, kernel, *_ = values.pop("weights")
            group = values.get("group", 1)
            array = RNG.normal(size=(filters, width // group, kernel, kernel)).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"w{number}"))
            inputs.append(f"w{number}")
            values.setdefault("pads", [kernel // 2] * 4)
            width = filters
        if operator == "Clip":
            for name, limit in values.items():
                weights.append(numpy_helper.from_array(np.float32(limit), f"{name}{number}"))
                inputs.append(f"{name}{number}")
            values = {}
        made.append(helper.make_node(operator, inputs, [out], name=f"{operator}_{number}", **values))
        last = out
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, SIDE, SIDE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(made, "network", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def of(kind, model, n=1):
    """Advice of one kind, by the layer's name."""
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return {one.layer: one for one in advise(model, {"x": (n, channels, SIDE, SIDE)}, H200) if one.kind == kind}


POOL = ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]})


# ---------------------------------------------------------------------------------------------------------- activations


def test_what_a_relu_could_be():
    relu6 = ("Clip", {"low": 0, "high": 6})
    model = network(64, ("Conv", {"weights": (64, 3)}), ("Relu", {}), POOL, ("Conv", {"weights": (64, 3)}), relu6)
    found = of("activation", model)
    assert set(found) == {"Conv_0", "Conv_3"}, "by the layers, not by their activations"
    assert found["Conv_0"].what.startswith("relu: prelu, clip")
    assert found["Conv_3"].what.startswith("relu6: relu, prelu")
    for one in found.values():
        assert all(kind in one.what for kind in ACTIVATIONS if kind != "clip")
        assert one.gain.low_ms < one.gain.high_ms == 0
        assert one.gain.of_ms > 1000 * H200.launch
        assert one.gain.basis == "estimated"


def test_an_activation_is_free_where_the_layer_takes_long():
    """A 5×5 of 256 channels has 6400 products for each number; a 1×1 of 8 has 8, and cannot hide a softplus."""
    long = of("activation", network(256, ("Conv", {"weights": (64, 5)}), ("Relu", {})), n=8)["Conv_0"]
    short = of("activation", network(8, ("Conv", {"weights": (64, 1)}), ("Relu", {})), n=64)["Conv_0"]
    free = "relu: prelu, clip, hard_swish would cost nothing more"
    assert long.what.startswith(free)
    assert not short.what.startswith(free)
    shares = [int(re.search(r"softplus up to (\d+)%", one.what)[1]) for one in (long, short)]
    assert shares[0] <= 5
    assert shares[1] >= 15


def test_other_ends_are_left_alone():
    model = network(16, ("Conv", {"weights": (16, 3)}), ("Clip", {"low": 0, "high": 1}), POOL)
    assert not of("activation", model)
    assert not of("activation", network(16, ("Conv", {"weights": (16, 3)}), POOL))


@pytest.mark.parametrize(
    ("nodes", "layer", "words"),
    [
        (
            [("Conv", {"weights": (16, 3)}), ("Selu", {})],
            "Selu_1",
            "no kernel has this operator; these are: relu",
        ),
        ([("Conv", {"weights": (16, 3)}), POOL, ("Tanh", {})], "Tanh_2", "no layer before it"),
    ],
)
def test_activations_that_are_not_fused(nodes, layer, words):
    one = of("activation", network(16, *nodes))[layer]
    assert one.what.startswith("not fused: ")
    assert words in one.what
    # A kernel that only starts, and one that also reads and writes all numbers.
    side = 56 if layer == "Selu_1" else 28
    assert one.gain.low_ms == pytest.approx(1000 * H200.launch)
    assert one.gain.high_ms - one.gain.low_ms == pytest.approx(1000 * 4 * 16 * side**2 / H200.memory_rate)
    assert one.gain.of_ms is None


# ------------------------------------------------------------------------------------------------------------- channels


def test_odd_channels_are_told_with_both_numbers():
    nodes = [("Conv", {"weights": (46, 3), "strides": [2, 2]}), POOL, ("Conv", {"weights": (32, 3)}), POOL]
    found = of("channels", network(8, *nodes), n=64)
    assert "46 channels out: with 48" in found["Conv_0"].what
    one = found["Conv_2"]
    assert "46 channels in: with 48, 4% more products" in one.what
    assert one.gain.low_ms <= one.gain.high_ms
    assert one.gain.high_ms > 0


def test_channels_that_are_aligned_or_pixels():
    assert not of("channels", network(48, ("Conv", {"weights": (32, 3), "strides": [2, 2]}), POOL), n=64)
    shuffled = ("Conv", {"weights": (36, 3), "strides": [2, 2]}), ("DepthToSpace", {"blocksize": 3})
    assert not of("channels", network(48, *shuffled), n=64)


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "factor"),
    [
        ((32, 20, 26), (46, 32), (3, 3), 1.62),
        ((32, 20, 26), (46, 32), (5, 5), 1.95),
        ((128, 14, 19), (46, 32), (5, 7), 1.77),
        ((288, 11, 15), (46, 32), (5, 7), 1.71),
        ((128, 20, 26), (174, 64), (3, 3), 1.60),
        ((128, 20, 26), (174, 64), (5, 5), 1.99),
    ],
)
def test_the_paper_s_factors_are_in_the_range(shape, channels, kernel, factor):
    """Table 3, which is of another GPU and of copies of 4 bytes instead of 2: no closer than a range can be asked."""
    adviser, (has, filters) = _Adviser(H200), channels
    wanted = -(-has // 8) * 8
    padding = (kernel[0] // 2, kernel[1] // 2) * 2
    weights = np.zeros((*kernel, has, filters), np.float32)
    region = Region((Layer(0, weights, np.zeros(filters, np.float32), padding=padding),), (has,))
    wide = _widened(region, 0, wanted)
    low, high = (
        one / other
        for one, other in zip(
            adviser.alone(region, shape, adviser.best(region, shape)),
            adviser.alone(wide, shape, adviser.best(wide, shape)),
            strict=True,
        )
    )
    assert 0.9 < low < factor < high < 3


@pytest.mark.parametrize(("value", "wanted"), [(0, 16), (2, 16), (3, 24)])
def test_a_wider_region_means_the_same(value, wanted):
    one = Activate("prelu", np.array([0.2], np.float32))
    region = Region((conv(0, 3, 12, 10, prelu(10), one), conv(2, 1, 10, 20, Add(1), prelu(20))), (12, 20))
    wide = _widened(region, value, wanted)
    given = [RNG.normal(size=(1, 5, 6, channels)) for channels in region.channels]
    padded = [np.pad(x, [(0, 0)] * 3 + [(0, has - x.shape[3])]) for x, has in zip(given, wide.channels, strict=True)]
    found, expected = computed(wide, padded), computed(region, given)
    assert np.allclose(found[..., : expected.shape[3]], expected)
    assert not found[..., expected.shape[3] :].any()
    assert wide.macs > region.macs


def test_one_channel_that_is_added_stays_one():
    region = Region((conv(0, 3, 8, 12, Add(1)),), (8, 1))
    assert _widened(region, 2, 16).channels == (8, 1)


# ------------------------------------------------------------------------------------------------------------ pointwise


@pytest.mark.parametrize(("filters", "where"), [(32, "registers"), (64, "registers"), (128, "shared memory")])
def test_a_pointwise_layer_behind_a_wider_kernel(filters, where):
    nodes = [("Conv", {"weights": (filters, 3), "strides": [2, 2]}), ("Relu", {}), POOL]
    found = of("pointwise", network(64, *nodes), n=8)
    one = found["Conv_0"]
    assert f"a 1×1 of {filters} to {filters} channels" in one.what
    assert f"by {where}" in one.what or filters > 32  # where estimates may prefer the other
    apart = float(one.what.split(" of its own ")[1].removesuffix(" ms"))
    assert 0 <= -one.gain.high_ms <= -one.gain.low_ms
    assert -one.gain.high_ms < apart, "else nothing is gained by fusing it"
    macs = 8 * 28 * 28 * filters**2
    fastest = 1000 * macs / 2048 * H200.product_cycles / 4 / H200.processors / H200.clock
    assert -one.gain.low_ms >= fastest * 0.999


@pytest.mark.parametrize(
    "nodes",
    [
        [("Conv", {"weights": (384, 3)})],
        [("Conv", {"weights": (32, 1)})],
        [("Conv", {"weights": (64, 3), "group": 64})],
        [("Conv", {"weights": (64, 3)}), ("Relu", {}), ("Conv", {"weights": (64, 1)})],
    ],
    ids=["too many channels", "a 1×1 itself", "depthwise", "has one"],
)
def test_layers_that_no_pointwise_layer_joins(nodes):
    model = network(64, *nodes, POOL)
    if len(nodes) > 2:
        assert len(partition(model, Policy(max_channels=0)).regions) == 1
    assert not of("pointwise", model)


# ----------------------------------------------------------------------------------------------------- refusals, errors


def test_what_is_refused_is_told_with_its_reason():
    found = of("refused", network(16, ("Conv", {"weights": (16, 3)}), POOL, ("Conv", {"weights": (32, 3), "group": 2})))
    assert set(found) == {"MaxPool_1", "Conv_2"}
    assert "no kernel has this operator" in found["MaxPool_1"].what
    assert "2 groups" in found["Conv_2"].what
    assert found["Conv_2"].gain is None


def test_layers_of_the_same_weights_have_names_of_their_own():
    model = network(16, ("Conv", {"weights": (16, 3)}), ("Relu", {}), POOL, ("Conv", {"weights": (16, 3)}))
    first, second = model.graph.initializer
    second.raw_data = first.raw_data
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"], name="last"))
    model.graph.output[0].name = "z"
    assert set(of("activation", model)) == {"Conv_0", "Conv_3"}


def test_equal_refusals_are_one():
    """With all layers of which it is said; of activations with the time of all."""
    nodes = [("Conv", {"weights": (16, 3)}), ("Selu", {}), POOL] * 2
    model = network(16, *((kind, dict(values)) for kind, values in nodes))
    pools = of("refused", model)["MaxPool_2"]
    assert pools.layers == ("MaxPool_2", "MaxPool_5")
    assert pools.what == "2 times MaxPool: no kernel has this operator"
    activations = of("activation", model)
    assert set(activations) == {"Selu_1"}
    both = activations["Selu_1"]
    assert both.layers == ("Selu_1", "Selu_4")
    assert both.what.startswith("2 times not fused: Selu: ")
    assert both.gain.low_ms == pytest.approx(2000 * H200.launch)


def test_sizes_that_are_wrong():
    model = network(16, ("Conv", {"weights": (16, 3)}))
    with pytest.raises(WrongArgument, match="Input 'x' has the shape"):
        advise(model, {}, H200)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match="onnxscript") as caught:
        check_installed()
    assert "keras-efficient[gpu]" in caught.value.hint


def test_gains_in_words():
    assert str(Gain(0.5, 1.25, 2.0)) == "saves 0.5000 to 1.2500 of 2.0000 ms, estimated"
    assert str(Gain(-0.25, -0.0)) == "costs 0.0000 to 0.2500 ms, estimated"
    assert str(Gain(-0.25, 0.5)) == "saves -0.2500 to 0.5000 ms, estimated"
    assert str(Gain(-0.25, -0.25)) == "costs 0.2500 ms, estimated"


def test_a_keras_model():
    import keras
    from keras import layers

    inputs = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(12, 3, strides=2, padding="same", activation="relu", name="begin")(inputs)
    model = keras.Model(inputs, layers.Conv2D(8, 3, activation="selu", name="end")(x))
    with pytest.raises(WrongArgument, match="sizes, and input 'image' has shape"):
        converted(model)
    told = []
    proto, sizes = converted(model, (64, 96), told.append)
    onnx.checker.check_model(proto)
    assert sizes == {"image": (1, 64, 96, 3)}
    assert told
    found = {(one.kind, one.layer) for one in advise(proto, sizes, H200)}
    assert ("activation", "begin") in found
    assert ("activation", "end") in found

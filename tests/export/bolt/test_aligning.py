"""Channels inside of networks, padded: nothing changes but the layers' shapes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnx_ir", reason="regions need the extra gpu")

from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.assembling import best_partition
from keras_efficient.export.bolt.partition import Policy, partition

RNG = np.random.default_rng(0)


class Network:
    """An ONNX file, made node by node."""

    def __init__(self, channels, size=16):
        self.nodes, self.constants = [], []
        self.channels, self.size = {"x": channels}, size

    def constant(self, *shape):
        name = f"c{len(self.constants)}"
        values = RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 1)
        self.constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, kind, inputs, channels, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        self.channels[name] = channels
        return name

    def conv(self, x, filters, kernel=3, group=1):
        given = [x, self.constant(filters, self.channels[x] // group, kernel, kernel), self.constant(filters)]
        return self.node("Conv", given, filters, pads=[kernel // 2] * 4, group=group)

    def model(self, *outputs):
        def value(name):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, self.channels[name], *[self.size] * 2])

        graph = helper.make_graph(self.nodes, "n", [value("x")], [value(one) for one in outputs], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})


def compared(network, *outputs):
    """Filters of each region's layers, of the plain file and of the padded one, which compute the same."""
    model = network.model(*outputs)
    x = RNG.normal(size=(1, network.channels["x"], network.size, network.size)).astype(np.float32)
    wanted, found = run(model, x), []
    for unit in (1, 8):
        parted = partition(model, Policy(max_layers=1, unit=unit))
        for ours, theirs in zip(run(parted.model, x), wanted, strict=True):
            assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)
        found.append([layer.filters for region in parted.regions for layer in region.layers])
    return found


def test_a_chain_with_skips_of_every_kind():
    net = Network(3)
    first = net.node("PRelu", [net.conv("x", 46), net.constant(46, 1, 1)], 46)
    second = net.node("Add", [net.node("Relu", [net.conv(first, 46)], 46), first], 46)
    third = net.node("Clip", [net.conv(second, 46, group=46)], 46)
    shifted = net.node("Add", [third, net.constant(1, 46, 1, 1)], 46)
    plain, padded = compared(net, net.conv(shifted, 13, kernel=1))
    assert plain == [46, 46, 46, 13]
    assert padded == [48, 48, 48, 13]  # the file's own output stays


def test_activations_that_make_something_of_nothing():
    net = Network(8)
    inner = net.node("Sigmoid", [net.conv("x", 12)], 12)
    assert compared(net, net.conv(inner, 16)) == [[12, 16], [16, 16]]


@pytest.mark.parametrize("kind", ["output", "concatenation", "input", "pooling"])
def test_what_others_read_stays(kind):
    net = Network(12)
    inner = net.conv("x", 12)
    if kind == "output":
        outputs = [net.conv(inner, 16), inner]
    elif kind == "concatenation":
        outputs = [net.conv(net.node("Concat", [inner, inner], 24, axis=1), 16)]
    elif kind == "input":
        outputs = [net.conv(net.node("Add", [inner, "x"], 12), 16)]
    else:
        outputs = [net.conv(net.node("MaxPool", [inner], 12, kernel_shape=[3, 3], pads=[1] * 4), 16)]
    plain, padded = compared(net, *outputs)
    assert plain == padded


def test_products_of_rows():
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, count]) for name, count in (("x", 20), ("y", 10))
    ]
    net = Network(20)
    hidden = net.node("MatMul", ["x", net.constant(20, 30)], 30)
    hidden = net.node("Relu", [net.node("Add", [hidden, net.constant(30)], 30)], 30)
    last = helper.make_node("MatMul", [hidden, net.constant(30, 10)], ["y"])
    graph = helper.make_graph([*net.nodes, last], "n", given[:1], given[1:], net.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    parted = partition(model, Policy(max_layers=1, unit=8))
    assert [layer.filters for region in parted.regions for layer in region.layers] == [32, 10]
    x = RNG.normal(size=(5, 20)).astype(np.float32)
    np.testing.assert_allclose(run(parted.model, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)


def test_a_constant_that_two_layers_share():
    net = Network(12)
    weights, bias = net.constant(12, 12, 3, 3), net.constant(12)
    inner = net.node("Conv", ["x", weights, bias], 12, pads=[1] * 4)
    plain, padded = compared(net, net.node("Conv", [inner, weights, bias], 12, pads=[1] * 4))
    assert plain == [12, 12]
    assert padded == [16, 12]


def test_the_search_pads_where_that_pays():
    """The paper's layer of 46 channels, behind one that makes them; and a file that gives the same bytes each time."""
    net = Network(64, size=256)
    inner = net.node("Relu", [net.conv("x", 174, kernel=1)], 174)
    model = net.model(net.node("Relu", [net.conv(inner, 64)], 64))
    sizes = {"x": (1, 64, 256, 256)}
    first, _ = best_partition(model, sizes, architecture("sm_80"), None)
    assert [layer.filters for region in first.regions for layer in region.layers] == [176, 64]
    again, _ = best_partition(model, sizes, architecture("sm_80"), None)
    assert first.model.SerializeToString(deterministic=True) == again.model.SerializeToString(deterministic=True)
    even = Network(8)
    even = even.model(even.conv(even.conv("x", 16), 8))
    assert onnx.checker.check_model(partition(even, Policy(unit=8)).model) is None

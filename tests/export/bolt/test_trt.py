"""Kernels as TensorRT plugins, with a stand-in for `tensorrt.plugin` that is as strict as its documentation."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_efficient.errors import MissingDependency
from keras_efficient.export.bolt import trt
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.grids import formulas, geometry, launch
from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.partition import Policy, partition

RNG = np.random.default_rng(0)


class Expression:
    """A size: whole numbers with the four operations, of which an expression must be the left side."""

    def __init__(self, value):
        assert isinstance(value, (int, Expression)), value
        self.value = value if isinstance(value, int) else value.value

    def __add__(self, other):
        return Expression(self.value + Expression(other).value)

    def __sub__(self, other):
        return Expression(self.value - Expression(other).value)

    def __mul__(self, other):
        return Expression(self.value * Expression(other).value)

    def __floordiv__(self, other):
        return Expression(self.value // Expression(other).value)

    def __bool__(self):
        raise AssertionError("An expression has no value at build time.")


class SymInt32(Expression):
    pass


class Expressions(list):
    @classmethod
    def from_tuple(cls, values):
        return cls(one if isinstance(one, Expression) else Expression(one) for one in values)


class TensorDesc:
    def __init__(self, *shape):
        self.shape_expr = Expressions.from_tuple(shape)

    def like(self):
        return TensorDesc(*self.shape_expr)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class AutoTuneCombination:
    def __init__(self, types, layouts):
        self.types, self.layouts = types, layouts


@pytest.fixture
def api(monkeypatch):
    """`tensorrt.plugin`, with what was registered in `kinds`."""
    found = types.ModuleType("tensorrt.plugin")
    found.TensorDesc, found.SymInt32, found.KernelLaunchParams = TensorDesc, SymInt32, KernelLaunchParams
    found.ShapeExprs = found.SymIntExprs = Expressions
    found.AutoTuneCombination = AutoTuneCombination
    found.kinds = {}
    for kind in ("register", "autotune", "aot_impl"):
        found.kinds[kind] = {}

        def decorator(name, kind=kind):
            assert name not in found.kinds[kind]
            return lambda function: found.kinds[kind].setdefault(name, function)

        setattr(found, kind, decorator)
    parent = types.ModuleType("tensorrt")
    parent.plugin = found
    monkeypatch.setitem(sys.modules, "tensorrt", parent)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", found)
    monkeypatch.setattr(trt, "_registered", set())
    return found


def network(rows: bool = False) -> onnx.ModelProto:
    """A convolution with a stride, a depthwise one, a 1×1 one; or two products."""
    nodes, arrays, generator = [], {}, np.random.default_rng(1)

    def weights(name, *shape):
        arrays[name] = generator.normal(0, 0.3, shape).astype(np.float32)
        return name

    if rows:
        nodes.append(helper.make_node("MatMul", ["x", weights("w", 8, 16)], ["a"]))
        nodes.append(helper.make_node("Relu", ["a"], ["b"]))
        nodes.append(helper.make_node("MatMul", ["b", weights("v", 16, 8)], ["y"]))
        shapes = ("m", "k", 8), ("m", "k", 8)
    else:
        pads = {"pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("Conv", ["x", weights("w", 8, 3, 3, 3)], ["a"], strides=[2, 2], **pads))
        nodes.append(helper.make_node("Relu", ["a"], ["b"]))
        nodes.append(helper.make_node("Conv", ["b", weights("v", 8, 1, 3, 3)], ["c"], group=8, **pads))
        nodes.append(helper.make_node("Conv", ["c", weights("u", 4, 8, 1, 1)], ["y"]))
        shapes = ("n", 3, "h", "w"), ("n", 4, "p", "q")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, one) for name, one in zip("xy", shapes, strict=True)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "network", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def rule_of(region, kind: str) -> dict:
    sizes = {"channels": region.layers[-1].filters, "geometry": geometry(region.layers[0])}
    return {
        "strip": {"kind": "strip", "useful": 48, "extra": 3, "rows": 4, "blocks": 2, "channels": 16},
        "tile": {"kind": "tile", "places": 64, "across": 2, **sizes},
        "cluster": {"kind": "tile", "places": 64, "across": 2, "together": 4, **sizes},
        "depthwise": {"kind": "depthwise", "places": 4, "threads": 128, "groups": 3, **sizes},
    }[kind]


def bundle_of(model, sizes, *, kind=None, shared=0, ptx=b".version 8.0") -> Bundle:
    """A bundle whose PTX is nothing, with launches as templates make them."""
    parted = partition(model, Policy(max_layers=1))
    names = [f"kernel_{index}" for index in range(len(parted.regions))]
    kinds = [kind or ("depthwise" if region.layers[0].depthwise else "tile") for region in parted.regions]
    entries = {
        name: {
            "rule": rule_of(region, one),
            "threads": 128,
            "shared_bytes": shared,
            "inputs": len(region.channels),
        }
        for name, region, one in zip(names, parted.regions, kinds, strict=True)
    }
    return Bundle(
        onnx=to_float16(parted.model).SerializeToString(),
        ptx={f"{name}/sm_90a": ptx for name in names} if ptx else {},
        weights={str(index): bytes(range(index, index + 7)) for index in range(len(names))},
        launches={"regions": names, "kernels": entries},
        tuning={"architecture": "sm_90a"},
        metadata={"sizes": sizes},
    )


@pytest.mark.parametrize("kind", ["strip", "tile", "cluster", "depthwise"])
def test_formulas_are_those_of_the_grids(kind):
    region = partition(network(), Policy(max_layers=1)).regions[0]
    rule = rule_of(region, kind)
    for _ in range(50):
        n, height, width = (int(one) for one in (RNG.integers(1, 5), RNG.integers(3, 2000), RNG.integers(3, 2000)))
        grid, integers = launch(rule, n, height, width, 132)
        assert formulas(rule, n, height, width, integers[0]) == (grid, integers)
        if kind in ("tile", "cluster"):
            together, places = rule.get("together", 1), n * integers[1] * integers[2]
            assert grid[0] % together == 0  # clusters are whole, and no more than are needed
            assert places <= grid[0] * rule["places"] < places + together * rule["places"]
        symbolic = formulas(rule, *map(Expression, (n, height, width)), integers[0])
        assert tuple(Expression(one).value for one in symbolic[0]) == grid
        assert tuple(Expression(one).value for one in symbolic[1]) == integers


@pytest.mark.parametrize("kind", [None, "strip"])
def test_functions_of_an_image_network(api, kind):
    bundle = bundle_of(network(), {"x": (2, 3, 20, 24)}, kind=kind)
    plugged = trt.plugins(bundle)
    assert not plugged.refusals
    assert [name.split("::")[1] for name in plugged.plugins] == ["region_0", "region_1", "region_2"]
    assert trt.plugins(bundle).plugins == plugged.plugins  # and registers nothing again
    nodes = {f"{node.attribute[0].s.decode()}::{node.op_type}": node for node in plugged.model.graph.node
             if node.op_type.startswith("region")}  # fmt: skip
    assert set(nodes) == set(plugged.plugins)
    constants = {one.name: numpy_helper.to_array(one) for one in plugged.model.graph.initializer}
    regions = partition(network(), Policy(max_layers=1)).regions
    for index, name in enumerate(plugged.plugins):
        assert len(nodes[name].input) == 2
        packed = constants[nodes[name].input[-1]]
        assert packed.dtype == np.int32
        assert packed.tobytes() == bytes(range(index, index + 7)) + b"\0"
        channels, weights = regions[index].channels[0], TensorDesc(2)
        describe, implement = api.kinds["register"][name], api.kinds["aot_impl"][name]
        assert list(inspect.signature(describe).parameters) == ["x0", "packed"]
        assert list(inspect.signature(implement).parameters) == ["x0", "packed", "outputs", "tactic"]
        assert inspect.signature(describe).return_annotation is TensorDesc
        assert [one.types for one in api.kinds["autotune"][name](None, None, None)] == ["FP16, INT32, FP16"]
        built = (2, 20, 24) if index == 0 else (2, 10, 12)
        for n, height, width in (built, (1, 33, 50)):
            x = TensorDesc(n, height, width, channels)
            out = describe(x, weights)
            wanted = regions[index].output_shape(n, height, width)
            assert tuple(one.value for one in out.shape_expr) == wanted
            kernel, ptx, parameters, extra = implement(x, weights, (out,), 0)
            rule = bundle.launches["kernels"][kernel]["rule"]
            grid, integers = launch(rule, n, height, width, 132)
            if kind == "strip":  # the bands' rows are those of the sizes that the bundle is for
                band = launch(rule, *built, 132)[1]
                grid, integers = (grid[0], -(-height // band[0]), grid[2]), band
            assert (parameters.grid_x.value, parameters.grid_y.value, parameters.grid_z.value) == grid
            assert (parameters.block_x, parameters.shared_mem) == (128, 0)
            assert all(isinstance(one, SymInt32) for one in extra)
            assert [one.value for one in extra] == [height, width, *integers]
            assert (kernel, ptx) == (f"kernel_{index}", b".version 8.0")


def test_functions_of_rows(api):
    bundle = bundle_of(network(rows=True), {"x": (5, 7, 8)})
    plugged = trt.plugins(bundle)
    name = plugged.plugins[0]
    x = TensorDesc(3, 50, 8)
    assert [one.value for one in api.kinds["register"][name](x, TensorDesc(2)).shape_expr] == [3, 50, 16]
    _, _, parameters, extra = api.kinds["aot_impl"][name](x, TensorDesc(2), (), 0)
    grid, integers = launch(bundle.launches["kernels"]["kernel_0"]["rule"], 1, 1, 150, 132)
    assert (parameters.grid_x.value, parameters.grid_y.value, parameters.grid_z.value) == grid
    assert [one.value for one in extra] == [1, 150, *integers]


def test_refused_kernels_stay_in_standard_operators(api):
    cases = (
        ({"shared": 49153}, "49153 bytes of shared memory"),
        ({"ptx": b""}, "no PTX"),
        ({"kind": "cluster"}, "in clusters"),
    )
    for more, words in cases:
        plugged = trt.plugins(bundle_of(network(), {"x": (2, 3, 20, 24)}, **more))
        assert plugged.plugins == ()
        assert len(plugged.refusals) == 3
        assert all(words in reason for reason in plugged.refusals.values())
        assert not plugged.model.functions
        session = onnxruntime.InferenceSession(plugged.model.SerializeToString())
        x = RNG.normal(size=(2, 3, 20, 24)).astype(np.float32)
        wanted = onnxruntime.InferenceSession(network().SerializeToString()).run(None, {"x": x})[0]
        np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, atol=0.02 * np.abs(wanted).max())


def test_regions_without_a_kernel_stay(api):
    bundle = bundle_of(network(), {"x": (2, 3, 20, 24)})
    plugged = trt.plugins(replace(bundle, launches={**bundle.launches, "regions": [None, "kernel_1", None]}))
    assert [name.split("::")[1] for name in plugged.plugins] == ["region_1"]
    assert [node.op_type for node in plugged.model.graph.node].count("Conv") == 2


def test_no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="tensorrt"):
        trt.plugins(bundle_of(network(), {"x": (2, 3, 20, 24)}))

"""What the targets `cuda-sm…` refuse before any work, and what their reports say."""

from __future__ import annotations

import builtins
import sys

import pytest
from onnx import TensorProto, helper

from keras_efficient.errors import MissingDependency
from keras_efficient.export.bolt import build, graph
from keras_efficient.export.bolt.partition import partition
from keras_efficient.export.targets import registry

TARGET = registry["cuda-sm90a"]


def options(**given):
    return {**{name: one.default for name, one in TARGET.options.items()}, **given}


def relu(shape=("n", 4)):
    """An ONNX file of one operator."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "test", ends[:1], ends[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


# -------------------------------------------------------------------------------------------------- what is not here


@pytest.mark.parametrize(("module", "package"), [("onnxscript", "onnxscript"), ("cuda.bindings", "cuda-bindings")])
def test_missing_packages_are_told_before_any_work(monkeypatch, module, package):
    monkeypatch.setattr(graph, "check_installed", graph.check_installed if module == "onnxscript" else lambda: None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency) as caught:
        TARGET.ready(options())
    assert caught.value.package == package
    assert caught.value.hint == "Install it: pip install 'keras-efficient[gpu]'"


def test_missing_headers_are_told_before_any_work(monkeypatch):
    monkeypatch.setattr(graph, "check_installed", lambda: None)
    monkeypatch.setattr(build, "_nvrtc", lambda: None)
    monkeypatch.setattr(build, "_wheels", list)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(MissingDependency, match="nvidia-cuda-runtime"):
        TARGET.ready(options())


@pytest.mark.parametrize("function", [partition, graph.normalised])
@pytest.mark.parametrize("missing", ["onnxscript", "onnx_ir"])
def test_what_takes_networks_apart_says_what_to_install(monkeypatch, function, missing):
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnxscript", "onnx_ir")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *more):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="onnxscript"):
        function(relu())


def test_the_program_asks_before_keras_starts(monkeypatch, tmp_path):
    from keras_efficient.cli import export, models

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(models, "open_keras", lambda name: pytest.fail("a model was opened"))
    how = {"input_shape": None, "calibration": None, "overwrite": False, "verify": True}
    with pytest.raises(MissingDependency, match="onnxscript"):
        export._export("m.keras", tmp_path / "m.bolt", None, None, None, how)

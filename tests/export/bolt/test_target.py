"""What the targets `cuda-sm…` refuse before any work, and what their reports say."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace

import pytest
from onnx import TensorProto, helper

from keras_efficient.errors import ConversionError, FileProblem, MissingDependency
from keras_efficient.export.bolt import assembling, build, graph
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.partition import NO_KERNEL, NOTHING_TO_JOIN, partition
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.runtime import CudaDevice
from keras_efficient.export.bolt.search import candidates, unserved
from keras_efficient.export.signature import InputSpec
from keras_efficient.export.targets import Built, Request, cuda, registry
from keras_efficient.export.targets.cuda import _without_kernel

from .kernels import conv

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


def test_measuring_without_a_gpu_is_refused_before_any_work(monkeypatch, tmp_path):
    driver = pytest.importorskip("cuda.bindings.driver", reason="the driver's interface is of the extra gpu")

    def no_library(flags):
        raise RuntimeError("no libcuda")

    for name in ("graph", "build"):
        monkeypatch.setattr(f"keras_efficient.export.bolt.{name}.check_installed", lambda: None)
    monkeypatch.setattr(driver, "cuInit", no_library)
    with pytest.raises(ConversionError, match=r"No NVIDIA GPU .*no libcuda") as caught:
        TARGET.ready(options(tune=3))
    assert "--tune" in caught.value.hint
    with pytest.raises(ConversionError) as caught:
        CudaDevice()
    assert "HostDevice()" in caught.value.hint
    assert "--tune" not in caught.value.hint
    (tmp_path / "list.txt").write_text("milk\n")
    with pytest.raises(FileProblem, match="no measurement"):
        TARGET.ready(options(tune_cache=str(tmp_path / "list.txt")))


def test_a_file_of_measurements_is_a_path_as_well(tmp_path):
    from keras_efficient.export.pipeline import _options

    assert _options(TARGET, {"tune_cache": tmp_path / "m"}) == options(tune_cache=str(tmp_path / "m"))


# ---------------------------------------------------------------------------------------------------------- reports


def test_operators_without_a_kernel_are_told_by_layer():
    norm = [f"Op{number % 5}" for number in range(13)]
    refused = [
        {"node": f"{name}{f' #{number + 1}' if number else ''}", "reason": f"{kind}: {NO_KERNEL}"}
        for name in ("norm", "norm_1")
        for number, kind in enumerate(norm)
    ]
    refused.append({"node": "norm #14", "reason": f"Add: {NOTHING_TO_JOIN}"})  # between others, where nothing could be
    refused.append({"node": "norm_1 #14", "reason": f"Add: {NOTHING_TO_JOIN}"})
    refused += [{"node": "pool", "reason": f"MaxPool: {NO_KERNEL}"}, {"node": "conv", "reason": "strip: a; tile: b"}]
    refused += [{"node": f"pool_{number}", "reason": f"MaxPool: {NO_KERNEL}"} for number in range(5)]
    assert _without_kernel(refused) == [
        "No kernel for norm, norm_1: Op0, Op1, Op2, Op3, … (14 operators).",
        "No kernel for pool, pool_0, pool_1, pool_2 and 2 more layers: MaxPool.",
        "No kernel for conv: strip: a; tile: b.",
    ]


def test_the_program_shows_a_few_of_many_notes():
    from keras_efficient.cli.export import _shortened

    many = [f"No kernel for layer_{number}: Mul." for number in range(40)]
    shown = _shortened(["first", *many, "last"])
    assert len(shown) == 18
    assert shown[:2] + shown[-3:] == ["first", many[0], many[14], "… and 25 more; --json has all.", "last"]
    assert _shortened(["first", *many[:15], "last"]) == ["first", *many[:15], "last"]


def test_regions_without_candidates_have_a_reason(monkeypatch):
    monkeypatch.setattr(build, "missing_for_cutlass", lambda: "not installed")
    wide = Region((conv(0, 3, 64, 64),), (64,))
    assert unserved(wide, architecture("sm_90a"), sized=False) == "the size of its input is not known"
    small = replace(architecture("sm_80"), block_bytes=1 << 10)
    assert candidates(wide, small, 1, 8, 8) == []
    reason = unserved(wide, small, sized=True)
    assert "strip: no parameters fit into 1 KB of shared memory" in reason
    assert "tile: no parameters fit into 1 KB" in reason
    assert "warpgroup: no parameters for sm_80" in reason
    strided = Region((conv(0, 3, 12, 12, stride=(2, 2)), conv(1, 3, 12, 12)), (12,))
    assert "strip: a layer strides" in unserved(strided, small, sized=False)


def test_a_report_counts_fused_parts_that_have_a_kernel(monkeypatch, tmp_path):
    network = partition(relu()).model
    bundle = Bundle(
        onnx=network.SerializeToString(),
        launches={"kernels": {}, "regions": ["strip", None, None]},
        tuning={"kernels": [{"measured_ms": None, "estimated_ms": 1.0, "checked": True, "template": "strip"}]},
        metadata={"refused": [{"node": name, "reason": "tile: no"} for name in ("a", "b")]},
    )
    monkeypatch.setattr(assembling, "assemble", lambda *given, **how: bundle)
    path = tmp_path / "m.onnx"
    path.write_bytes(bundle.onnx)
    request = Request(TARGET, "float16", (InputSpec("x", (1, 4), "float32"),), options=options())
    notes = cuda.compile_bundle(Built(path, path), request, tmp_path).notes
    assert "1 of 3 fused parts have a kernel (`Fused` in ops)." in notes
    assert notes[-1] == "No kernel for a, b: tile: no."

"""Bundles on a device: called, and captured as graphs; and which memory is freed behind which work.

Kernels run on the CPU: by `HostDevice`, and by `CudaDevice` on a driver that is none.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_efficient import export
from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.export.bolt import checking, dlpack, meter, reference, runtime, spec
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.dlpack import array_of
from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.partition import Policy, partition
from keras_efficient.export.bolt.region import Activate, Add, Region
from keras_efficient.export.bolt.runtime import CudaDevice, HostDevice, load
from keras_efficient.export.bolt.search import candidates
from keras_efficient.export.bolt.standard import DOMAIN, FUSED

from .driver import OWN_STREAM, PRIMARY, Driver, OnDevice
from .kernels import conv, sesr

pytest.importorskip("onnx_ir", reason="kernels need the extra gpu")
if shutil.which("g++") is None:
    pytest.skip("g++ compiles kernels for the CPU", allow_module_level=True)

RNG = np.random.default_rng(0)
STREAM, TAKER = 40, 50


def bundle_of(outputs=("y",), arch="sm_90a") -> Bundle:
    """Three kernels in a row; with source for machine code, which the driver that is none takes."""
    random = np.random.default_rng(1)
    arrays = {
        name: random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in {"w": (8, 8, 3, 3), "v": (8, 1, 3, 3), "u": (16, 8, 1, 1)}.items()
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], strides=[2, 2], **pads),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], group=8, **pads),
        helper.make_node("Conv", ["c", "u"], ["y"]),
    ]

    def value(name, channels):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, f"{name}_h", f"{name}_w"])

    channels = {"b": 8, "y": 16}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "n", [value("x", 8)], [value(one, channels[one]) for one in outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return assembled(partition(model, Policy(max_layers=1)), arch)


def assembled(parted, arch) -> Bundle:
    best = [candidates(one, architecture("sm_90a"), 1, 16, 16, limit=1)[0].emit(one) for one in parted.regions]
    entries = {
        source.kernel: {"rule": dict(source.rule), "threads": source.threads, "shared_bytes": source.shared_bytes}
        for source in best
    }
    # Inputs and outputs in N×H×W×C, as exporters make them.
    model = onnx.ModelProto()
    model.CopyFrom(to_float16(parted.model))
    return Bundle(
        onnx=_without_transposes(model).SerializeToString(),
        sources={one.kernel: one.text for one in best},
        cubins={f"{one.kernel}/{arch}": one.text.encode() for one in best},
        weights={str(index): one.packed for index, one in enumerate(best)},
        launches={"regions": [one.kernel for one in best], "kernels": entries},
    )


def _without_transposes(model):
    names = {}
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Cast"):
            names[node.output[0]] = names.get(node.input[0], node.input[0])
    kept = [node for node in model.graph.node if node.op_type not in ("Transpose", "Cast")]
    for node in kept:
        node.input[:] = [names.get(one, one) for one in node.input]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for one in model.graph.output:
        one.name = names.get(one.name, one.name)
    return model


@pytest.fixture(scope="module")
def bundle():
    return bundle_of()


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float16)


@pytest.fixture
def driver(monkeypatch):
    """A driver that is none, which the next `CudaDevice` takes."""
    bindings = pytest.importorskip("cuda.bindings", reason="the driver's interface is of the extra gpu")
    found = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", found)
    monkeypatch.setattr(bindings, "driver", found, raising=False)
    monkeypatch.setattr(runtime, "WARM", 1e-3)  # two replays
    return found


# ------------------------------------------------------------------------------------------------------ on the CPU


def test_arguments_that_are_none_of_theirs(bundle):
    for given in (None, 5, b"x"):
        with pytest.raises(WrongArgument, match=r"the path of a \.bolt is wanted, not"):
            load(given)
        with pytest.raises(WrongArgument, match=r"A bundle, or the path of a \.bolt"):
            export.bolt.ort.session(given)
    with pytest.raises(WrongArgument, match="not 'cpu'") as caught:
        load(bundle, "cpu")
    assert "HostDevice()" in caught.value.hint
    for processors in (0, -1, 1.5, None):
        with pytest.raises(WrongArgument, match="a whole number from 1 on"):
            HostDevice(processors)
    for given in ("x.onnx", None):
        with pytest.raises(WrongArgument, match="An ONNX model is wanted"):
            export.bolt.assemble(given, {"x": (1, 4, 4, 1)})
    network = onnx.load_from_string(bundle.onnx)
    with pytest.raises(WrongArgument, match="The size of each input is wanted"):
        export.bolt.assemble(network, (1, 4, 4, 1))


def test_arrays_that_cannot_be_shared():
    locked = drawn(1, 4, 4, 1)
    locked.flags.writeable = False
    for array, words in (
        (locked, "cannot be shared"),
        (np.zeros((1, 4, 4, 1), ">f2"), "cannot be shared"),
        (np.zeros((0, 4, 4, 1), np.float16), "is empty"),
    ):
        with pytest.raises(WrongArgument, match=words):
            array_of(array, 0)
    assert array_of(np.array(locked, np.float16), 0).shape == (1, 4, 4, 1)


def test_what_makes_and_runs_bundles_is_there_when_asked_for():
    done = (
        "import sys; from keras_efficient import export; "
        "assert not {'onnx', 'onnxruntime', 'keras'} & set(sys.modules); bolt = export.bolt; "
        "assert not {'onnx', 'onnxruntime', 'keras'} & set(sys.modules); "
        "bolt.Bundle, bolt.assemble, bolt.runtime.load, bolt.ort.session, bolt.trt.plugins; "
        "assert 'keras' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", done], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        export.bolt.nothing


def test_a_graph_computes_what_a_call_does_for_whatever_is_in_its_arrays(bundle):
    run, x = load(bundle, HostDevice()), drawn(2, 9, 12, 8)
    graph = run.captured(x)
    assert np.isnan(graph.outputs[0]).all()  # nothing ran yet
    assert graph.inputs == (x,)
    (y,) = graph.outputs
    for _ in range(2):
        x[...] = drawn(*x.shape)
        graph.replay()
        assert (y == run(x)).all()
    assert graph.outputs[0] is y


def test_a_graph_of_several_outputs_and_of_one_that_is_given(bundle):
    several, x = load(bundle_of(("y", "b")), HostDevice()), drawn(1, 8, 8, 8)
    graph = several.captured(x)
    graph.replay()
    wanted = several(x)
    assert len(wanted) == len(graph.outputs) == 2
    assert all((one == other).all() for one, other in zip(graph.outputs, wanted, strict=True))
    with pytest.raises(WrongArgument, match="networks with one output"):
        several.captured(x, out=wanted[0])
    run = load(bundle, HostDevice())
    out = np.zeros((1, 4, 4, 16), np.float16)
    graph = run.captured(x, out=out)
    assert not out.any()
    graph.replay()
    assert graph.outputs == (out,)
    assert (out == run(x)).all()


def test_graphs_are_refused_what_calls_are(bundle):
    run, x = load(bundle, HostDevice()), drawn(1, 8, 8, 8)
    with pytest.raises(WrongArgument, match="takes 1 arrays, received 2"):
        run.captured(x, x)
    with pytest.raises(WrongArgument, match="of 8 are wanted"):
        run.captured(drawn(1, 8, 8, 4))
    with pytest.raises(WrongArgument, match="`out` is"):
        run.captured(x, out=drawn(1, 4, 5, 16))
    with pytest.raises(WrongArgument, match="shares memory"):
        run.captured(x, out=x.reshape(-1)[: 4 * 4 * 16].reshape(1, 4, 4, 16))
    jax = type("Array", (), {"__module__": "jaxlib._jax"})()
    with pytest.raises(WrongArgument, match="Arrays of JAX never change"):
        run.captured(jax)
    assert (run(x) == run(x)).all()  # nothing is left of a capture that failed


def with_one_more(region, axes):
    """A bundle of one region, to which another input is added."""
    best = candidates(region, architecture("sm_90a"), 1, 8, 8, limit=1)[0].emit(region)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [None] * axes) for name in ("x", "r", "y")]
    structure = spec.written(spec.spec(region))
    node = helper.make_node(FUSED, ["x", "r"], ["y"], domain=DOMAIN, spec=structure, region=0)
    entry = {"rule": dict(best.rule), "threads": best.threads, "shared_bytes": best.shared_bytes}
    return Bundle(
        helper.make_model(helper.make_graph([node], "n", values[:2], values[2:])).SerializeToString(),
        sources={best.kernel: best.text},
        weights={"0": best.packed},
        launches={"regions": [best.kernel], "kernels": {best.kernel: entry}},
    )


def test_rows_have_any_axes_before_their_own():
    region = Region((conv(0, 1, 16, 24, Add(1)),), (16, 24), rows=True)
    run, x, added = load(with_one_more(region, 4), HostDevice()), drawn(2, 3, 5, 16), drawn(2, 3, 5, 24)
    wanted = reference.computed(region, [x.reshape(-1, 16), added.reshape(-1, 24)]).reshape(2, 3, 5, 24)
    for found in (run(x, added), run(x.reshape(6, 5, 16), added.reshape(6, 5, 24)).reshape(wanted.shape)):
        assert found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
    with pytest.raises(WrongArgument, match=r"'r' is \(6, 5, 24\), and \(2, 3, 5, 24\) is wanted"):
        run(x, added.reshape(6, 5, 24))
    with pytest.raises(WrongArgument, match="rows of 16 are wanted"):
        run(x[0, 0, 0], added)


def test_arrays_of_other_sizes_are_not_added():
    region = Region((conv(0, 3, 8, 8, Add(1), stride=(2, 2)),), (8, 8))
    run, x, added = load(with_one_more(region, 4), HostDevice()), drawn(1, 9, 12, 8), drawn(1, 5, 6, 8)
    wanted = reference.computed(region, [x, added])
    assert np.linalg.norm(run(x, added) - wanted) < 1e-3 * np.linalg.norm(wanted)
    for use in (run, run.captured):
        with pytest.raises(WrongArgument, match=r"'r' is \(1, 6, 5, 8\), and \(1, 5, 6, 8\) is wanted"):
            use(x, drawn(1, 6, 5, 8))


def test_arrays_live_as_long_as_a_graph_or_themselves(bundle):
    run, x = load(bundle, HostDevice()), drawn(1, 8, 8, 8)
    wanted, graph = run(x), run.captured(x.copy())  # nobody else has the copy
    gc.collect()
    graph.replay()
    (y,) = graph.outputs
    del graph
    gc.collect()
    assert (y == wanted).all()
    del y, wanted
    gc.collect()
    assert not dlpack.Owned._alive


def test_what_is_added_has_its_own_size():
    region = Region((conv(0, 3, 8, 8, Activate("relu"), Add(1), stride=(2, 2)),), (8, 8))
    assert region.input_shapes(2, 9, 12) == [(2, 9, 12, 8), (2, 5, 6, 8)]
    assert spec.outline(spec.spec(region)).output_shape(2, 9, 12) == (2, 5, 6, 8)
    chain = sesr(3)
    assert chain.output_shape(1, 7, 9) == (1, 14, 18, 1)
    x = drawn(1, 7, 9, 1)
    assert reference.computed(chain, [x]).shape == (1, 14, 18, 1)
    rows = Region((conv(0, 1, 8, 24, Add(1)),), (8, 24), rows=True)
    assert rows.input_shapes(*rows.image((3, 5, 8))) == [(15, 8), (15, 24)]
    assert rows.output_shape(1, 1, 15) == (15, 24)


# ---------------------------------------------------------------------------------------- on a driver that is none


def test_calls_and_graphs_on_a_driver_that_is_none(bundle, driver):
    run, x = load(bundle), OnDevice(drawn(2, 9, 12, 8))
    driver.memory.update([x.memory])
    wanted = load(bundle, HostDevice())(x.numbers.copy())
    kept = len(driver.memory)
    found = run(x, stream=STREAM)
    assert (found._array.numpy() == wanted).all()
    assert {one[-3] for one in driver.named("cuLaunchKernel")} == {STREAM}
    del found
    gc.collect()
    assert len(driver.memory) == kept
    driver.calls.clear()
    graph = run.captured(x)
    assert not driver.named("cuMemAllocFromPoolAsync")
    assert {one[-3] for one in driver.named("cuLaunchKernel")} == {OWN_STREAM}
    launched = len(driver.named("cuLaunchKernel"))
    x.numbers[...] = drawn(*x.numbers.shape)
    for stream in (STREAM, TAKER):
        graph.replay(stream)
    assert [one[2] for one in driver.named("cuGraphLaunch")] == [STREAM, TAKER]
    assert len(driver.named("cuLaunchKernel")) == launched == 3
    found = graph.outputs[0]
    assert (found._array.numpy() == load(bundle, HostDevice())(x.numbers.copy())).all()
    assert driver.alive["graphs"] == 1
    del graph, found
    gc.collect()
    assert (driver.alive["graphs"], driver.alive["events"], len(driver.memory)) == (0, 0, kept)


def test_a_capture_that_fails_is_ended(bundle, driver):
    device = CudaDevice()

    def work(stream):
        raise KeyError("no")

    with pytest.raises(KeyError):
        device.captured(work)
    assert driver.capture is None
    assert not driver.alive["graphs"]
    with pytest.raises(ConversionError, match="refused cuMemAlloc: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.captured(lambda stream: device.buffer((8,), None))
    assert driver.capture is None


@pytest.mark.parametrize("current", [[], [5], [6]])
def test_the_caller_s_context_stays_the_current_one(bundle, driver, current):
    driver.contexts = list(current)
    device = CudaDevice()
    run, x = load(bundle, device), OnDevice(drawn(1, 8, 8, 8))
    driver.memory.update([x.memory])
    own = (current or [PRIMARY])[0]
    driver.contexts = [8]  # of another device, later
    driver.calls.clear()
    found, graph = run(x, stream=STREAM), run.captured(x)
    graph.replay(STREAM)
    device.timed(lambda stream: None, 2)
    device.fetched(device.copied(x.numbers))
    del found, graph
    gc.collect()
    assert driver.contexts == [8]
    assert {one[1] for one in driver.named("cuCtxPushCurrent")} == {own}
    with pytest.raises(ConversionError):
        device.timed(lambda stream: device.buffer((8,), None), 2)
    assert driver.contexts == [8]


def test_memory_of_calls_is_of_a_pool_that_ends_with_its_device(bundle, driver):
    run, x = load(bundle), OnDevice(drawn(1, 8, 8, 8))
    driver.memory.update([x.memory])
    assert not driver.named("cuMemPoolCreate")
    found = [run(x, stream=STREAM) for _ in range(2)]
    assert len(driver.named("cuMemPoolCreate")) == driver.alive["pools"] == 1
    del run
    gc.collect()
    assert driver.alive["pools"] == 1  # arrays are left
    del found
    gc.collect()
    assert driver.alive["pools"] == 0


def test_nothing_is_collected_during_a_capture(driver):
    device, seen = CudaDevice(), []
    for wanted in (True, False):
        (gc.enable if wanted else gc.disable)()
        try:
            device.captured(lambda stream: seen.append(gc.isenabled()))
            assert gc.isenabled() == wanted
        finally:
            gc.enable()
    assert seen == [False, False]


def test_replays_are_timed_without_waiting_in_between(driver):
    assert CudaDevice().timed(lambda stream: None, 3) == [0.5e-3] * 3
    names = [one[0] for one in driver.named("cuGraphLaunch", "cuEventRecord", "cuEventSynchronize")]
    launch, record, wait = "cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"
    assert names == [launch, record, launch, record, wait, *[launch] * 2, record, *[launch, record] * 3, wait]
    assert driver.alive["events"] == 0


def test_results_are_freed_behind_who_took_them(bundle, driver):
    run, x = load(bundle), OnDevice(drawn(1, 8, 8, 8))
    driver.memory.update([x.memory])
    found = run(x, stream=STREAM)
    driver.calls.clear()
    taken = found.__dlpack__(stream=TAKER)
    (recorded,), (waited,) = driver.named("cuEventRecord"), driver.named("cuStreamWaitEvent")
    assert (recorded[2], waited[1:3]) == (STREAM, (TAKER, recorded[1]))  # who takes it waits for it
    driver.calls.clear()
    del found, taken
    gc.collect()
    pointer = driver.named("cuMemFreeAsync")[0][1]
    (recorded,), (waited,) = driver.named("cuEventRecord"), driver.named("cuStreamWaitEvent")
    assert recorded[2] == TAKER
    assert waited[1:3] == (STREAM, recorded[1])
    names = [one[0] for one in driver.calls]
    assert names.index("cuStreamWaitEvent") < names.index("cuMemFreeAsync")
    assert driver.named("cuMemFreeAsync") == [("cuMemFreeAsync", pointer, STREAM)]
    assert driver.alive["events"] == 0


@pytest.mark.parametrize("gone", [STREAM, TAKER])
def test_where_a_stream_is_gone_all_work_is_waited_for(bundle, driver, gone):
    run, x = load(bundle), OnDevice(drawn(1, 8, 8, 8))
    driver.memory.update([x.memory])
    kept = len(driver.memory)
    found = run(x, stream=STREAM)
    taken = found.__dlpack__(stream=TAKER)
    driver.gone.add(gone)
    driver.calls.clear()
    del found, taken
    gc.collect()
    assert [one[0] for one in driver.named("cuCtxSynchronize", "cuMemFree")] == ["cuCtxSynchronize", "cuMemFree"]
    assert (len(driver.memory), driver.alive["events"]) == (kept, 0)


def test_a_newer_gpu_compiles_ptx_of_an_older_one(bundle, driver):
    code = {name.split("/")[0]: text for name, text in bundle.cubins.items()}

    def of(**parts):
        named = {f"{name}/{arch}": text for arch in parts["ptx"] for name, text in code.items()}
        return replace(bundle, cubins={f"{name}/sm_80": b"no" for name in code}, ptx=named)

    x = OnDevice(drawn(1, 8, 8, 8))
    driver.memory.update([x.memory])
    found = load(of(ptx=["sm_80", "sm_86"]))(x)
    assert (found._array.numpy() == load(bundle, HostDevice())(x.numbers.copy())).all()
    assert all(one[1].endswith(b"\0") for one in driver.named("cuLibraryLoadData"))
    for ptx in (["sm_100"], ["sm_90a"], []):
        with pytest.raises(ConversionError, match=r"The bundle is for sm_80, this GPU is sm_90a\.\n.*for sm_90a"):
            load(of(ptx=ptx))
    driver.takes_ptx = False
    with pytest.raises(ConversionError, match=r"its PTX is of no use.*UNSUPPORTED_PTX_VERSION"):
        load(of(ptx=["sm_80"]))


def test_a_meter_draws_arrays_once(driver, monkeypatch):
    asked = []
    real = meter.random_inputs
    monkeypatch.setattr(meter, "random_inputs", lambda region, *shape: asked.append(shape) or real(region, *shape))
    gauge, region, shape = meter.CudaMeter(), Region((conv(0, 3, 16, 16, Activate("relu")),), (16,)), (1, 20, 24)
    for one in candidates(region, architecture("sm_90a"), *shape, limit=2):
        source = one.emit(region)
        assert gauge.error(region, source, source.text.encode()) < 1e-3
        for repetitions in (2, 3):
            times = gauge.seconds(region, source, source.text.encode(), shape, repetitions)
            assert times == [0.5e-3 / meter.LAUNCHES] * repetitions
    assert len(asked) == 2  # one small, one of the size that is timed
    kept = len(driver.memory)
    other = Region(region.layers, region.channels)
    gauge.error(other, source, source.text.encode())
    assert len(driver.memory) < kept  # what was drawn for the first one is freed
    assert driver.alive == {"graphs": 0, "events": 0}


@pytest.mark.parametrize(
    ("region", "shape"),
    [
        (sesr(3), (1, 70, 90)),
        (
            Region((conv(0, 3, 8, 16, Activate("relu"), Add(1), stride=(2, 2), padding=(0, 0, 1, 1)),), (8, 16)),
            (2, 65, 130),
        ),
        (Region((conv(0, 3, 8, 8), conv(1, 3, 8, 8, dilation=(2, 2), padding=(2,) * 4)), (8,)), (1, 9, 80)),
        (Region((conv(0, 1, 8, 24, Add(1)),), (8, 24), rows=True), (1, 1, 150)),
    ],
    ids=["shuffled", "stride, a skip", "low", "rows"],
)
def test_the_corner_is_what_the_whole_has_there(region, shape):
    inputs = checking.random_inputs(region, *(shape[2:] if region.rows else shape))
    whole, corner = reference.computed(region, inputs, rounded=np.float16), meter._corner(region, inputs)
    there = whole[-len(corner) :] if region.rows else whole[-1, -corner.shape[0] :, -corner.shape[1] :]
    assert min(corner.shape[:-1]) >= min(meter.CORNER, *whole.shape[-3:-1])
    assert np.abs(corner - there).max() < 1e-12


def test_a_kernel_that_is_wrong_at_its_real_size_is_refused(driver):
    gauge, region, shape = meter.CudaMeter(), Region((conv(0, 3, 16, 16, Activate("relu")),), (16,)), (1, 20, 24)
    source = candidates(region, architecture("sm_90a"), *shape, limit=1)[0].emit(region)
    right = gauge.device.launch
    gauge.device.launch = lambda kernel, grid, *more: right(kernel, (1, 1, 1), *more)  # the first block only
    with pytest.raises(ConversionError, match=r"Its relative error at the size that is timed is (nan|1)"):
        gauge.seconds(region, source, source.text.encode(), shape, 1)


def test_sets_fill_the_cache():
    assert meter.turns(1 << 20, 50 << 20) == 101
    assert meter.turns(1 << 30, 50 << 20) == 2
    assert meter.turns(1000, 50 << 20) == meter.MOST_SETS

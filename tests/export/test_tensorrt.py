"""The tensorrt target: its ONNX files in ONNX Runtime, what is asked of a builder (a stand-in), and clear errors.

No engine runs here. The one test with TensorRT-RTX builds real ones, where its wheel is installed.
"""

from __future__ import annotations

import enum
import json
import sys
import types

import keras
import numpy as np
import onnx
import pytest
from keras import layers as L
from onnx import TensorProto, numpy_helper

from keras_efficient import export
from keras_efficient.errors import ConversionError, FileProblem, MissingDependency, WrongArgument
from keras_efficient.export.bolt import runtime as bolt_runtime
from keras_efficient.export.targets import Request
from keras_efficient.export.targets import tensorrt as target
from keras_efficient.export.verify import TOLERANCES

PRECISIONS = ("float32", "float16", "int8")


class Flags(enum.IntEnum):
    STRONGLY_TYPED = 1
    TF32 = 2
    WORKSPACE = 3
    ERROR = 4
    INTERNAL_ERROR = 5
    INPUT = 6
    OUTPUT = 7


class StandIn(types.ModuleType):
    """What the target calls of TensorRT. Its engines double the input; what was asked of it is in `asked`."""

    __version__ = "0"
    NetworkDefinitionCreationFlag = BuilderFlag = MemoryPoolType = TensorIOMode = Flags

    class ILogger:
        Severity = Flags

    class ComputeCapability:
        SM89 = "89"

    def __init__(self, name: str):
        super().__init__(name)
        self.asked, self.complaint, self.engine = {}, None, b"vtrt engine"
        self.Builder = self.Runtime = lambda log: setattr(self, "log", log) or self
        self.OnnxParser = lambda network, log: self
        self.num_errors, self.errors, self.text = 1, [], ""

    def create_network(self, flags):
        assert flags == 1 << Flags.STRONGLY_TYPED
        return self

    def parse(self, data):
        self.proto = onnx.load_from_string(data)
        return self.complaint != "parse"

    def get_error(self, number):
        return types.SimpleNamespace(desc=lambda: "In node 3: no importer")

    def create_builder_config(self):
        return self

    def clear_flag(self, flag):
        self.asked["cleared"] = flag

    def set_memory_pool_limit(self, pool, size):
        self.asked[pool] = size

    def set_compute_capability(self, capability, index):
        self.asked["arch"] = capability
        return True

    def create_optimization_profile(self):
        return types.SimpleNamespace(set_shape=lambda *shapes: self.asked.update(profile=shapes))

    def add_optimization_profile(self, profile):
        assert "profile" in self.asked

    def create_timing_cache(self, data):
        self.asked["cache"] = data
        return types.SimpleNamespace(serialize=lambda: b"timings")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        return self.asked["cache"] != b"of another GPU"

    def build_serialized_network(self, network, config):
        if self.complaint == "build":
            self.log.log(Flags.ERROR, "no tactic\nmore")
            return None
        self.text = self.name  # of the network, the one text that an engine keeps
        return self.engine

    # The engine, and its context.

    def deserialize_cuda_engine(self, data):
        if self.complaint == "open":
            return None
        self.name = self.text
        return self

    num_io_tensors, sizes = 2, {}

    def create_execution_context(self):
        self.sizes, self.places = {}, {}
        return self

    def get_tensor_name(self, number):
        return "xy"[number]

    def get_tensor_mode(self, name):
        return Flags.INPUT if name == "x" else Flags.OUTPUT

    def get_tensor_shape(self, name):
        return self.sizes.get("x", (-1, 3))

    def get_tensor_dtype(self, name):
        return np.float32

    def nptype(self, kind):
        return kind

    def set_input_shape(self, name, shape):
        self.sizes[name] = shape
        return shape[0] <= 4

    def set_tensor_address(self, name, pointer):
        self.places[name] = pointer

    def execute_async_v3(self, stream):
        x, y = (Memory.all[self.places[name]] for name in "xy")
        y[:] = (np.frombuffer(x, np.float32) * 2).tobytes()
        return True


class Memory:
    """Of the stand-in for a GPU."""

    all: dict[int, bytearray] = {}  # noqa: RUF012

    def __init__(self, data):
        self.pointer = len(self.all) + 1
        self.all[self.pointer] = bytearray(data)


class Device:
    weights = staticmethod(Memory)

    def _call(self, name, *arguments):
        if name == "cuMemcpyDtoH":
            import ctypes

            place, pointer, size = arguments
            ctypes.memmove(place, bytes(Memory.all[pointer]), size)


@pytest.fixture
def stand_in(monkeypatch):
    """Both of TensorRT's modules."""
    found = StandIn("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", found)
    return found


@pytest.fixture
def nothing(monkeypatch):
    for name in target.MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def converted(small_model, images, tmp_path_factory):
    """``converted(precision) -> (report, ONNX)`` of the small model; engines are the stand-in's."""
    done = {}

    def get(precision):
        if precision not in done:
            with pytest.MonkeyPatch.context() as patch:
                found = StandIn("tensorrt_rtx")
                patch.setitem(sys.modules, "tensorrt_rtx", found)
                path = tmp_path_factory.mktemp("engines") / "m.engine"
                data = {"calibration" if precision == "int8" else "samples": images}
                report = export.save(small_model, path, precision=precision, runtime="rtx", **data)
                assert path.read_bytes() == found.engine
                done[precision] = report, found.proto
        return done[precision]

    return get


def small(shape=(3,), units=3) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input(shape, name="x")
    return keras.Model(inputs, L.Dense(units, name="y")(inputs))


def producers(graph) -> dict:
    return {name: node for node in graph.node for name in node.output}


# ------------------------------------------------------------------------------------------------------ the ONNX files


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_onnx_file_matches_the_model(converted, precision):
    report, proto = converted(precision)
    onnx.checker.check_model(proto, full_check=True)
    assert report.sqnr_db >= TOLERANCES[precision].sqnr_db
    assert report.latency_ms is None
    assert any(note.startswith("Not verified: the engine did not run here") for note in report.notes)
    assert report.macs == 32 * 32 * (9 * 16 + 9 * 16 * 16 + 9 * 16 * 4)
    borders = [value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)]
    assert borders == [TensorProto.FLOAT] * 2


def test_float16_is_written_into_the_file(converted):
    graph = converted("float16")[1].graph
    assert not [one for one in graph.initializer if len(one.dims) > 1 and one.data_type != TensorProto.FLOAT16]
    casts = [node.attribute[0].i for node in graph.node if node.op_type == "Cast"]
    assert sorted(casts) == [TensorProto.FLOAT, TensorProto.FLOAT16]


def test_sums_stay_in_float32(stand_in, tmp_path):
    inputs = keras.Input((8, 8, 3), name="x")
    x = L.Conv2D(8, 3, activation="softmax")(inputs)
    x = L.UpSampling2D(2, interpolation="bilinear")(x)
    model = keras.Model(inputs, {"scaled": x, "y": L.LayerNormalization()(x)})
    report = export.save(model, tmp_path / "m.engine", precision="float16")
    assert report.ops["Softmax"] == {"float32": 1}
    assert set(report.ops["ReduceMean"]) == {"float32"}
    assert report.ops["Conv"] == {"float16": 1}
    assert report.sqnr_db > 50


def test_weights_beyond_float16(stand_in, tmp_path):
    model = small()
    model.layers[-1].set_weights([np.full((3, 3), 7e4), np.zeros(3)])
    with pytest.raises(ConversionError, match="beyond float16"):
        export.save(model, tmp_path / "m.engine", precision="float16")


def test_quantisers_before_all_convolutions(converted):
    graph = converted("int8")[1].graph
    made = producers(graph)
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    for node in convolutions:
        for place, name in enumerate(node.input[:2]):
            after = made[name]
            before = made[after.input[0]]
            assert (after.op_type, before.op_type) == ("DequantizeLinear", "QuantizeLinear")
            assert list(after.input[1:]) == list(before.input[1:])
            scale, zero = (constants[one] for one in after.input[1:])
            assert zero.dtype == np.int8
            assert not zero.any()
            filters = constants[before.input[0]].shape[0] if place else None
            assert scale.shape == ((filters,) if place else ())
        assert all(name in constants for name in node.input[2:])  # biases stay as they are


def test_products_are_verified_as_they_stand(stand_in, tmp_path):
    """ONNX Runtime's own integer products overflow 16 bits on some processors."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((64,), name="x")
    model = keras.Model(inputs, L.Dense(16)(L.Dense(64, activation="relu")(inputs)))
    x = np.random.default_rng(0).normal(size=(50, 64)).astype("float32")
    report = export.save(model, tmp_path / "m.engine", precision="int8", calibration=x)
    assert report.sqnr_db > 30
    assert sum(report.ops["QuantizeLinear"].values()) == 4


def test_nothing_to_quantise(stand_in, tmp_path):
    inputs = keras.Input((3,), name="x")
    model = keras.Model(inputs, L.ReLU()(inputs))
    with pytest.raises(ConversionError, match="can be quantised"):
        export.save(model, tmp_path / "m.engine", precision="int8", calibration=np.random.rand(9, 3))


# --------------------------------------------------------------------------------------------------------- the builder


def test_what_the_builder_is_asked(stand_in, tmp_path):
    cache = tmp_path / "timings"
    for before in (b"", b"timings", b""):
        report = export.save(small(), tmp_path / "m.engine", overwrite=True, timing_cache=str(cache), workspace=64)
        assert cache.read_bytes() == b"timings"
        assert stand_in.asked["cache"] == before
        cache.write_bytes(b"timings" if before == b"" else b"of another GPU")
    assert stand_in.asked["cleared"] == Flags.TF32
    assert stand_in.asked[Flags.WORKSPACE] == 64 << 20
    assert stand_in.asked["profile"] == ("x", (1, 3), (1, 3), (4, 3))
    assert "Sizes of 'x': 1×3 to 4×3, best at 1×3; profile= sets them." in report.notes
    metadata = json.loads(stand_in.text)["keras_efficient"]
    assert metadata["target"] == "tensorrt"
    assert not {"timing_cache", "workspace"} & set(metadata)


def test_architecture_of_rtx(stand_in, tmp_path):
    export.save(small(), tmp_path / "m.engine", runtime="rtx", arch="sm_89", input_shape=(2, 3))
    assert stand_in.asked["arch"] == "89"
    assert "profile" not in stand_in.asked


@pytest.mark.parametrize(("complaint", "words"), [("parse", "In node 3: no importer"), ("build", "engine: no tactic$")])
def test_what_tensorrt_refuses(stand_in, tmp_path, complaint, words):
    stand_in.complaint = complaint
    with pytest.raises(ConversionError, match=words):
        export.save(small(), tmp_path / "m.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "sm_89"}, "arch= is of runtime='rtx'"),
        ({"runtime": "rtx", "timing_cache": "x"}, "timing_cache= is of"),
        ({"workspace": 0}, "workspace=0"),
        ({"runtime": "cuda"}, "choose one of"),
        ({"profile": {"z": [[1, 3]] * 3}}, "for each of"),
        ({"profile": {"x": [[1, 3]] * 2}}, "least, usual and most"),
        ({"profile": {"x": [[2, 3], [1, 3], [4, 3]]}}, "least, usual and most"),
        ({"profile": {"x": [[1, 3], [1, 4], [4, 4]]}}, "least, usual and most"),
        ({"profile": {"x": [[1, 3], [1, "3"], [4, 3]]}}, "least, usual and most"),
        ({"profile": {"x": 3}}, "least, usual and most"),
    ],
)
def test_options_that_do_not_go(nothing, tmp_path, options, words):
    with pytest.raises(WrongArgument, match=words):
        export.save(small(), tmp_path / "m.engine", **options)


def test_profiles():
    spec = export.signature.InputSpec("x", (None, None, 64, 3), "float32")
    request = Request(export.targets["tensorrt"], "float32", (spec,), options={"profile": None})
    assert target.profile_of(request) == {"x": [(1, 16, 64, 3), (1, 512, 64, 3), (4, 1920, 64, 3)]}
    given = {"x": [[1, 8, 64, 3], [1, 9, 64, 3], [2, 10, 64, 3]]}
    request = Request(export.targets["tensorrt"], "float32", (spec,), options={"profile": given})
    assert target.profile_of(request) == {"x": [(1, 8, 64, 3), (1, 9, 64, 3), (2, 10, 64, 3)]}


# ------------------------------------------------------------------------------------------------ what is not installed


@pytest.mark.parametrize(
    ("runtime", "words"), [("tensorrt", "pip install tensorrt-cu13 --extra-index-url"), ("rtx", "tensorrt-rtx-cu13")]
)
def test_not_installed(nothing, tmp_path, runtime, words):
    said = []
    with pytest.raises(MissingDependency, match=words) as caught:
        export.save(small(), tmp_path / "m.engine", runtime=runtime, on_progress=said.append)
    assert "stub" in str(caught.value) or runtime == "rtx"
    assert not said  # before any work


def test_no_gpu(stand_in, tmp_path):
    def builder(log):
        log.log(Flags.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    stand_in.Builder = builder
    with pytest.raises(ConversionError, match="on this machine: CUDA initialization failure"):
        export.save(small(), tmp_path / "m.engine")


def test_opening_without_tensorrt(nothing, tmp_path):
    with pytest.raises(FileProblem, match="cannot be read"):
        export.load(tmp_path / "m.engine")
    for content, words in ((b"ftrt", "extra-index-url"), (b"vtrt", "tensorrt-rtx-cu13")):
        (tmp_path / "m.engine").write_bytes(content)
        with pytest.raises(MissingDependency, match=words):
            export.load(tmp_path / "m.engine")


def test_tensorrt_is_imported_when_it_is_needed(nothing):
    assert "tensorrt" in export.targets
    assert export.targets["tensorrt"].suffix == ".engine"


# ----------------------------------------------------------------------------------------------------- engines that run


def test_engines_on_a_device(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(bolt_runtime, "CudaDevice", Device)
    export.save(small(), tmp_path / "m.engine", metadata={"scale": 2})
    run = export.load(tmp_path / "m.engine")
    assert run.scale == 2
    assert (run.input_names, run.output_names) == (("x",), ("y",))
    assert run.input_shapes == {"x": (None, 3)}
    for rows in (1, 4):
        x = np.random.default_rng(0).random((rows, 3), "float32")
        np.testing.assert_array_equal(run(x), 2 * x)
    with pytest.raises(WrongArgument, match="not built for 'x' of shape"):
        run(np.zeros((5, 3), "float32"))
    stand_in.complaint = "open"
    with pytest.raises(FileProblem, match="cannot open it"):
        export.load(tmp_path / "m.engine")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_rtx_builds(small_model, images, tmp_path, precision):
    """Parsing and typing by the real library, which needs no GPU for that."""
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13 builds real engines, without a GPU")
    data = {"calibration" if precision == "int8" else "samples": images}
    report = export.save(small_model, tmp_path / "m.engine", precision=precision, runtime="rtx", **data)
    content = (tmp_path / "m.engine").read_bytes()
    assert content.startswith(target.RTX_MAGIC)
    assert b'"keras_efficient"' in content
    assert report.bytes == len(content)

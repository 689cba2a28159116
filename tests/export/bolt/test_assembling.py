"""From a Keras model to a bundle, and from a bundle to results: on the CPU, whose kernels are the GPU's source."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from keras import layers

from keras_efficient import export, models
from keras_efficient.errors import (
    ConversionError,
    MissingDependency,
    UnknownName,
    UnsupportedLayer,
    VerificationError,
    WrongArgument,
)
from keras_efficient.export.bolt import assembling, build, checking, dlpack
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.assembling import assemble, at_sizes, best_partition
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.grids import launch
from keras_efficient.export.bolt.partition import Policy
from keras_efficient.export.bolt.region import Activate, Region
from keras_efficient.export.bolt.runtime import CudaDevice, HostDevice, load
from keras_efficient.export.bolt.search import candidates, refusals
from keras_efficient.export.bolt.templates import TEMPLATES

from .kernels import conv, sesr

RNG = np.random.default_rng(0)
pytest.importorskip("onnx_ir", reason="kernels need the extra gpu")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        build.compiled('extern "C" __global__ void nothing() {}', ["nothing"])
    except MissingDependency as err:
        pytest.skip(str(err))


def filled(model):
    for variable in model.variables:
        values = RNG.normal(size=variable.shape)
        variable.assign(values / np.sqrt(max(np.prod(variable.shape[:-1]), 1)))
    return model


def onnx_of(model, folder):
    path = folder / "model.onnx"
    export.save(
        model, path, samples=RNG.normal(size=(1, *[size or 8 for size in model.input_shape[1:]])), overwrite=True
    )
    return onnx.load(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A super-resolution network as a model, its ONNX file, and a bundle."""
    model = filled(models.SESR(2, "m3"))
    proto = onnx_of(model, tmp_path_factory.mktemp("small"))
    (name,) = (one.name for one in proto.graph.input)
    told = []
    return model, proto, assemble(proto, {name: (1, 64, 64, 1)}, on_progress=told.append), told


def relative(found, wanted):
    return np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)


def test_a_whole_network_is_one_kernel(small):
    model, _, bundle, told = small
    (kernel,) = bundle.tuning["kernels"]
    assert (kernel["layers"], kernel["template"], kernel["spills"], kernel["measured_ms"]) == (5, "strip", 0, None)
    assert bundle.metadata == {"checked": checking.is_possible(), "refused": [], "sizes": {"y": [1, 64, 64, 1]}}
    assert told == ["looking for regions", "compiling kernel 1 of 1 for sm_90a"]
    x = RNG.uniform(size=(1, 11, 23, 1)).astype(np.float16)
    wanted = np.asarray(model(x.astype(np.float32)))
    session = onnxruntime.InferenceSession(bundle.onnx)
    assert relative(session.run(None, {"y": x.astype(np.float32)})[0], wanted) < 2e-3
    run = load(bundle, HostDevice())
    assert (run.inputs, run.outputs) == (("y",), (bundle.tuning["kernels"][0]["output"],))
    found = run(x)
    assert relative(found, wanted) < 2e-3
    out = np.zeros_like(found)
    assert run(x, out=out) is out
    assert (out == found).all()


def test_a_bundle_is_the_same_from_its_file(small, tmp_path):
    _, _, bundle, _ = small
    bundle.save(tmp_path / "small.bolt")
    x = RNG.uniform(size=(2, 5, 9, 1)).astype(np.float16)
    assert (load(Bundle.load(tmp_path / "small.bolt"), HostDevice())(x) == load(bundle, HostDevice())(x)).all()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((), "takes 1 arrays, received 0"),
        ((np.zeros((1, 4, 4, 1), np.float32),), "Kernels take float16"),
        ((np.zeros((1, 4, 4, 2), np.float16),), "of 1 are wanted"),
        ((np.zeros((4, 4), np.float16),), "of 1 are wanted"),
        ((np.zeros((1, 4, 8, 1), np.float16)[:, :, ::2],), "not contiguous"),
        (("text",), "An array with DLPack"),
        ((np.zeros((1, 4, 4, 1), np.float16), np.zeros((1, 4, 4, 1), np.float16)), "takes 1 arrays, received 2"),
    ],
)
def test_arrays_that_are_wrong(small, arrays, words):
    run = load(small[2], HostDevice())
    with pytest.raises(WrongArgument, match=words):
        run(*arrays)
    with pytest.raises(WrongArgument, match="`out` is"):
        run(np.zeros((1, 4, 4, 1), np.float16), out=np.zeros((1, 4, 4, 1), np.float16))
    both = np.zeros((5, 8, 8, 1), np.float16)
    with pytest.raises(WrongArgument, match="shares memory"):
        run(both[:1, :4, :8], out=both[:1])


def test_bundles_that_say_nothing_of_launches(small):
    for launches in ({}, {"kernels": {}, "regions": ["x"]}, {"kernels": {"x": {"rule": 1}}, "regions": [None]}):
        with pytest.raises(ConversionError, match="does not say how"):
            load(replace(small[2], launches=launches), HostDevice())
    with pytest.raises(ConversionError, match="no weights of region 0"):
        load(replace(small[2], weights={}), HostDevice())


def test_casts_to_integers_are_not_left_out():
    from keras_efficient.export.bolt.runtime import _only_widens

    for to, widens in ((1, True), (10, True), (6, False), (11, False)):
        node = onnx.helper.make_node("Cast", ["x"], ["y"], to=to)
        assert _only_widens(node, {"x": 1}) is widens
    assert not _only_widens(onnx.helper.make_node("Cast", ["x"], ["y"], to=1), {"x": 6})


def test_several_kernels(tmp_path):
    inputs = keras.Input((12, 12, 8))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu6")(x)
    y = layers.Conv2D(16, 1)(x)
    outputs = layers.Conv2D(8, 3, padding="valid", activation="gelu")(layers.Add()([x, y]))
    model = filled(keras.Model(inputs, outputs))
    proto = onnx_of(model, tmp_path)
    bundle = assemble(proto, {proto.graph.input[0].name: (1, 12, 12, 8)}, arch="sm_80")
    assert len(bundle.tuning["kernels"]) >= 3
    assert {name.split("/")[1] for name in bundle.cubins} == {"sm_80"}
    x = RNG.normal(size=(2, 12, 12, 8)).astype(np.float16)
    wanted = np.asarray(model(x.astype(np.float32)))
    assert relative(load(bundle, HostDevice())(x), wanted) < 2e-3


def test_rows(tmp_path):
    inputs = keras.Input((24,))
    model = keras.Model(inputs, layers.Dense(10)(layers.Dense(40, activation="relu")(inputs)))
    proto = onnx_of(filled(model), tmp_path)
    bundle = assemble(proto, {proto.graph.input[0].name: (37, 24)})
    x = RNG.normal(size=(21, 24)).astype(np.float16)
    assert relative(load(bundle, HostDevice())(x), np.asarray(model(x.astype(np.float32)))) < 2e-3


def test_a_residual_of_rows_at_batch_1(tmp_path):
    inputs = keras.Input((64,))
    model = filled(keras.Model(inputs, inputs + layers.Dense(64)(layers.Dense(128, activation="relu")(inputs))))
    report = export.save(model, tmp_path / "m.bolt", target="cuda-sm80")
    assert "Every operator is in a kernel" in " ".join(report.notes)
    x = RNG.normal(size=(1, 64)).astype(np.float16)
    assert relative(load(tmp_path / "m.bolt", HostDevice())(x), np.asarray(model(x.astype(np.float32)))) < 2e-3


def test_what_has_no_kernel_is_told_and_left_to_the_onnx_file(tmp_path):
    inputs = keras.Input((8, 8, 8))
    x = layers.MaxPooling2D()(layers.Conv2D(8, 3, padding="same")(inputs))
    proto = onnx_of(filled(keras.Model(inputs, x)), tmp_path)
    bundle = assemble(proto, {proto.graph.input[0].name: (1, 8, 8, 8)})
    (refused,) = bundle.metadata["refused"]
    assert "MaxPool" in refused["reason"]
    with pytest.raises(UnsupportedLayer, match="an operator without a kernel"):
        load(bundle, HostDevice())


def test_arguments_that_are_wrong(small):
    proto = small[1]
    with pytest.raises(UnknownName, match="sm_91"):
        assemble(proto, {"y": (1, 64, 64, 1)}, arch="sm_91")
    with pytest.raises(WrongArgument, match=r"Input 'y' has the shape"):
        assemble(proto, {"y": (1, 64, 64)})
    with pytest.raises(WrongArgument, match=r"Input 'y' has the shape"):
        assemble(proto, {"y": (1, 64, 64, 3)})


def test_a_machine_without_a_gpu_says_so(small):
    with pytest.raises((ConversionError, MissingDependency), match=r"No NVIDIA GPU|cuda-bindings"):
        load(small[2])
    assert CudaDevice.__doc__.count("Not verified") == 1  # until a GPU ran it


def test_a_wrong_kernel_is_not_taken(small, monkeypatch):
    monkeypatch.setattr(checking, "problem", lambda region, source: "its relative error on the CPU is 1")
    monkeypatch.setattr(checking, "is_possible", lambda: True)
    bundle = assemble(small[1], {"y": (1, 64, 64, 1)})
    assert bundle.launches["regions"] == [None]
    assert "no kernel of 4 is good: Strip(" in bundle.metadata["refused"][0]["reason"]


class Stand:
    """A GPU that measures nothing here."""

    arch, identity = "sm_90a", {"name": "stand-in", "processors": 132, "arch": "sm_90a"}


def test_time_is_shared_out_among_kernels_and_compilers_by_all(tmp_path, monkeypatch):
    """Three different regions, of which the first leaves time and the second takes too much; and one that is equal."""
    x = inputs = keras.Input((12, 12, 8))
    for number, filters in enumerate((8, 8, 24)):
        x = layers.Conv2D(filters, 3, strides=1, padding="same", activation="tanh")(x)
        x = layers.MaxPooling2D(1 if number < 2 else 2)(x)
    x = layers.Conv2D(64, 1, activation="gelu")(x)
    proto = onnx_of(filled(keras.Model(inputs, layers.MaxPooling2D()(x))), tmp_path)
    clock, asked, pools, told = [1000.0], [], [], []
    monkeypatch.setattr(assembling, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    @contextlib.contextmanager
    def compilers():
        pools.append(len(pools))
        yield pools[-1]

    def tuned(region, ranking, shape, meter, *, deadline, executor, on_progress, **how):
        asked.append((deadline - clock[0], executor))
        on_progress("candidate 1 of 1")
        clock[0] += (0, 75, 1)[len(asked) - 1]
        return list(ranking[::-1]), ["slow"]

    monkeypatch.setattr(assembling.tuning, "compilers", compilers)
    monkeypatch.setattr(assembling.tuning, "tuned", tuned)
    how = {"tune": 90, "meter": Stand(), "check": False, "on_progress": told.append}
    bundle = assemble(proto, {proto.graph.input[0].name: (1, 12, 12, 8)}, policy=Policy(max_layers=1), **how)
    assert asked == [(30, 0), (45, 0), (15, 0)]
    assert len(bundle.tuning["kernels"]) == 4
    assert all(one["refused"][0] == "slow" for one in bundle.tuning["kernels"])  # the equal one has the first one's
    assert pools == [0]
    assert told[1:3] == ["kernel 1 of 3: measuring candidates for up to 30 s", "kernel 1 of 3: candidate 1 of 1"]


def test_files_of_the_target(tmp_path):
    model = filled(models.SESR(2, "m3"))
    report = export.save(model, tmp_path / "small.bolt", target="cuda-sm80", input_shape=(20, 30))
    assert report.ops["Fused"] == {"float16": 1}
    assert report.macs == 20 * 30 * (400 + 3 * 2304 + 1600)
    (kernel,) = report.kernels
    assert kernel["registers"] <= 255
    assert "no GPU" in " ".join(report.notes)
    opened = export.load(tmp_path / "small.bolt")
    assert opened.metadata["target"] == "cuda-sm80"
    x = RNG.uniform(size=(1, 20, 30, 1))
    assert relative(opened(x), np.asarray(model(x))) < 2e-3


# ---------------------------------------------------------------------------------------------- search, rules, DLPack


def test_the_estimate_of_the_paper_s_network():
    """A whole SESR-M5 at 1080p on an H200: floors are 0.07 to 0.11 ms, a strip of 80 was estimated at 0.135."""
    best = candidates(sesr(5), architecture("sm_90a"), 1, 1080, 1920)
    assert 0.1e-3 < best[0].seconds < 0.25e-3
    assert [one.seconds for one in best] == sorted(one.seconds for one in best)
    assert len(best) <= 32


def test_what_follows_attention_has_kernels(tmp_path):
    """TensorFlow's attention computes with its operands' sizes, which hides those of all that follows."""
    x = keras.Input((12, 32))
    y = keras.layers.Dense(48, activation="gelu")(x + keras.layers.MultiHeadAttention(2, 16)(x, x))
    export.save(keras.Model(x, keras.layers.Dense(32)(y)), tmp_path / "some.onnx", verify=False)
    model = onnx.load(tmp_path / "some.onnx")
    assert any(node.op_type == "Shape" for node in model.graph.node)
    name = model.graph.input[0].name
    parted, ranked = best_partition(model, {name: (1, 12, 32)}, architecture("sm_90a"), None)
    assert sum(len(one.layers) for one in parted.regions) == 6
    assert all(shape == (1, 1, 12) and found for shape, found in ranked)
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], []))
    assert at_sizes(plain, {}) is plain


def test_kernels_of_less_shared_memory():
    """As TensorRT's plugins have; several small blocks share a multiprocessor's all the same."""
    small = replace(architecture("sm_90a"), block_bytes=48 << 10)
    for region, shape in (
        (sesr(5), (1, 1080, 1920)),
        (Region((conv(0, 3, 128, 128),), (128,)), (1, 64, 64)),
        (Region((conv(0, 3, 16, 48), conv(1, 1, 48, 40)), (16,)), (1, 64, 64)),
    ):
        found = candidates(region, small, *shape)
        assert found
        assert all(one.emit(region).shared_bytes <= 48 << 10 for one in found)
        assert found[0].seconds >= candidates(region, architecture("sm_90a"), *shape)[0].seconds
    assert any(one.parameters.blocks > 1 for one in candidates(sesr(5), small, 1, 1080, 1920))
    with pytest.raises(WrongArgument, match="100 bytes"):
        assemble(None, {}, shared_bytes=100)


def test_regions_that_no_template_serves():
    region = Region((conv(0, 3, 12, 12, stride=(2, 2)), conv(1, 3, 12, 12)), (12,))
    assert candidates(region, architecture("sm_90a"), 1, 8, 8) == []
    assert set(refusals(region)) == set(TEMPLATES)


def test_bands_of_strips_cover_an_image_once():
    rule = {"kind": "strip", "useful": 50, "extra": 14, "rows": 3, "blocks": 1, "channels": 16}
    for height, width, n in [(1, 1, 1), (7, 51, 2), (1080, 1920, 1), (200, 49, 3)]:
        (strips, bands, images), (band,) = launch(rule, n, height, width, 132)
        assert images == n
        assert (strips - 1) * 50 < width <= strips * 50
        assert (bands - 1) * band < height <= bands * band


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((0, 4, 4), "nothing to compute"), ((9000, 1000, 1000), "2³¹ numbers"), ((70_000, 8, 8), "more than 65535")],
)
def test_sizes_that_cannot_be_launched(sizes, words):
    rule = {"kind": "strip", "useful": 50, "extra": 14, "rows": 3, "blocks": 1, "channels": 16}
    with pytest.raises(WrongArgument, match=words):
        launch(rule, *sizes, 132)


def test_images_smaller_than_a_kernel_are_refused():
    rule = {"kind": "tile", "places": 64, "across": 1, "channels": 8, "geometry": [4, 4, 1, 1, 0, 0, 0, 0]}
    with pytest.raises(WrongArgument, match="smaller than the kernel"):
        launch(rule, 1, 4, 9, 132)


def test_arrays_go_out_and_come_in_without_copies():
    x = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    inside = dlpack.array_of(x, 0)
    assert inside.pointer == x.ctypes.data
    assert dlpack.array_of(x.transpose(0, 3, 1, 2), 0).shape == (2, 3, 2, 2)  # torch's channels-last
    outside = dlpack.Owned(inside).like(x)
    assert outside.ctypes.data == x.ctypes.data
    assert len(dlpack.Owned._alive) == 1
    del outside
    gc.collect()
    assert not dlpack.Owned._alive
    capsule = dlpack.Owned(inside).__dlpack__()
    del capsule
    gc.collect()
    assert not dlpack.Owned._alive


def with_casts(kind):
    """Two convolutions, and where the casts are: inside, as mixed precision has them, or at a border."""
    mixed, plain = ("mixed_float16", "float32") if kind == "mixed" else ("float32", "float32")
    inputs = keras.Input((12, 12, 3), dtype="uint8" if kind == "bytes in" else "float32")
    x = layers.Rescaling(1 / 127.5, -1.0)(inputs) if kind == "bytes in" else inputs
    x = layers.Conv2D(8, 3, padding="same", activation="relu", dtype=mixed)(x)
    if kind == "inside":
        x = keras.ops.cast(keras.ops.cast(x, "float16") * 0.5, "float32")
    x = layers.Conv2D(4, 3, padding="same", activation="sigmoid", dtype=plain)(x)
    return keras.Model(inputs, keras.ops.cast(x * 255, "uint8") if kind == "bytes out" else x)


@pytest.mark.parametrize(
    ("kind", "layers", "left"),
    [
        ("mixed", 2, []),
        ("inside", 2, []),
        ("bytes in", 3, ["is uint8, and kernels read float16"]),
        ("bytes out", 2, ["Mul: no kernel", "to uint8, and kernels write float16"]),
    ],
)
def test_casts_leave_a_network_fused(tmp_path, kind, layers, left):
    model = filled(with_casts(kind))
    if kind == "bytes in":
        x = RNG.integers(0, 256, (1, 12, 12, 3)).astype(np.uint8)
    else:
        x = RNG.uniform(size=(1, 12, 12, 3)).astype(np.float16)
    report = export.save(model, tmp_path / "m.bolt", target="cuda-sm80", samples=x)
    assert [one["layers"] for one in report.kernels] == [layers]
    refused = Bundle.load(tmp_path / "m.bolt").metadata["refused"]
    assert all(words in one["reason"] for words, one in zip(left, refused, strict=True))
    wanted, found = np.asarray(model(x)), export.load(tmp_path / "m.bolt")(x)
    assert found.dtype == (np.uint8 if kind == "bytes out" else np.float32)
    if kind == "bytes out":
        assert np.abs(found.astype(int) - wanted).max() <= 1
    else:
        assert relative(found, wanted) < 2e-3
    if left:
        with pytest.raises(UnsupportedLayer, match="is an operator without a kernel"):
            load(tmp_path / "m.bolt", HostDevice())
    else:
        assert relative(load(tmp_path / "m.bolt", HostDevice())(x), wanted) < 2e-3


def test_what_overflows_in_half_precision_is_not_hidden(tmp_path):
    """ONNX Runtime computes a file of float16 in float32 on processors, and a sigmoid hides what it was given."""
    inputs = keras.Input((8,))
    x = layers.Dense(8, kernel_initializer="ones", activation="relu", name="small")(inputs)
    x = layers.Dense(8, kernel_initializer=keras.initializers.Constant(100.0), name="large")(x)
    x = layers.Dense(8, kernel_initializer=keras.initializers.Constant(-1.0), activation="sigmoid", name="last")(x)
    model, path = keras.Model(inputs, x), tmp_path / "large.bolt"
    with pytest.raises(VerificationError) as caught:
        export.save(model, path, target="cuda-sm80", samples=np.full((4, 8), 200.0))
    assert caught.value.message.endswith(
        "Layer 'large' makes numbers up to 1.28e+06, and kernels keep at most 65504 (float16)."
    )
    assert not path.exists()
    report = export.save(model, path, target="cuda-sm80", samples=np.full((4, 8), 200.0), verify=False)
    assert "MISSES ITS TOLERANCE: Layer 'large'" in report.notes[-1]
    export.save(model, path, target="cuda-sm80", samples=np.full((4, 8), 1.0), overwrite=True)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_overflows_within_one_kernel_is_named(tmp_path):
    """A kernel is judged by numbers that fit; a model's own ones are another matter, and its layer is told."""
    inputs = keras.Input((16, 16, 8))
    x = layers.Conv2D(8, 3, padding="same", name="bigconv")(inputs)
    model = filled(keras.Model(inputs, layers.Conv2D(8, 3, padding="same")(x)))
    model.get_layer("bigconv").kernel.assign(2000 * RNG.normal(size=(3, 3, 8, 8)))
    with pytest.raises(VerificationError, match="Layer 'bigconv' makes numbers up to"):
        export.save(model, tmp_path / "m.bolt", target="cuda-sm80", samples=RNG.normal(size=(1, 16, 16, 8)))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_kernels_whose_numbers_never_fit_are_not_judged():
    region = Region((conv(0, 1, 8, 8),), (8,))
    huge = replace(region, layers=(replace(region.layers[0], bias=np.full(8, 1e5, np.float32)),))
    assert "go beyond 65504" in checking.problem(huge, candidates(huge, architecture("sm_80"), 1, 8, 8)[0].emit(huge))


def test_what_is_large_outside_of_kernels_is_no_overflow(tmp_path):
    """A float32 operator behind the last kernel may make what it likes; a kernel makes infinity beyond 65504."""
    inputs = keras.Input((8,))
    x = layers.Dense(4, kernel_initializer="ones", activation="relu", name="last")(inputs)
    model = keras.Model(inputs, {"kernel": x, "outside": keras.ops.exp(keras.ops.minimum(x, 20.0))})
    export.save(model, tmp_path / "m.bolt", target="cuda-sm80", samples=np.full((2, 8), 3.0))
    opened = export.load(tmp_path / "m.bolt")
    assert opened(np.full((1, 8), 3.0))["outside"] == pytest.approx(np.exp(20), rel=1e-3)
    assert np.isposinf(opened(np.full((1, 8), 1e4))["kernel"]).all()
    assert np.isfinite(opened(np.full((1, 8), 1e4))["outside"]).all()


def test_a_network_of_half_precision_runs_by_kernels_alone():
    """Its input and output are float16 already: no cast is left."""
    nodes = [
        onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["t", "w"], ["c"], name="first", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["c"], ["r"]),
        onnx.helper.make_node("Conv", ["r", "v"], ["d"], name="second", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Transpose", ["d"], ["y"], perm=[0, 2, 3, 1]),
    ]
    half = onnx.TensorProto.FLOAT16
    ends = [
        onnx.helper.make_tensor_value_info(name, half, ["n", "h", "w", size]) for name, size in (("x", 3), ("y", 4))
    ]
    weights = {"w": RNG.normal(size=(8, 3, 3, 3)) / 5, "v": RNG.normal(size=(4, 8, 3, 3)) / 8}
    constants = [onnx.numpy_helper.from_array(one.astype(np.float16), name) for name, one in weights.items()]
    graph = onnx.helper.make_graph(nodes, "half", ends[:1], ends[1:], constants)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    bundle = assemble(proto, {"x": (1, 16, 16, 3)})
    assert [one.op_type for one in onnx.load_from_string(bundle.onnx).graph.node] == ["Fused"]
    x = RNG.normal(size=(1, 9, 14, 3)).astype(np.float16)
    (wanted,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    found = load(bundle, HostDevice())(x)
    assert found.dtype == np.float16
    assert relative(found, wanted.astype(np.float64)) < 2e-3
    (same,) = onnxruntime.InferenceSession(bundle.onnx).run(None, {"x": x})
    assert relative(same, wanted.astype(np.float64)) < 2e-3


@pytest.mark.parametrize("tune", [-1, "soon", True])
def test_a_time_for_measuring_is_one(tmp_path, tune):
    """Before anything is converted."""
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, layers.Conv2D(4, 3)(inputs))
    with pytest.raises(WrongArgument, match=f"tune={tune!r}: seconds, 0 or more"):
        export.save(model, tmp_path / "m.bolt", tune=tune)


def test_a_network_without_any_kernel_is_refused(tmp_path):
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, layers.MaxPooling2D()(inputs))
    with pytest.raises(ConversionError, match="No part of the network has a kernel"):
        export.save(model, tmp_path / "none.bolt", target="cuda-sm80")


def test_activations_are_refused_by_name():
    with pytest.raises(WrongArgument, match="No activation"):
        Activate("relu7")

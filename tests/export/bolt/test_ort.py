"""The library for ONNX Runtime: it computes what regions mean, refuses what it should, and launches as Python does.

Its CUDA kernels run here on a driver that is none: a launch comes back to Python, which runs the kernel's source on the
CPU, thread by thread.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from keras_efficient.errors import ConversionError, FileProblem, WrongArgument
from keras_efficient.export.bolt import grids, host, ort, reference, spec
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.bundle import HEADER, MAGIC, VERSION, Bundle
from keras_efficient.export.bolt.half import to_float16
from keras_efficient.export.bolt.partition import partition
from keras_efficient.export.bolt.region import ACTIVATIONS, Activate, Add, Layer, Region
from keras_efficient.export.bolt.search import candidates
from keras_efficient.export.bolt.standard import DOMAIN, FUSED, region_function

onnxruntime = pytest.importorskip("onnxruntime", reason="the library is for ONNX Runtime")
ir = pytest.importorskip("onnx_ir", reason="kernels need the extra gpu")
if shutil.which("g++") is None:
    pytest.skip("The library is compiled by g++, which is not there.", allow_module_level=True)

RNG = np.random.default_rng(0)
SENTINEL = 1000
DRIVER_NAME = "libbolt_driver_that_is_none.so"
DRIVER = """
#include <cstdlib>
#include <cstring>
using Launch = int (*)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared, void** arguments);
static Launch launched;
extern "C" {
int alive;  // pieces of memory and modules
void fake_launch(Launch one) { launched = one; }
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) { *name = "FAKE_ERROR"; return 0; }
int cuCtxGetCurrent(void** context) { *context = nullptr; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &alive; return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuDeviceGetAttribute(int* found, int which, int) {
    *found = which == 16 ? 4 : which == 75 ? 9 : which == 76 ? 0 : which == 97 ? 232448 : -1;
    return 0;
}
int cuModuleLoadData(void** module, const void* code) {
    if (std::memcmp(code, "code", 4)) return 1;
    *module = const_cast<void*>(code);
    ++alive;
    return 0;
}
int cuModuleUnload(void*) { --alive; return 0; }
int cuModuleGetFunction(void** found, void*, const char* name) { *found = strdup(name); return 0; }
int cuFuncSetAttribute(void*, int which, int) { return which == 8 ? 0 : 1; }
int cuMemAlloc_v2(unsigned long long* found, size_t bytes) {
    *found = reinterpret_cast<unsigned long long>(std::malloc(bytes));
    ++alive;
    return 0;
}
int cuMemFree_v2(unsigned long long one) { std::free(reinterpret_cast<void*>(one)); --alive; return 0; }
int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** arguments, void**) {
    const unsigned grid[] = {x, y, z};
    return launched(static_cast<const char*>(function), grid, threads, shared, arguments);
}
}
"""
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["g++", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER_NAME}", "driver.cpp", "-o", "driver.so"]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "driver.so"))


@pytest.fixture(scope="module")
def special(driver):
    """A library whose float32 kernels add a number, and whose float16 kernels are those of CUDA on `driver`, which it
    finds by its name since it is loaded already."""
    defines = {"BOLT_SENTINEL": SENTINEL, "BOLT_DRIVER": f'"{DRIVER_NAME}"', "BOLT_CUDA_ON_CPU": 1}
    return ort.library(defines=[f"{name}={value}" for name, value in defines.items()])


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def layer(value, channels, filters, kernel=(3, 3), *, depthwise=False, padding=None, **more):
    """A layer whose output has about the size of its input."""
    down, across = kernel
    shape = (*kernel, channels, 1 if depthwise else filters)
    weights = normal(*shape) / np.sqrt(down * across * (1 if depthwise else channels))
    around = (down // 2, across // 2, down // 2, across // 2)
    padding = around if padding is None else padding
    return Layer(value, weights, normal(filters), depthwise=depthwise, padding=padding, **more)


def sesr(channels=16, layers=3):
    """As the super-resolution network: a long and a short skip, depth to space."""
    found = [layer(0, 1, channels, (5, 5), steps=(Activate("prelu", normal(channels)),))]
    found += [layer(i, channels, channels, steps=(Activate("prelu", normal(1)),)) for i in range(1, layers)]
    found += [layer(layers, channels, channels, steps=(Activate("relu"), Add(1)))]
    found += [layer(layers + 1, channels, 4, (5, 5), steps=(Add(0),))]
    return Region(tuple(found), (1,), 2)


def one(found, channels, **more):
    return Region((found,), (channels,), **more)


# Regions, and shapes of their inputs.
CASES = {
    "chain": (sesr(), [(2, 11, 105, 1)]),
    "wide": (one(layer(0, 3, 40, (3, 5), steps=(Activate("relu"),)), 3), [(1, 5, 213, 3)]),
    "depthwise": (
        one(layer(0, 9, 9, (3, 3), depthwise=True, dilation=(2, 1), steps=(Activate("silu"),)), 9),
        [(2, 10, 12, 9)],
    ),
    "strided": (
        one(layer(0, 20, 33, (5, 3), stride=(2, 3), padding=(1, 0, 2, 4), steps=(Activate("relu"),)), 20),
        [(1, 13, 12, 20)],
    ),
    "dilated": (one(layer(0, 4, 8, dilation=(3, 2), padding=(0, 0, 1, 0)), 4), [(1, 12, 9, 4)]),
    "strided depthwise": (
        one(layer(0, 16, 16, depthwise=True, stride=(2, 2), padding=(0, 0, 1, 1)), 16),
        [(1, 8, 10, 16)],
    ),
    "pair": (
        Region((layer(0, 5, 24, stride=(2, 2), steps=(Activate("hard_swish"),)), layer(1, 24, 7, (1, 1))), (5,)),
        [(1, 9, 9, 5)],
    ),
    "added": (
        Region((layer(0, 8, 12, (1, 1), steps=(Add(1), Activate("relu"), Add(2))),), (8, 12, 1)),
        [(2, 3, 4, 8), (2, 3, 4, 12), (2, 3, 4, 1)],
    ),
    "shuffled": (one(layer(0, 2, 18), 2, shuffle=3), [(2, 4, 5, 2)]),
    "rows": (
        Region(
            (
                layer(0, 24, 50, (1, 1), steps=(Activate("gelu"),)),
                layer(2, 50, 24, (1, 1), steps=(Activate("prelu", normal(24)), Add(1))),
            ),
            (24, 24),
            rows=True,
        ),
        [(2, 70, 24), (2, 70, 24)],
    ),
    "no images": (one(layer(0, 2, 3), 2), [(0, 4, 5, 2)]),
    **{
        kind: (
            one(layer(0, 4, 6, steps=(Activate(kind, normal(6) if kind == "prelu" else None, **limits),)), 4),
            [(1, 5, 6, 4)],
        )
        for kind in ACTIVATIONS
        for limits in [{"low": -0.4, "high": 0.7} if kind == "clip" else {}]
    },
    "clip from below": (one(layer(0, 4, 6, steps=(Activate("clip", low=0.25),)), 4), [(1, 5, 6, 4)]),
}


def model(region, shapes, kind=np.float32, structure=None, index=0, weights=None):
    """An ONNX file with one region."""
    type_ = ir.TensorType(ir.DataType.FLOAT if kind is np.float32 else ir.DataType.FLOAT16)
    body = region_function(region)
    known = [shape if shape is None else ir.Shape(shape) for shape in shapes]
    inputs = [ir.Value(name=f"x{i}", type=type_, shape=shape) for i, shape in enumerate(known)]
    constants = []
    for i, numbers in enumerate(spec.arrays(region) if weights is None else weights):
        tensor = ir.tensor(numbers.astype(kind), name=f"w{i}")
        constants.append(ir.Value(name=f"w{i}", type=type_, shape=ir.Shape(numbers.shape), const_value=tensor))
    text = spec.written(spec.spec(region)) if structure is None else structure
    attributes = {"spec": text, "region": index}
    node = ir.node(FUSED, [*inputs, *constants], attributes, domain=DOMAIN, overload=body.overload, name="fused")
    node.outputs[0].name, node.outputs[0].type = "y", type_
    opsets = {"": 18, DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="network")
    functions = [body] if structure is None else []
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10, functions=functions)).SerializeToString()


def opened(content, library=None, threads=1, bundle=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if bundle is not None:
        options.add_session_config_entry(ort.ENTRY, str(bundle))
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def ran(session, inputs):
    return session.run(None, {f"x{i}": numbers for i, numbers in enumerate(inputs)})[0]


def meant(region, inputs):
    """The region's output in double precision; leading axes of rows are made one, and again many."""
    if not region.rows:
        return reference.computed(region, inputs)
    found = reference.computed(region, [x.reshape(-1, x.shape[-1]) for x in inputs])
    return found.reshape(*inputs[0].shape[:-1], -1)


def check(found, wanted, tolerance):
    assert found.shape == wanted.shape
    if wanted.size:
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_results(case):
    region, shapes = CASES[case]
    inputs = [normal(*shape) for shape in shapes]
    session = opened(model(region, shapes), ort.library())
    wanted = meant(region, inputs)
    check(ran(session, inputs), wanted, 1e-5)
    check(ran(opened(model(region, shapes)), inputs), wanted, 1e-5)  # by what the file says it means


@pytest.mark.parametrize("case", CASES)
def test_results_in_halves(case):
    region, shapes = CASES[case]
    inputs = [normal(*shape).astype(np.float16) for shape in shapes]
    rounded = spec.region_of(spec.spec(region), [x.astype(np.float16) for x in spec.arrays(region)])
    wanted = meant(rounded, inputs)
    found = ran(opened(model(region, shapes, np.float16), ort.library()), inputs)
    assert found.dtype == np.float16
    check(found, wanted, 2e-3)
    check(ran(opened(model(region, shapes, np.float16)), inputs), wanted, 5e-3)  # rounded behind each operator


def test_the_library_wins(special):
    region, shapes = CASES["pair"]
    inputs = [normal(*shape) for shape in shapes]
    check(ran(opened(model(region, shapes), special), inputs), meant(region, inputs) + SENTINEL, 1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_in_threads(threads):
    region = sesr()
    shapes = [(1, "H", "W", 1)]
    inputs = [normal(1, 40 + 8 * i, 200, 1) for i in range(2)]
    wanted = [meant(region, [x]) for x in inputs]
    sessions = [opened(model(region, shapes), ort.library(), threads) for _ in range(2)]
    found = {}

    def work(which):
        for repeat in range(4):
            found[which, repeat] = ran(sessions[(which + repeat) % 2], [inputs[which]])

    workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8
    for (which, _), numbers in found.items():
        check(numbers, wanted[which], 1e-5)


@pytest.mark.parametrize(
    ("case", "shapes", "wanted"),
    [
        ("chain", [("N", "H", "W", 1)], ["N", "2*(H)", "2*(W)", 1]),
        ("strided", [(1, 13, 12, 20)], [1, 6, 5, 33]),
        ("strided", [(1, "H", 12, 20)], [1, "floor((H + -2)/2) + 1", 5, 33]),
        ("pair", [("N", 9, "W", 5)], ["N", 5, "floor((W + -1)/2) + 1", 7]),
        ("rows", [("N", 70, 24), ("N", 70, 24)], ["N", 70, 24]),
        ("chain", [("N", None, "W", 1)], None),
    ],
)
def test_shapes_of_outputs(case, shapes, wanted):
    found = opened(model(CASES[case][0], shapes), ort.library()).get_outputs()[0].shape
    assert found == (wanted or [])


# ------------------------------------------------------------------------------------------------------- what is wrong


def forged():
    """Structures that are none, and what is said."""
    good = spec.spec(CASES["pair"][0])
    layers = good["layers"]

    def changed(index=0, **more):
        return json.dumps({**good, "layers": [{**x, **more} if i == index else x for i, x in enumerate(layers)]})

    def whole(**more):
        return json.dumps({**good, **more})

    return {
        "": "is no JSON",
        "[" * 100_000: "is no JSON",
        '{"version": 1, "version": 1}': "is no JSON",
        '{"version": 01}': "is no JSON",
        '{"version": NaN}': "is no JSON",
        '"\\ud8': "is no JSON",
        json.dumps(good)[:-1]: "is no JSON",
        json.dumps(good) + "x": "is no JSON",
        "[]": "a region has version",
        whole(more=1): "a region has version",
        whole(version=2): "version is an integer from 1 to 1",
        whole(version=True): "version is an integer",
        whole(rows=0): "rows is true or false",
        whole(rows=True): "rows is a product",
        whole(shuffle=17): "shuffle is an integer from 1 to 16",
        whole(shuffle=2): "cannot be shuffled by 2",
        whole(channels=[]): "channels is a list of 1 to 256",
        whole(channels=[1] * 257): "channels is a list of 1 to 256",
        whole(channels=[4]): "reads value 0 of 4",
        whole(layers=[]): "1 to 1024 layers",
        whole(layers=[layers[0]] * 1025): "1 to 1024 layers",
        changed(value=1): "value is an integer from 0 to 0",
        changed(value=-1): "value is an integer",
        changed(value=10**30): "value is an integer",
        changed(kernel=[3]): "kernel is a list of 2 to 2",
        changed(kernel=[256, 1]): "kernel is an integer from 1 to 255",
        changed(kernel=[255, 255], channels=5, filters=2**20): "more than 2147483647 numbers",
        changed(stride=[0, 1]): "stride is an integer",
        changed(stride=[1.5, 1]): "stride is an integer",
        changed(padding=[-1, 0, 0, 0]): "padding is an integer",
        changed(depthwise=True): "makes 24 channels of 5",
        changed(filters=0): "filters is an integer",
        changed(steps=[{"kind": "relu"}] * 65): "at most 64 steps",
        changed(steps=[{"kind": "sin"}]): "no activation",
        changed(steps=[7]): "no activation",
        changed(steps=[{"kind": "relu", "low": 1}]): "a step has kind",
        changed(steps=[{"kind": "prelu", "slopes": 2}]): "2 slopes for 24",
        changed(steps=[{"kind": "prelu", "slopes": 24}]): "its structure wants",
        changed(steps=[{"kind": "clip", "low": 2, "high": 1}]): "A clip from 2",
        changed(steps=[{"kind": "clip", "low": "x", "high": 1}]): "limits are numbers",
        changed(steps=[{"add": 1}]): "add is an integer from 0 to 0",
        changed(steps=[{"add": 0}]): "5 channels is added to 24",
        changed(index=1, filters=8): "is 7×24×1×1, its structure wants 8×24×1×1",
        json.dumps({**good, "layers": layers[:1]}): "has 5 inputs, its structure wants 3",
        "x" * 2**21: "at most 1048576 characters",
    }


# Inputs of regions whose shapes the file leaves open, and what is said.
SHAPES = {
    "pair": [
        ([(1, 9, 9)], "is 1×9×9; N×H×W of 5"),
        ([(1, 9, 9, 4)], "of 5 numbers"),
        ([(1, 9, 0, 5)], "9×0 is smaller"),
    ],
    "dilated": [([(1, 5, 5, 4)], "5×5 is smaller than the kernel")],
    "added": [
        ([(2, 3, 4, 8), (2, 3, 5, 12), (2, 3, 4, 1)], "3×5 is added to 3×4"),
        ([(2, 3, 4, 8), (1, 3, 4, 12), (2, 3, 4, 1)], "are 2×3×4×8 and 1×3×4×12"),
    ],
    "rows": [([(2, 7, 24), (7, 24)], "are 2×7×24 and 7×24"), ([(24, 24), (24, 23)], "of 24 numbers")],
}
SUBPROCESS = """
import json, sys
import numpy as np
import onnxruntime
for line in open(sys.argv[1]):
    path, library, shapes = json.loads(line)
    try:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        y = session.run(None, {f"x{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)})[0]
        print(json.dumps(f"no exception, {y.shape}"))
    except Exception as error:
        print(json.dumps(str(error)))
"""


def test_what_is_wrong_is_said(tmp_path):
    region, shapes = CASES["pair"]
    tries, wanted = [], []
    for structure, words in forged().items():
        tries.append((model(region, shapes, structure=structure), shapes))
        wanted.append(words)
    for case, rows in SHAPES.items():
        for given, words in rows:
            tries.append((model(CASES[case][0], [None] * len(given)), given))
            wanted.append(words)
    few = [x[..., :2] if x.ndim == 4 else x for x in spec.arrays(region)]
    tries.append((model(region, shapes, structure=spec.written(spec.spec(region)), weights=few), shapes))
    wanted.append("is 24×5×3×2, its structure wants 24×5×3×3")
    lines = []
    for number, (content, given) in enumerate(tries):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        lines.append(json.dumps([str(path), str(ort.library()), given]))
    (tmp_path / "tries").write_text("\n".join(lines))
    command = [sys.executable, "-c", SUBPROCESS, str(tmp_path / "tries")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(wanted)
    for said, words in zip(found, wanted, strict=True):
        assert words in said
        assert "keras_efficient.bolt: " in said
        assert "\n" not in said.strip()


def leaves(value, path=()):
    """Paths to all parts of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield from leaves(value[key], (*path, key))


def test_structures_are_accepted_as_in_python():
    accepts = ctypes.CDLL(str(ort.library())).keras_efficient_bolt_accepts
    message, results = ctypes.create_string_buffer(600), []
    values = [None, True, False, -1, 0, 1, 2, 3, 4, 5, 16, 17, 24, 255, 256, 2**20, 2**20 + 1, 10**30, 0.5, "", "relu",
              "prelu", "clip", [], [1], [1, 1], [0, 0, 0, 0], {}, {"add": 0}, {"add": 1}, {"kind": "gelu"}]  # fmt: skip
    structures = [spec.written(spec.spec(region)) for region, _ in CASES.values()]
    assert all(accepts(text.encode(), message) for text in structures)
    for _ in range(4000):
        changed = json.loads(structures[RNG.integers(len(structures))])
        for _ in range(RNG.integers(1, 3)):
            paths = [path for path in leaves(changed) if path]
            *path, last = paths[RNG.integers(len(paths))]
            inner = changed
            for key in path:
                inner = inner[key]
            if RNG.integers(8):
                inner[last] = copy.deepcopy(values[RNG.integers(len(values))])
            else:
                del inner[last]
        text = json.dumps(changed)
        try:
            spec.parsed(text)
            results.append(True)
        except WrongArgument:
            results.append(False)
        assert accepts(text.encode(), message) == results[-1], (text, message.value)
    assert 200 < sum(results) < 3800


def test_an_old_runtime():
    said = []
    status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, line: said.append((code, line.decode())) or 77
    )
    table = (ctypes.c_void_p * 300)(ctypes.cast(status, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version < 17 else None
    )
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    name = ctypes.create_string_buffer(b"1.16.3")
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(x, ctypes.c_void_p).value for x in (get_api, version)))
    register = ctypes.CDLL(str(ort.library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 77
    assert said == [(2, "keras_efficient.bolt: ONNX Runtime 1.16.3 is too old: release 1.17 or later is needed.")]


# ------------------------------------------------------------------------------------------------- bundles and launches


def rules():
    """A rule at random, and sizes."""
    kind = str(RNG.choice(["strip", "tile", "depthwise"]))
    rule = {"kind": kind, "channels": int(RNG.integers(1, 300))}
    if kind == "strip":
        limits = {"useful": 70, "rows": 9, "extra": 20, "blocks": 5}
    else:
        low = [0, 0, 1, 1, 0, 0, 0, 0]
        rule["geometry"] = [int(RNG.integers(x, high)) for x, high in zip(low, [12, 12, 5, 5, 4, 4, 4, 4], strict=True)]
        limits = {"places": 130, "across": 5} if kind == "tile" else {"places": 9, "groups": 40, "threads": 300}
    if kind == "tile" and RNG.random() < 0.5:
        limits["together"] = 5
    rule |= {name: int(RNG.integers(name != "extra", high)) for name, high in limits.items()}
    most = int(RNG.choice([6, 200, 5000]))
    n, height, width = (int(x) for x in RNG.integers([0, 0, 0], [9, most, most]))
    return rule, n, height, width, int(RNG.integers(1, 200))


def test_launches_are_those_of_python():
    function = ctypes.CDLL(str(ort.library())).keras_efficient_bolt_launch
    function.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_char_p]
    refused = 0
    for _ in range(3000):
        rule, *sizes = rules()
        found, message = (ctypes.c_int64 * 8)(), ctypes.create_string_buffer(600)
        result = function(json.dumps(rule).encode(), *sizes, found, message)
        if result:
            with pytest.raises(WrongArgument) as error:
                grids.launch(rule, *sizes)
            assert message.value.decode() == error.value.message
            refused += 1
        else:
            assert (tuple(found[:3]), tuple(found[4 : 4 + found[3]])) == grids.launch(rule, *sizes)
    assert 100 < refused < 2900
    assert function(b'{"kind": "other", "channels": 1}', 1, 1, 1, 1, found, message)
    assert function(b'{"kind": "strip"}', 1, 1, 1, 1, found, message)


def test_damaged_bundles_are_refused(tmp_path):
    function = ctypes.CDLL(str(ort.library())).keras_efficient_bolt_sections
    message, path = ctypes.create_string_buffer(600), tmp_path / "some.bolt"
    bundle = Bundle(b"onnx" * 50, cubins={"k/sm_90a": bytes(200)}, sources={"k": "// ×"}, weights={"0": b""})
    bundle.save(path)
    content = path.read_bytes()
    assert function(str(path).encode(), message) == 7
    tries = [content[:length] for length in RNG.integers(0, len(content), 60)] + [content + b"x", b""]
    for at in RNG.integers(0, len(content), 150):
        tries.append(content[:at] + bytes([content[at] ^ 1 << RNG.integers(8)]) + content[at + 1 :])
    for one_try in tries:
        path.write_bytes(one_try)
        with pytest.raises(FileProblem):
            Bundle.load(path)
        assert function(str(path).encode(), message) == -1
        assert str(path) in message.value.decode()
    assert function(str(tmp_path / "none").encode(), message) == -1
    for length in (55, 56, 63, 64, 119, 120, 1000):  # where the last blocks of a hash begin
        Bundle(b"onnx", weights={"0": RNG.bytes(length)}).save(path, overwrite=True)
        assert function(str(path).encode(), message) == 5


NEEDED = [("onnx", "", b"o"), ("launches", "", b"{}"), ("tuning", "", b"{}"), ("metadata", "", b"{}")]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (NEEDED, None),
        ([*NEEDED, ("source", "×" * 200, "// × 𝄞".encode())], None),
        (NEEDED[1:], "missing"),
        ([*NEEDED, ("weights", "0", b""), ("weights", "0", b"")], "there twice"),
        ([*NEEDED, ("other", "0", b"")], "its table is none"),
        ([*NEEDED, ("weights", "", b"")], "its table is none"),
        ([*NEEDED, ("weights", "×" * 201, b"")], "its table is none"),
        ([("onnx", "x", b""), *NEEDED], "its table is none"),
        ([*NEEDED[:3], ("metadata", "", b"[]")], "metadata/ is no JSON object"),
        ([*NEEDED[:3], ("metadata", "", b'{"x": NaN}')], "metadata/ is no JSON object"),
        ([*NEEDED[:3], ("metadata", "", b'{"x": "\xff"}')], "metadata/ is no JSON object"),
        ([*NEEDED[:2], ("tuning", "", b""), NEEDED[3]], "tuning/ is no JSON object"),
        ([NEEDED[0], ("launches", "", b"1"), *NEEDED[2:]], "launches/ is no JSON object"),
        *(
            ([*NEEDED, ("source", "k", text)], "source/k is no text")
            for text in (b"\xff", b"\x80", b"x\xc3", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80",
                         b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xe2\x82")
        ),
    ],
)  # fmt: skip
def test_sections_are_checked_as_in_python(tmp_path, sections, said):
    entries = [[kind, name, len(part), hashlib.sha256(part).hexdigest()] for kind, name, part in sections]
    refused = written_file(tmp_path / "some.bolt", json.dumps(entries), b"".join(part for *_, part in sections))
    assert refused is None if said is None else said in refused


def test_an_entry_of_a_table_is_a_list(tmp_path):
    for first in ('{"a": "onnx", "b": "", "c": 0, "d": ""}', '["onnx", "", 0]', '"onnx"', '["onnx", "", true, ""]'):
        assert "its table is none" in written_file(tmp_path / "some.bolt", f"[{first}]", b"")


def written_file(path, table, body):
    """Writes a bundle with this table; what Python and the library say against it, which is the same."""
    function, message = ctypes.CDLL(str(ort.library())).keras_efficient_bolt_sections, ctypes.create_string_buffer(600)
    table = table.encode()
    path.write_bytes(HEADER.pack(MAGIC, VERSION, len(table), hashlib.sha256(table).digest()) + table + body)
    is_refused = function(str(path).encode(), message) < 0
    try:
        Bundle.load(path)
    except FileProblem:
        assert is_refused
        return message.value.decode()
    assert not is_refused, message.value
    return None


def test_sessions_of_bundles(tmp_path):
    region, shapes = CASES["pair"]
    inputs = [normal(*shape) for shape in shapes]
    bundle = Bundle(model(region, shapes))
    bundle.save(tmp_path / "network.bolt")
    (tmp_path / "network.onnx").write_bytes(bundle.onnx)
    for network in (bundle, tmp_path / "network.bolt", str(tmp_path / "network.onnx")):
        found = ort.session(network, ["CPUExecutionProvider"], threads=1)
        check(ran(found, inputs), meant(region, inputs), 1e-5)
    with pytest.raises(WrongArgument, match="no provider 'OtherProvider' here"):
        ort.session(bundle, ["OtherProvider"])
    with pytest.raises(ConversionError, match=r"refused the network: .*keras_efficient.bolt: .*is no JSON"):
        ort.session(Bundle(model(region, shapes, structure="{")))
    with pytest.raises(FileProblem, match="cannot be read"):
        ort.session(tmp_path / "none.bolt")


def test_a_network_of_several_regions(tmp_path):
    """Skips between regions, free sizes, and casts around halves."""
    import onnx
    import onnx.helper as helper
    from onnx import numpy_helper

    arrays = {"a": normal(8, 3, 3, 3) / 5, "b": normal(8), "c": normal(8, 1, 3, 3) / 3, "d": normal(8, 8, 1, 1) / 3}
    nodes = [
        helper.make_node("Conv", ["x0", "a", "b"], ["p"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "c"], ["r"], pads=[1, 1, 1, 1], group=8),
        helper.make_node("HardSwish", ["r"], ["s"]),
        helper.make_node("Conv", ["s", "d"], ["t"]),
        helper.make_node("Add", ["t", "q"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(name, 1, ["n", count, *size]) for name, count, size in
             (("x0", 3, ("h", "w")), ("y", 8, ("u", "v")))]  # fmt: skip
    graph = helper.make_graph(
        nodes, "network", sides[:1], sides[1:], [numpy_helper.from_array(x, name) for name, x in arrays.items()]
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = partition(network)
    assert len(found.regions) >= 2
    inputs = [normal(2, 3, 15, 22)]
    wanted = ran(opened(network.SerializeToString()), inputs)
    for name, content, tolerance in (("single", found.model, 1e-5), ("half", to_float16(found.model), 5e-3)):
        onnx.save(content, tmp_path / f"{name}.onnx")
        session = ort.session(tmp_path / f"{name}.onnx", ["CPUExecutionProvider"], threads=1)
        check(ran(session, inputs), wanted, tolerance)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", "")
    with pytest.raises(ConversionError, match=r"needs g\+\+"):
        ort.library()


# ---------------------------------------------------------------------------------------------------------- CUDA's part


def compiled(region, shape, *, index=0):
    """A bundle of the region's best kernel, with its source, and code that is none; and the kernel."""
    size = (1, 1, int(np.prod(shape[:-1]))) if region.rows else shape[:3]
    best = candidates(region, architecture("sm_90a"), *size)[0].emit(region)
    entry = {
        "rule": dict(best.rule),
        "threads": best.threads,
        "shared_bytes": best.shared_bytes,
        "inputs": len(region.channels),
    }
    regions = [None] * index + [best.kernel]
    return best, Bundle(
        b"onnx",
        cubins={f"{best.kernel}/sm_90a": b"code"},
        weights={str(index): best.packed},
        launches={"regions": regions, "kernels": {best.kernel: entry}},
    )


def numbers_at(pointer, shape):
    count = int(np.prod(shape))
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint16)), (count,)).view(np.float16)


@pytest.mark.parametrize("case", ["chain", "strided", "rows", "depthwise"])
def test_launches_on_a_driver_that_is_none(case, tmp_path, special, driver):
    regions = {
        "chain": (sesr(16, 2), [(2, 9, 20, 1)]),
        "strided": (one(layer(0, 16, 24, stride=(2, 2), steps=(Activate("relu"),)), 16), [(1, 9, 10, 16)]),
        "rows": (
            Region((layer(0, 24, 32, (1, 1), steps=(Add(1), Activate("relu"))),), (24, 32), rows=True),
            [(2, 7, 24), (2, 7, 32)],
        ),
        "depthwise": (one(layer(0, 16, 16, depthwise=True), 16), [(1, 6, 7, 16)]),
    }
    region, shapes = regions[case]
    best, bundle = compiled(region, shapes[0], index=1)
    bundle.save(tmp_path / "network.bolt")
    inputs = [normal(*shape).astype(np.float16) for shape in shapes]
    wanted = meant(region, inputs)
    launches = []

    @CALLBACK
    def launched(kernel, grid, threads, shared, arguments):
        grid, count = tuple(grid[:3]), len(inputs)

        def pointer(i):
            return ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_void_p))[0]

        height, width = (1, int(np.prod(shapes[0][:-1]))) if region.rows else shapes[0][1:3]
        n = 1 if region.rows else shapes[0][0]
        expected, integers = grids.launch(best.rule, n, height, width, 4)
        plain = [
            ctypes.cast(arguments[count + 1 + i], ctypes.POINTER(ctypes.c_int32))[0] for i in range(2 + len(integers))
        ]
        launches.append((kernel.decode(), grid == expected, threads, shared, plain == [height, width, *integers]))
        packed = numbers_at(pointer(count), (len(best.packed) // 2,)).copy().view(np.uint8)
        found = np.full(wanted.size, np.nan, np.float16)
        given = [numbers_at(pointer(i), x.shape).copy() for i, x in enumerate(inputs)]
        host.run(
            best.text,
            best.kernel,
            grid=grid,
            threads=threads,
            shared_bytes=shared,
            arguments=[*given, packed, *plain, found],
        )
        numbers_at(pointer(count + 1 + len(plain)), wanted.shape)[:] = found
        return 0

    driver.fake_launch(launched)
    bundles = ctypes.CDLL(str(special)).keras_efficient_bolt_bundles
    before = bundles()
    content = model(region, shapes, np.float16, index=1)
    session = opened(content, special, bundle=tmp_path / "network.bolt")
    assert ctypes.c_int.in_dll(driver, "alive").value == 2
    second = opened(content, special, bundle=tmp_path / "network.bolt")
    assert bundles() == before + 1  # of which both sessions have a part
    del second
    check(ran(session, inputs), wanted, 5e-3)
    assert launches == [(best.kernel, True, best.threads, best.shared_bytes, True)]
    assert bundles() == before + 1
    del session
    assert ctypes.c_int.in_dll(driver, "alive").value == 0
    assert bundles() == before  # no file is kept in memory longer than a session


def test_bundles_without_what_is_asked_for(tmp_path, special, monkeypatch):
    region, shapes = one(layer(0, 16, 24), 16), [(1, 9, 10, 16)]
    best, bundle = compiled(region, shapes[0])
    content, path = model(region, shapes, np.float16), tmp_path / "network.bolt"

    def said(bundle=None, **more):
        if bundle is not None:
            bundle.save(path, overwrite=True)
        with pytest.raises(Exception, match=r"keras_efficient\.bolt: ") as found:
            opened(content, special, **more)
        return str(found.value)

    def changed(**more):
        (entry,) = bundle.launches["kernels"].values()
        kernels = {best.kernel: {**entry, **more.pop("entry", {})}}
        launches = {**bundle.launches, "kernels": kernels, **more.pop("launches", {})}
        return Bundle(**{**vars(bundle), "launches": launches, **more})

    monkeypatch.delenv("KERAS_EFFICIENT_BOLT_BUNDLE", raising=False)
    assert "Which bundle has the kernels?" in said()
    monkeypatch.setenv("KERAS_EFFICIENT_BOLT_BUNDLE", str(path))
    assert "cannot be read" in said()
    bundle.save(path)
    alive = opened(content, special)  # what it read is not taken for what the file is later
    assert "has no kernel for region 0" in said(changed(launches={"regions": [None]}))
    assert "has no region 0" in said(changed(launches={"regions": []}))
    assert "JSON without" in said(changed(launches={"kernels": {}}))
    assert "has no code of" in said(changed(cubins={f"{best.kernel}/sm_80": b"code"}))
    assert "has no code of" in said(changed(cubins={}, ptx={f"{best.kernel}/sm_100": b"code"}))
    changed(cubins={f"{best.kernel}/sm_80": b"none"}, ptx={f"{best.kernel}/sm_80": b"code"}).save(path, overwrite=True)
    opened(content, special)  # the driver compiles what is for an older GPU
    bundle.save(path, overwrite=True)
    assert "has no section weights/0" in said(changed(weights={}))
    assert "the driver refused cuModuleLoadData: FAKE_ERROR".lower() in said(
        changed(cubins={f"{best.kernel}/sm_90a": b"none"})
    ).lower().replace("cuda ", "")
    assert "more than this GPU has" in said(changed(entry={"shared_bytes": 300_000}))
    assert "threads is an integer from 1 to 1024" in said(changed(entry={"threads": 2048}))
    assert "inputs is an integer from 1 to 1" in said(changed(entry={"inputs": 2}))
    assert alive.get_outputs()

"""Kernels on the CPU: each primitive against NumPy, and what is wrong is found."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from keras_efficient.errors import ConversionError, VerificationError, WrongArgument
from keras_efficient.export import bolt
from keras_efficient.export.bolt import host, shared_library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles kernels for the CPU")

RNG = np.random.default_rng(0)
PRIMITIVES = (Path(bolt.__file__).parent / "templates/primitives.cuh").read_text(encoding="utf-8")
GEMM = PRIMITIVES + (Path(__file__).parent / "gemm.cu").read_text(encoding="utf-8")
SHARED = 2 * (64 * 24 + 16 * 72) * 2
SEEDS = range(8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Everything is compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_library.tempfile, "tempdir", str(tmp_path_factory.mktemp("cache")))
        yield


def launched(body: str, arguments, *, threads=32, shared=1024, parameters="float* y", grid=1, **more) -> host.Run:
    source = f"{PRIMITIVES}\nusing namespace bolt;\nBOLT_KERNEL({threads}, 1) tried({parameters}) {{\n{body}\n}}"
    return host.run(source, "tried", grid=grid, threads=threads, shared_bytes=shared, arguments=arguments, **more)


def halves(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float16)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def product(source=GEMM, m=64, n=64, k=64, shared=SHARED, seed=0) -> tuple[float, host.Run]:
    """The largest error of a product, and what was counted."""
    a, b, d = read_only(halves(m, k)), read_only(halves(k, n)), np.full((m, n), np.nan, np.float32)
    grid = (-(-n // 64), -(-m // 64))
    run = host.run(source, "gemm", grid=grid, threads=128, shared_bytes=shared, arguments=[a, b, d, m, n, k], seed=seed)
    return float(np.abs(d - a.astype(float) @ b.astype(float)).max()), run


def without(text: str) -> str:
    assert GEMM.count(text) == 1
    return GEMM.replace(text, "")


def test_places():
    found = np.full((2, 3, 4, 64, 8), -1, np.int32)
    body = """
    int* const at = y + (((block_z() * 3 + block_y()) * 4 + block_x()) * 64 + thread()) * 8;
    const int all[8] = {lane(), warp(), block_x(), block_y(), block_z(), grid_x(), grid_y(), grid_z()};
    for (int i = 0; i < 8; ++i) at[i] = all[i];"""
    launched(body, [found], threads=64, grid=(4, 3, 2), parameters="int* y")
    z, y, x, thread = np.meshgrid(*map(np.arange, (2, 3, 4, 64)), indexing="ij")
    ones = np.ones_like(x)
    wanted = np.stack([thread % 32, thread // 32, x, y, z, 4 * ones, 3 * ones, 2 * ones], -1)
    np.testing.assert_array_equal(found, wanted)


def test_halves_are_rounded_to_the_nearest_even():
    x = np.concatenate([RNG.normal(size=58) * 10.0 ** RNG.integers(-9, 6, 58), [2049, 2051, 1e9, -0.0, np.inf, 65520]])
    x = x.astype(np.float32)
    packed, joined = np.zeros((2, 32), np.uint32)
    back, one = np.zeros(64, np.float32), np.zeros(64, np.float16)
    body = """
    const int i = 2 * thread();
    packed[thread()] = pack(x[i], x[i + 1]);
    joined[thread()] = join(to_half(x[i]), to_half(x[i + 1]));
    y[i] = low(packed[thread()]);
    y[i + 1] = high(packed[thread()]);
    one[i] = to_half(x[i]);
    one[i + 1] = to_half(to_float(to_half(x[i + 1])));"""
    parameters = "const float* x, uint32_t* packed, uint32_t* joined, float* y, half* one"
    launched(body, [x, packed, joined, back, one], parameters=parameters)
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    np.testing.assert_array_equal(packed.view(np.float16), wanted)
    np.testing.assert_array_equal(joined.view(np.float16), wanted)
    np.testing.assert_array_equal(back, wanted.astype(np.float32))
    np.testing.assert_array_equal(one, wanted)


def test_functions():
    x = np.linspace(-0.99, 9, 32, dtype=np.float32)
    found = np.zeros((4, 32), np.float32)
    names = ("exp", "tanh", "log1p", "reciprocal")
    body = "".join(f"y[{32 * i} + lane()] = fast_{name}(x[lane()]);" for i, name in enumerate(names))
    launched(body, [x, found], parameters="const float* x, float* y")
    functions = (math.exp, math.tanh, math.log1p, lambda one: 1 / one)
    wanted = [[function(float(one)) for one in x] for function in functions]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # what kernels are promised


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_ldmatrix_does(transposed):
    x, found = halves(32, 8), np.zeros((32, 4), np.uint32)
    body = f"""
    BOLT_SHARED(shared);
    half* const rows = reinterpret_cast<half*>(shared);
    for (int i = 0; i < 8; ++i) rows[lane() * 8 + i] = x[lane() * 8 + i];
    warp_barrier();
    uint32_t r[4];
    load_matrix{"_transposed" if transposed else ""}(r, rows + lane() * 8);
    for (int i = 0; i < 4; ++i) y[lane() * 4 + i] = r[i];"""
    run = launched(body, [x, found], parameters="const half* x, uint32_t* y")
    matrices = x.reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    # Lane 4 g + t has elements (g, 2t) and (g, 2t + 1) of each matrix.
    np.testing.assert_array_equal(
        found.view(np.float16).reshape(8, 4, 4, 2).transpose(2, 0, 1, 3), matrices.reshape(4, 8, 4, 2)
    )
    assert (run.loads, run.conflicts) == (1, 1.0)


def test_conflicts_are_counted():
    body = """
    BOLT_SHARED(shared);
    uint32_t r[4];
    load_matrix(r, reinterpret_cast<half*>(shared + lane() % 8 * apart));"""
    found = {apart: launched(body, [apart], parameters="int apart").conflicts for apart in (128, 64, 32, 16, 48, 0)}
    assert found == {128: 8, 64: 4, 32: 2, 16: 1, 48: 1, 0: 1}


def test_a_product_of_one_fragment():
    a, b, d = halves(16, 16), halves(16, 8), RNG.normal(size=(16, 8)).astype(np.float32)
    wanted = d + a.astype(float) @ b.astype(float)
    body = """
    const int g = lane() / 4, t = lane() % 4 * 2;
    const uint32_t x[4] = {pack(to_float(a[g * 16 + t]), to_float(a[g * 16 + t + 1])),
                           pack(to_float(a[(g + 8) * 16 + t]), to_float(a[(g + 8) * 16 + t + 1])),
                           pack(to_float(a[g * 16 + t + 8]), to_float(a[g * 16 + t + 9])),
                           pack(to_float(a[(g + 8) * 16 + t + 8]), to_float(a[(g + 8) * 16 + t + 9]))};
    const uint32_t b0 = pack(to_float(b[t * 8 + g]), to_float(b[(t + 1) * 8 + g]));
    const uint32_t b1 = pack(to_float(b[(t + 8) * 8 + g]), to_float(b[(t + 9) * 8 + g]));
    float sum[4] = {d[g * 8 + t], d[g * 8 + t + 1], d[(g + 8) * 8 + t], d[(g + 8) * 8 + t + 1]};
    multiply(sum, x, b0, b1);
    d[g * 8 + t] = sum[0];
    d[g * 8 + t + 1] = sum[1];
    d[(g + 8) * 8 + t] = sum[2];
    d[(g + 8) * 8 + t + 1] = sum[3];"""
    run = launched(body, [a, b, d], parameters="const half* a, const half* b, float* d")
    np.testing.assert_allclose(d, wanted, atol=1e-5)  # 17 terms of size 4, each rounded by 6e-8
    assert run.products == 1


def test_shuffles():
    x, found = RNG.normal(size=64).astype(np.float32), np.zeros((2, 64), np.float32)
    body = "y[thread()] = shuffle_xor(x[thread()], 5); y[64 + thread()] = shuffle_down(x[thread()], 3);"
    launched(body, [x, found], threads=64, parameters="const float* x, float* y")
    lanes = np.arange(64) % 32
    np.testing.assert_array_equal(found[0], x[np.arange(64) ^ 5])
    np.testing.assert_array_equal(found[1], x[np.arange(64) + np.where(lanes + 3 < 32, 3, 0)])


def test_loads_of_global_memory():
    x, found = halves(64, 8), np.zeros((64, 8), np.float16)
    body = """
    const int i = thread();
    reinterpret_cast<Words*>(y)[i] = load_global(reinterpret_cast<const Words*>(x) + i);
    const Words2 two = load_global(reinterpret_cast<const Words2*>(x) + i * 2 + 1);
    reinterpret_cast<uint32_t*>(y)[i * 4] = load_global(reinterpret_cast<const uint32_t*>(x) + i * 4 + 3);
    reinterpret_cast<Words2*>(y)[i * 2 + 1] = {two.y, two.x};
    y[i * 8 + 2] = load_global(x + i * 8);"""
    launched(body, [read_only(x), found], threads=64, parameters="const half* x, half* y")
    np.testing.assert_array_equal(found, x[:, [6, 7, 0, 3, 6, 7, 4, 5]])


def test_copies():
    """Groups arrive in their order, when they are waited for; zeros come where nothing is, and that is not read."""
    x, found = RNG.normal(size=(32, 8)).astype(np.float32), np.zeros((32, 3), np.float32)
    body = """
    BOLT_SHARED(shared);
    const float* const arrived = reinterpret_cast<const float*>(shared + 32 * lane());
    copy_async(shared + 32 * lane(), x + 8 * lane(), true);
    copy_commit();
    copy_async(shared + 32 * lane() + 16, nullptr, false);
    copy_commit();
    y[3 * lane()] = arrived[0];
    copy_wait<1>();
    y[3 * lane() + 1] = arrived[0] + 0 * (arrived[4] == arrived[4]);
    copy_wait<0>();
    y[3 * lane() + 2] = arrived[1] + arrived[4];"""
    launched(body, [read_only(x), found], parameters="const float* x, float* y")
    np.testing.assert_array_equal(found, np.stack([np.full(32, np.nan), x[:, 0], x[:, 1]], -1))


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (70, 136, 40), (1, 8, 8)])
def test_a_tiled_product(m, n, k):
    for seed in SEEDS:
        error, run = product(m=m, n=n, k=k, seed=seed)
        assert error < 1e-4  # 64 terms of size 4, each rounded by 6e-8
    assert run.conflicts == 1.0  # what the padding of rows is for
    assert run.products == -(-m // 64) * -(-n // 64) * -(-k // 16) * 4 * 8


@pytest.mark.parametrize("comment", ["all have arrived", "all are read"])
def test_a_missing_barrier_shows(comment):
    broken = without(f"barrier();  // {comment}")
    assert any(not product(broken, seed=seed)[0] < 1e-4 for seed in SEEDS)


@pytest.mark.parametrize("changed", ["", "copy_wait<2>();"])
def test_a_missing_wait_shows(changed):
    broken = GEMM.replace("copy_wait<1>();", changed)
    assert broken != GEMM
    assert not product(broken)[0] < 1e-4


def test_a_missing_barrier_of_the_warp_shows():
    x = np.arange(32, dtype=np.float32)
    body = """
    BOLT_SHARED(shared);
    float* const all = reinterpret_cast<float*>(shared);
    all[lane()] = x[lane()];
    warp_barrier();
    y[lane()] = all[lane() ^ 1];"""
    found = np.zeros(32, np.float32)
    launched(body, [x, found], parameters="const float* x, float* y")
    np.testing.assert_array_equal(found, x[np.arange(32) ^ 1])
    launched(body.replace("warp_barrier();", ""), [x, found], parameters="const float* x, float* y")
    assert not np.array_equal(found, x[np.arange(32) ^ 1])


def test_what_was_never_written_is_nan():
    found = np.zeros((2, 64), np.float32)
    body = """
    BOLT_SHARED(shared);
    float* const all = reinterpret_cast<float*>(shared);
    y[block_x() * 64 + thread()] = all[thread()];
    all[thread()] = 1;"""
    launched(body, [found], grid=2, threads=64)
    assert np.isnan(found).all()


def test_what_lies_beyond_an_array_spoils_results():
    """Arrays begin at multiples of 256 bytes, as on a GPU; up to the next one nothing traps."""
    x, found = np.zeros(60, np.float32), np.zeros(2, np.float32)
    launched("y[0] = x[60]; y[1] = x[-1];", [read_only(x), found], parameters="const float* x, float* y")
    assert (found < -1e38).all()


# What a kernel of 64 threads does, and what is said about it. y and z are 64 floats, z is read-only; shared memory has
# 520 bytes.
MISTAKES = {
    # Out of shared memory.
    "load_matrix(r, rows + 8 * lane() + 8 * 2);": "goes out of shared memory: load_matrix at byte 512 of 520",
    "load_matrix(r, rows - 8);": "goes out of shared memory: load_matrix at byte -16 of 520",
    "copy_async(shared + 512, z, true);": "goes out of shared memory: copy_async at byte 512 of 520",
    "shared[640] = 1;": "goes out of shared memory: byte 640 of 520",
    "shared[520] = 1;": "a thread has written out of shared memory: at byte 520 of 520",
    "shared[-1] = 1;": "a thread has written out of shared memory: at byte -1 of 520",
    # Not aligned.
    "load_matrix(r, rows + 1);": "gives load_matrix a row at byte 2 of shared memory, no multiple of 16",
    "copy_async(shared + 8, z, true);": "gives copy_async a row at byte 8 of shared memory, no multiple of 16",
    "copy_async(shared, z + 2, true);": "loads 16 bytes at byte 8 of argument 1, no multiple",
    "y[0] = load_global((const Words*)(z + 1)).x;": "loads 16 bytes at byte 4 of argument 1, no multiple",
    "*(Words*)(y + 1) = {};": r"thread \d+ does what is not defined: an address not aligned",
    # Not defined.
    "int all[4] = {}; all[which] = 1; y[0] = all[thread() % 4];": "an index out of an array",
    "y[0] = 2147483647 + which;": "an integer out of range",
    # Out of global memory.
    "y[64 + block_x()] = 1;": r"^.*block \(0, 0, 0\), thread \d+ goes out of argument 0: byte 256 of 256",
    "y[block_x() * 5000] = 1;": r"^.*block \(1, 0, 0\), thread \d+ goes out of argument 0: byte 20000 of 256",
    "y[-1] = 1;": r"block \(0, 0, 0\), a thread has written out of argument 0: at byte -4 of 256",
    "y[0] = z[64];": "goes out of argument 1: byte 256 of 256",
    "y[0] = load_global(z - 1);": "reads out of argument 1: at byte -4 of 256",
    "copy_async(shared, z + 64, true);": "reads out of argument 1: at byte 256 of 256",
    "z[3] = 1;": "writes to argument 1, which is read-only: byte 12",
    "*(float*)(128) = 1;": "reads or writes at 0x80, where there is nothing",
    # Waiting for what never comes.
    "if (warp() == 0) barrier();": "32 threads wait at a barrier, and 32 have ended",
    "if (lane() < 16) barrier();": "32 threads wait at a barrier, and 32 have ended",
    "if (lane() < 16) warp_barrier();": r"warp \d is stuck: 16 of its lanes wait at warp_barrier",
    "if (lane() < 16) warp_barrier(); else barrier();": r"warp \d is stuck: 16 of its lanes wait at warp_barrier",
    "if (lane() < 16) warp_barrier(); else y[0] = shuffle_xor(1, 1);": "comes to .* other lanes of its warp wait at",
}
CASES = "\n".join(f"case {i}: {{ {body} break; }}" for i, body in enumerate(MISTAKES))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    y, z = np.zeros(64, np.float32), read_only(np.zeros(64, np.float32))
    body = f"""
    BOLT_SHARED(shared);
    half* const rows = reinterpret_cast<half*>(shared);
    uint32_t r[4];
    switch (which) {{ {CASES} }}"""
    arguments = [y, z, list(MISTAKES).index(mistake)]
    with pytest.raises(VerificationError, match=MISTAKES[mistake]):
        launched(body, arguments, grid=2, threads=64, shared=520, parameters="float* y, float* z, int which")
    assert not y.any()  # as it was


@pytest.mark.parametrize("size", [66_000, 100_000])
def test_too_large_a_stack(size):
    with pytest.raises(VerificationError, match=r"thread \d+ has used up its stack of 65536 bytes"):
        launched("volatile char much[SIZE]; much[0] = 1; y[0] = much[0];", [np.zeros(1)], defines=[f"SIZE={size}"])


def test_too_little_shared_memory():
    with pytest.raises(VerificationError, match=r"block \(0, 0, 0\), thread \d+ goes out of shared memory: copy_async"):
        product(shared=SHARED // 2)


def test_a_seed_draws_an_order():
    body = "static int turn; if (block_x() == 0) y[turn++] = thread(); barrier(); turn = 0;"
    orders = []
    for seed in (1, 2, 1):
        found = np.full(128, -1, np.int32)
        launched(body, [found], threads=128, parameters="int* y", seed=seed)
        assert sorted(found) == list(range(128))
        orders.append(found.tolist())
    assert orders[0] == orders[2] != orders[1]


def test_defines():
    y = np.zeros(32, np.float32)
    launched("y[lane()] = VALUE;", [y], defines=["VALUE=7"])
    assert (y == 7).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"arguments": [np.zeros(1), 1]}, "takes 1 arguments, not 2"),
        ({"arguments": [1]}, "argument 0 is an integer, and the kernel takes an array"),
        ({"arguments": ["x"]}, "Argument 0 is str"),
        ({"arguments": [np.zeros((4, 4))[:, :2]]}, "not C-contiguous"),
        ({"threads": 33}, "33 threads"),
        ({"grid": (1, 0)}, "No grid"),
        ({"grid": (1, 1, 1, 1)}, "No grid"),
        ({"shared": -1}, "-1 bytes"),
    ],
)
def test_launches_that_are_none(more, words):
    with pytest.raises(WrongArgument, match=words):
        launched("", more.pop("arguments", [np.zeros(1)]), **more)


def test_a_source_that_is_refused():
    with pytest.raises(ConversionError, match=r"^g\+\+ refused the source: source\.cpp:\d+:\d+: error: .*nonsense"):
        launched("nonsense", [])


def test_without_a_compiler(monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", "")
    with pytest.raises(ConversionError, match=r"needs g\+\+"):
        launched("y[1] = 2;", [np.zeros(2, np.float32)])

"""Kernels compile for each architecture; what goes wrong is said in a line."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from keras_efficient.errors import ConversionError, MissingDependency, UnknownName
from keras_efficient.export import bolt
from keras_efficient.export.bolt import build
from keras_efficient.export.bolt.architectures import ARCHITECTURES

PRIMITIVES = (Path(bolt.__file__).parent / "templates/primitives.cuh").read_text(encoding="utf-8")
GEMM = PRIMITIVES + (Path(__file__).parent / "gemm.cu").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheels():
    try:
        build.compiled('extern "C" __global__ void nothing() {}', ["nothing"])
    except MissingDependency as error:
        pytest.skip(f"{error.package} is not installed")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_compiles(wheels, arch):
    found = build.compiled(GEMM, ["gemm"], arch)
    info = found.kernels["gemm"]
    assert (info.spill_stores, info.spill_loads, info.stack_bytes, info.shared_bytes) == (0, 0, 0, 0)
    assert 32 < info.registers <= 128
    assert found.cubin[:4] == b"\x7fELF"
    assert f".target {arch}".encode() in found.ptx
    for one in ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "ldmatrix.sync.aligned.m8n8.x4.trans"):
        assert one.encode() in found.ptx
    assert b"cp.async.cg.shared.global" in found.ptx
    assert 0 < found.seconds < 60


def test_compiling_twice_gives_the_same(wheels):
    first, second = (build.compiled(GEMM, ["gemm"], "sm_80") for _ in range(2))
    assert (first.cubin, first.ptx) == (second.cubin, second.ptx)


def test_all_primitives_compile(wheels):
    source = (
        PRIMITIVES
        + """
    using namespace bolt;
    BOLT_KERNEL(64, 2) all(const half* a, float* y, uint32_t* u, Words* w) {
        const float x = to_float(load_global(a + thread())) + low(load_global(u)) + high(u[1]);
        const Words2 two = load_global(reinterpret_cast<const Words2*>(u));
        w[warp()] = load_global(w + block_y() + block_z() + grid_x() + grid_y() + grid_z());
        warp_barrier();
        y[0] = fast_exp(x) + fast_tanh(x) + fast_reciprocal(x) + fast_log1p(x);
        y[1] = shuffle_xor(x, 1) + shuffle_down(x, 2) + to_float(to_half(x)) + float(two.x) + low(join(a[0], a[1]));
    }"""
    )
    assert build.compiled(source, ["all"]).kernels["all"].spill_stores == 0


def test_several_kernels_and_defines(wheels):
    source = "\n".join(
        f'extern "C" __global__ void {name}(int* y) {{ __shared__ int x[{size} * SIZE]; x[threadIdx.x] = y[0]; '
        "__syncthreads(); y[threadIdx.x] = x[threadIdx.x ^ 1]; }"
        for name, size in (("one", 1), ("two", 2))
    )
    found = build.compiled(source, ["two", "one"], defines=["SIZE=64"]).kernels
    assert list(found) == ["two", "one"]
    taken = {name: info.shared_bytes for name, info in found.items()}
    assert taken["two"] - taken["one"] == 256
    with pytest.raises(ConversionError, match="No kernel 'three' in the source; there are"):
        build.compiled(source, ["three"], defines=["SIZE=64"])


def test_spills_are_counted(wheels):
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) many(float* y, int n) {
        float x[64];
        for (int i = 0; i < 64; ++i) x[i] = y[i * 1024 + threadIdx.x];
        for (int j = 0; j < n; ++j)
            for (int i = 0; i < 64; ++i) x[i] = x[(i + 1) % 64] * x[(i * 7) % 64] + x[i];
        for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = x[i];
    }"""
    info = build.compiled(source, ["many"]).kernels["many"]
    assert info.registers <= 32
    assert info.spill_stores > 0
    assert info.spill_loads > 0


def test_a_broken_source(wheels):
    lines = GEMM.splitlines()
    line = next(i for i, text in enumerate(lines) if "BOLT_SHARED(shared)" in text)
    lines[line] = "    nonsense;"
    with pytest.raises(ConversionError) as found:
        build.compiled("\n".join(lines), ["gemm"])
    assert str(found.value) == f'NVRTC refused the source: kernel.cu:{line + 1}: identifier "nonsense" is undefined'


def test_an_unknown_architecture():
    for function in (build.compiled, build.compiled_by_nvcc):
        with pytest.raises(UnknownName, match="'sm_91'"):
            function("", [], "sm_91")


def test_without_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_wheels", lambda: [tmp_path])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    (tmp_path / "include").mkdir()
    with pytest.raises(MissingDependency, match=r"nvidia-cuda-runtime.*\n.*keras-efficient\[gpu\]"):
        build.compiled("", [])
    (tmp_path / "include/cuda_fp16.h").touch()
    with pytest.raises(MissingDependency, match="nvidia-cuda-cccl"):
        build.compiled("", [])
    (tmp_path / "include/nv").mkdir()
    (tmp_path / "include/nv/target").touch()
    real = builtins.__import__
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)

    def without_cuda(name, *more):
        if name.startswith("cuda"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without_cuda)
    with pytest.raises(MissingDependency, match="cuda-bindings"):
        build.compiled("", [])


def test_without_nvcc(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "_wheels", list)
    with pytest.raises(MissingDependency, match="nvidia-cuda-nvcc"):
        build.compiled_by_nvcc("", [])


def test_nvcc_compiles_the_same_source():
    try:
        build.nvcc()
    except MissingDependency as error:
        pytest.skip(f"{error.package} is not installed")
    found = build.compiled_by_nvcc("#include <cstdio>\n" + GEMM, ["gemm"])
    assert (found.kernels["gemm"].spill_stores, found.cubin[:4]) == (0, b"\x7fELF")
    assert b".target sm_90a" in found.ptx
    with pytest.raises(ConversionError, match=r"nvcc refused the source: kernel\.cu:1: "):
        build.compiled_by_nvcc("nonsense;", [])

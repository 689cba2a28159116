"""Calls of the driver through cuda-bindings, as they arrive in C: in a libcuda that is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="the driver is called through cuda-bindings")

SCRIPT = """
import numpy as np
from cuda.bindings import driver
from keras_efficient.export.bolt.runtime import CudaDevice

device = CudaDevice()
print(device.identity(), device.arch, device.cache_bytes)
numbers = device.copied(np.arange(24, dtype=np.float16).reshape(1, 2, 3, 4))
weights, out = device.weights(b"abcd"), device.buffer((1, 2, 3, 4), device.stream)
print("pointers", *(f"{one.pointer:x}" for one in (numbers, weights, out)))
kernel = device.function(b"\\x7fELF", "some_kernel", 1000)

def work(stream):
    device.launch(kernel, (3, 2, 1), 128, 1000, [numbers, weights, 7, -9, out], stream)

work(device.stream)
device.captured(work).replay(device.stream)
print("seconds", *device.timed(work, 3))
device.lend(out, device.stream, 5)
print("current", int(driver.cuCtxGetCurrent()[1]))
print(device.fetched(numbers).ravel().tolist() == list(range(24)))
del numbers, weights, out, work, device
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder, source = tmp_path_factory.mktemp("driver"), Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-shared", "-fPIC", "-w", str(source), "-o", str(folder / "libcuda.so.1"), "-ldl"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "ARGUMENTS": "ppiip", "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_a_device_says_of_itself(said):
    assert "{'name': 'stand-in', 'processors': 132, 'arch': 'sm_90a', 'driver': 13000} sm_90a 1048576" in said


def test_kernels_are_taken_and_launched(said):
    assert "kernel some_kernel" in said
    assert "attribute 8 1000" in said  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    numbers, weights, out = next(one for one in said if one.startswith("pointers")).split()[1:]
    launch = f"launch 3 2 1, 128 1 1, 1000 on 0x22: {numbers} {weights} 7 -9 {out}"
    assert said.count(launch) == 4  # plainly, into a graph, and both again to be timed


def test_graphs_are_captured_and_replayed(said):
    assert said.count("capture 0x22 1") == 2  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    # Plainly; then uploaded, measured for the first time, 0.05 s until clocks are up, and three times.
    assert said.count("graph 0x44 on 0x22") == 1 + 1 + 1 + 100 + 3
    assert "seconds 0.0005 0.0005 0.0005" in said


def test_memory_comes_back_and_is_freed_behind_its_readers(said):
    assert "True" in said
    assert "current 0" in said  # no context, as it was
    assert "0x5 waits" in said
    assert "0x22 waits" in said
    assert said.count("freed") == 3
    assert said.count("pool 1 0 1 0") == 1  # pinned, shared with nobody, on device 0
    assert said.count(f"pool keeps 4 {1 << 30}") == 1  # CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    assert said.count("pool is gone") == 1

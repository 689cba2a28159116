"""A super-resolution network as one GPU kernel, made and checked on a machine without a GPU.

    python examples/bolt.py [--size 1080x1920] [--target cuda-sm90a]

The zoo's network becomes a `.bolt`: its ONNX file, one fused kernel for all seven layers, machine code for one kind of
GPU. The kernel's own source then runs here on the CPU, thread by thread, on a small crop, beside the Keras model. On a
machine with such a GPU, `runtime.load(bundle)` takes arrays of PyTorch, JAX or CuPy. Writes to out/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from keras_efficient import export, zoo
from keras_efficient.export.bolt import runtime
from keras_efficient.export.bolt.bundle import Bundle


def main(out: Path, size: tuple[int, int], target: str) -> dict[str, float]:
    """Exports the network, runs its kernel; returns its relative error, and the ONNX file's SQNR."""
    out.mkdir(parents=True, exist_ok=True)
    model, path = zoo.load("sesr-m5-x2"), out / f"sesr-m5-x2-{target}.bolt"
    report = export.save(model, path, target=target, precision="float16", input_shape=size, overwrite=True)
    for kernel in report.kernels or ():
        print(
            f"{kernel['name']}: {kernel['layers']} layers, {kernel['registers']} registers, "
            f"{kernel['shared_bytes'] // 1024} KiB of shared memory, {kernel['estimated_ms']:.3f} ms estimated"
        )

    crop = np.random.default_rng(0).uniform(size=(1, 24, 40, 1)).astype(np.float16)
    wanted = np.asarray(model(crop.astype(np.float32)))
    bundle = Bundle.load(path)
    run = runtime.load(bundle, runtime.HostDevice())  # on a GPU: runtime.load(bundle)
    error = float(np.linalg.norm(run(crop).astype(np.float64) - wanted) / np.linalg.norm(wanted))
    print(f"relative error of the kernel {error:.1e}; ONNX file against Keras {report.sqnr_db:.0f} dB")

    for name, source in bundle.sources.items():
        (out / f"{name}.cu").write_text(source)
        print(f"{out / name}.cu: {len(source.splitlines())} lines to read")
    print(f"{path}: {report.bytes} bytes")
    return {"error": error, "sqnr_db": report.sqnr_db or 0.0}


def size_of(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=size_of, default=(1080, 1920), help="height and width, such as 1080x1920")
    parser.add_argument("--target", default="cuda-sm90a")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    main(arguments.out, arguments.size, arguments.target)

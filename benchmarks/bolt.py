"""Fused GPU kernels: their files and compile times on any machine, and, where there is a GPU, their speed beside peers.

python -m benchmarks.bolt                      what needs no GPU (TensorFlow and Keras)
python -m benchmarks.bolt --all                what needs one (PyTorch and JAX; neither TensorFlow nor Keras)
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.bolt_networks import BERT
from benchmarks.harness import Row

RNG = np.random.default_rng(0)
ARCHITECTURES = ("sm_80", "sm_90a")


def files(quick: bool) -> Iterator[Row]:
    """Fused ONNX files in ONNX Runtime against Keras, with weights of the zoo or random ones."""
    import onnxruntime

    from keras_efficient.export.bolt.half import to_float16
    from keras_efficient.export.bolt.partition import partition

    for name, make in _networks().items():
        if quick and name not in ("SESR-M3", "MLP"):
            continue
        proto, x, wanted = _converted(make())
        start = time.perf_counter()
        parted = partition(proto)
        seconds = time.perf_counter() - start
        for kind, bar, fused in (("float32", 1e-5, parted.model), ("float16", 2e-3, to_float16(parted.model))):
            session = onnxruntime.InferenceSession(fused.SerializeToString())
            found = session.run(None, {session.get_inputs()[0].name: x})[0]
            error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            details = {
                "regions": [len(region.layers) for region in parted.regions],
                "refused": [f"{one.node}: {one.reason}" for one in parted.refusals],
                "partition, s": round(seconds, 2),
            }
            what = f"{name}: fused ONNX file in {kind}, relative error against Keras"
            yield Row(what, float(f"{error:.2g}"), "", bar=f"≤ {bar:g}", reached=error <= bar, details=details)


def kernels(quick: bool) -> Iterator[Row]:
    """Bundles: how long they take, and that nothing spills."""
    from keras_efficient.export.bolt.assembling import assemble

    for name in ("SESR-M3", "SESR-M5", "SESR-M7", "SESR-M11", "SESR-XL", "FSRCNN"):
        if quick and name != "SESR-M3":
            continue
        proto, _, _ = _converted(_networks()[name]())
        for arch in ARCHITECTURES:
            start = time.perf_counter()
            bundle = assemble(proto, {proto.graph.input[0].name: (1, 1080, 1920, 1)}, arch=arch)
            seconds = time.perf_counter() - start
            found = bundle.tuning["kernels"]
            spills = sum(one["spills"] for one in found)
            covered = all(bundle.launches["regions"])
            yield Row(
                f"{name}, 1080p, {arch}: bundle from its ONNX file, kernels checked on the CPU",
                round(seconds, 1),
                "s",
                bar="≤ 60 s, no spills, every layer in a kernel",
                reached=seconds <= 60 and not spills and covered,
                details={"kernels": found, "refused": bundle.metadata["refused"]},
            )


def gpu(quick: bool) -> Iterator[Row]:
    """All that takes a GPU; without one, what was not measured."""
    from benchmarks import bolt_gpu

    path = harness.RESULTS / "bolt.json"
    file = json.loads(path.read_text()) if path.exists() else {"sections": {}, "rows": []}
    measured = {one["what"]: one for one in file["rows"] if one["section"] == "gpu" and one["ours"] is not None}
    for row in bolt_gpu.rows(quick):
        if row.why == bolt_gpu.NOT_MEASURED and measured:
            sys.exit(f"{row.why}. What {path.name} has was measured, and stays.")
        older = measured.get(row.what)
        yield row if row.ours is not None or older is None else _kept(older, row.why, file["sections"].get("gpu", {}))


def _kept(older: dict[str, Any], why: str, section: dict[str, Any]) -> Row:
    """A row of an earlier run, which says of which one, and why there is no newer one."""
    row = {name: value for name, value in older.items() if name != "section"}
    told = {name: section.get(name) for name in ("measured", "commit")}
    row["details"] = {"kept of an earlier run": {**told, "because": why}, **row["details"]}
    return Row(**row)


def _networks() -> dict[str, Callable[[], Any]]:
    import keras
    from keras import layers

    from keras_efficient import models, zoo

    def mlp() -> Any:
        inputs = keras.Input((64,))
        x = layers.Dense(256, activation="relu")(inputs)
        return keras.Model(inputs, layers.Dense(10)(layers.Dense(256, activation="gelu")(x)))

    def bert() -> Any:
        inputs = keras.Input((BERT[0][2],))
        x = layers.Dense(BERT[0][1], activation="gelu")(inputs)
        return keras.Model(inputs, layers.Dense(BERT[0][2])(x))

    def repvgg() -> Any:
        x = inputs = keras.Input((32, 32, 3))
        for filters in (48, 48, 96):
            branches = [layers.Conv2D(filters, size, strides=2, padding="same", use_bias=False)(x) for size in (3, 1)]
            x = layers.Add()([layers.BatchNormalization()(one) for one in branches])
            x = layers.ReLU()(x)
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))

    def applied(kind: Any) -> Callable[[], Any]:
        # Without the softmax, which hides errors.
        return lambda: kind(weights=None, input_shape=(64, 64, 3), classifier_activation=None)

    found: dict[str, Callable[[], Any]] = {
        f"SESR-{variant.upper()}": lambda variant=variant: zoo.load(f"sesr-{variant}-x2")
        for variant in ("m3", "m5", "m7", "m11")
    }
    # Blocks add what they compute to what they read: with wider weights their errors would grow from block to block.
    found["SESR-XL"] = lambda: _filled(models.SESR(2, "xl"), 0.5)
    found["FSRCNN"] = lambda: zoo.load("fsrcnn-x2")
    others = {
        "RepVGG-like": repvgg,
        "ResNet-50": applied(keras.applications.ResNet50),
        "MobileNetV2": applied(keras.applications.MobileNetV2),
        "MLP": mlp,
        "BERT-like": bert,
    }
    return found | {name: lambda make=make: _filled(make()) for name, make in others.items()}


def _filled(model: Any, width: float = 1.0) -> Any:
    """With random weights, slopes of both signs, biases and statistics: equal ones would hide mistakes."""
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        values = RNG.normal(size=variable.shape)
        if len(variable.shape) > 1:
            values *= width / np.sqrt(np.prod(variable.shape[:-1]))
        elif "variance" in variable.path:
            values = np.abs(values) + 0.5
        elif "gamma" in variable.path:
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        variable.assign(values)
    return model


def _converted(model: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """The ONNX file, an input, and what Keras gives for it."""
    import onnx

    from keras_efficient import export

    x = RNG.uniform(size=(1, *(size or 40 for size in model.input_shape[1:]))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export.save(model, path, samples=x)
        return onnx.load(path), x, np.asarray(model(x))


SECTIONS = {"files": files, "kernels": kernels}

if __name__ == "__main__":
    if "--all" in sys.argv:
        sys.argv.remove("--all")
        SECTIONS = {"gpu": gpu}
    harness.main("bolt", SECTIONS)

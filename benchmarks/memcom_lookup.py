"""Looks up 64 ids of 480,000 × 128 and takes their mean, in LiteRT on one thread: time, size of the file, memory.

A large float32 table is put into a small converted file by hand, since the converter takes minutes for it.

    python -m benchmarks.memcom_lookup FILE     prints the memory that the file's table takes once it was all read
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Row

ENTITIES, WIDTH, IDS = 480_000, 128, 64
OPTIONS = {
    "MEmCom 16×, float32": {"compression": 16},
    "MEmCom 25×, float32": {"compression": 25.1},
    "MEmCom 100×, int8": {"compression": 101, "bits": 8, "scalar_bits": 8},
    "MEmCom subspace 16×, 2 bits": {"compression": 16, "form": "subspace", "bits": 2},
    "MEmCom codebooks 32×, int8": {"compression": 32, "form": "codebooks", "bits": 8},
}
BARRED = ("MEmCom 16×, float32", "MEmCom 25×, float32", "MEmCom 100×, int8")  # the form for fast lookups
TINY = "tiny"
EMBEDDING, PLAIN = "Embedding, as Keras exports it", "Embedding, as this package exports it"
REASON = "its rows leave the second-level cache as a whole table's do, and each id fetches a scalar besides"


def rows(rounds: int) -> Iterator[Row]:
    """Files, times in turns with new ids in each call, times with the same ids, memory."""
    with tempfile.TemporaryDirectory() as folder:
        files = _files(Path(folder))
        for fresh in (True, False):
            times = _times({name: path for name, path in files.items() if name != TINY}, rounds, fresh)
            how = "new random ids in every call" if fresh else "the same ids again"
            for name in (*OPTIONS, PLAIN):
                ours, peer = (times[n]["median"] for n in (name, EMBEDDING))
                slower = "" if ours <= peer else f"{100 * (ours / peer - 1):.1f} % slower in this run: {REASON}"
                bar = {"bar": "≤ 1×", "reached": not slower, "why": slower} if fresh and name in BARRED else {}
                yield Row(
                    f"lookup of 64 ids + mean, 480,000 × 128, LiteRT, 1 thread, {how}: {name} against {EMBEDDING}",
                    round(ours, 2),
                    "µs",
                    peer=round(peer, 2),
                    ratio=round(ours / peer, 3),
                    details={"ours": times[name], "peer": times[EMBEDDING]},
                    **bar,
                )
        whole = files[EMBEDDING].stat().st_size
        for name in OPTIONS:
            size = files[name].stat().st_size
            least = {"MEmCom 25×, float32": 25, "MEmCom 100×, int8": 100}.get(name)
            bar = {} if least is None else {"bar": f"≥ {least}× smaller", "reached": whole / size >= least}
            yield Row(
                f"file of the lookup: {name} against Embedding",
                round(size / 1e6, 3),
                "MB",
                peer=round(whole / 1e6, 1),
                ratio=round(whole / size, 2),
                **bar,
            )
        # What a table of half a megabyte takes besides that is the runtime's own.
        runtime = _memory(files[TINY]) - files[TINY].stat().st_size / 1e6
        for name in OPTIONS:
            ours, peer = _memory(files[name]) - runtime, _memory(files[EMBEDDING]) - runtime
            share = files[name].stat().st_size / whole
            bar = {"bar": "≤ 1.1 × its share of the file", "reached": ours / peer <= 1.1 * share}
            yield Row(
                f"memory once the whole table was read, without the runtime's own: {name} against Embedding",
                round(ours, 1),
                "MB",
                peer=round(peer, 1),
                ratio=round(ours / peer, 4),
                details={"share_of_file": round(share, 4), "runtime_mb": round(runtime, 1)},
                **(bar if name in BARRED else {}),
            )


def _files(folder: Path) -> dict[str, Path]:
    """The exported files; the two of `Embedding` are made of small ones."""
    import keras

    from keras_efficient import export, layers

    def model(table: keras.Layer) -> keras.Model:
        ids = keras.Input((IDS,), dtype="int32", name="ids")
        return keras.Model(ids, keras.ops.mean(table(ids), axis=1))

    files = {}
    for number, (name, options) in enumerate(OPTIONS.items()):
        files[name] = folder / f"{number}.tflite"
        ids = keras.Input((IDS,), dtype="int32", name="ids")
        pooled = layers.MEmComEmbedding(ENTITIES, WIDTH, combiner="mean", **options)(ids)
        export.save(keras.Model(ids, pooled), files[name], input_shape=(IDS,))
    files[TINY] = folder / "tiny.tflite"
    tiny = model(layers.MEmComEmbedding(ENTITIES, WIDTH, hash_size=8, bits=8, scalar_bits=8))
    export.save(tiny, files[TINY], input_shape=(IDS,))
    small = model(keras.layers.Embedding(1000, WIDTH))
    export.save(small, folder / "plain.tflite", input_shape=(IDS,))
    small.save(folder / "small.keras")
    script = (
        "import sys, keras, tensorflow as tf; m = keras.saving.load_model(sys.argv[1]);"
        "f = tf.function(lambda i: m(i), input_signature=[tf.TensorSpec((1, 64), tf.int32, name='ids')]);"
        "c = tf.lite.TFLiteConverter.from_concrete_functions([f.get_concrete_function()]);"
        "open(sys.argv[2], 'wb').write(c.convert())"
    )
    command = [sys.executable, "-c", script, str(folder / "small.keras"), str(folder / "keras.tflite")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    for name, file in ((EMBEDDING, "keras.tflite"), (PLAIN, "plain.tflite")):
        files[name] = _enlarged(folder / file)
    return files


def _enlarged(path: Path) -> Path:
    """The file with a table of `ENTITIES` rows in the place of the small one; constants made of its size follow."""
    from keras_efficient.export import flatbuffer

    model = flatbuffer.unpack(path.read_bytes())
    table = np.random.default_rng(0).normal(size=(ENTITIES, WIDTH)).astype("float32")
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or not len(data):
            continue
        if list(tensor.shape) == [1000, WIDTH]:
            tensor.shape = [ENTITIES, WIDTH]
            model.buffers[tensor.buffer].data = table.view(np.uint8).ravel()
        elif len(data) == 4 and np.frombuffer(bytes(data), np.int32)[0] == 1000:
            model.buffers[tensor.buffer].data = np.frombuffer(np.int32(ENTITIES).tobytes(), np.uint8)
    path.write_bytes(flatbuffer.pack(model))
    return path


def _times(files: dict[str, Path], rounds: int, fresh: bool) -> dict[str, dict[str, float]]:
    """Microseconds of `invoke`: median and tenth percentile, the files in turns."""
    runs = {name: _opened(path) for name, path in files.items()}
    random = np.random.default_rng(1)
    same = random.integers(0, ENTITIES, (1, IDS)).astype(np.int32)
    found: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 20):
        for name, (interpreter, place) in runs.items():
            interpreter.set_tensor(place, random.integers(0, ENTITIES, (1, IDS)).astype(np.int32) if fresh else same)
            started = time.perf_counter()
            interpreter.invoke()
            if turn >= 20:
                found[name].append(1e6 * (time.perf_counter() - started))
    return {
        name: {"median": round(statistics.median(times), 2), "p10": round(float(np.percentile(times, 10)), 2)}
        for name, times in found.items()
    }


def _opened(path: Path) -> tuple[object, int]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter, interpreter.get_input_details()[0]["index"]


def _memory(path: Path) -> float:
    """Megabytes that a process of its own grows by."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memcom_lookup", str(path)], capture_output=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    path = Path(sys.argv[1])
    from ai_edge_litert.interpreter import Interpreter  # noqa: F401  its own memory does not count

    before = harness.memory()
    interpreter, place = _opened(path)
    everything = np.arange(ENTITIES, dtype=np.int32).reshape(-1, 1, IDS)
    for ids in everything:
        interpreter.set_tensor(place, ids)
        interpreter.invoke()
    print(json.dumps(harness.memory() - before))


if __name__ == "__main__":
    main()

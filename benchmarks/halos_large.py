"""An output layer of 670,091 classes: learning, quality, time in LiteRT and TensorFlow, memory, instructions.

    python -m benchmarks.halos_large learn PATH           learns an index, to PATH.npz; prints measures, seconds, memory
    python -m benchmarks.halos_large files PATH FOLDER    exports the learned layer, and writes the dense files by hand
    python -m benchmarks.halos_large convert MODEL FILE PRECISION [SHAPE]
    python -m benchmarks.halos_large time FOLDER          times files in turns, with a new query in every call
    python -m benchmarks.halos_large batches FOLDER       times files whose batch is free, by batch
    python -m benchmarks.halos_large call PATH            times calls of Keras models, dense and from candidates
    python -m benchmarks.halos_large quality PATH         P@k on test queries
    python -m benchmarks.halos_large precision FILE DATA  P@1 of a file on DATA/queries.npy and labels.npy
    python -m benchmarks.halos_large memory FILE          anonymous memory that a thousand queries take
    python -m benchmarks.halos_large run FILE COUNT       so many queries, to be watched from outside

Each prints a line of JSON. The converter takes minutes, and many gigabytes, for a dense layer of this size, so the
dense files are small ones that are enlarged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks import halos_planted, harness

BUDGET, TARGET = 0.01, 0.997  # of validation data; test data is asked for 0.995
TRAINING, VALIDATION, TEST = 500_000, 5_000, 20_000  # queries
K = 5
FEATURES, WORDS = 135_909, 75  # of Amazon-670K, and how many an input has
SMALL = 1009  # classes of the file that is enlarged
BATCHES = (1, 8, 64, 256, 1024)
ANY_BATCH = ("candidates, 8 bits, any batch", "dense, float32", "dense, int8")


def run(*arguments: Any, backend: str = "tensorflow") -> dict[str, Any]:
    """One of the commands above in a process of its own, whose memory is its own too."""
    command = [sys.executable, "-m", "benchmarks.halos_large", *map(str, arguments)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _layer(planted: halos_planted.Planted, **options: Any) -> tuple[Any, Any]:
    """A model of nothing but the output layer, and the layer."""
    import keras

    from keras_efficient.layers import HALOSOutput

    x = keras.Input((halos_planted.DIM,), name="x")
    layer = HALOSOutput(len(planted.bias), K, name="classes", **options)
    model = keras.Model(x, layer(x))
    layer.set_weights([planted.kernel, planted.bias])
    return model, layer


def _index(path: Path) -> Any:
    from keras_efficient.layers.halos import Index
    from keras_efficient.layers.halos.plans import Plan

    with np.load(f"{path}.npz") as arrays:
        plan = Plan.from_config(json.loads(str(arrays["plan"])))
        return Index(plan, {name: arrays[name] for name in arrays.files if name != "plan"})


def learn(path: Path) -> dict[str, Any]:
    from keras_efficient import extreme

    planted = halos_planted.planted()
    parts = planted.queries(TRAINING, 1), planted.queries(VALIDATION, 2)
    model, layer = _layer(planted)
    del planted
    before = _peak()
    found = extreme.learn_index(model, parts[0], validation=parts[1], budget=BUDGET, target=TARGET, method="cells")
    index = layer.index
    np.savez(f"{path}.npz", plan=json.dumps(index.plan.to_config()), **index.arrays)
    measures = found.measures
    return {
        "seconds": found.seconds,
        "gigabytes": round(_peak(), 2),
        "gigabytes before": round(before, 2),
        "neurons": measures.neurons,
        "share": round(measures.share, 5),
        "kept on validation": round(measures.kept(), 5),
        "label recall": [round(x, 4) for x in (measures.label_recall, measures.head, measures.middle, measures.tail)],
        "dial": {str(neurons): round(m.kept(), 5) for neurons, m in sorted(found.dial.items())},
        "plan": index.plan.to_config(),
    }


def quality(path: Path) -> dict[str, Any]:
    from keras_efficient import extreme
    from keras_efficient.extreme.measures import DEPTH, full_answers
    from keras_efficient.extreme.queries import Queries

    planted = halos_planted.planted()
    x, y = planted.queries(TEST, 3)
    _, layer = _layer(planted)
    index = _index(path)
    layer.set_index(index)
    rows = np.concatenate([planted.kernel, planted.bias[:, None]], axis=1)
    queries = Queries(x, y[:, 0], np.arange(len(x) + 1, dtype=np.int64))
    import keras

    def candidates(vectors: np.ndarray) -> np.ndarray:
        return keras.ops.convert_to_numpy(layer.candidates(vectors))

    full = full_answers(rows, queries, DEPTH)
    found = extreme.measure(candidates, index.plan.neurons, rows, queries, full=full)
    counts = np.bincount(planted.queries(TRAINING, 1)[1][:, 0], minlength=len(rows))
    head = np.argsort(-counts, kind="stable")[: index.plan.neurons].astype(np.int32)
    popular = extreme.measure(lambda v: np.tile(head, (len(v), 1)), len(head), rows, queries, full=full)
    lost = found.full_precision[1] - found.precision[1]
    return {
        "queries": len(x),
        "full P@1": round(found.full_precision[1], 5),
        "P@1": round(found.precision[1], 5),
        "kept": round(found.kept(), 5),
        # Nearly every answer that differs was right before, so what is lost is counted, and its error is a count's.
        "standard error": round((max(lost, 0) * len(x)) ** 0.5 / len(x) / found.full_precision[1], 5),
        "kept, P@5": round(found.kept(5), 5),
        "label recall": round(found.label_recall, 4),
        "the most frequent only": round(popular.kept(), 4),
    }


def files(path: Path, folder: Path) -> dict[str, Any]:
    """Files by the command line: seconds and peak of memory are those of the conversion."""
    planted, index, found = halos_planted.planted(), _index(path), {}
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "queries.npy", planted.queries(2000, 3)[0])
    for bits, precision in ((32, "float32"), (8, "float32"), (8, "dynamic"), (4, "float32")):
        model, layer = _layer(planted, bits=bits)
        layer.set_index(index)
        name = f"candidates, {bits} bits" + (", dynamic" if precision == "dynamic" else "")
        model.save(folder / "model.keras")
        shape = str(halos_planted.DIM)
        found[name] = run("convert", folder / "model.keras", folder / f"{name}.tflite", precision, shape)
        if (bits, precision) == (8, "float32"):
            run("convert", folder / "model.keras", folder / f"{ANY_BATCH[0]}.tflite", precision)
        del model, layer
    (folder / "model.keras").unlink()
    _whole_files(planted, index, folder)
    _dense_files(planted, folder)
    return found


def _whole(units: int, **options: Any) -> tuple[Any, Any, Any]:
    """A classifier of bags of words whose output layer is asked for a query that is given: the hidden layers are not
    trained, and what they give would lead every query to the same few classes. Also the layer and the hidden layers."""
    import keras

    from keras_efficient import models
    from keras_efficient.layers import HALOSOutput

    words = models.ExtremeClassifier(FEATURES, units, output={"k": K})
    hidden = keras.Model(words.input, words.layers[-1].input)
    query = keras.Input((halos_planted.DIM,), name="query")
    layer = HALOSOutput(units, K, name="classes", **options)
    outputs = layer(1e-30 * hidden.output + query)
    return keras.Model({**words.input, "query": query}, outputs), layer, hidden


def _whole_files(planted: halos_planted.Planted, index: Any, folder: Path) -> None:
    from keras_efficient import export

    whole, layer, hidden = _whole(len(planted.bias), bits=8)
    layer.set_weights([planted.kernel, planted.bias])
    layer.set_index(index)
    for model, name in ((whole, "whole, candidates, 8 bits"), (hidden, "hidden layers alone")):
        shapes = {"ids": (WORDS,), "weights": (WORDS,), "query": (halos_planted.DIM,)}
        shapes = {name: shape for name, shape in shapes.items() if name in model.input}
        export.save(model, folder / f"{name}.tflite", input_shape=shapes, overwrite=True, verify=False)


def convert(model: Path, file: Path, precision: Path, shape: Path | None = None) -> dict[str, Any]:
    """Seconds and peak of memory of the program that exports. A child's peak is its parent's too: call a small one."""
    command = [sys.executable, "-m", "keras_efficient.cli", "export", str(model), "-o", str(file), "--force", "--json"]
    command += ["--precision", str(precision), *(["--input-shape", str(shape)] if shape else [])]
    started = time.time()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        output.seek(0)
        report = json.loads(output.read())
    return {
        "seconds": round(time.time() - started, 1),
        "peak gigabytes": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "megabytes": round(report["bytes"] / 1e6, 1),
        "megabytes read": round(report["bytes_read"] / 1e6, 3),
    }


def _dense_files(planted: halos_planted.Planted, folder: Path) -> None:
    import keras

    from keras_efficient import export
    from keras_efficient.layers import HALOSOutput

    x = keras.Input((halos_planted.DIM,), name="x")
    alone = keras.Model(x, HALOSOutput(SMALL, K, name="classes")(x))
    whole, _, _ = _whole(SMALL)
    for name, model, precision in (
        ("dense, float32", alone, "float32"),
        ("dense, int8", alone, "dynamic"),
        ("whole, dense, float32", whole, "float32"),
    ):
        small = folder / "small.tflite"
        export.save(model, small, precision=precision, overwrite=True, verify=False)
        (folder / f"{name}.tflite").write_bytes(_enlarged(small.read_bytes(), planted))
        small.unlink()


def _enlarged(data: bytes, planted: halos_planted.Planted) -> bytes:
    """The file with the planted rows and biases in the place of the small ones."""
    from keras_efficient.export import flatbuffer

    model, units = flatbuffer.unpack(data), len(planted.bias)
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            shape = list(tensor.shape) if tensor.shape is not None else []
            if SMALL not in shape:
                continue
            tensor.shape = [units if size == SMALL else size for size in shape]
            if tensor.shapeSignature is not None:
                tensor.shapeSignature = [units if size == SMALL else size for size in tensor.shapeSignature]
            contents = model.buffers[tensor.buffer].data
            if contents is None or not len(contents):
                continue
            if shape == [SMALL]:
                values = planted.bias
            elif len(contents) == 4 * SMALL * halos_planted.DIM:
                values = planted.kernel
            else:
                scale = np.abs(planted.kernel).max(axis=1) / 127
                values = np.round(planted.kernel / scale[:, None]).astype(np.int8)
                many = tensor.quantization.scale is not None and len(tensor.quantization.scale) == SMALL
                if not many:
                    scale = np.array([np.abs(planted.kernel).max() / 127], np.float32)
                    values = np.round(planted.kernel / scale).astype(np.int8)
                tensor.quantization.scale = scale.astype(np.float32)
                tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
            model.buffers[tensor.buffer].data = np.ascontiguousarray(values).view(np.uint8).ravel()
    return flatbuffer.pack(model)


class _File:
    """A file that answers one query a call."""

    def __init__(self, path: Path):
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=str(path), num_threads=1)
        self.inputs = self.interpreter.get_input_details()
        self.resize(1)
        wide = [place["shape_signature"][1] == halos_planted.DIM for place in self.inputs]
        self._queries = [place for place, is_query in zip(self.inputs, wide, strict=True) if is_query]
        self._bags = [place for place, is_query in zip(self.inputs, wide, strict=True) if not is_query]
        self.random = np.random.default_rng(0)

    def resize(self, batch: int) -> None:
        """Lets it take so many queries at once."""
        for place in self.inputs:
            if -1 in place["shape_signature"]:
                width = WORDS if place["shape_signature"][1] == -1 else place["shape_signature"][1]
                self.interpreter.resize_tensor_input(place["index"], [batch, width])
        self.interpreter.allocate_tensors()

    def bag(self) -> list[np.ndarray]:
        """What it takes besides queries: random words."""
        words = self.random.integers(1, FEATURES, (1, WORDS)).astype(np.int32)
        return [words if place["dtype"] == np.int32 else np.ones((1, WORDS), np.float32) for place in self._bags]

    def __call__(self, query: np.ndarray, bag: Sequence[np.ndarray] = ()) -> Any:
        """Answers to a query, or to several of a file that has one input: from NumPy to NumPy."""
        for place, value in zip(self._bags, bag, strict=True):
            self.interpreter.set_tensor(place["index"], value)
        for place in self._queries:
            self.interpreter.set_tensor(place["index"], np.atleast_2d(query))
        self.interpreter.invoke()
        return self.answer()

    def answer(self) -> Any:
        return [self.interpreter.get_tensor(place["index"]) for place in self.interpreter.get_output_details()]


def time_files(folder: Path) -> dict[str, Any]:
    """Median microseconds of a call from NumPy to NumPy, the files in turns, the dense ones in fewer.

    All queries are asked once before: of a file that is mapped, each page is a fault when it is first read.
    """
    queries = np.load(folder / "queries.npy")
    opened = {path.stem: _File(path) for path in sorted(folder.glob("*.tflite"))}
    for name, file in opened.items():
        for query in queries if "dense" not in name else ():
            file(query, file.bag())
    times: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(15):
        for name, file in opened.items():
            for call in range(2 if "dense" in name else 40):
                query, bag = queries[(turn * 40 + call) % len(queries)], file.bag()
                started = time.perf_counter()
                file(query, bag)
                if turn >= 2:
                    times[name].append(1e6 * (time.perf_counter() - started))
    return {
        name: {"median": round(statistics.median(values), 1), "p10": round(float(np.percentile(values, 10)), 1)}
        for name, values in times.items()
    }


def time_batches(folder: Path) -> dict[str, Any]:
    """Median milliseconds of `invoke` on one thread by batch, for files whose batch is free."""
    queries = np.load(folder / "queries.npy")
    opened = {name: _File(folder / f"{name}.tflite") for name in ANY_BATCH}
    found: dict[str, Any] = {}
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in opened}
        for file in opened.values():
            file.resize(batch)
        for turn in range(3 if batch > 64 else 4 if batch > 8 else 16):
            for name, file in opened.items():
                part = np.roll(queries, -turn * batch, axis=0)[:batch]
                started = time.perf_counter()
                file(part)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - started))
        found[str(batch)] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return found


def precision(file: Path, data: Path) -> dict[str, Any]:
    """P@1 of a file."""
    queries, labels, opened = np.load(data / "queries.npy"), np.load(data / "labels.npy"), _File(file)
    right = 0
    for query, label in zip(queries, labels, strict=True):
        classes = next(answer for answer in opened(query) if answer.dtype == np.int32)
        right += int(classes[0, 0] == label)
    return {"queries": len(queries), "P@1": round(right / len(queries), 5)}


def call(path: Path) -> dict[str, Any]:
    """Median milliseconds of a compiled call of the deployed models on one thread, by batch.

    With `keras_rs` installed of its search among all rows too.
    """
    import keras

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # JAX has no other way to one thread
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    planted = halos_planted.planted()
    x = planted.queries(max(BATCHES), 3)[0]
    _, layer = _layer(planted)
    functions = {"dense": _compiled(layer.deploy())}
    if importlib.util.find_spec("keras_rs"):
        functions["keras_rs"] = _compiled(_brute_force(planted))
    layer.set_index(_index(path))
    functions["candidates"] = _compiled(layer.deploy())
    del planted, layer
    found: dict[str, Any] = {}
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in functions}
        calls = 0
        for turn in range(3 if batch > 8 else 12):
            for name, function in functions.items():
                for _ in range(10 if name == "candidates" and batch <= 8 else 1):
                    calls += 1
                    part = np.roll(x, -calls * batch, axis=0)[:batch]  # queries that were not asked just now
                    started = time.perf_counter()
                    function(part)
                    if turn:
                        times[name].append(1e3 * (time.perf_counter() - started))
        found[str(batch)] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return found


def _compiled(model: Any) -> Callable[[Any], Any]:
    """A function from NumPy to NumPy."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        function = tf.function(model, reduce_retracing=True)
        return lambda x: [np.asarray(y) for y in keras.tree.flatten(function(tf.constant(x)))]
    import jax

    variables = [[v.value for v in some] for some in (model.trainable_variables, model.non_trainable_variables)]
    jitted = jax.jit(lambda trainable, other, x: model.stateless_call(trainable, other, x)[0])
    return lambda x: [np.asarray(y) for y in keras.tree.flatten(jitted(*variables, x))]


def _brute_force(planted: halos_planted.Planted) -> Any:
    import keras
    import keras_rs

    rows = np.concatenate([planted.kernel, planted.bias[:, None]], axis=1)
    x = keras.Input((halos_planted.DIM,))
    retrieval = keras_rs.layers.BruteForceRetrieval(rows, k=K)
    wide = keras.ops.pad(x, [[0, 0], [0, 1]], constant_values=1.0)
    return keras.Model(x, retrieval(wide))


def memory(file: Path) -> dict[str, Any]:
    """Megabytes of anonymous memory: after opening the file, and what a thousand queries add."""
    queries = np.load(file.parent / "queries.npy")
    opened = _File(file)
    opened(queries[0])
    before = harness.memory("RssAnon")
    for query in queries[:1000]:
        opened(query)
    return {"opened": round(before, 1), "added": round(harness.memory("RssAnon") - before, 1)}


def run_queries(file: Path, count: int) -> dict[str, Any]:
    queries = np.load(file.parent / "queries.npy")
    opened = _File(file)
    for query in queries[:count]:
        opened(query)
    return {"queries": count}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "learn": learn,
    "files": files,
    "convert": convert,
    "time": time_files,
    "batches": time_batches,
    "call": call,
    "quality": quality,
    "precision": precision,
    "memory": memory,
    "run": lambda file, count: run_queries(file, int(str(count))),
}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*map(Path, sys.argv[2:]))))

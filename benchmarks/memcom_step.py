"""Times a training step of a compressed and of a whole embedding, on the backend of this process.

    KERAS_BACKEND=tensorflow python -m benchmarks.memcom_step [--rounds 15]

Prints one JSON line: milliseconds of a step of `model.fit` (medians, in turns) and bytes of weights and optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_efficient import layers

ENTITIES, WIDTH, BATCH, LENGTH, STEPS = 1_000_000, 64, 256, 64, 4


def model(table: keras.Layer) -> keras.Model:
    """Mean of the vectors, one dense layer: the table is what costs."""
    ids = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(table(ids))
    network = keras.Model(ids, keras.layers.Dense(1)(x))
    network.compile(keras.optimizers.Adam(1e-3), "mse")
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    random = np.random.default_rng(0)
    models = {
        "scaled": model(layers.MEmComEmbedding(ENTITIES, WIDTH, compression=16)),
        "subspace": model(layers.MEmComEmbedding(ENTITIES, WIDTH, compression=16, form="subspace", bits=2)),
        "codebooks": model(layers.MEmComEmbedding(ENTITIES, WIDTH, compression=16, form="codebooks", bits=8)),
        "peer": model(keras.layers.Embedding(ENTITIES, WIDTH)),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        ids = random.integers(0, ENTITIES, (BATCH * STEPS, LENGTH)).astype("int32")
        targets = random.normal(size=(BATCH * STEPS, 1)).astype("float32")
        for name, network in models.items():
            started = time.perf_counter()
            network.fit(ids, targets, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
            if turn:  # the first one compiles
                times[name].append((time.perf_counter() - started) / STEPS)
    kept = {
        name: sum(keras.ops.convert_to_numpy(v).nbytes for v in (*network.variables, *network.optimizer.variables))
        for name, network in models.items()
    }
    print(json.dumps({"ms": {name: 1e3 * statistics.median(found) for name, found in times.items()}, "bytes": kept}))


if __name__ == "__main__":
    main()

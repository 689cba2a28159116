"""Times training steps of Bayesian layers beside those of tfp.layers.

    python -m benchmarks.bayesian_layers [--rounds 30]

The two need two Keras', so each has a process of its own; they are told to run in turn, and the shortest of all runs
counts, since this measures layers and not what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.harness import Row

WIDTHS, BATCH, STEPS, EXAMPLES = (200, 200, 10), 128, 10, 60_000
BARS = {"flipout": 1.0, "reparameterization": 1.0, "local_reparameterization": 1.1}
PEERS = {
    "flipout": "DenseFlipout",
    "reparameterization": "DenseReparameterization",
    "local_reparameterization": "DenseLocalReparameterization",
}


def layers(quick: bool) -> Iterator[Row]:
    """Milliseconds of a step of `fit`, MLP 784-200-200-10, Adam."""
    rounds = 3 if quick else 30
    shortest = measured(rounds)
    for name, bar in BARS.items():
        (ours, our_processor), (peer, peer_processor) = (shortest[kind][name] for kind in ("ours", "peer"))
        ratio = ours / peer
        yield Row(
            f"training step, {name}, MLP 784-200-200-10, batch {BATCH}, Adam; ours over tfp.layers",
            round(ours, 3),
            "ms",
            peer=round(peer, 3),
            ratio=round(ratio, 3),
            bar=f"≤ {bar}",
            reached=ratio <= bar,
            why="" if ratio <= bar else "measured slower",
            details={
                "rounds": rounds,
                "steps of a round": STEPS,
                "peer": f"tfp.layers.{PEERS[name]} in tf_keras",
                "processor's ms": {"ours": round(our_processor, 3), "peer": round(peer_processor, 3)},
            },
        )


def measured(rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Shortest milliseconds of a step, of each kind and estimator: by the clock, and of the processor."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "benchmarks.bayesian_layers", "--serve"]
    servers = {
        kind: subprocess.Popen(
            [*command, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | ({"TF_USE_LEGACY_KERAS": "1"} if kind == "peer" else {}),
        )
        for kind in ("ours", "peer")
    }
    endless = (float("inf"), float("inf"))
    found = {kind: dict.fromkeys(BARS, endless) for kind in servers}
    try:
        for server in servers.values():
            _answer(server)  # compiled
        for _ in range(rounds):
            for name in BARS:
                for kind, server in servers.items():
                    assert server.stdin is not None
                    server.stdin.write(f"{name}\n")
                    server.stdin.flush()
                    clock, processor = found[kind][name]
                    now = _answer(server)
                    found[kind][name] = min(clock, now[0]), min(processor, now[1])
    finally:
        for server in servers.values():
            server.kill()
            server.wait()
    return found


def _answer(server: subprocess.Popen[str]) -> tuple[float, float]:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("A process that measures has ended; its error is above.")
    clock, processor = json.loads(line)
    return clock, processor


def serve(kind: str) -> None:
    """Answers each name of an estimator with the milliseconds of a step."""
    models = {name: (_ours if kind == "ours" else _peer)(name) for name in BARS}
    random = np.random.default_rng(0)
    import tensorflow as tf

    x = random.normal(size=(BATCH * STEPS, 784)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, random.integers(0, 10, len(x)))).batch(BATCH).cache()
    for model in models.values():
        _run(model, data)
        _run(model, data)
    print(json.dumps([0.0, 0.0]), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(models[line.strip()], data)), flush=True)


def _run(model: Any, data: Any) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    model.fit(data, epochs=1, verbose=0)
    return (time.perf_counter() - start) / STEPS * 1e3, (time.process_time() - used) / STEPS * 1e3


def _ours(estimator: str) -> Any:
    import keras

    from keras_efficient.layers import BayesianDense

    *hidden, last = WIDTHS
    options: dict[str, Any] = {"estimator": estimator, "num_data": EXAMPLES}
    some = [BayesianDense(width, activation="relu", **options) for width in hidden]
    model = keras.Sequential([keras.Input((784,)), *some, BayesianDense(last, **options)])
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _peer(estimator: str) -> Any:
    import tensorflow_probability as tfp
    import tf_keras

    def divergence(posterior: Any, prior: Any, _: Any) -> Any:
        return tfp.distributions.kl_divergence(posterior, prior) / EXAMPLES

    *hidden, last = WIDTHS
    kind = getattr(tfp.layers, PEERS[estimator])
    some = [kind(width, activation="relu", kernel_divergence_fn=divergence) for width in hidden]
    model = tf_keras.Sequential([tf_keras.Input((784,)), *some, kind(last, kernel_divergence_fn=divergence)])
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(1e-3), loss)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", choices=("ours", "peer"), help="measure this kind, told by standard input")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    found = measured(arguments.rounds)
    for name, bar in BARS.items():
        for number, what in enumerate(("clock", "processor")):
            ours, peer = found["ours"][name][number], found["peer"][name][number]
            print(
                f"{name}: {ours:.2f} ms, tfp.layers {peer:.2f} ms, ratio {ours / peer:.2f} by the {what} (bar ≤ {bar})"
            )


if __name__ == "__main__":
    main()

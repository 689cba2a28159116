"""Speed of posteriors: all members asked at once, and trained at once. Part of `benchmarks.ursabench`.

python -m benchmarks.bayesian_speed jax     the JAX half of `predict`, as JSON; `predict` runs it itself
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.harness import Row, medians
from keras_efficient import models
from keras_efficient.bayes import SGHMC, Data, Members, StackedPosterior, trained

__all__ = ["predict", "together"]

MEMBERS, BATCH = 8, 256
TRAINED, STEPS = 16, 100


def mlp() -> keras.Model:
    return models.MLP(200, 2, input_shape=(784,))


def cnn() -> keras.Model:
    """Two convolutions on 28 × 28: about a million multiplications."""
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(8, 3, strides=2, activation="relu")(inputs)
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def digits() -> keras.Model:
    return models.MLP(32, 1, input_shape=(64,))


NETWORKS: dict[str, tuple[Callable[[], keras.Model], float]] = {"MLP200": (mlp, 15.0), "small CNN": (cnn, 4.0)}


def predict(quick: bool) -> Iterator[Row]:
    """A batch asked of all members: one call, against a loop over Keras models."""
    for name, (make, bar) in NETWORKS.items():
        ours, loop, details = _asked(make, quick, jitted=False)
        yield Row(
            f"{name}, {MEMBERS} members, batch {BATCH}, TensorFlow: predict against a loop of model(x)",
            round(1e3 * ours, 2),
            "ms",
            round(1e3 * loop, 2),
            round(loop / ours, 2),
            f"≥ {bar:g}×",
            loop / ours >= bar,
            "" if loop / ours >= bar else _roofline(details),
            details,
        )
    for name, (ours, loop) in _on_jax(quick).items():
        yield Row(
            f"{name}, {MEMBERS} members, batch {BATCH}, JAX: predict against a loop of jitted members",
            round(1e3 * ours, 2),
            "ms",
            round(1e3 * loop, 2),
            round(loop / ours, 2),
            "≥ 1× (5 % of noise)",
            loop / ours >= 0.95,
        )


def _asked(make: Callable[[], keras.Model], quick: bool, *, jitted: bool) -> tuple[float, float, dict[str, Any]]:
    """Medians of ours and of the loop, seconds."""
    members = Members.new(make, MEMBERS, 0)
    posterior = StackedPosterior(members)
    networks = [_network(make, members, index) for index in range(MEMBERS)]
    x = np.random.default_rng(0).normal(size=(BATCH, *members.model.input_shape[1:])).astype(np.float32)
    if jitted:
        import jax

        def call(network: keras.Model) -> Callable[[Any], Any]:
            both = (
                [one.value for one in some] for some in (network.trainable_variables, network.non_trainable_variables)
            )
            program = jax.jit(lambda t, o, x: ops.softmax(network.stateless_call(t, o, x, training=False)[0]))
            mine = tuple(both)
            return lambda x: program(*mine, x)
    else:

        def call(network: keras.Model) -> Callable[[Any], Any]:
            return lambda x: ops.softmax(network(x, training=False))

    calls = [call(network) for network in networks]

    def loop() -> np.ndarray:
        tensor = ops.convert_to_tensor(x)
        return np.mean([ops.convert_to_numpy(one(tensor)) for one in calls], axis=0)

    def ours() -> np.ndarray:
        return posterior.predict(x, batch_size=BATCH, reduce="mean")

    np.testing.assert_allclose(ours(), loop(), atol=1e-5)
    found = medians({"ours": ours, "loop": loop}, rounds=10 if quick else 200, warmups=5)
    multiplications = _multiplications(members.model) * BATCH * MEMBERS
    kernels = [ops.convert_to_numpy(one.value).reshape(MEMBERS, -1)[0].size for one in members.trainable]
    details = {
        "multiply-adds": multiplications,
        "weights of a member": int(sum(kernels)),
        "gigaflops of ours": round(2e-9 * multiplications / found["ours"], 1),
        "gigaflops of a product of matrices of 1024": round(_gigaflops(), 1),
    }
    return found["ours"], found["loop"], details


def _network(make: Callable[[], keras.Model], members: Members, index: int) -> keras.Model:
    network = make()
    for variable, values in zip(network.trainable_variables, members.trainable, strict=True):
        variable.assign(values.value[index])
    return network


def _roofline(details: dict[str, Any]) -> str:
    """What the machine can do at best, as its own product of large matrices does."""
    least = 2e-6 * details["multiply-adds"] / details["gigaflops of a product of matrices of 1024"]
    return f"the arithmetic alone takes {least:.1f} ms at the speed of one large product of matrices on this machine"


def _gigaflops() -> float:
    a = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))
    seconds = medians({"product": lambda: ops.convert_to_numpy(ops.matmul(a, a))}, rounds=20)["product"]
    return 2e-9 * 1024**3 / seconds


def _multiplications(model: keras.Model) -> int:
    found = 0
    for layer in model.layers:
        if layer.trainable_variables:
            places = int(np.prod(layer.output.shape[1:-1])) if len(layer.output.shape) > 2 else 1
            found += places * int(np.prod(layer.kernel.shape))
    return found


def _on_jax(quick: bool) -> dict[str, tuple[float, float]]:
    command = [sys.executable, "-m", "benchmarks.bayesian_speed", "jax", *(["--quick"] if quick else [])]
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def together(quick: bool) -> Iterator[Row]:
    """Sixteen members trained at once, against sixteen times Keras' own fit."""
    random = np.random.default_rng(0)
    for name, make, batch, bar in (("digits network 64–32–10", digits, 32, 20.0), ("MLP200", mlp, 128, 3.0)):
        steps = 10 if quick else STEPS
        x = random.normal(size=(steps * batch, make().input_shape[1])).astype(np.float32)
        data = Data(x, random.integers(0, 10, len(x)), 10)
        epochs = 3 if quick else 8
        ours, fit = _epochs(make, data, batch, epochs)
        ratio = TRAINED * fit / ours
        yield Row(
            f"{name}, batch {batch}: {TRAINED} members trained together against {TRAINED} fits of Keras",
            round(1e3 * ours / steps / TRAINED, 3),
            "ms a step of a member",
            round(1e3 * fit / steps, 3),
            round(ratio, 2),
            f"≥ {bar:g}×",
            ratio >= bar,
            "" if ratio >= bar else "both do the same arithmetic: what is won is the overhead of a step",
            {"steps": steps, "epochs": epochs},
        )


def _epochs(make: Callable[[], keras.Model], data: Data, batch: int, epochs: int) -> tuple[float, float]:
    """Medians of seconds of an epoch, ours (of all members) and one fit, in turns; the first of each compiles."""
    members = Members.new(make, TRAINED, 0)
    optimizer = SGHMC(0.1, len(data), alpha=0.1, prior_sd=0.234, temperature=0.0)
    running = trained(members, data, optimizer, epochs=epochs, batch_size=batch)
    network = make()
    network.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=3e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    runs = {
        "ours": lambda: next(running),
        "fit": lambda: network.fit(data.x, data.y, batch_size=batch, epochs=1, verbose=0),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(epochs):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - began)
    return float(np.median(found["ours"][1:])), float(np.median(found["fit"][1:]))


if __name__ == "__main__":
    if sys.argv[1:2] != ["jax"] or keras.backend.backend() != "jax":
        sys.exit("KERAS_BACKEND=jax python -m benchmarks.bayesian_speed jax")
    results = {name: _asked(make, "--quick" in sys.argv, jitted=True)[:2] for name, (make, _) in NETWORKS.items()}
    print(json.dumps(results))

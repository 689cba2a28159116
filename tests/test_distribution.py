"""Training on several devices gives what one device gives; the devices are shares of this processor."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import keras
import pytest

pytestmark = [
    pytest.mark.jax,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution works on JAX"),
]

TRAIN = """
import json
import warnings

import keras, numpy as np
from keras_efficient import models
from keras_efficient.errors import WrongArgument
from keras_efficient.distribution import TableParallel, local_rows

assert len(keras.distribution.list_devices()) == 4
OPTIONS = [{"compression": 4}, {"form": "subspace", "bits": 2, "compression": 8}]


def train(distribution, entities, options):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = models.SequenceClassifier(entities, 20, dim=16, hidden=(8,), embedding=options)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    ids = random.integers(0, entities, (80, 12)).astype("int32")
    labels = random.integers(0, 20, 80)
    losses = model.fit(ids, labels, batch_size=8, epochs=1, shuffle=False, verbose=0).history["loss"]
    sharded = [v.path for v in model.trainable_variables if not v.value.sharding.is_fully_replicated]
    return {"losses": losses, "sharded": sharded, "weights": [np.ravel(w)[:50].tolist() for w in model.get_weights()]}


ways = {"one": None, "data": keras.distribution.DataParallel(), "2": TableParallel(2), "4": TableParallel(4)}
found = {
    str(entities): {way: [train(ways[way], entities, options) for options in OPTIONS] for way in chosen}
    for entities, chosen in {400: ways, 403: ("one", "4")}.items()
}
keras.distribution.set_distribution(ways["2"])
try:
    found["uneven"] = str(local_rows(7))
except WrongArgument as error:
    found["uneven"] = str(error)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    keras.distribution.set_distribution(TableParallel(4))
    models.SequenceClassifier(1603, 20, dim=16, embedding={"hash_size": 400})
found["told"] = [str(warning.message) for warning in told if "rows" in str(warning.message)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    env = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("entities", "way"), [("400", "data"), ("400", "2"), ("400", "4"), ("403", "4")])
def test_the_result_is_one_devices(found, entities, way):
    for actual, expected in zip(found[entities][way], found[entities]["one"], strict=True):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for left, right in zip(actual["weights"], expected["weights"], strict=True):
            assert left == pytest.approx(right, abs=2e-5)


def test_rows_that_cannot_be_divided_are_told(found):
    words = "The 1603 rows of embedding/scalars cannot be divided among 4 devices: every device has them whole"
    assert len(found["told"]) == 1
    assert words in found["told"][0]


def test_tables_are_spread_by_rows_where_these_can_be_divided(found):
    # The scaled form's scalars, and the subspace's, which are the rows of a factorisation.
    for run, name in zip(found["400"]["4"], ("scalars", "rows"), strict=True):
        assert any(path.endswith(f"embedding/{name}") for path in run["sharded"])
    # 403 rows on four devices: the columns of the subspace's scalars, and the whole of what has one column.
    assert not any(path.endswith("embedding/scalars") for path in found["403"]["4"][0]["sharded"])
    assert not any(run["sharded"] for run in found["400"]["one"])


HOST = """
import os, sys
address, host, hosts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // hosts}"
import keras, numpy as np
if hosts > 1:
    keras.distribution.initialize(address, hosts, host)
from keras_efficient import models, recsys

keras.distribution.set_distribution(recsys.TableParallel(2))
keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
data = recsys.Interactions(np.repeat(np.arange(64), 10), random.integers(0, 200, 640), 64, 200)
model = models.SequenceClassifier(204, 200, dim=16, hidden=(16,), dropout=0)
losses = recsys.train(model, data, epochs=2, batch_size=16, negatives=64)["loss"]
print([*losses, *np.ravel(model.get_layer("embedding").get_weights()[0])[:50].tolist()])
"""


def test_two_hosts_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def start(host, hosts):
        command = [sys.executable, "-c", HOST, address, str(host), str(hosts)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env={**os.environ, "KERAS_BACKEND": "jax"})

    outputs = [job.communicate(timeout=280)[0] for job in (start(0, 1), *[start(host, 2) for host in (0, 1)])]
    alone, *both = [json.loads(output.splitlines()[-1]) for output in outputs]
    for found in both:
        assert found == pytest.approx(alone, rel=1e-5, abs=2e-5)


def test_batches_must_fit(found):
    assert "7 rows cannot be divided" in found["uneven"]
    assert "a multiple of 2" in found["uneven"]


def test_groups_must_fit():
    from keras_efficient.distribution import TableParallel
    from keras_efficient.errors import WrongArgument

    with pytest.raises(WrongArgument, match="cannot be divided"):
        TableParallel(3, devices=["cpu:0", "cpu:1"])


ANSWERS = """
import json
import keras, numpy as np
from keras import ops
import dataclasses
from keras_efficient import extreme, layers, models
from keras_efficient.distribution import TableParallel


def answers(distribution, units, method):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16,))
    layer = layers.HALOSOutput(units, 7, bias_initializer="normal")
    model = keras.Model(inputs, layer(inputs))
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 16)).astype("float32"), random.integers(0, units, 200)
    if method:
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=40, shuffle=False, verbose=0)
        extreme.learn_index(model, (x, y), method=method, budget=0.5)
        before = [ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.bias)]
        model.fit(x, y, batch_size=40, shuffle=False, verbose=0)  # the index is no variable that was there before
        training = models.SampledSoftmax(model)
        training.compile("sgd")
        batch = {"inputs": x, "targets": y[:, None].astype("int32"), "weights": np.ones(200, "float32")}
        batch |= models.sampled.Negatives(np.ones(units), 40).draw(random, batch["targets"])
        for index in (layer.index, None, layer.index):
            layer.set_index(None if index is None else dataclasses.replace(index, fingerprint=""))
            training.fit((one for one in [(batch,)]), steps_per_epoch=1, verbose=0)
        layer.kernel.assign(before[0])
        layer.bias.assign(before[1])
    logits, classes = layer.top_k(x)
    spread = not layer.kernel.value.sharding.is_fully_replicated if distribution else None
    logits, classes = (ops.convert_to_numpy(found).tolist() for found in (logits, classes))
    return {"logits": logits, "classes": classes, "spread": spread}


found = [
    [answers(way, units, method) for way in (None, TableParallel(4))]
    for units in (400, 403) for method in (None, "cells", "contexts")
]
print(json.dumps(found))
"""


def test_answers_are_one_devices():
    env = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    for one, four in json.loads(done.stdout.splitlines()[-1]):
        assert four["spread"]
        assert four["classes"] == one["classes"]
        for left, right in zip(four["logits"], one["logits"], strict=True):
            assert left == pytest.approx(right, abs=1e-5)

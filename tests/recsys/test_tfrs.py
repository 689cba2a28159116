"""TensorFlow Recommenders with Keras 3 towers, in processes whose tf.keras is tf_keras."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import pytest

from keras_efficient.errors import KerasEfficientError

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TFRS runs on TensorFlow")

TRAIN = """
import json, sys
import keras, numpy as np, tensorflow as tf
from keras_efficient import layers, models
from keras_efficient.recsys import tfrs as bridge
import tensorflow_recommenders as tfrs

assert tf.keras.Model.__module__.startswith("tf_keras") and keras.__version__.startswith("3")
keras.utils.set_random_seed(0)
query, item = models.TwoTower(
    51, 50, dim=16, hidden=(), query_embedding={"compression": 2}, item_embedding={"compression": 2}
)
random = np.random.default_rng(0)
histories = random.integers(1, 51, (512, 4)).astype("int32")
items = (histories[:, 0] - 1).astype("int32")  # the wanted item is the first of the history
query(histories[:2]), item(items[:2])
data = tf.data.Dataset.from_tensor_slices({"history": histories, "item": items}).batch(64)
candidates = tf.data.Dataset.range(50).map(lambda i: tf.cast(i, tf.int32)).batch(25)
task = tfrs.tasks.Retrieval(metrics=bridge.factorized_top_k(candidates, item, k=(5,)))
model = bridge.trainer(
    {"query": query, "item": item},
    task,
    lambda task, towers, x: task(towers["query"](x["history"]), towers["item"](x["item"])),
    keras.optimizers.Adam(0.02),
)
model.compile()
before = model.evaluate(data, return_dict=True, verbose=0)
rating = tfrs.tasks.Ranking(loss=tf.keras.losses.MeanSquaredError())
history = model.fit(data, epochs=15, verbose=0).history
after = model.evaluate(data, return_dict=True, verbose=0)
scorer = bridge.trainer(
    {"query": query, "item": item},
    rating,
    lambda task, towers, x: task(
        labels=tf.ones((tf.shape(x["item"])[0], 1)),
        predictions=tf.reduce_sum(towers["query"](x["history"]) * towers["item"](x["item"]), 1, keepdims=True),
    ),
)
scorer.compile()
ranked = scorer.fit(data, epochs=3, verbose=0).history["loss"]
key = "factorized_top_k/top_5_categorical_accuracy"
ids = keras.Input((4,), dtype="int32")
dropout, norm = keras.layers.Dropout(0.5), keras.layers.BatchNormalization(name="norm")
vectors = layers.MEmComEmbedding(51, 16, compression=2, combiner="mean", embeddings_regularizer="l2")(ids)
tower = keras.Model(ids, dropout(norm(vectors)))
seen = set()
plain = dropout.call
dropout.call = lambda x, training=False: seen.add(training) or plain(x, training=training)
modes = bridge.trainer(
    {"query": tower, "item": item},
    tfrs.tasks.Retrieval(),
    lambda task, towers, x: task(towers["query"](x["history"]), towers["item"](x["item"])),
)
modes.compile()
told = modes.fit(data, epochs=1, verbose=0).history
trained = [sorted(seen), bool(norm.moving_mean.numpy().any()), told["total_loss"][0] - told["loss"][0]]
seen.clear()
modes.evaluate(data, verbose=0)
trained.append(sorted(seen))
found = {"before": before[key], "after": after[key], "loss": history["loss"], "ranking": ranked}
print(json.dumps({"modes": trained, **found}))
"""


def run(code, **environment):
    env = {**os.environ, "KERAS_BACKEND": "tensorflow", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=250)


def test_towers_learn_and_are_ranked():
    pytest.importorskip("tf_keras", reason="TensorFlow Recommenders needs tf_keras")
    done = run(TRAIN, TF_USE_LEGACY_KERAS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"][-1] < found["loss"][0]
    assert found["ranking"][-1] < found["ranking"][0]
    assert found["after"] > found["before"] + 0.2
    flags, moved, penalty, evaluated = found["modes"]
    assert (flags, moved, evaluated) == ([True], True, [False])
    assert penalty > 0


def test_in_a_keras_3_process_the_error_gives_the_line():
    from keras_efficient.recsys import tfrs

    with pytest.raises(KerasEfficientError, match="TF_USE_LEGACY_KERAS=1 python"):
        tfrs.trainer({}, None, lambda task, towers, inputs: 0.0)
    assert "TF_USE_LEGACY_KERAS" not in os.environ

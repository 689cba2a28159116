"""A classifier of very many classes that looks at a few of them: trained, indexed, exported, compared.

    python examples/halos.py [--classes 20000] [--points 60000] [--epochs 6]

The points are made here: bags of words about a class, its topic, and nothing. Points of your own are read by
`extreme.SparseFile` in the text form of the Extreme Classification Repository. Writes to out/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_efficient import export, extreme, models
from keras_efficient.deploy import deploy

WORDS, LENGTH = 8000, 16
Points = tuple[dict[str, np.ndarray], np.ndarray]


class Library:
    """Classes with words of their own, in topics with words of theirs; a few classes are frequent."""

    def __init__(self, classes: int, seed: int = 0):
        self.random = np.random.default_rng(seed)
        topics = max(10, classes // 100)
        self.topic = self.random.integers(topics, size=classes)
        self.topic_words = self.random.integers(1, WORDS, (topics, 30))
        self.class_words = self.random.integers(1, WORDS, (classes, 10))
        frequency = 1 / (5 + self.random.permutation(classes)) ** 0.8
        self.frequency = frequency / frequency.sum()

    def points(self, number: int) -> Points:
        """Bags of five words about the class, six about its topic and five about nothing."""
        labels = self.random.choice(len(self.topic), number, p=self.frequency)

        def some(words: np.ndarray, count: int) -> np.ndarray:
            return words[np.arange(number)[:, None], self.random.integers(words.shape[1], size=(number, count))]

        own, shared = some(self.class_words[labels], 5), some(self.topic_words[self.topic[labels]], 6)
        noise = self.random.integers(1, WORDS, (number, LENGTH - 11))
        ids = np.concatenate([own, shared, noise], axis=1).astype("int32")
        return {"ids": ids, "weights": np.ones(ids.shape, "float32")}, labels.astype("int32")


def main(out: Path, classes: int, points: int, epochs: int, budget: float = 0.02) -> dict[str, float]:
    """Trains, learns an index, exports with it and without; returns what was measured by name."""
    out.mkdir(parents=True, exist_ok=True)
    library = Library(classes)
    train, test = library.points(points), library.points(2000)
    keras.utils.set_random_seed(0)
    model = models.ExtremeClassifier(WORDS, classes, hidden=64, output={"k": 5, "bits": 8})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss)
    model.fit(*train, batch_size=256, epochs=epochs, verbose=0)
    whole = export.save(
        model, out / "all-classes.tflite", precision="dynamic", input_shape=SHAPE, samples=one(test), overwrite=True
    )

    learned = extreme.learn_index(model, train, budget=budget)
    found = learned.measures
    print(f"{classes:,} classes, {found.neurons} of them looked at or asked for the way ({found.share:.1%})")
    few = export.save(
        model, out / "candidates.tflite", precision="dynamic", input_shape=SHAPE, samples=one(test), overwrite=True
    )

    scores = {}
    answers = keras.ops.convert_to_numpy(deploy(model)(test[0])[1])
    logits = model.predict(test[0], batch_size=500, verbose=0)
    scores["P@1 of all classes"] = float((logits.argmax(1) == test[1]).mean())
    scores["P@1 of candidates"] = float((answers[:, 0] == test[1]).mean())
    for name, value in scores.items():
        print(f"{name}: {value:.4f}")
    for report, name in ((whole, "all-classes"), (few, "candidates")):
        print(f"{out / name}.tflite: {report.bytes / 1e6:.1f} MB, {report.latency_ms:.3f} ms")
    logits, best = export.load(out / "candidates.tflite")(one(test)[0])
    print(f"the first point is of class {test[1][0]}; answers {best[0].tolist()}, logits {np.round(logits[0], 1)}")
    return {**scores, "share": found.share, "ms": few.latency_ms or 0.0}


SHAPE = {"ids": (1, LENGTH), "weights": (1, LENGTH)}


def one(points: Points) -> list[dict[str, np.ndarray]]:
    """Some points, one by one."""
    return [{name: values[i : i + 1] for name, values in points[0].items()} for i in range(16)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--points", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.classes < 1000 or arguments.points < 1000 or arguments.epochs < 1:
        parser.error("needs 1000 classes, 1000 points and an epoch at least")
    main(arguments.out, arguments.classes, arguments.points, arguments.epochs)

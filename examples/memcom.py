"""A recommender whose embedding table takes a fraction of its bytes: trained, compared, exported to a phone's file.

    python examples/memcom.py [--users 3000] [--items 4000] [--epochs 30]

The interactions are made here: users of hidden tastes choose items, a few of them often, as in a shop. Data of your
own are read by `recsys.read_lists`, `recsys.read_movielens` or `recsys.read_table`. Writes to out/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_efficient import export, models, recsys
from keras_efficient.compress import compress_embeddings

TASTES = 12


def interactions(users: int, items: int, seed: int = 0) -> recsys.Interactions:
    """Each user takes 10 to 60 items by popularity and by how well they fit a taste of two."""
    random = np.random.default_rng(seed)
    popularity = 1 / (10 + random.permutation(items)) ** 0.8
    group = random.integers(0, TASTES, items)
    rows, columns = [], []
    for user in range(users):
        liked = random.choice(TASTES, 2, replace=False)
        weights = popularity * np.where(np.isin(group, liked), 1.0, 0.03)
        count = int(random.integers(10, 61))
        columns.append(random.choice(items, count, replace=False, p=weights / weights.sum()))
        rows.append(np.full(count, user))
    return recsys.Interactions(np.concatenate(rows), np.concatenate(columns), users, items)


def main(out: Path, users: int, items: int, epochs: int) -> dict[str, float]:
    """Trains a whole table and a small one, compresses the whole one; returns nDCG@20 by name."""
    out.mkdir(parents=True, exist_ok=True)
    train, _, test = recsys.at_random(interactions(users, items), valid=0.0, test=0.2)
    (train, test), _ = recsys.by_frequency(train, test)  # id 0 is the most frequent item from here on
    scores = {}

    def trained(name: str, options: dict[str, float] | None) -> keras.Model:
        keras.utils.set_random_seed(0)
        model = models.SequenceClassifier(items + 1, items, hidden=(64,), dropout=0.3, embedding=options)
        recsys.train(model, train, epochs=epochs, weight_decay=0.1, batch_size=256, negatives=1000)
        measure(name, model)
        return model

    def measure(name: str, model: keras.Model) -> None:
        found = recsys.evaluate(model.predict_on_batch, train, test, k=20)
        scores[name] = found.ndcg
        size = model.get_layer("embedding").nbytes / 1e3
        print(f"{name}: {size:,.0f} kB, nDCG@20 {found.ndcg:.4f} ± {found.ndcg_error:.4f}")

    whole = trained("whole table", None)
    trained("MEmCom as published, 16×", {"compression": 16})
    counts = {"embedding": [0, *train.counts()]}  # of the padding, then of every item
    for name, form in (("subspace of 2-bit scalars", "subspace"), ("codebooks", "codebooks")):
        if form == "codebooks" and items < 2000:
            continue  # its shared rows alone take more than the whole table's sixteenth
        model = compress_embeddings(whole, compression=16, form=form, counts=counts)
        model.get_layer("embedding").freeze()  # from here on the table is what is stored
        measure(f"MEmCom {name}, 16×, of the trained table", model)
    # The last model, up to the user's vector: what a phone computes to ask for candidates.
    query = keras.Model(model.input, model.get_layer("hidden_0").output, name="query")
    history = train.items[train.users == 0][:32] + 1
    report = export.save(
        query, out / "query.tflite", input_shape=(len(history),), samples=history[None], overwrite=True
    )
    run = export.load(out / "query.tflite")
    vector = run(history[None].astype("int32"))
    print(
        f"{out / 'query.tflite'}: {report.bytes / 1e3:,.0f} kB, {report.latency_ms:.3f} ms, vector of {vector.shape[1]}"
    )
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.users < 50 or arguments.items < 200 or arguments.epochs < 1:
        parser.error("needs 50 users, 200 items and an epoch at least")
    main(arguments.out, arguments.users, arguments.items, arguments.epochs)

"""Makes the next-item recommender of the zoo, `halos-games`: a classifier that looks at a few of its classes.

    KERAS_BACKEND=jax python -m keras_efficient.zoo.recipes.halos --data FOLDER --out runs --publish

`FOLDER` holds `sequences.txt.gz`, the items of each user of Amazon's games in the order of time. The last item of each
user is for the test; rate, decay and epochs were chosen by the last but one. Interrupt it and run it again: it goes on
from its last epoch. `--publish` learns the index and writes weights, golden tensors and card; `--measure` measures the
model of the zoo.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.recsys.interactions import Interactions, by_frequency
from keras_efficient.zoo.recipes.memcom import exports, histories

if TYPE_CHECKING:
    import keras

    from keras_efficient.recsys.evaluation import Ranking
    from keras_efficient.zoo.schema import Card

__all__ = ["BUDGET", "NAME", "compressed", "indexed", "measure", "publish", "read", "train"]

NAME = "halos-games"
NETWORK: dict[str, Any] = {"dim": 64, "hidden": [64], "activation": "tanh", "dropout": 0.5, "combiner": "mean"}
EMBEDDING: dict[str, Any] = {"form": "codebooks", "bits": 8, "compression": 16, "frozen": True}
TRAINING: dict[str, Any] = {
    "epochs": 40,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "batch_size": 512,
    "length": 32,
    "seed": 0,
}
BUDGET = 0.05
METHOD = "cells"  # lists of contexts would be larger than the network
CUTS = 4  # histories of each user that the index is learned from, the longest ones
K = 20


def read(folder: Path) -> tuple[Interactions, Interactions]:
    """What is trained on, and the last item of each user; the item that most users have is 0."""
    from keras_efficient.recsys import files, splits

    whole = files.read_sequences(folder / "sequences.txt.gz")
    _, _, test = splits.leave_one_out(whole)
    (train, test), _ = by_frequency(splits.without(whole, test), test)
    return train, test


def _arguments(num_items: int, embedding: dict[str, Any], plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of `models.SequenceClassifier`: every item is an id, and 0 the padding."""
    output = {"k": K, **({"plan": plan} if plan else {})}
    sizes = {"vocabulary_size": num_items + 1, "num_classes": num_items}
    return {**sizes, **NETWORK, "embedding": embedding, "output": output}


def train(interactions: Interactions, folder: Path, *, epochs: int | None = None) -> keras.Model:
    """Trains the network around a whole table, or goes on with it; `folder` keeps the state."""
    import keras

    from keras_efficient import models
    from keras_efficient.recsys import training

    settings = TRAINING if epochs is None else {**TRAINING, "epochs": epochs}
    keras.utils.set_random_seed(settings["seed"])
    initializer = keras.initializers.RandomNormal(stddev=0.36, seed=settings["seed"])
    options = {"method": "reduced", "embeddings_initializer": initializer}  # nothing is reduced: the whole table
    model = models.SequenceClassifier(**_arguments(interactions.num_items, options))
    training.train(model, interactions, folder=folder, verbose=2, **settings)
    return model


def compressed(whole: keras.Model, interactions: Interactions) -> keras.Model:
    """The model with a compressed table, and an output layer that is rounded to float16."""
    import keras
    import numpy as np

    from keras_efficient import layers, models

    arguments = _arguments(interactions.num_items, EMBEDDING)
    model = models.SequenceClassifier(**arguments, name=NAME.replace("-", "_"))
    counts, matrix = [0, *interactions.counts()], whole.get_layer("embedding").embeddings()
    table = layers.MEmComEmbedding.from_embedding(matrix, counts=counts, **EMBEDDING)
    for layer in model.layers:
        source = table if layer.name == "embedding" else whole.get_layer(layer.name)
        layer.set_weights(source.get_weights())
    kernel = model.get_layer("logits").kernel
    kernel.assign(keras.ops.convert_to_numpy(kernel).astype(np.float16).astype(np.float32))
    return model


def indexed(model: keras.Model, interactions: Interactions) -> keras.Model:
    """The model with an index that is learned from what users took next, time after time."""
    import numpy as np

    from keras_efficient import extreme

    items, offsets = interactions.histories()
    lengths = np.diff(offsets)
    ids, labels = [], []
    for back in range(1, CUTS + 1):
        users = np.flatnonzero(lengths > back)
        ends = offsets[1:][users] - back
        starts = np.maximum(offsets[:-1][users], ends - TRAINING["length"])
        columns = np.arange(TRAINING["length"])
        inside = columns < (ends - starts)[:, None]
        found = items[np.minimum(starts[:, None] + columns, len(items) - 1)]
        ids.append(np.where(inside, found + 1, 0).astype(np.int32))
        labels.append(items[ends].astype(np.int32))
    data = np.concatenate(ids), np.concatenate(labels)
    extreme.learn_index(model, data, method=METHOD, budget=BUDGET, seed=TRAINING["seed"])
    layer = model.get_layer("logits")
    layer.set_index(dataclasses.replace(layer.index, fingerprint=""))  # the card has a hash of the whole file
    return model


def measure(model: keras.Model, known: Interactions, test: Interactions, *, whole: bool = False) -> Ranking:
    """How well the model ranks each user's last item by those before, from candidates, or the `whole` layer's."""
    import keras
    import numpy as np

    from keras_efficient.recsys.evaluation import evaluate

    if whole:
        return evaluate(model.predict_on_batch, known, test, k=K)
    layer = model.get_layer("logits")
    body = keras.Model(model.input, layer.input)

    def of_candidates(ids: np.ndarray) -> np.ndarray:
        vectors = body.predict_on_batch(ids)
        logits = keras.ops.convert_to_numpy(layer(vectors))
        inside = np.zeros((len(ids), layer.units + 1), bool)
        np.put_along_axis(inside, keras.ops.convert_to_numpy(layer.candidates(vectors)), True, axis=1)
        return np.where(inside[:, :-1], logits, np.float32(-np.inf))

    return evaluate(of_candidates, known, test, k=K)


def publish(whole: keras.Model, known: Interactions, test: Interactions, zoo_folder: Path) -> Card:
    """Compresses the table, learns the index, measures, and puts weights, golden tensors and card into the zoo."""
    from keras_efficient.zoo import golden, weights
    from keras_efficient.zoo.schema import write_card

    model = indexed(compressed(whole, known), known)
    rankings = measure(model, known, test), measure(model, known, test, whole=True)
    files = zoo_folder / "weights"
    weights.save(model, files / f"{NAME}.weights.h5")
    golden.write_golden(golden.answers(model, {"random": histories(known.num_items)}), files / f"{NAME}.golden.npz")
    card = _card(model, known, *rankings, weights.describe(files / f"{NAME}.weights.h5"))
    write_card(card, zoo_folder / "cards" / f"{NAME}.yaml")
    return card


def _card(model: keras.Model, known: Interactions, found: Ranking, whole: Ranking, weights: Any) -> Card:
    import keras

    from keras_efficient.deploy import deploy
    from keras_efficient.zoo import schema as cards

    plan = model.get_layer("logits").plan
    return cards.Card(
        name=NAME,
        system="halos",
        task="recommendation",
        summary=f"The next of Amazon's {known.num_items:,} games by those a user has, of {plan.neurons:,} looked at.",
        builder=cards.Builder("SequenceClassifier", _arguments(known.num_items, EMBEDDING, plan.to_config())),
        weights=weights,
        preprocessing=_preprocessing(model, known.num_items),
        parameters=deploy(model).count_params(),
        metrics=_metrics(found),
        trained_on=(cards.TrainedOn(_DATA, _TERMS),),
        recipe=cards.Recipe(_COMMAND, TRAINING["seed"], backend=keras.backend.backend(), details=TRAINING),
        licence="Apache-2.0",
        limitations=_limitations(plan, whole),
        golden=f"{NAME}.golden.npz",
        exports=tuple(exports(model)),
        paper=cards.Paper(
            "HALOS: Hashing Large Output Space for Cheap Inference", "https://arxiv.org/abs/2007.01230", 2022
        ),
    )


_MODULE = "python -m keras_efficient.zoo.recipes.halos --data FOLDER"
_COMMAND = f"{_MODULE} --out runs --publish"
_MEASURE = f"{_MODULE} --measure"
_DATA = (
    "Video games of the Amazon reviews of 2014 as SASRec joined them, but for each user's last item; cite McAuley, "
    "Targett, Shi, van den Hengel: Image-based recommendations on styles and substitutes, SIGIR 2015"
)
_TERMS = "offered for research, citation asked, no licence stated"


def _preprocessing(model: keras.Model, num_items: int):
    from keras_efficient.zoo.schema import Preprocessing, Tensor

    ids = "games that a user has; id 0 is padding"
    logits = "of each game: number c is of id c + 1; deployed the largest ones of candidates, and their numbers"
    return Preprocessing(
        inputs=(Tensor("ids", model.input_shape, "int32", ids, (0, num_items)),),
        outputs=(Tensor("logits", model.output_shape, "float32", logits),),
        facts={"padding": 0, "ids": "recsys.by_frequency(train)[1][item] + 1, see the recipe's read()"},
    )


def _metrics(found: Ranking):
    from keras_efficient.zoo.schema import Metric

    protocol = f"last item of {found.users:,} users, all games ranked but the user's, from candidates"
    values = {"nDCG": (found.ndcg, found.ndcg_error), "Recall": (found.recall, found.recall_error)}
    return tuple(
        Metric(f"{name}@{K}", round(value, 4), "Amazon games", f"{protocol}; standard error {error:.4f}", _MEASURE)
        for name, (value, error) in values.items()
    )


def _limitations(plan: Any, whole: Ranking) -> tuple[str, ...]:
    return (
        "It knows the games of that set and no others: for a catalogue of your own train one of your own.",
        "It looks at the set of a user's games, not at their order.",
        f"Candidates are {plan.candidates:,} games, {plan.routed:,} rows find them; the whole layer has "
        f"nDCG@{K} {whole.ndcg:.4f} and Recall@{K} {whole.recall:.4f}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, for a trial; not to be published")
    parser.add_argument("--publish", action="store_true", help="then learn the index, measure, write weights and card")
    parser.add_argument("--measure", action="store_true", help="measure the model of the zoo instead")
    arguments = parser.parse_args()
    if arguments.publish and arguments.epochs:
        parser.error("a trial is not to be published")
    known, test = read(arguments.data)
    if arguments.measure:
        from keras_efficient import zoo

        print(measure(zoo.load(NAME), known, test))
        return
    whole = train(known, arguments.out / NAME, epochs=arguments.epochs)
    if arguments.publish:
        card = publish(whole, known, test, Path(__file__).resolve().parent.parent)
        print(*(f"{NAME}: {metric.name} {metric.value}" for metric in card.metrics), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()

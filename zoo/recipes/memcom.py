"""Makes the recommender of the zoo, `memcom-gowalla-16x`: a table that is trained whole, then compressed by MEmCom.

    KERAS_BACKEND=jax python -m keras_efficient.zoo.recipes.memcom --data FOLDER --out runs --publish

`FOLDER` holds `train.txt` and `test.txt` of Gowalla as NGCF and LightGCN split it, plain or as `.txt.gz`. Rate, decay
and epochs were chosen on a part of the training pairs, never by the test pairs; the model is trained on all of the
former. Interrupt it and run it again: it goes on from its last epoch, and what is trained stays trained when only
`EMBEDDING` changes. `--publish` writes weights, golden tensors and card; `--measure` measures the model of the zoo.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.recsys.interactions import Interactions, by_frequency

if TYPE_CHECKING:
    import keras

    from keras_efficient.recsys.evaluation import Ranking
    from keras_efficient.zoo.schema import Card

__all__ = ["EMBEDDING", "NAME", "compressed", "exports", "histories", "measure", "publish", "read", "train_whole"]

NAME = "memcom-gowalla-16x"
EMBEDDING: dict[str, Any] = {"form": "codebooks", "bits": 8, "compression": 16}
NETWORK: dict[str, Any] = {"dim": 64, "hidden": [64], "activation": "tanh", "dropout": 0.5, "combiner": "sqrtn"}
TRAINING: dict[str, Any] = {
    "epochs": 60,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "batch_size": 512,
    "negatives": 4096,
    "seed": 0,
}
# Training pools halves of histories; `sqrtn` of whole ones is longer, and would saturate the layer behind it.
# Chosen on a part of the training pairs, out of 1, 0.8 and 0.64.
HISTORY_SCALE = 0.64
K = 20


def read(folder: Path) -> tuple[Interactions, Interactions]:
    """Training and test part, items renumbered so that the one that most users have in the training part is 0."""
    import dataclasses

    from keras_efficient.recsys.files import read_lists

    parts = [read_lists(_part(folder, name)) for name in ("train", "test")]
    sizes = {name: max(getattr(part, name) for part in parts) for name in ("num_users", "num_items")}
    (train, test), _ = by_frequency(*(dataclasses.replace(part, **sizes) for part in parts))
    return train, test


def _part(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.txt.gz"
    return packed if packed.exists() else folder / f"{name}.txt"


def _arguments(num_items: int, embedding: dict[str, Any]) -> dict[str, Any]:
    """Of `models.SequenceClassifier`: every item is an id, and 0 the padding."""
    return {"vocabulary_size": num_items + 1, "num_classes": num_items, **NETWORK, "embedding": embedding}


def _stored(num_items: int) -> dict[str, Any]:
    """Arguments of the model that goes into the zoo."""
    return _arguments(num_items, {**EMBEDDING, "frozen": True})


def train_whole(train: Interactions, folder: Path, *, epochs: int | None = None) -> keras.Model:
    """Trains the network around the whole table, or goes on with it; `folder` keeps the state."""
    import keras

    from keras_efficient import models
    from keras_efficient.recsys import training

    settings = TRAINING if epochs is None else {**TRAINING, "epochs": epochs}
    keras.utils.set_random_seed(settings["seed"])
    initializer = keras.initializers.RandomNormal(stddev=0.1, seed=settings["seed"])
    options = {"method": "reduced", "embeddings_initializer": initializer}  # nothing is reduced: the whole table
    model = models.SequenceClassifier(**_arguments(train.num_items, options))
    training.train(model, train, folder=folder, verbose=2, **settings)
    kernel = model.get_layer("hidden_0").kernel
    kernel.assign(kernel * HISTORY_SCALE)
    return model


def compressed(whole: keras.Model, train: Interactions) -> keras.Model:
    """The model of the zoo: its table is the nearest to the whole one, all other weights are those of the whole.

    Those of the output layer are rounded to float16.
    """
    import keras
    import numpy as np

    from keras_efficient import layers, models

    counts = [0, *train.counts()]  # of the padding: none
    matrix = whole.get_layer("embedding").embeddings()
    model = models.SequenceClassifier(**_stored(train.num_items), name=NAME.replace("-", "_"))
    table = layers.MEmComEmbedding.from_embedding(matrix, counts=counts, **EMBEDDING, frozen=True)
    for layer in model.layers:
        source = table if layer.name == "embedding" else whole.get_layer(layer.name)
        layer.set_weights(source.get_weights())
    kernel = model.get_layer("logits").kernel  # half the bytes in the file
    kernel.assign(keras.ops.convert_to_numpy(kernel).astype(np.float16).astype(np.float32))
    return model


def measure(model: keras.Model, train: Interactions, test: Interactions) -> Ranking:
    """How well the model ranks the test items of every user, by all of the user's training items."""
    from keras_efficient.recsys.evaluation import evaluate

    return evaluate(model.predict_on_batch, train, test, k=K)


def publish(whole: keras.Model, train: Interactions, test: Interactions, zoo_folder: Path) -> Card:
    """Compresses and measures a trained model, and puts weights, golden tensors and card into the zoo."""
    from keras_efficient.zoo import golden, weights
    from keras_efficient.zoo.schema import write_card

    model = compressed(whole, train)
    rankings = measure(model, train, test), measure(whole, train, test)
    files = zoo_folder / "weights"
    weights.save(model, files / f"{NAME}.weights.h5")
    golden.write_golden(golden.answers(model, {"random": histories(train.num_items)}), files / f"{NAME}.golden.npz")
    card = _card(model, train, *rankings, weights.describe(files / f"{NAME}.weights.h5"))
    write_card(card, zoo_folder / "cards" / f"{NAME}.yaml")
    return card


def histories(num_items: int):
    """Two random users, the first with the first and the last id, the second with padding: no real person's places."""
    import numpy as np

    ids = np.random.default_rng(0).integers(1, num_items + 1, (2, 12)).astype("int32")
    ids[0, :2] = 1, num_items
    ids[1, 5:] = 0
    return ids


def _card(model: keras.Model, train: Interactions, found: Ranking, whole: Ranking, weights: Any) -> Card:
    import keras

    from keras_efficient.deploy import deploy
    from keras_efficient.zoo import schema as cards

    table = model.get_layer("embedding")
    return cards.Card(
        name=NAME,
        system="memcom",
        task="recommendation",
        summary=f"The next of Gowalla's {train.num_items:,} places by those a user has; "
        f"table {table.compression_ratio:.3g} times smaller.",
        builder=cards.Builder("SequenceClassifier", _stored(train.num_items)),
        weights=weights,
        preprocessing=_preprocessing(model, train.num_items),
        parameters=deploy(model).count_params(),
        metrics=_metrics(found),
        trained_on=(cards.TrainedOn(_DATA, _TERMS),),
        recipe=cards.Recipe(_COMMAND, TRAINING["seed"], backend=keras.backend.backend(), details=TRAINING),
        licence="Apache-2.0",
        limitations=_limitations(model, whole),
        golden=f"{NAME}.golden.npz",
        exports=tuple(exports(model)),
        paper=cards.Paper(
            "Learning Compressed Embeddings for On-Device Inference", "https://arxiv.org/abs/2203.10135", 2022
        ),
    )


_MODULE = "python -m keras_efficient.zoo.recipes.memcom --data FOLDER"
_COMMAND = f"{_MODULE} --out runs --publish"
_DATA = (
    "Gowalla check-ins of SNAP, the training part of the split of NGCF and LightGCN; cite Cho, Myers, Leskovec: "
    "Friendship and Mobility, KDD 2011"
)
_TERMS = "published for research, no licence stated"


def _preprocessing(model: keras.Model, num_items: int):
    from keras_efficient.zoo.schema import Preprocessing, Tensor

    ids = "places that a user has, in any order; id 0 is padding"
    logits = "of each place: number c is of id c + 1; the places that a user has are among them"
    return Preprocessing(
        inputs=(Tensor("ids", model.input_shape, "int32", ids, (0, num_items)),),
        outputs=(Tensor("logits", model.output_shape, "float32", logits),),
        facts={
            "padding": 0,
            "ids": "of a place in the split of NGCF and LightGCN: recsys.by_frequency(train)[1][place] + 1",
        },
    )


def _metrics(found: Ranking):
    from keras_efficient.zoo.schema import Metric

    protocol = (
        f"test part of the split of NGCF and LightGCN, {found.users:,} users, all places ranked but the user's of the "
        "training part"
    )
    values = {"nDCG": (found.ndcg, found.ndcg_error), "Recall": (found.recall, found.recall_error)}
    return tuple(
        Metric(f"{name}@{K}", round(value, 4), "Gowalla", f"{protocol}; standard error {error:.4f}", _MEASURE)
        for name, (value, error) in values.items()
    )


_MEASURE = f"{_MODULE} --measure"


def _limitations(model: keras.Model, whole: Ranking) -> tuple[str, ...]:
    table, matrix = model.get_layer("embedding"), model.get_layer("logits")
    return (
        "It knows the places of that split and no others: for a catalogue of your own train one of your own.",
        "The split is random, not by time: the model looks at the set of a user's places, not at their order.",
        f"Only the input table is compressed, to {table.nbytes:,} bytes; the {4 * matrix.count_params():,} bytes of "
        "the output layer are as they were trained.",
        f"The whole table that it was made from has nDCG@{K} {whole.ndcg:.4f} and Recall@{K} {whole.recall:.4f}.",
        "The table is frozen: the other layers can be trained on, the table cannot.",
    )


def exports(model: keras.Model):
    """Files that a model makes, each run and compared, for its card."""
    import tempfile

    from keras_efficient import export
    from keras_efficient.zoo.schema import Export

    with tempfile.TemporaryDirectory() as folder:
        for target in ("tflite", "onnx"):
            report = export.save(model, Path(folder) / f"model.{target}")
            assert report.max_error is not None  # verified files have one
            yield Export(target, "float32", report.bytes, report.max_error, report.sqnr_db)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, for a trial; not to be published")
    parser.add_argument("--publish", action="store_true", help="then compress, measure, write weights and card")
    parser.add_argument("--measure", action="store_true", help="measure the model of the zoo instead")
    arguments = parser.parse_args()
    if arguments.publish and arguments.epochs:
        parser.error("a trial is not to be published")
    train, test = read(arguments.data)
    if arguments.measure:
        from keras_efficient import zoo

        print(measure(zoo.load(NAME), train, test))
        return
    whole = train_whole(train, arguments.out / NAME, epochs=arguments.epochs)
    if arguments.publish:
        card = publish(whole, train, test, Path(__file__).resolve().parent.parent)
        print(*(f"{NAME}: {metric.name} {metric.value}" for metric in card.metrics), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Makes the camera models of the zoo, such as `accmodel-yolox-nano`: what macroblocks are worth to a server's network.

    python -m keras_efficient.zoo.recipes.accmodel --data FOLDER --out runs --publish
    python -m keras_efficient.zoo.recipes.accmodel --data FOLDER --out runs --publish --int8

`FOLDER` holds `video/` with clips and `models/` with the server's network. Clips of cars on a motorway, `dashcam_*`,
are not trained on: the model is measured on them. Nobody labels anything. Interrupt it and run it again: it goes on.
The trunk is that of the server's network, and stays as it is: it has seen many more objects than are in the clips.
`--publish` writes weights, golden tensors and card; `--measure` measures the model of the zoo; `--without CLIP` trains
one more, which has not seen that clip but has seen a dashcam, for the benchmark. `--int8` makes the one for files of
integers: it is taught by the one in floats, whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import keras

    from keras_efficient.video import Server
    from keras_efficient.zoo.schema import Card

__all__ = ["CLIPS", "INT8", "NAME", "TESTED", "measure", "publish", "server", "teach", "train"]

NAME = "accmodel-yolox-nano"
INT8 = f"{NAME}.int8"
NETWORK = ("yolox_nano.onnx", "detection", "yolox")
FRAME_SIZE = (720, 1280)
CLIPS = ("traffic_highway_640x360", "horses_720x480", "person_indoor_768x432", "people_street_800x450")
TESTED = "dashcam_highway_960x540"
CODING: dict[str, Any] = {"label": "found", "every": 3}
TRAINING: dict[str, Any] = {"steps": 400, "batch": 16, "rate": 2e-3, "seed": 0}
TEACHING: dict[str, Any] = {"steps": 600, "batch": 8, "rate": 1e-4, "seed": 0}
PICTURES = "sr/train"
TRUNK = "yolox-nano"
LEAST = 0.1  # score of what counts as found


def server(data: Path) -> Server:
    from keras_efficient import video

    file, task, preprocess = NETWORK
    return video.onnx_server(data / "models" / file, task, preprocess, threshold=LEAST)


def untrained(data: Path) -> keras.Model:
    """The camera model with the trunk of the server's network, which is not trained."""
    import keras

    from keras_efficient import models

    keras.utils.set_random_seed(TRAINING["seed"])
    model = models.AccModel(FRAME_SIZE, trunk=TRUNK, name="accmodel")
    layers = sorted((one for one in model.layers if one.name.startswith("yolox_")), key=lambda one: one.name)
    for layer, arrays in zip(layers, _trunk_weights(data / "models" / NETWORK[0]), strict=True):
        layer.set_weights(arrays)
    return models.with_frozen_trunk(model)


def _trunk_weights(path: Path) -> Iterator[list[Any]]:
    """Kernels and biases of YOLOX-nano's convolutions but those for classes, as `models.AccModel` has them."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model(path).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    found = [[arrays[name] for name in node.input[1:3]] for node in graph.node if node.op_type == "Conv"]
    trunk, heads = found[:-36], found[-36:]  # of each of three levels: a stem, 5 for classes, 4 and 2 for boxes
    for level in range(0, 36, 12):
        trunk += [heads[level], *heads[level + 6 : level + 10]]
    for number, (kernel, bias) in enumerate(trunk):
        if number == 0:
            # 3 × 3 of four pixels side by side, blue first, 0 to 255: 6 × 6 of single ones, red first, 0 to 1.
            whole = np.zeros((6, 6, 3, len(kernel)), np.float32)
            for part, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
                whole[row::2, column::2] = kernel[:, 3 * part : 3 * part + 3].transpose(2, 3, 1, 0)
            yield [255 * whole[:, :, ::-1], bias]
        elif kernel.shape[1:] == (1, 3, 3):
            yield [kernel.transpose(2, 3, 0, 1), bias]
        else:
            yield [kernel.transpose(2, 3, 1, 0), bias]


def train(data: Path, folder: Path, *, without: str | None = None, steps: int | None = None) -> keras.Model:
    """Trains the camera model, or goes on with it; `folder` keeps labels and state."""
    from keras_efficient import video

    found = video.train_accmodel(
        server(data),
        model=untrained(data),
        source=[data / "video" / f"{clip}.mp4" for clip in _clips(without)],
        coding=video.Coding(**CODING),
        folder=folder,
        name=NETWORK[0],
        on_progress=lambda line: print(line, file=sys.stderr, flush=True),
        **(TRAINING if steps is None else {**TRAINING, "steps": steps}),
    )
    return found.model


def teach(teacher: keras.Model, data: Path, folder: Path, *, without: str | None = None, steps: int | None = None):
    """The camera model for integers, taught by the one in floats on the clips that this was trained on, and on photos:
    what it has not seen in the clips it has to see as the teacher does."""
    from keras_efficient import models, video

    found = video.teach_accmodel(
        models.AccModel(FRAME_SIZE, trunk=TRUNK, int8_aware=True, name="accmodel"),
        teacher,
        [*(data / "video" / f"{clip}.mp4" for clip in _clips(without)), data / PICTURES],
        folder=folder,
        on_progress=lambda line: print(line, file=sys.stderr, flush=True),
        **(TEACHING if steps is None else {**TEACHING, "steps": steps}),
    )
    return found.model


def calibration(model: keras.Model, data: Path):
    """Frames of the clips that are trained on, of the size that the model takes."""
    import numpy as np

    from keras_efficient import video

    size = model.input_shape[1:3]
    return np.concatenate([video.calibration(data / "video" / f"{clip}.mp4", size, limit=8) for clip in CLIPS])


def _clips(without: str | None) -> tuple[str, ...]:
    return CLIPS if without is None else (*(clip for clip in CLIPS if clip != without), TESTED)


def measure(model: keras.Model | str | Path, data: Path) -> float:
    """On the clip that was not trained on: how often a macroblock in which the server finds something has a higher
    score than one of the same frame in which it does not (the area under the ROC curve), the mean over frames."""
    import numpy as np

    from keras_efficient import video
    from keras_efficient.video.found import sureness
    from keras_efficient.video.frames import rgb
    from keras_efficient.video.training import ranks

    network, looks, areas = server(data), video.Saliency(model), []
    for number, frame in enumerate(video.Video.open(data / "video" / f"{TESTED}.mp4")):
        if number % CODING["every"] == 0:
            has = sureness(network.predict(rgb(frame)[None])[0], frame.height, frame.width).ravel() > 0
            count = has.sum()
            if 0 < count < len(has):
                above = ranks(looks(frame).ravel())[has].sum() - count * (count - 1) / 2
                areas.append(above / (count * (len(has) - count)))
    return float(np.mean(areas))


def publish(model: keras.Model, data: Path, log: Path, zoo_folder: Path, *, int8: bool = False) -> Card:
    """Measures, and puts weights (kernels rounded to float16), golden tensors, the training's log and card into the
    zoo."""
    import tempfile

    import numpy as np

    from keras_efficient import export
    from keras_efficient.zoo import golden, weights
    from keras_efficient.zoo.recipes.memcom import exports
    from keras_efficient.zoo.schema import Export, write_card

    name = INT8 if int8 else NAME
    for variable in model.weights:
        if len(variable.shape) > 1:
            variable.assign(np.asarray(variable).astype(np.float16).astype(np.float32))
    if int8:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            report = export.save(model, path, precision="int8", calibration=calibration(model, data))
            assert report.max_error is not None  # verified files have one
            note = f"calibrated on {8 * len(CLIPS)} frames of the clips"
            files = [Export("tflite", "int8", report.bytes, report.max_error, report.sqnr_db, note)]
            area = measure(path, data)
    else:
        files, area = list(exports(model)), measure(model, data)
    kept = zoo_folder / "weights"
    weights.save(model, kept / f"{name}.weights.h5")
    golden.write_golden(golden.answers(model, {"random": _squares(model)}), kept / f"{name}.golden.npz")
    logs = zoo_folder / "recipes" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{name}.csv").write_bytes(log.read_bytes())
    card = _card(name, model, area, weights.describe(kept / f"{name}.weights.h5"), files)
    write_card(card, zoo_folder / "cards" / f"{name}.yaml")
    return card


def _squares(model: keras.Model):
    """A frame of random squares, which is small in a file."""
    import numpy as np

    _, height, width, _ = model.input_shape
    squares = np.random.default_rng(0).integers(0, 256, (-(-height // 40), -(-width // 40), 3))
    return squares.repeat(40, axis=0).repeat(40, axis=1)[None, :height, :width].astype(np.float32)


def _card(name: str, model: keras.Model, area: float, file: Any, files: list[Any]) -> Card:
    import keras

    from keras_efficient.deploy import deploy
    from keras_efficient.zoo import schema as cards
    from keras_efficient.zoo.recipes import sesr

    frame, scores = (
        "of a camera, RGB",
        "log2 of how surely YOLOX-nano finds something in each macroblock of 16 × 16",
    )
    int8 = name == INT8
    arguments: dict[str, Any] = {
        "frame_size": list(FRAME_SIZE),
        "trunk": TRUNK,
        **({"int8_aware": True} if int8 else {}),
    }
    of_file = "; of the int8 file in LiteRT" if int8 else ""
    kind = (
        "It is for int8 files alone; the one in floats is accmodel-yolox-nano."
        if int8
        else "Integers all through (int8, NPUs) lose too much of it: take accmodel-yolox-nano.int8 for them."
    )
    seen = "It was taught on four short clips and some photos" if int8 else "But for its trunk it saw four short clips"
    seen += ": one of your own camera's takes minutes to train."
    details = {**TEACHING, "teacher": NAME} if int8 else {**TRAINING, **CODING, "threshold": LEAST}
    return cards.Card(
        name=name,
        system="accmpeg",
        task="video coding",
        summary=f"Where YOLOX-nano looks: a score for each macroblock of a frame{', for int8 files' if int8 else ''}.",
        builder=cards.Builder("AccModel", arguments),
        weights=file,
        preprocessing=cards.Preprocessing(
            inputs=(cards.Tensor("frame", model.input_shape, "float32", frame, (0, 255)),),
            outputs=(cards.Tensor(model.output_names[0], model.output_shape, "float32", scores),),
            facts={"server": NETWORK[0], "block": 16},
        ),
        parameters=deploy(model).count_params(),
        metrics=(
            cards.Metric(
                "area under the ROC curve",
                round(area, 3),
                f"{TESTED}.mp4",
                f"of the scores of macroblocks, for being in a box of YOLOX-nano; mean over every third frame{of_file}",
                f"{_MODULE} --measure{' --int8' if int8 else ''}",
            ),
        ),
        trained_on=(
            cards.TrainedOn("the trunk: weights of YOLOX-nano", "Megvii-BaseDetection/YOLOX, Apache-2.0"),
            *(cards.TrainedOn(f"{clip}.mp4", _TERMS[clip]) for clip in CLIPS),
            *(cards.TrainedOn(*one) for one in sesr.SOURCES.values() if int8),
        ),
        recipe=cards.Recipe(
            f"{_COMMAND}{' --int8' if int8 else ''}",
            TRAINING["seed"],
            backend=keras.backend.backend(),
            details=details,
        ),
        licence="Apache-2.0",
        limitations=(
            seen,
            kind,
            "Scores are compared inside of a frame: they do not say that one frame matters more than another.",
            "It serves YOLOX-nano with a letterbox of 416 × 416; another network looks elsewhere.",
        ),
        golden=f"{name}.golden.npz",
        exports=tuple(files),
        paper=cards.Paper(
            "AccMPEG: Optimizing Video Encoding for Accurate Video Analytics", "https://arxiv.org/abs/2204.12534", 2022
        ),
    )


_MODULE = "python -m keras_efficient.zoo.recipes.accmodel --data FOLDER"
_COMMAND = f"{_MODULE} --out runs --publish"
_OPENCV4NODEJS = "opencv4nodejs, MIT; origin of the clip not stated there"
_TERMS = {
    "traffic_highway_640x360": _OPENCV4NODEJS,
    "horses_720x480": _OPENCV4NODEJS,
    "person_indoor_768x432": "one-by-one-person-detection by Intel Corporation, CC-BY-4.0, shortened",
    "people_street_800x450": _OPENCV4NODEJS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for a trial; not to be published")
    parser.add_argument("--without", choices=CLIPS, help="train on a dashcam instead of this clip; not to be published")
    parser.add_argument("--int8", action="store_true", help="the one for integers, taught by that of the zoo")
    parser.add_argument("--publish", action="store_true", help="then measure, write weights and card")
    parser.add_argument("--measure", action="store_true", help="measure the model of the zoo instead")
    arguments = parser.parse_args()
    if arguments.publish and (arguments.steps or arguments.without):
        parser.error("a trial is not to be published")
    if arguments.measure:
        print(_measured(arguments.data, arguments.int8))
        return
    name, options = (INT8 if arguments.int8 else NAME), {"without": arguments.without, "steps": arguments.steps}
    folder = arguments.out / (name if arguments.without is None else f"{name}-without-{arguments.without}")
    if arguments.int8:
        model = teach(_teacher(arguments.out, arguments.without), arguments.data, folder, **options)
    else:
        model = train(arguments.data, folder, **options)
    if arguments.without:
        from keras_efficient.zoo import weights

        weights.save(model, folder / "model.weights.h5")
    if arguments.publish:
        home = Path(__file__).resolve().parent.parent
        card = publish(model, arguments.data, folder / "training.csv", home, int8=arguments.int8)
        print(*(f"{name}: {metric.name} {metric.value}" for metric in card.metrics), sep="\n", file=sys.stderr)


def _teacher(runs: Path, without: str | None) -> keras.Model:
    from keras_efficient import zoo
    from keras_efficient.zoo import weights

    model = zoo.load(NAME)
    if without is not None:
        weights.load_into(model, runs / f"{NAME}-without-{without}" / "model.weights.h5")
    return model


def _measured(data: Path, int8: bool) -> float:
    import tempfile

    from keras_efficient import export, zoo

    if not int8:
        return measure(zoo.load(NAME), data)
    model = zoo.load(INT8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        export.save(model, path, precision="int8", calibration=calibration(model, data))
        return measure(path, data)


if __name__ == "__main__":
    main()

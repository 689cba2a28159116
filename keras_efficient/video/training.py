"""A new server network in, a camera model out, in minutes; and one camera model taught by another."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.atomic import replacing
from keras_efficient.deploy import rebuild
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.layers import FakeQuantize
from keras_efficient.models import AccModel, without_shrink
from keras_efficient.video.frames import calibration
from keras_efficient.video.interpolation import reach, resized
from keras_efficient.video.labels import DAMAGED, Coding, Labels, clips_of, labels_of
from keras_efficient.video.servers import Server

__all__ = ["TrainedCamera", "rank_correlation", "teach_accmodel", "train_accmodel"]

LABELLING = 0.45  # of the time, at most
FLOOR = 0.02  # of a frame's mean gain, added before the logarithm
LEAST_CROP = 0.6  # of a side
FITTED, TOGETHER = 32, 24  # frames whose values say how they are rounded, and layers whose values are held at once
SAVED_EVERY = 60.0  # seconds
WARMUP = 0.08  # of the steps


@dataclass(frozen=True, eq=False)
class TrainedCamera:
    """What `train_accmodel` or `teach_accmodel` made.

    Attributes:
        model: frames to scores, the logarithms of gains.
        correlation: rank correlation of scores and gains, or the teacher's scores, inside of a frame, the mean over
            frames that it did not see.
        frames: that it was trained on.
        steps: of the optimizer.
        seconds: how long it took.
    """

    model: keras.Model
    correlation: float
    frames: int
    steps: int
    seconds: float


def train_accmodel(
    server: Server,
    source: str | Path | Sequence[str | Path],
    *,
    model: keras.Model | None = None,
    frame_size: tuple[int, int] = (720, 1280),
    coding: Coding | None = None,
    minutes: float = 10,
    steps: int | None = None,
    folder: str | Path | None = None,
    name: str = "",
    batch: int = 16,
    rate: float = 2e-3,
    held_out: float = 0.1,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> TrainedCamera:
    """Trains a camera model for a server's network from videos and pictures; nobody labels anything.

    Frames are coded well and badly, the server's accuracy gradient says what each macroblock is worth, and the model
    learns its logarithm, up to a constant of each frame: a Huber loss of what is left without both means.

    Args:
        server: what looks at frames.
        source: videos, pictures, and folders of them. Pictures are scaled to the camera's frames, videos stay as they
            are; what cannot be read is left out, and told.
        model: an `AccModel` to go on with; `None`: a new one for frames of `frame_size`.
        frame_size: (height, width) of the camera's frames.
        coding: how frames are coded; by default `Coding()`.
        minutes: that all of it may take. Labels take 45 per cent of that at most, a share for each clip: of a long
            video they are made in places all over it. Clips that are left are not used.
        steps: of training instead; labels are made of all frames then, and the result hangs on the seed alone.
        folder: where labels and the state of training are kept; called again with it, it goes on.
        name: of the server, which tells its labels from another's; needed with `folder`.
        batch, rate: of the optimizer, AdamW.
        held_out: share of each video, its end, and of the pictures, the last by name, that is not trained on but
            measured.
        seed: of weights and batches.
        on_progress: called with a line at each step of the way.

    Raises:
        FileProblem: no clip can be read, or a kept file cannot.
        WrongArgument: numbers out of range, or too few frames.
    """
    if not minutes > 0 or (steps is not None and steps < 1) or batch < 1 or not 0 <= held_out < 1:
        raise WrongArgument(f"Nothing is trained in minutes={minutes!r}, steps={steps!r}, batch={batch!r}.")
    if folder is not None and not name:
        raise WrongArgument("Give the server's name= with folder=: what is kept there is of one server.")
    tell, begin = on_progress or (lambda line: None), time.monotonic()
    keras.utils.set_random_seed(seed)
    model = AccModel(frame_size) if model is None else model
    inner = without_shrink(model)  # labels have shrunk frames
    if len(model.output_shape) != 3:
        raise WrongArgument(f"{model.name!r} is no AccModel: it gives {model.output_shape}, not scores of macroblocks.")
    if any(float(layer.range_min) == float(layer.range_max) for layer in _rounding(model)):
        hint = "Train one in floats, and teach this one by it: video.teach_accmodel."
        raise WrongArgument(f"{model.name!r} rounds, but its ranges are not known.", hint=hint)
    folder = None if folder is None else Path(folder)
    deadline = None if steps is not None else begin + 60 * minutes
    options = {
        "coding": coding or Coding(),
        "size": inner.input_shape[1:3],
        "frame_size": model.input_shape[1:3],
        "folder": None if folder is None else folder / "labels",
        "name": name,
    }
    last = None if deadline is None else deadline - (1 - LABELLING) * 60 * minutes
    labels = _labels(server, clips_of(source), options, last, tell)
    if deadline is not None and time.monotonic() >= deadline:
        hint = "Give more of them, fewer frames (coding), or a folder: what is there is not made again."
        raise WrongArgument(f"Labels took all of the {minutes:g} minutes.", hint=hint)
    train, test = _split(labels, held_out, inner)
    tell(f"training on {len(train[0])} frames of {len(labels)} clips")
    random = np.random.default_rng(seed)
    done = _train(inner, _loss, partial(_batch, train, batch), rate, steps, deadline, folder, random, tell)
    correlation = _correlation(inner, *test)
    tell(f"rank correlation on {len(test[0])} other frames: {correlation:.3f}")
    return TrainedCamera(model, correlation, len(train[0]), done, round(time.monotonic() - begin, 1))


def teach_accmodel(
    model: keras.Model,
    teacher: keras.Model,
    source: str | Path | Sequence[str | Path],
    *,
    features: Sequence[str] | None = None,
    frames: int = 96,
    minutes: float = 10,
    steps: int | None = None,
    folder: str | Path | None = None,
    batch: int = 8,
    rate: float = 1e-4,
    held_out: float = 0.1,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> TrainedCamera:
    """Trains a camera model to give another's scores: one for int8 files what the one in floats gives.

    ```
    loss = Σ mean (its output − the teacher's)² / variance of the teacher's,   over the scores and some features
    ```

    It begins with the teacher's weights where layers have the same name and shapes, and its batch normalisation stays
    as it is. No server is needed, and the more kinds of pictures there are the better. ::

        model = models.AccModel(trunk="yolox-nano", int8_aware=True)
        video.teach_accmodel(model, zoo.load("accmodel-yolox-nano"), ["videos/", "photos/"])

    Args:
        model: an `AccModel`, which is changed.
        teacher: one for frames of the same size.
        source: videos, pictures, and folders of them; frames of other shapes are stretched.
        features: names of layers that both have; `None`: those of an `AccModel` that have seen all sizes.
        frames: of each video at most, spread over it; fewer where the model takes large ones.
        minutes: that all of it may take.
        steps: of training instead.
        folder: where the state of training is kept, of one teacher; called again with it, it goes on.
        batch, rate: of the optimizer, AdamW.
        held_out: share of each video, its end, and of the pictures, the last by name, that is not trained on but
            measured.
        seed: of batches.
        on_progress: called with a line at each step of the way.

    Returns:
        The model, with the rank correlation of its scores and the teacher's on frames that it was not trained on.

    Raises:
        FileProblem: no clip can be read, or a kept file cannot.
        WrongArgument: numbers out of range, models of different sizes, too few frames or minutes.
    """
    if not minutes > 0 or (steps is not None and steps < 1) or batch < 1 or frames < 1 or not 0 <= held_out < 1:
        given = f"minutes={minutes!r}, steps={steps!r}, batch={batch!r}, frames={frames!r}, held_out={held_out!r}"
        raise WrongArgument(f"Nothing is taught in {given}.")
    tell, begin = on_progress or (lambda line: None), time.monotonic()
    inner, knowing = without_shrink(model), without_shrink(teacher)
    if (inner.input_shape, inner.output_shape) != (knowing.input_shape, knowing.output_shape):
        shapes = f"{inner.input_shape} to {inner.output_shape}, {knowing.input_shape} to {knowing.output_shape}"
        raise WrongArgument(f"Both must take and give the same: {shapes}.")
    names = [layer.name for layer in inner.layers if layer.name.endswith("mix_add")] if features is None else features
    seen, known = _with_features(model, names), _with_features(teacher, names)
    for name, ours, theirs in zip(names, _shapes(seen), _shapes(known), strict=False):
        if ours != theirs:
            raise WrongArgument(f"The features of {name!r} differ: {ours}, {theirs}.", hint="Give others, or none: [].")
    folder = None if folder is None else Path(folder)
    _check_teacher(folder, teacher, names)
    train, test = _taught_frames(clips_of(source), inner.input_shape[1:3], frames, held_out, tell)
    keras.utils.set_random_seed(seed)
    _take_over(model, teacher)
    nothing = np.zeros((len(train), 1, 1), np.float32)

    def draw(random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        pictures, _ = _batch((train, nothing), batch, random)
        return pictures, _listed(known.predict_on_batch(pictures))

    _, wanted = draw(np.random.default_rng(seed))
    tell(f"teaching on {len(train)} frames")
    _fit_ranges(model, train[:: -(-len(train) // FITTED)].astype(np.float32))
    deadline = None if steps is not None else begin + 60 * minutes
    if deadline is not None and time.monotonic() >= deadline:
        raise WrongArgument(f"Frames took all of the {minutes:g} minutes.", hint="Give more of them, or fewer frames.")
    with _frozen_statistics(model):
        losses = [_squared(float(np.var(one))) for one in wanted]
        done = _train(seen, losses, draw, rate, steps, deadline, folder, np.random.default_rng(seed), tell)
    correlation = _correlation(inner, test, knowing.predict(test, batch_size=16, verbose=0)) if len(test) else np.nan
    tell(f"rank correlation with the teacher's on {len(test)} other frames: {correlation:.3f}")
    return TrainedCamera(model, correlation, len(train), done, round(time.monotonic() - begin, 1))


def _shapes(model: keras.Model) -> list[tuple[Any, ...]]:
    return [tuple(output.shape) for output in model.outputs]


def _listed(outputs: Any) -> list[np.ndarray]:
    return outputs if isinstance(outputs, list) else [outputs]


def _check_teacher(folder: Path | None, teacher: keras.Model, names: Sequence[str]) -> None:
    """What is kept in a folder is of one teacher and some features."""
    if folder is None:
        return
    digest = hashlib.sha256(repr(list(names)).encode())
    for weight in teacher.weights:
        digest.update(ops.convert_to_numpy(weight).tobytes())
    note = folder / "teacher.txt"
    if note.exists() and note.read_text() != digest.hexdigest():
        raise FileProblem(folder, "keeps the training by another teacher.", hint="Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(note, overwrite=True) as temporary:
        temporary.write_text(digest.hexdigest())


def _rounding(model: keras.Model) -> list[FakeQuantize]:
    return [layer for layer in model.layers if isinstance(layer, FakeQuantize) and layer.minimum is None]


def _fit_ranges(model: keras.Model, pictures: np.ndarray) -> None:
    """Ranges of what is rounded, from what is there without rounding; of some layers at a time: values are many."""

    def without(operation: Any, path: str) -> Any:
        return keras.layers.Identity(name=operation.name) if isinstance(operation, FakeQuantize) else None

    layers = _rounding(model)
    plain = rebuild(model, without) if layers else model
    for start in range(0, len(layers), TOGETHER):
        some = layers[start : start + TOGETHER]
        outputs = [plain.get_layer(layer.name).output for layer in some]
        values = _listed(without_shrink(keras.Model(plain.input, outputs)).predict_on_batch(pictures))
        for layer, value in zip(some, values, strict=True):
            behind = [node.operation for node in layer._outbound_nodes]
            alone = behind[0] if len(behind) == 1 else None
            layer.fit(value, alone.activation if isinstance(alone, keras.layers.Activation) else None)


def _with_features(model: keras.Model, names: Sequence[str]) -> keras.Model:
    """Shrunk frames to what some layers give, and the scores."""
    known = [layer.name for layer in model.layers]
    for name in names:
        if name not in known:
            raise UnknownName("layer", name, known)
    outputs = [*(model.get_layer(name).output for name in names), model.output]
    try:
        return without_shrink(keras.Model(model.input, outputs))
    except ValueError as error:  # what `without_shrink` gives shares layers with another model
        raise WrongArgument(f"{model.name!r} is a part of another model.", hint="Give the whole AccModel.") from error


def _taught_frames(
    clips: Sequence[Path], size: tuple[int, int], limit: int, held_out: float, tell: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Frames for training, and those of the end of each video and of all pictures."""
    videos: list[np.ndarray] = []
    pictures: list[np.ndarray] = []
    problems: list[FileProblem] = []
    for path in clips:
        try:
            found = calibration(path, size, limit=limit).astype(np.uint8)
        except FileProblem as error:
            problems.append(error)
            tell(f"left out: {error.message}")
        else:
            (videos if len(found) > 1 else pictures).append(found)
    if not videos and not pictures:
        raise problems[0]
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for frames in [*videos, *([np.concatenate(pictures)] if pictures else [])]:
        kept = _kept(len(frames), held_out)
        parts[0].append(frames[:kept])
        parts[1].append(frames[kept:])
    train, test = map(np.concatenate, parts)
    if not len(train):
        raise WrongArgument(f"There is no frame to train on: held_out={held_out} takes all {len(test)} of them.")
    return train, test


def _kept(count: int, held_out: float) -> int:
    """How many of some frames are trained on."""
    return count - round(held_out * count)


def _squared(variance: float) -> Callable[[Any, Any], Any]:
    """The mean square of what is wrong, in shares of a variance."""

    def loss(wanted: Any, found: Any) -> Any:
        return ops.mean(ops.square(wanted - found), axis=tuple(range(1, len(found.shape)))) / (variance + 1e-12)

    return loss


def _take_over(model: keras.Model, teacher: keras.Model) -> None:
    """Weights of layers with the same name and shapes."""
    known = {layer.name: layer.get_weights() for layer in teacher.layers}
    for layer in model.layers:
        weights = known.get(layer.name, [])
        if weights and [w.shape for w in weights] == [tuple(w.shape) for w in layer.weights]:
            layer.set_weights(weights)


@contextlib.contextmanager
def _frozen_statistics(model: keras.Model) -> Iterator[None]:
    flat = model._flatten_layers()
    norms = [layer for layer in flat if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    for norm in norms:
        norm.trainable = False
    try:
        yield
    finally:
        for norm in norms:
            norm.trainable = True


def rank_correlation(model: keras.Model, labels: Sequence[Labels]) -> float:
    """Spearman's of an `AccModel`'s scores and the gains of a frame's macroblocks, the mean over frames."""
    inner = without_shrink(model)
    return _correlation(inner, *_together([_wanted(one, inner) for one in labels]))


def _labels(
    server: Server, clips: Sequence[Path], options: dict[str, Any], last: float | None, tell: Callable[[str], None]
) -> list[Labels]:
    """Of the clips that can be read, as many as there is time for; `options` of `labels_of`."""
    found: list[Labels] = []
    problems: list[FileProblem] = []
    for number, path in enumerate(clips):
        now = time.monotonic()
        if last is not None and found and now > last:
            tell(f"no time for the labels of {len(clips) - number} of {len(clips)} clips")
            break
        tell(f"labels of {path.name} ({number + 1} of {len(clips)})")
        deadline = None if last is None else now + (last - now) / (len(clips) - number)
        try:
            found.append(labels_of(server, path, deadline=deadline, **options))
        except FileProblem as error:
            if error.path != str(path):  # one of those that are kept
                raise
            problems.append(error)
            tell(f"left out: {error.message}")
    if not found:
        raise problems[0]
    return found


Frames = tuple[np.ndarray, np.ndarray]


def _split(labels: Sequence[Labels], held_out: float, inner: keras.Model) -> tuple[Frames, Frames]:
    """Frames and logarithms of their gains, for training, and of the end of each video and of all pictures."""
    videos = [_wanted(one, inner) for one in labels if len(one.frames) > 1]
    pictures = [_wanted(one, inner) for one in labels if len(one.frames) == 1]
    parts: tuple[list[Frames], list[Frames]] = ([], [])
    for frames, gains in [*videos, *([_together(pictures)] if pictures else [])]:
        kept = _kept(len(frames), held_out)
        parts[0].append((frames[:kept], gains[:kept]))
        parts[1].append((frames[kept:], gains[kept:]))
    train, test = map(_together, parts)
    if not len(train[0]):
        seen, count = len(test[0]), sum(len(one.frames) for one in labels)
        why = f"held_out={held_out} takes all {seen} of them" if seen else f"the server sees nothing in any of {count}"
        raise WrongArgument(f"There is no frame to train on: {why}.")
    return train, test


def _together(parts: Sequence[Frames]) -> Frames:
    frames, gains = (np.concatenate(some) for some in zip(*parts, strict=True))
    return frames, gains


def _wanted(labels: Labels, inner: keras.Model) -> Frames:
    """Frames, and logarithms of their gains at the model's cells; without frames in which the server sees nothing: they
    do not say which macroblock is worth more."""
    has = labels.gains.any(axis=(1, 2))
    gains = labels.gains[has]
    gains = gains + FLOOR * gains.mean(axis=(1, 2), keepdims=True) + 1e-12
    cells = inner.output_shape[1:]
    have, want = reach(labels.size, gains.shape[1:]), reach(inner.input_shape[1:3], cells)
    found = resized(np.log2(gains), cells, have=have, want=want)
    return labels.frames[has], (found - found.mean(axis=(1, 2), keepdims=True)).astype(np.float32)


def _loss(wanted: Any, found: Any) -> Any:
    """Huber's, of what is left without the mean of each frame."""
    apart = ops.abs(
        (wanted - ops.mean(wanted, (1, 2), keepdims=True)) - (found - ops.mean(found, (1, 2), keepdims=True))
    )
    return ops.mean(ops.where(apart < 2.0, 0.5 * ops.square(apart), 2.0 * apart - 2.0), axis=(1, 2))


def _train(
    inner: keras.Model,
    loss: Any,
    draw: Callable[[np.random.Generator], tuple[Any, Any]],
    rate: float,
    steps: int | None,
    deadline: float | None,
    folder: Path | None,
    random: np.random.Generator,
    tell: Callable[[str], None],
) -> int:
    """Trains on what is drawn until the steps or the time are over; returns the steps in all."""
    inner.compile(keras.optimizers.AdamW(rate, weight_decay=2e-2), loss)
    done, log = _resumed(inner, folder), []
    begin = saved = time.monotonic()
    random = np.random.default_rng([int(random.integers(2**31)), done])
    while True:
        now = time.monotonic()
        share = done / steps if steps is not None else (now - begin) / max((deadline or now) - begin, 1e-9)
        if share >= 1:
            break
        # A cosine of what is over, of steps or of time.
        inner.optimizer.learning_rate.assign(
            rate * min(share / WARMUP, 1.0, 0.51 + 0.49 * np.cos(np.pi * share)) + 1e-6
        )
        value = float(np.ravel(inner.train_on_batch(*draw(random)))[0])
        done += 1
        log.append((done, round(value, 5)))
        if now - saved > SAVED_EVERY:
            tell(f"step {done}, {share:.0%}: loss {np.mean([one for _, one in log[-50:]]):.4f}")
            _save(inner, folder, log)
            saved = now
    _save(inner, folder, log)
    return done


def _batch(train: Frames, batch: int, random: np.random.Generator) -> Frames:
    """Some frames, each a part of one, mirrored, darker or lighter, or none of that."""
    frames, gains = train
    whole = reach(frames.shape[1:3], gains.shape[1:])
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for index in random.integers(len(frames), size=batch):
        x, y = frames[index].astype(np.float32), gains[index]
        if random.random() < 0.5:
            x, y = _cropped((x, y), whole, random)
        if random.random() < 0.5:
            x, y = x[:, ::-1], y[:, ::-1]
        x = x * random.uniform(0.7, 1.3) * random.uniform(0.9, 1.1, 3) + random.uniform(-20, 20)
        found[0].append(x.clip(0, 255))
        found[1].append(y)
    return np.stack(found[0]).astype(np.float32), np.stack(found[1]).astype(np.float32)


def _cropped(of: Frames, whole: tuple[float, float], random: np.random.Generator) -> Frames:
    """A part of a frame as large as the frame; `whole`: how far its gains reach."""
    frame, gains = of
    part = float(np.exp(random.uniform(np.log(LEAST_CROP), 0)))
    start = tuple(random.uniform(0, 1 - part, 2).tolist())
    gains = resized(gains, gains.shape, have=whole, want=(part * whole[0], part * whole[1]), start=start)
    return resized(frame[None], frame.shape[:2], want=(part, part), start=start)[0], gains


def _correlation(inner: keras.Model, frames: np.ndarray, gains: np.ndarray) -> float:
    """The mean of Spearman's over frames; not a number where there is none."""
    if not len(frames):
        return float("nan")
    scores = inner.predict(frames.astype(np.float32), batch_size=16, verbose=0).reshape(len(frames), -1)
    told = [(a, b) for a, b in zip(scores, gains.reshape(len(gains), -1), strict=True) if np.ptp(a) and np.ptp(b)]
    return float(np.mean([np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in told])) if told else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in order, from 0 on; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: np.ndarray = (ends - (counts + 1) / 2)[which]
    return found


def _resumed(inner: keras.Model, folder: Path | None) -> int:
    """Takes up weights and the optimizer's state as they were kept; returns the steps that are done."""
    inner.optimizer.build(inner.trainable_variables)
    path = None if folder is None else folder / "training.npz"
    if path is None or not path.exists():
        return 0
    variables = _state(inner)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[str(number)] for number in range(len(variables))]
    except DAMAGED as error:
        raise FileProblem(path, "is damaged, or of another model.", hint="Remove it to begin anew.") from error
    if any(tuple(variable.shape) != array.shape for variable, array in zip(variables, arrays, strict=True)):
        raise FileProblem(path, "is of another model.", hint="Remove it to begin anew.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return int(ops.convert_to_numpy(inner.optimizer.iterations))


def _state(inner: keras.Model) -> list[keras.Variable]:
    return [*inner.variables, *inner.optimizer.variables]


def _save(inner: keras.Model, folder: Path | None, log: list[tuple[int, float]]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {str(number): ops.convert_to_numpy(variable) for number, variable in enumerate(_state(inner))}
    with replacing(folder / "training.npz", overwrite=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    with (folder / "training.csv").open("a", newline="") as file:
        csv.writer(file).writerows(log)
    log.clear()

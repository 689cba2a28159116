"""Bytes and delay at equal accuracy of a camera that knows its server's network; rates kept; speed.

The server is YOLOX-nano, and is asked about the clips of the shared data. Bytes, and delays from the same codings, take
hours, and go on where they were: what was evaluated is kept in runs/accmpeg.

    KERAS_EFFICIENT_ACCMODEL=FILE|NAME  a camera model for all clips, instead of the zoo's and those that
    python -m keras_efficient.zoo.recipes.accmodel --data FOLDER --without CLIP     trains for clips which that has seen
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Row
from keras_efficient import video
from keras_efficient.atomic import replacing
from keras_efficient.video import report
from keras_efficient.video.delay import bandwidth_for
from keras_efficient.video.encoder import PRESETS
from keras_efficient.video.evaluation import Saving
from keras_efficient.video.schemes import SCHEMES

FOLDER = Path("runs/accmpeg")
PICTURE, DRAWN = Path("docs/accmpeg.svg"), ("uniform", "defaults", "boxes", "vigil", "camera")
CAMERA, INT8, UNSEEN = "accmodel-yolox-nano", "accmodel-yolox-nano.int8", "dashcam_highway_960x540"
# clip: bytes to save at least, against one QP and against x264's defaults
CLIPS = {
    "dashcam_highway_960x540": (0.30, 0.15),
    "traffic_highway_640x360": (0.30, 0.15),
    "person_indoor_768x432": (0.30, 0.15),
    "people_street_800x450": (0.15, 0.08),
    "horses_720x480": (0.0, 0.0),
}
EVALUATED = 200  # frames of a clip at least, where it has them
# At each QP, the others at each second one: accuracy jumps from one to the next.
DENSE = ("uniform", "defaults", "camera")
BASELINES = ("uniform", "defaults", "aq", "boxes", "vigil", "eaar", "dds", "defaults-short", "defaults-live")
OURS = ("camera", "two-levels", "camera-short", "camera-live")
OF_INTEGERS = "camera-int8"
BARRED = ("camera", OF_INTEGERS)
ROUND_TRIP, ON_LINK, LOWER = 0.1, 0.6, 0.25
KEPT = 0.05  # share by which a bitrate may be missed
BITRATES = (150_000, 400_000, 1_000_000)
MILLISECONDS, RATE, ROI_COST = 15, 30, 0.05
# another server: its network, the clip that it is measured on, those that its camera model is trained on, and what it
# learns, in how many minutes: the last label and the last step end a little later
SERVERS = {
    "DeepLab v3": (
        ("deeplabv3_mnv2_dm05_voc_257.onnx", "segmentation", "deeplab"),
        "people_street_800x450",
        ("person_indoor_768x432", "horses_720x480", "traffic_highway_640x360", "dashcam_highway_1280x720"),
        ("found", 5),
    ),
    "road segmentation": (
        ("road_segmentation_adas_0001.onnx", "segmentation", "openvino-road"),
        "dashcam_highway_960x540",
        ("dashcam_highway_1280x720", "traffic_highway_640x360", "people_street_800x450"),
        ("gradient", 9),
    ),
    "pose": (
        ("pose_landmark_lite.onnx", "keypoints", "mediapipe-pose"),
        # In the crowd it looks at the best 8 of 12 people, and which these are hangs on each coding. It is trained
        # there, with all of them: else the others would be labelled as background.
        "person_indoor_768x432",
        ("people_street_800x450", "dashcam_highway_1280x720"),
        ("found", 8),
    ),
}
PEOPLE = 16  # in a frame, when it is trained
MINUTES, DISTANCE = 10, 0.10


@cache
def _server() -> Any:
    network = harness.data_folder() / "models" / "yolox_nano.onnx"
    return video.onnx_server(network, "detection", "yolox")


@cache
def _model(clip: str = UNSEEN) -> Any:
    """A camera model that has not seen a clip: a Keras model, a file, or `None` where there is none.

    The zoo's has not seen the dashcams. For the others the recipe of the zoo trains one: `--without CLIP`.
    """
    named = os.environ.get("KERAS_EFFICIENT_ACCMODEL")
    if named and Path(named).suffix in (".tflite", ".onnx"):
        return named
    from keras_efficient import zoo
    from keras_efficient.zoo import weights

    trained = FOLDER.parent / f"{CAMERA}-without-{clip}" / "model.weights.h5"
    if not named and clip != UNSEEN and not trained.exists():
        return None
    model = zoo.load(named or CAMERA)
    if not named and clip != UNSEEN:
        weights.load_into(model, trained)
    return model


def _path(name: str) -> Path:
    return harness.data_folder() / "video" / f"{name}.mp4"


@cache
def _evaluated(name: str, quick: bool) -> video.Evaluation:
    """A clip in all schemes; a clip of which less is asked is evaluated at fewer frames."""
    opened = video.Video.open(_path(name))
    clip = video.Clip(opened, 20 if quick else None)
    every = 4 if quick else max(sum(1 for _ in opened) // EVALUATED, 1)
    model = _model(UNSEEN if quick else name)
    wanted = [one for one in SCHEMES if model is not None or one not in OURS]
    if quick and name != UNSEEN:
        wanted = [one for one in wanted if one in (*DENSE, "camera-live")]
    made = [
        scheme
        for one in wanted
        for scheme in video.coding_schemes([one], _server(), model, step=10 if quick else 1 if one in DENSE else 2)
    ]
    if name == UNSEEN and model is not None and "KERAS_EFFICIENT_ACCMODEL" not in os.environ:
        (whole,) = video.coding_schemes(["camera"], _server(), _integers(), step=10 if quick else 2)
        made.append(replace(whole, name=OF_INTEGERS, about=f"{whole.about}, in integers"))
    asked: dict[str, Any] = {"every": every, "between": report.BETWEEN, "folder": FOLDER, "name": "yolox-nano"}
    found = video.evaluate(_server(), clip, made, on_progress=_shower(name), **asked)
    print()
    return found


def _shower(name: str) -> Callable[[int, int], None]:
    began = time.perf_counter()

    def show(done: int, total: int) -> None:
        print(f"\r{name}: {done} of {total}, {time.perf_counter() - began:.0f} s", end="", flush=True)

    return show


def data_bytes(quick: bool) -> Iterator[Row]:
    """Bytes at equal accuracy, both conventions; and a picture of the curves."""
    evaluated = {name: _evaluated(name, quick) for name in CLIPS}
    if not quick:
        with replacing(PICTURE, overwrite=True) as temporary:
            temporary.write_text(report.picture(list(evaluated.values()), DRAWN), "utf-8")
    for name, bars in CLIPS.items():
        found = evaluated[name]
        for other, bar in zip(("uniform", "defaults"), bars, strict=True):
            for scheme in found.points:
                if scheme != other:
                    yield from _savings(found, name, scheme, other, bar if scheme in BARRED else None)
        if "camera" not in found.points:
            yield Row(f"{name}: camera", None, "kB", reached=None, why="the zoo's camera model has seen it")


def _savings(found: video.Evaluation, name: str, scheme: str, other: str, bar: float | None) -> Iterator[Row]:
    """The mean, with the bar, and for the camera the least at single accuracies, where it must not be worse."""
    both = {
        one.name: video.saving(found.curve(scheme, one), found.curve(other, one), report.GRID) for one in found.measures
    }
    first = next(iter(both.values()))
    mean = first.mean
    details = {
        "interval": [mean.low, mean.high],
        "highest that both reach": vars(first.highest),
        "settings": len(found.points[scheme]),
        "evaluated frames": len(next(iter(found.points[scheme][0].sums.values()))),
        "other conventions": {one: vars(value.mean) for one, value in list(both.items())[1:]},
    }
    barred: dict[str, Any] = {}
    why = "one of both does not reach it" if mean.value is None else ""
    if bar is not None:
        barred = {"bar": f"≥ {bar:.0%}", "reached": None if mean.value is None else mean.value >= bar}
        why = why or ("" if barred["reached"] else _limit(found, other))
    what = f"{name}, mean over F1 .80 to .95: bytes that {scheme} saves against {other}"
    yield Row(what, _rounded(mean.value, 4), "share", why=why, details=details, **barred)
    if bar is not None:
        yield _never_worse(found, name, scheme, other, [one for one in first.at if one.accuracy in report.ACCURACIES])


def _never_worse(found: video.Evaluation, name: str, scheme: str, other: str, at: Sequence[Saving]) -> Row:
    known = {one.accuracy: one for one in at if one.value is not None}
    worse = [one for one in known.values() if one.value < 0]
    some = ", ".join(f"{one:.2f}" for one in known)
    what = f"{name}, F1 {some or 'of none that both reach'}: the least that {scheme} saves against {other}"
    found_at = {
        f"{one.accuracy:.2f}": {
            "saves": _rounded(one.value, 4),
            "interval": [one.low, one.high],
            "bytes": [found.curve(each).bytes_at(one.accuracy) for each in (scheme, other)],
        }
        for one in at
    }
    noise = [one for one in worse if one.low is not None and one.high is not None and one.low < 0 < one.high]
    why = "" if known else "they share none of .80, .85, .90, .95"
    if worse:
        why = "worse at " + ", ".join(f"{one.accuracy:.2f} ({one.value:.1%})" for one in worse)
        why += "; zero lies inside of the interval there" if len(noise) == len(worse) else ""
    least = min((one.value for one in known.values()), default=None)
    reached = not worse if known else None
    return Row(what, _rounded(least, 4), "share", bar="never worse", reached=reached, why=why, details=found_at)


def _limit(found: video.Evaluation, other: str) -> str:
    """What is saved where the server's own results are known, which says what can be reached on a clip."""
    known = {}
    for scheme in ("oracle", "boxes", "vigil"):
        if scheme in found.points:
            mean = video.saving(found.curve(scheme), found.curve(other), report.GRID).mean.value
            known[scheme] = "shares no accuracy" if mean is None else f"{mean:.1%}"
    return "with the server's own results: " + ", ".join(f"{name} {value}" for name, value in known.items())


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def delay(quick: bool) -> Iterator[Row]:
    """Mean delay of a chunk at F1 .85: where the best baseline's takes 0.6 s on the link, and from 0.1 to 2 Mbit/s."""
    for name in CLIPS:
        found = _evaluated(name, quick)
        needed = {one: found.curve(one).bytes_at(report.SHOWN_AT) for one in BASELINES if one in found.points}
        known = {one: value for one, value in needed.items() if value}
        if not known:
            yield Row(f"{name}: delay", None, "s", why="no baseline reaches F1 .85")
            continue
        smallest = min(known, key=lambda one: known[one])
        narrow = bandwidth_for(found, smallest, report.SHOWN_AT, seconds=ON_LINK)
        for bandwidth, queues in [(narrow, True), (narrow, False), *((one, True) for one in report.BANDWIDTHS)]:
            link = video.Link(bandwidth, ROUND_TRIP, queues=queues)
            yield _delays(found, name, link, is_barred=bandwidth == narrow)


def _delays(found: video.Evaluation, name: str, link: video.Link, *, is_barred: bool) -> Row:
    rate = found.clip.video.rate
    looking = replace(link, look=_look())
    seconds = {
        one: found.cost(one, report.SHOWN_AT, lambda point, of=of: of.delay(point, rate))
        for one in found.points
        for of in [looking if one in OURS else link]
    }
    ours, theirs = (
        min(((seconds[one], one) for one in names if seconds.get(one)), default=(None, "none"))
        for names in (OURS, BASELINES)
    )
    share = None if ours[0] is None or theirs[0] is None else 1 - ours[0] / theirs[0]
    queues = "" if link.queues else ", queues left out"
    where = f"{link.bandwidth / 1e6:.3f} Mbit/s{queues}"
    what = f"{name}, F1 .85, {where}: mean delay of a chunk, {ours[1]} against {theirs[1]}"
    barred: dict[str, Any] = {}
    why = "F1 .85 is not reached" if share is None else ""
    if is_barred:
        barred = {"bar": f"≥ {LOWER:.0%} lower", "reached": None if share is None else share >= LOWER}
        if share is not None and share < LOWER:
            fixed = found.cost(theirs[1], report.SHOWN_AT, lambda point: _without_link(point, rate, link))
            why = f"{fixed:.2f} s of {theirs[1]}'s do not hang on bytes"
    details = {"lower by": _rounded(share, 4), "all": {one: _rounded(value, 4) for one, value in seconds.items()}}
    details["link"] = vars(looking)
    return Row(what, _rounded(ours[0], 4), "s", peer=_rounded(theirs[0], 4), why=why, details=details, **barred)


def _without_link(point: Any, rate: Any, link: video.Link) -> float:
    terms = video.delays(point, rate, link)
    return float(np.mean(sum(terms[name] for name in terms if name not in ("queue", "link"))))


def another_server(name: str, quick: bool) -> Iterator[Row]:
    """A camera model for another network: how long that takes, how far it is from the clip's own gradients."""
    network, clip, clips, learns = SERVERS[name]
    file, task, preprocess = network
    path = harness.data_folder() / "models" / file
    finder = {"people": _server()} if task == "keypoints" else {}
    server = video.onnx_server(path, task, preprocess, **finder)
    teacher = video.onnx_server(path, task, preprocess, **finder, most=PEOPLE) if finder else server
    model, trained = _trained(teacher, file, clips, learns, quick)
    what = f"{name}: camera model from {len(clips)} clips, labels included"
    bar: dict[str, Any] = {"bar": f"≤ {MINUTES} minutes", "reached": trained["seconds"] <= 60 * MINUTES}
    yield Row(what, round(trained["seconds"] / 60, 2), "minutes", details=trained, **bar)
    opened = video.Video.open(_path(clip))
    every = 4 if quick else max(sum(1 for _ in opened) // EVALUATED, 1)
    schemes = video.coding_schemes(OF_SERVERS, server, model, step=10 if quick else 2)
    some = video.Clip(opened, 20 if quick else None)
    asked: dict[str, Any] = {"every": every, "between": report.BETWEEN, "folder": FOLDER, "name": file}
    found = video.evaluate(server, some, schemes, on_progress=_shower(name), **asked)
    print()
    yield from _distances(found, f"{name}, {clip}")


OF_SERVERS = ("uniform", "defaults", "oracle", "camera")


def _distances(found: video.Evaluation, where: str) -> Iterator[Row]:
    """In bytes, of the camera model from the others; the oracle is the one that counts."""
    measure = found.measures[0].name
    for other in ("oracle", "uniform", "defaults"):
        both = video.saving(found.curve("camera"), found.curve(other), report.GRID)
        value = None if both.mean.value is None else -both.mean.value
        limits = [None if one is None else round(-one, 4) for one in (both.mean.high, both.mean.low)]
        details = {"interval": limits, "evaluated frames": len(next(iter(found.points["camera"][0].sums.values())))}
        bar: dict[str, Any] = {}
        why = ""
        if other == "oracle":
            bar = {"bar": f"≤ {DISTANCE:.0%} more", "reached": None if value is None else value <= DISTANCE}
            why = f"95 % of a bootstrap: {limits[0]} to {limits[1]}" if bar["reached"] is False else ""
        why = f"they do not share accuracies from {report.GRID[0]:.2f} to .95" if value is None else why
        what = f"{where}, mean over {measure} .80 to .95: bytes of the camera model more than those of {other}"
        yield Row(what, _rounded(value, 4), "share", why=why, details=details, **bar)


def _trained(
    server: Any, name: str, clips: tuple[str, ...], learns: tuple[str, float], quick: bool
) -> tuple[Any, dict[str, Any]]:
    """A camera model, from the zoo's trunk on, and how it was made; kept in runs/accmpeg."""
    from keras_efficient import models, zoo
    from keras_efficient.zoo import weights

    kept = FOLDER / ("quick" if quick else "servers") / Path(name).stem
    note, file = kept / "trained.json", kept / "model.weights.h5"
    label, minutes = learns
    known = json.loads(note.read_text()) if note.exists() and file.exists() else {}
    if (known.get("label"), known.get("clips"), known.get("minutes", minutes)) == (label, list(clips), minutes):
        model = zoo.load(CAMERA)
        weights.load_into(model, file)
        return model, known
    options: dict[str, Any] = {"steps": 2} if quick else {"minutes": minutes}
    options |= {"coding": video.Coding(label=label, every=60 if quick else 3), "on_progress": print}
    model = models.with_frozen_trunk(zoo.load(CAMERA))
    made = video.train_accmodel(server, [_path(clip) for clip in clips], model=model, **options)
    kept.mkdir(parents=True, exist_ok=True)
    weights.save(made.model, file)
    found = {name: getattr(made, name) for name in ("seconds", "steps", "frames", "correlation")}
    found |= {"label": label, "clips": list(clips), "minutes": minutes, "load": os.getloadavg()[0]}
    note.write_text(json.dumps(found))
    return made.model, found


def rate(quick: bool) -> Iterator[Row]:
    """A bitrate over a clip."""
    for name, wanted in itertools.product(list(CLIPS)[:3], BITRATES):
        opened = video.Video.open(_path(name))
        camera = video.Camera(_model(), opened.width, opened.height, opened.rate, bitrate=wanted)
        packets, count = [], 0
        for frame in video.Clip(opened, 60 if quick else None):
            packets += camera.encode(frame)
            count += 1
        packets += camera.flush()
        found = 8 * sum(len(packet.data) for packet in packets) * float(opened.rate) / count
        off = abs(found / wanted - 1)
        what = f"{name}, {count} frames: bitrate kept, camera model {'none' if _model() is None else 'on'}"
        bar: dict[str, Any] = {"bar": f"within {KEPT:.0%}", "reached": off <= KEPT}
        yield Row(what, round(found / 1e3, 1), "kbit/s", peer=wanted / 1e3, ratio=round(found / wanted, 4), **bar)


def speed(quick: bool) -> Iterator[Row]:
    """The camera model in 8 bits, encoder and model together, what offsets cost, and whether they are kept exactly."""
    frames = list(video.Video.open(_path("dashcam_highway_1280x720")))[: 10 if quick else None]
    rounds = 3 if quick else 30
    file = None if _model() is None else _integers()
    if file is not None:
        times = [1e3 * seconds for seconds in _looks(file, frames, rounds)]
        middle, least = float(np.median(times)), min(times)
        what = "camera model, int8 .tflite, one 1280×720 frame, 2 threads, resize included: median"
        bar: dict[str, Any] = {"bar": f"≤ {MILLISECONDS} ms", "reached": middle <= MILLISECONDS}
        details = {"minimum": round(least, 2), "load": os.getloadavg()[0]}
        yield Row(what, round(middle, 2), "ms", details=details, **bar)
    for preset in ("veryfast", "superfast"):
        camera = video.Camera(file, 1280, 720, 25, preset=preset)
        began = time.perf_counter()
        for frame in frames:
            camera.encode(frame)
        camera.flush()
        found = len(frames) / (time.perf_counter() - began)
        what = f"encoder and camera model ({'none' if file is None else 'int8'}), 1280×720, {preset}"
        yield Row(what, round(found, 1), "frames/s", bar=f"≥ {RATE}", reached=found >= RATE)
    yield from _roi_costs(frames, rounds)
    for preset in PRESETS[: 2 if quick else -2]:
        told = video.RoiEncoder(1280, 720, 25, mode="exact", preset=preset).self_check(3 if quick else 6)
        what = f"exact mode, 1280×720, {preset}: QPs of all coded macroblocks as asked"
        yield Row(what, float(told == "read back"), "share", bar="all", reached=told == "read back")


@cache
def _look() -> float | None:
    """Median seconds of a look at 1280×720 by the file that a camera runs."""
    frames = list(itertools.islice(video.Video.open(_path("dashcam_highway_1280x720")), 20))
    if _model() is None:
        return None
    times = _looks(_integers(), frames, 20)
    return float(np.median(times))


def _looks(file: str, frames: list[Any], rounds: int) -> list[float]:
    saliency, times = video.Saliency(file, threads=2), []
    for frame in itertools.islice(itertools.cycle(frames), rounds + 3):
        began = time.perf_counter()
        saliency(frame)
        times.append(time.perf_counter() - began)
    return times[3:]


@cache
def _integers() -> str:
    """The camera model in integers all through, for frames that are scaled down before: what a camera runs."""
    from keras_efficient import export, models, zoo
    from keras_efficient.zoo.recipes import accmodel

    named = os.environ.get("KERAS_EFFICIENT_ACCMODEL")
    if named:
        if not named.endswith(".tflite"):
            sys.exit("What a camera runs is a .tflite file: set KERAS_EFFICIENT_ACCMODEL to one in integers.")
        return named
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, inner = FOLDER / "camera.tflite", models.without_shrink(zoo.load(INT8))
    samples = accmodel.calibration(inner, harness.data_folder())
    export.save(inner, path, overwrite=True, precision="int8", calibration=samples)
    return str(path)


def _roi_costs(frames: list[Any], rounds: int) -> Iterator[Row]:
    """Maps as the camera model makes them, new for each frame, and one of noise, where hardly two neighbours agree."""
    noise = np.zeros((45, 80), int)
    noise[15:30, 20:60] = np.random.default_rng(0).choice([-8, -4, 0], size=(15, 40))
    maps = {"noise in a sixth of the macroblocks": [noise] * len(frames)}
    if _model() is not None:
        camera, found = video.Camera(_model(), 1280, 720, 25), []
        for frame in frames:
            camera.encode(frame)
            found.append(camera.offsets)
        maps = {"of the camera model": found, **maps}
    for name, some in maps.items():
        yield _roi_cost(frames, name, some, rounds)


def _roi_cost(frames: list[Any], name: str, offsets: list[Any], rounds: int) -> Row:
    """An encode with offsets against a plain one that takes as many bytes, turn by turn."""

    def run(base: float, maps: list[Any]) -> int:
        encoder = video.RoiEncoder(1280, 720, 25, base=base, threads=1)
        packets = [packet for both in zip(frames, maps, strict=True) for packet in encoder.encode(*both)]
        return sum(len(packet.data) for packet in packets + encoder.flush())

    none = [None] * len(frames)
    size, low, high = run(36, offsets), 20.0, 51.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if run(middle, none) > size else (low, middle)
    runs = {"offsets": lambda: run(36, offsets), "plain": lambda: run(high, none)}
    times = harness.medians(runs, rounds=max(rounds // 3, 3), warmups=1)
    cost = times["offsets"] / times["plain"] - 1
    what = f"{len(frames)} frames of 1280×720, veryfast, 1 thread: encoding with offsets against plain, same bytes"
    details = {"cost": round(cost, 4), "bytes": [size, run(high, none)], "load": os.getloadavg()[0]}
    bar: dict[str, Any] = {"bar": f"≤ {ROI_COST:.0%} more", "reached": cost <= ROI_COST}
    why = "" if cost <= ROI_COST else "the encoder's own work with a QP for each macroblock"
    values: dict[str, Any] = {"ratio": round(cost + 1, 4), "details": details, "why": why}
    return Row(f"{what}; map: {name}", round(times["offsets"], 3), "s", peer=round(times["plain"], 3), **values, **bar)


SECTIONS = {
    "bytes": data_bytes,
    "delay": delay,
    **{name.lower().replace(" ", "-"): partial(another_server, name) for name in SERVERS},
    "rate": rate,
    "speed": speed,
}

if __name__ == "__main__":
    harness.main("accmpeg", SECTIONS)

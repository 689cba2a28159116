"""`keras-efficient video`: certificates, a server and cameras in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

from keras_efficient.cli import video as cli

from .conftest import program


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A segmenter without weights: the class of a pixel is its strongest colour."""
    import onnx
    from onnx import TensorProto, helper

    path = tmp_path_factory.mktemp("network") / "colours.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 257, 257, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """50 frames, two seconds."""
    av = pytest.importorskip("av", reason="needs the extra video")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for shift in range(50):
            picture = np.roll(noise, shift // 4, axis=1).repeat(8, axis=0).repeat(8, axis=1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return path


@pytest.fixture
def certificates(tmp_path):
    done = program(
        *("video", "certs", tmp_path / "certs", "--server", "localhost", "--camera", "cam1", "--camera", "cam2"),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["authority", "server", "cam1", "cam2"]
    return {
        row["name"]: (
            *("--certificate", row["certificate"], "--key", row["key"]),
            *("--authority", rows[0]["certificate"]),
        )
        for row in rows
    }


def started(*arguments, **options):
    command = [sys.executable, "-P", "-m", "keras_efficient.cli", "video", *map(str, arguments)]
    # A background job's children inherit an ignored SIGINT, which Python would keep.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    return subprocess.Popen(command, env=environment, **pipes, **heeding, **options)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def serve(network, tmp_path):
    made = []

    def start(*tls):
        page = free_port()
        server = started(
            *("serve", "--network", network, "--task", "segmentation", "--preprocess", "deeplab", "--every", 5),
            *("--listen", "localhost:0", "--journal", tmp_path / "journal.sqlite", "--metrics", f"127.0.0.1:{page}"),
            *tls,
        )
        made.append(server)
        for line in server.stderr:
            if line.startswith("Serving at "):
                return server, line.split()[-1].rstrip("."), f"http://127.0.0.1:{page}"
        raise AssertionError("the server ended")

    yield start
    for server in made:
        server.kill()
        server.communicate()


def stored(tmp_path):
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    return connection.execute(
        "SELECT camera, count(*), sum(frames) FROM chunks GROUP BY camera ORDER BY camera"
    ).fetchall()


def test_a_video_to_a_server_and_its_results_back(serve, certificates, clip, tmp_path):
    server, address, page = serve(*certificates["server"])
    done = program(
        *("video", "stream", clip, "--to", address, "--camera", "cam1", *certificates["cam1"]),
        *("--spool", tmp_path / "spool", "--key-every", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    results = [result for line in lines for result in line["results"]]
    assert [result["pts"] for result in results] == list(range(0, 50, 5))
    assert all(sum(result["found"]["shares"].values()) == pytest.approx(1, abs=0.01) for result in results)
    assert stored(tmp_path) == [("cam1", len(lines), 50)]
    metrics = urllib.request.urlopen(f"{page}/metrics", timeout=5).read().decode()
    assert "keras_efficient_video_frames_total 50.0" in metrics
    assert urllib.request.urlopen(f"{page}/healthz", timeout=5).status == 200
    other = program(
        *("video", "stream", clip, "--to", address, "--camera", "cam1", *certificates["cam2"]), cwd=tmp_path
    )
    assert (other.returncode, other.stdout) == (2, "")
    assert "is of 'cam2', and not of camera 'cam1'" in other.stderr
    server.send_signal(signal.SIGTERM)
    out, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert (out, errors.splitlines()[-1]) == ("", "Ending.")
    assert "Traceback" not in errors


def test_what_could_not_be_sent_goes_the_next_time(serve, clip, tmp_path):
    stream = ("video", "stream", clip, "--camera", "cam1", "--insecure", "--spool", tmp_path / "spool")
    done = program(*stream, "--to", f"127.0.0.1:{free_port()}", "--wait", "1")
    assert done.returncode == 1
    assert "6 chunks are not stored yet; they stay in" in done.stderr
    assert "nothing listens there" in done.stderr
    assert "Traceback" not in done.stderr
    _, address, _ = serve("--insecure")
    done = program(*stream, "--to", address)
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path) == [("cam1", 12, 100)]
    first = done.stdout.splitlines()[0]
    assert first.startswith("frame 0: class ")
    assert first.endswith("%")
    assert len(done.stdout.splitlines()) == 20
    # What is stored is not told again.
    done = program(*stream, "--to", address)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"frame {pts}" for pts in range(0, 50, 5)]


def test_words_for_what_a_server_finds():
    assert cli._found({"found": {"boxes": [[0, 0, 1, 1]] * 3, "classes": [2, 0, 2]}}) == "1 of class 0, 2 of class 2"
    assert cli._found({"found": {"boxes": [], "classes": []}}) == "nothing"
    assert cli._found({"found": {"people": [[], []]}}) == "2 people"
    assert cli._found({"found": {"shares": {"0": 0.25, "7": 0.75}}}) == "class 7 in 75%, class 0 in 25%"
    assert cli._found({"found": None, "error": "no"}) == "nothing is known: no"


def test_the_schemes_of_the_help_are_those_there_are():
    from keras_efficient.video.schemes import SCHEMES

    assert sorted(cli.SCHEMES.split(", ")) == sorted(SCHEMES)


STAMPS = [0.0, 0.04, 0.2, 0.24, 0.8, 0.84, 0.88, 1.2, 2.0, 2.04, 2.2, 2.24, 2.48]


@pytest.mark.parametrize("more", [(), ("--realtime",)])
def test_chunks_are_taken_at_the_time_stamps_of_a_file(serve, tmp_path, more):
    """One frame in a chunk, and B-frames: chunks are not in the order of their frames."""
    av = pytest.importorskip("av", reason="needs the extra video")
    path = tmp_path / "variable.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number, stamp in enumerate(STAMPS):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 2 * number, 1), format="rgb24")
            frame.pts, frame.time_base = round(stamp * 25), Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    _, address, _ = serve("--insecure")
    stream = ("video", "stream", path, "--to", address, "--camera", "cam1", "--insecure", "--model", "none")
    start = time.time()
    done = program(*stream, "--chunk", 1, "--preset", "medium", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    taken = [row[0] for row in connection.execute("SELECT captured FROM chunks WHERE frames > 0 ORDER BY sequence")]
    assert taken != sorted(taken), "there are B-frames"
    first = min(taken)
    assert start < first < time.time()
    assert sorted(when - first for when in taken) == pytest.approx(STAMPS, abs=2e-3)
    assert not more or time.time() - first > STAMPS[-1]


def test_time_stamps_that_are_missing_or_leap():
    def frame(stamp):
        return SimpleNamespace(pts=None if stamp is None else round(stamp * 1000), time_base=Fraction(1, 1000))

    times = cli._Times(0.04, is_live=False)
    stamps = [5, 5.1, None, None, 6, 6.5, 2, 2.5, 90_000, 90_000.5, 90_000.5]
    taken = [times.add(frame(stamp)) for stamp in stamps]
    steps = [0.1, 0.04, 0.04, 0.04, 0.5, 0.04, 0.5, 0.04, 0.5, 0.04]
    assert np.diff(taken) == pytest.approx(steps, abs=1e-5)
    assert [times.of(number) for number in (4, 0, 10)] == [taken[4], taken[0], taken[10]]


def test_memory_of_times_is_bounded():
    times = cli._Times(0.04, is_live=True)
    for number in range(1000):
        times.add(SimpleNamespace(pts=0, time_base=Fraction(1, 25)))
        assert abs(times.of(number) - time.time()) < 5, "a camera's frame is taken when it comes"
    assert len(times._taken) <= cli.REORDERED + 1


def test_a_device_does_not_wait_for_room_in_the_spool(tmp_path, monkeypatch):
    """There is no server: a file waits before a half of the spool is filled, a device goes on and loses groups."""
    video = pytest.importorskip("keras_efficient.video", reason="needs the extra video")
    random = np.random.default_rng(0)
    seen = []

    class Noise:
        width, height, rate, appearance = 320, 240, Fraction(25), video.frames.Appearance()

        def __iter__(self):
            for number in range(60):
                seen.append(number)
                yield video.frames.packages().VideoFrame.from_ndarray(
                    random.integers(0, 256, (240, 320, 3)).astype(np.uint8), format="rgb24"
                )

    limit = time.monotonic() + 20
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.setattr(cli, "_heed_signals", lambda: lambda: time.monotonic() > limit)
    monkeypatch.setattr(video.Video, "open", lambda path: Noise())
    monkeypatch.setattr(Path, "is_char_device", lambda path: path.name == "video0")
    with pytest.raises(typer.Exit):
        cli.stream(
            *(Path("/dev/video0"), "127.0.0.1:1", "cam1"),
            **{"insecure": True, "spool": tmp_path / "spool", "spool_size": 1, "model": "none", "wait": 0, "base": 10},
            **{"preset": "ultrafast", "key_every": 0.4},
        )
    assert len(seen) == 60
    assert sum(path.stat().st_size for path in (tmp_path / "spool").glob("*.chunk")) > 5e5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_camera_that_is_told_to_end_sends_what_it_has(serve, clip, tmp_path, number):
    _, address, _ = serve("--insecure")
    stream = ("stream", clip, "--to", address, "--camera", "cam1", "--insecure", "--spool", tmp_path / "spool")
    camera = started(*stream, "--realtime", "--low-delay", "--chunk", 2, "--json")
    try:
        camera.stdout.readline()
        camera.send_signal(number)
        _, errors = camera.communicate(timeout=30)
    finally:
        camera.kill()
    assert camera.returncode == 0, errors
    ((_, _, frames),) = stored(tmp_path)
    assert 2 <= frames < 50


def test_a_video_that_breaks_off(serve, clip, tmp_path):
    path = tmp_path / "damaged.mp4"
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(data)
    _, address, _ = serve("--insecure")
    done = program("video", "stream", path, "--to", address, "--camera", "cam1", "--insecure", cwd=tmp_path)
    assert (done.returncode, "is damaged or cut off at frame" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    assert stored(tmp_path)[0][2] >= 5, "what came before is there"


def test_encoding_a_file(clip, tmp_path):
    """With no further option: the zoo's camera model, and a quality that makes sense."""
    done = program("video", "encode", clip, tmp_path / "out.mp4", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["frames"] == 50
    assert 0 < made["video_bytes"] < 20_000
    again = program("video", "encode", clip, tmp_path / "out.mp4")
    assert (again.returncode, "exists already" in again.stderr) == (1, True), again.stderr
    plain = program("video", "encode", clip, tmp_path / "plain.mkv", "--model", "none", "--bitrate", "100000")
    assert plain.returncode == 0, plain.stderr
    assert "frames" in plain.stdout
    tiny = program("video", "encode", clip, tmp_path / "tiny.mkv", "--model", "none", "--size", "400")
    assert (tiny.returncode, "bytes instead of 400" in tiny.stderr) == (0, True), tiny.stderr
    for pair in (("--size", "9999"), ("--base", "30")):
        both = program("video", "encode", clip, tmp_path / "both.mkv", "--bitrate", "100000", *pair)
        assert (both.returncode, "Give one of --base, --bitrate" in both.stderr) == (2, True), both.stderr


SERVE = ("serve", "--network", "NETWORK", "--insecure", "--task", "segmentation", "--preprocess", "deeplab")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("stream", "CLIP", "--to", "localhost:1", "--camera", "c"), 2, "--insecure inside one machine"),
        (("stream", "CLIP", "--to", "localhost:1", "--camera", "a/b", "--insecure"), 2, "no name of a camera"),
        (("stream", "CLIP", "--to", "example.com:1", "--camera", "c", "--insecure"), 2, "is not this machine"),
        (("stream", "CLIP", "--to", "localhost", "--camera", "c", "--insecure"), 2, "is no address"),
        (("stream", "none.mp4", "--to", "localhost:1", "--camera", "c", "--insecure"), 1, "no such file"),
        (("stream", "/dev/null", "--to", "localhost:1", "--camera", "c", "--insecure"), 1, "/dev/null"),
        (("encode", "none.mp4", "out.mp4"), 1, "no such file"),
        (("encode", "CLIP", "out.gif"), 2, "cannot be written"),
        (("encode", "CLIP", "out.mp4", "--model", "accmodel-yolo"), 2, "Did you mean 'accmodel-yolox-nano'?"),
        (("encode", "CLIP", "out.mp4", "--model", "sesr-m5-x2"), 2, "not RGB frames"),
        (("serve", "--network", "NETWORK"), 2, "--insecure inside one machine"),
        ((*SERVE, "--listen", "0.0.0.0:0"), 2, "is not this machine"),
        (("serve", "--network", "NETWORK", "--insecure", "--task", "segments"), 2, "Unknown task"),
        (("serve", "--network", "NETWORK", "--insecure", "--people", "x"), 2, "--people is needed"),
        (("serve", "--network", "none.onnx", "--insecure"), 1, "none.onnx"),
        (("certs", ".", "--server", "é", "--camera", "c"), 2, "no name of a server"),
        (("certs", "CLIP", "--server", "a", "--camera", "c"), 1, "cannot be made"),
    ],
)
def test_calls_that_are_wrong(arguments, status, words, clip, network, tmp_path):
    names = {"CLIP": clip, "NETWORK": network}
    done = program("video", *(names.get(argument, argument) for argument in arguments), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_certificates_are_not_replaced_without_force(certificates, tmp_path):
    again = ("video", "certs", tmp_path / "certs", "--server", "localhost", "--camera", "cam1")
    done = program(*again)
    assert done.returncode == 1
    assert "exists already and is kept" in done.stderr
    assert program(*again, "--force").returncode == 0


def test_a_server_tells_at_once_what_is_wrong(network, tmp_path):
    (tmp_path / "bad.sqlite").write_text("no database" * 100)
    serve = ("video", "serve", "--network", network, "--task", "segmentation", "--preprocess", "deeplab", "--insecure")
    done = program(*serve, "--journal", tmp_path / "bad.sqlite")
    assert (done.returncode, "cannot be used as a journal" in done.stderr) == (1, True), done.stderr
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = f"127.0.0.1:{listener.getsockname()[1]}"
        done = program(*serve, "--listen", taken, "--metrics", "none", cwd=tmp_path)
    assert (done.returncode, "cannot be listened at" in done.stderr) == (1, True), done.stderr


def evaluate(clip, network, folder, *more):
    server = ("--network", network, "--task", "segmentation", "--preprocess", "deeplab")
    return program(
        "video", "evaluate", clip, *server, "--out", folder, "--frames", 12, "--every", 4, "--step", 10, *more
    )


def test_an_evaluation_in_files(clip, network, tmp_path):
    done = evaluate(clip, network, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["scheme"], row["against"]) for row in rows} == {
        *(("defaults", "uniform"), ("aq", "uniform"), ("uniform", "defaults"), ("aq", "defaults"))
    }
    (numbers,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (numbers["frames"], numbers["evaluated"]) == (12, 3)
    assert [len(one["points"]) for one in numbers["curves"]] == [3, 3, 3]
    assert (tmp_path / "out" / "evaluation.html").read_text().startswith("<!doctype html>")
    again = evaluate(clip, network, tmp_path / "out")
    assert (again.returncode, "exists already and is kept" in again.stderr) == (1, True), again.stderr
    again = evaluate(clip, network, tmp_path / "out", "--force", "--scheme", "uniform", "--scheme", "defaults")
    assert again.returncode == 0, again.stderr
    assert "uniform" in again.stdout
    assert len(list((tmp_path / "out" / "kept").iterdir())) == 9, "all of it was there"


def test_results_of_one_file_in_two_roles_are_kept_apart(clip, network, tmp_path):
    from keras_efficient import video
    from keras_efficient.cli import video_evaluation

    coding, link = {"step": 20}, {"bandwidth": 1e6}
    how = {"every": 4, "frames": 4, "reference": 30, "force": True}
    for scale, count in ((1 / 127.5, 6), (1 / 255, 12), (1 / 255, 12)):
        server = video.onnx_server(network, "segmentation", video.Preprocessing((257, 257), scale=scale))
        video_evaluation.run(
            server, [network], [clip], None, ["uniform", "defaults", "aq"], tmp_path, coding=coding, link=link, **how
        )
        assert len(list((tmp_path / "kept").iterdir())) == count


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (("--scheme", "unifrom"), 2, "Did you mean 'uniform'?"),
        (("--scheme", "vigil"), 2, "finds no boxes"),
        (("--model", "none.tflite"), 1, "no such file"),
    ],
)
def test_evaluations_that_are_wrong(more, status, words, clip, network, tmp_path):
    done = evaluate(clip, network, tmp_path / "out", *more)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_camera_model_in_integers_calibrated_by_a_video(clip, tmp_path):
    """Its frames are from 0 to 255, which is in the model alone."""
    import keras

    from keras_efficient import export, models, video

    keras.utils.set_random_seed(0)
    model = models.AccModel((96, 160), width=0.25, shrink=2)
    model.save(tmp_path / "camera.keras")
    command = ["export", tmp_path / "camera.keras", "--precision", "int8", "--calibration", clip]
    done = program(*command, "-o", tmp_path / "camera.tflite", "--behind", "shrink")
    assert done.returncode == 0, done.stderr
    frame = next(iter(video.Video.open(clip)))
    assert export.load(tmp_path / "camera.tflite").input_shapes.popitem()[1][1:] == (48, 80, 3)
    found, wanted = (video.Saliency(one)(frame) for one in (tmp_path / "camera.tflite", model))
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.95
    done = program(*command, "-o", tmp_path / "other.tflite", "--behind", "shrinks")
    assert (done.returncode, "Did you mean 'shrink'?" in done.stderr) == (2, True)
    done = program(*command, "-o", tmp_path / "other.tflite", "--behind", "deep_0_expand_conv")
    assert (done.returncode, "cannot be cut off" in done.stderr) == (2, True)

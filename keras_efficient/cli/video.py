"""`keras-efficient video`: certificates, a server that analyses the video of cameras, a camera that sends its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.atomic import check_apart, check_target
from keras_efficient.cli.output import out
from keras_efficient.errors import FileProblem, WrongArgument

if TYPE_CHECKING:
    import numpy as np

    from keras_efficient.video import Packet, Server
    from keras_efficient.video.transport import Chunk, Sender

__all__ = ["app"]

DEFAULT_MODEL = "accmodel-yolox-nano"
DEFAULT_BASE = 40.0
MISSED = 0.05  # share of a size that is worth a word
LEAP = 60.0  # seconds from a frame to the next one that no file means
REORDERED = 64  # frames that an encoder sends before an earlier one: there are at most 16 B-frames in a row

SCHEMES = (
    "uniform, defaults, aq, boxes, vigil, eaar, dds, oracle, camera, two-levels, defaults-short, camera-short, "
    "defaults-live, camera-live"
)

app = typer.Typer(help="Video for networks at a server.", no_args_is_help=True)

CERTIFICATE = typer.Option("--certificate", help="Own certificate, PEM.")
KEY = typer.Option("--key", help="Its private key, PEM.")
AUTHORITY = typer.Option("--authority", help="Certificate of the authority that signed both sides' own, PEM.")
MODEL = typer.Option("--model", metavar="NAME|FILE|none", help="A zoo model, a .keras, .tflite or .onnx file, or none.")
BASE = typer.Option(
    "--base", help="Quality: 1 best, 61 worst; less where the network does not look. Without: 40.", min=1, max=61
)
PREPROCESS = typer.Option(
    "--preprocess", help="What the network takes: yolox, deeplab, openvino-road or mediapipe-pose."
)
BITRATE = typer.Option("--bitrate", help="Bits a second to keep, instead of --base.", min=1000)
EVERY = typer.Option("--model-every", help="Frames from one that the model looks at to the next.", min=1)
INSECURE = typer.Option("--insecure", help="Without TLS; inside one machine only.")


@app.command("encode")
def encode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A video.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="An .mp4, .mkv, .mov or .ts.")],
    model: Annotated[str, MODEL] = DEFAULT_MODEL,
    base: Annotated[float | None, BASE] = None,
    bitrate: Annotated[int | None, BITRATE] = None,
    size: Annotated[int | None, typer.Option("--size", help="Bytes to keep instead, of all pictures.", min=1)] = None,
    every: Annotated[int, EVERY] = 10,
    codec: Annotated[str, typer.Option("--codec", help="libx264 or libx265.")] = "libx264",
    preset: Annotated[str, typer.Option("--preset", help="Effort of the encoder: ultrafast … placebo.")] = "veryfast",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Encode a video for a network at a server: bits go where it looks. Sound and subtitles are copied."""
    out.begin(as_json=as_json)
    check_target(target, overwrite=force)
    check_apart([source], [target])
    quality = _quality(base, bitrate, size)
    with out.hushed():
        from keras_efficient.video.encode import encode_file

        network = _camera_model(model)
    options = {**quality, "every": every, "codec": codec, "preset": preset}
    with out.progress(source.name) as show, out.hushed():
        made = encode_file(source, target, network, size=size, overwrite=force, on_progress=show, **options)
    values = {
        "output": str(target),
        "frames": made.frames,
        "video_bytes": made.video_bytes,
        "bits_per_second": round(8 * made.video_bytes / made.seconds),
    }
    out.record(values)
    if size is not None and abs(made.video_bytes / size - 1) > MISSED:
        out.message(f"{made.video_bytes:,} bytes instead of {size:,}: the encoder gets no nearer in so short a video.")


@app.command("certs")
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    server: Annotated[list[str], typer.Option("--server", help="A name or address of the server; may be repeated.")],
    camera: Annotated[list[str], typer.Option("--camera", help="The name of a camera; may be repeated.")],
    days: Annotated[int, typer.Option("--days", help="How long they hold.", min=1, max=3650)] = 365,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Make an authority, and certificates of a server and its cameras, for tests and small installations."""
    out.begin(as_json=as_json)
    from keras_efficient.video.transport.certificates import make_authority

    made = make_authority(folder, server, camera, days=days, overwrite=force)
    out.rows(
        [{"name": path.stem, "certificate": str(path), "key": str(path.with_suffix(".key"))} for path in made],
        {"name": "name", "certificate": "certificate", "key": "key"},
    )


@app.command("serve")
def serve(
    network: Annotated[Path, typer.Option("--network", metavar="FILE", help="An .onnx file.")],
    task: Annotated[str, typer.Option("--task", help="detection, segmentation or keypoints.")] = "detection",
    preprocess: Annotated[str, PREPROCESS] = "yolox",
    people: Annotated[
        Path | None, typer.Option("--people", metavar="FILE", help="For keypoints: a YOLOX .onnx that finds people.")
    ] = None,
    every: Annotated[int, typer.Option("--every", help="Analyse one frame in so many.", min=1)] = 1,
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT")] = "127.0.0.1:50051",
    certificate: Annotated[Path | None, CERTIFICATE] = None,
    key: Annotated[Path | None, KEY] = None,
    authority: Annotated[Path | None, AUTHORITY] = None,
    insecure: Annotated[bool, INSECURE] = False,
    journal: Annotated[
        str, typer.Option("--journal", metavar="FILE|URL", help="Where results go: an SQLite file, or postgresql://….")
    ] = "results.sqlite",
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="HOST:PORT|none", help="For /metrics (Prometheus) and /healthz.")
    ] = "127.0.0.1:9090",
    cameras: Annotated[int, typer.Option("--cameras", help="At most so many at once.", min=1, max=1000)] = 64,
) -> None:
    """Serve cameras: decode, analyse, store the results, send them back; until Ctrl-C or SIGTERM."""
    out.begin(as_json=False)
    place = None if metrics == "none" else _address(metrics)
    _address(listen)
    tls = _tls(certificate, key, authority, insecure)
    if not insecure:
        from keras_efficient.video.transport.certificates import checked

        checked(**tls)
    with out.hushed():
        predict = _predictor(network, task, preprocess, people)
    from keras_efficient.video.transport import Receiver, open_journal

    receiver = Receiver(
        predict,
        open_journal(journal),
        address=listen,
        cameras=cameras,
        every=every,
        on_message=out.message,
        **tls,
    )
    page = receiver.metrics.listen(*place, lambda: receiver.is_serving) if place else None
    with out.hushed():
        port = receiver.start()
    out.message(f"Serving at {listen.rpartition(':')[0]}:{port}.")
    ended = _heed_signals()
    while not ended():
        time.sleep(0.2)
    out.message("Ending.")
    receiver.stop()
    if page is not None:
        page.shutdown()


@app.command("stream")
def stream(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A video file; on Linux also a camera's device, /dev/video0.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="HOST:PORT", help="The server.")],
    camera: Annotated[str, typer.Option("--camera", help="The name of this camera, as in its certificate.")],
    certificate: Annotated[Path | None, CERTIFICATE] = None,
    key: Annotated[Path | None, KEY] = None,
    authority: Annotated[Path | None, AUTHORITY] = None,
    insecure: Annotated[bool, INSECURE] = False,
    spool: Annotated[
        Path | None, typer.Option("--spool", metavar="DIR", help="For what is not sent yet; by default spool-CAMERA.")
    ] = None,
    spool_size: Annotated[int, typer.Option("--spool-size", metavar="MB", help="Of the spool.", min=1)] = 256,
    model: Annotated[str, MODEL] = DEFAULT_MODEL,
    base: Annotated[float | None, BASE] = None,
    bitrate: Annotated[int | None, BITRATE] = None,
    every: Annotated[int, EVERY] = 10,
    preset: Annotated[str, typer.Option("--preset", help="Effort of the encoder: ultrafast … placebo.")] = "veryfast",
    frames: Annotated[int, typer.Option("--chunk", help="Frames in a chunk.", min=1, max=1024)] = 10,
    key_every: Annotated[float, typer.Option("--key-every", help="Seconds between key frames.", min=0.1)] = 10,
    low_delay: Annotated[
        bool, typer.Option("--low-delay", help="Each frame is coded at once: up to a second less, and more bytes.")
    ] = False,
    realtime: Annotated[
        bool,
        typer.Option("--realtime", help="A file's frames at their times, as from a camera; a full spool drops groups."),
    ] = False,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to wait at the end for what is not stored.", min=0)
    ] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results, a line of JSON for each chunk.")] = False,
) -> None:
    """Send a video to a server as a camera does, and show what the server finds; until its end, or Ctrl-C or SIGTERM.

    What could not be sent stays in the spool, and goes first the next time.

    Frames of a camera are taken when they come. The first of a file is taken when it is read, the others later by
    their time stamps, with or without --realtime; where these are missing or leap, by the rate.
    """
    out.begin(as_json=as_json)
    _address(to)
    tls = _tls(certificate, key, authority, insecure)
    quality = _quality(base, bitrate)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters comes as an error, and is said in our words
    if not insecure:
        from keras_efficient.video.transport.sender import check_identity

        check_identity(camera, **tls)
    with out.hushed():
        from keras_efficient.video import Camera, Video
        from keras_efficient.video.transport import Sender, Spool, chunked

        network = _camera_model(model)

    video = Video.open(source)
    with out.hushed():  # LiteRT speaks of each file that it opens
        source_camera = Camera(
            network,
            *(video.width, video.height, video.rate),
            appearance=video.appearance,
            every=every,
            preset=preset,
            low_delay=low_delay,
            key_every=max(round(key_every * video.rate), 1),
            **quality,
        )
    folder = spool or Path(f"spool-{camera}")
    sender = Sender(
        to, Spool(folder, camera, limit=spool_size * 10**6), on_results=_show, on_message=out.message, **tls
    )
    ended, is_live = _heed_signals(), source.is_char_device()
    times = _Times(1 / float(video.rate), is_live=is_live)
    broken: list[FileProblem] = []
    pictures = _until_broken(video, broken, ended)
    packets = _packets(_paced(pictures, times, ended if realtime else None), source_camera, sender)
    encoder = source_camera.encoder
    form = (encoder.codec, encoder.width, encoder.height, encoder.fps)
    chunks = chunked(packets, *form, frames=frames, captured=times.of)
    with out.stages(f"{source.name} to {to}") as show:
        try:
            _send(chunks, sender, ended, show, waits=not (realtime or is_live))
        finally:
            left = sender.close(min(wait, 5) if ended() else wait)
    if broken:
        raise broken[0]
    if sender.spool.dropped:
        out.message(f"{sender.spool.dropped} chunks were given up: the spool was full.")
    if left:
        out.error(f"{left} chunks are not stored yet; they stay in {folder}.", sender.problem)
        raise typer.Exit(1)


@app.command("evaluate")
def evaluate(
    clips: Annotated[list[Path], typer.Argument(metavar="CLIP...", help="Videos.")],
    network: Annotated[Path, typer.Option("--network", metavar="FILE", help="The server's, an .onnx file.")],
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="For evaluation.json, evaluation.html, and what is kept.")
    ],
    task: Annotated[str, typer.Option("--task", help="detection, segmentation or keypoints.")] = "detection",
    preprocess: Annotated[str, PREPROCESS] = "yolox",
    people: Annotated[
        Path | None, typer.Option("--people", metavar="FILE", help="For keypoints: a YOLOX .onnx that finds people.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", metavar="NAME", help=f"A way of coding; may be repeated: {SCHEMES}. Without: what is usual."
        ),
    ] = None,
    step: Annotated[int, typer.Option("--step", help="QPs from one setting to the next.", min=1, max=10)] = 2,
    frames: Annotated[int | None, typer.Option("--frames", help="Of the beginning of each clip.", min=1)] = None,
    every: Annotated[int, typer.Option("--every", help="Evaluate one frame in so many.", min=1)] = 1,
    source: Annotated[
        bool, typer.Option("--source", help="The reference is the clip itself, not its coding at QP 30.")
    ] = False,
    preset: Annotated[str, typer.Option("--preset", help="Of libx264.")] = "veryfast",
    key_every: Annotated[
        int | None, typer.Option("--key-every", help="Frames between key frames; without: only the first.", min=1)
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", help="Frames that are sent together.", min=1)] = 10,
    bandwidth: Annotated[float, typer.Option("--bandwidth", help="Of the link, Mbit/s.", min=0.001)] = 0.5,
    round_trip: Annotated[float, typer.Option("--round-trip", help="Of the link, milliseconds.", min=0)] = 100,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """How many bytes, and how much delay, a server's network needs to see as well: curves of several ways to code.

    Each coding that was evaluated is kept in DIR/kept: a run that was interrupted goes on where it was.
    """
    out.begin(as_json=as_json)
    from keras_efficient.cli import video_evaluation

    with out.hushed():
        server = _server(network, task, preprocess, people)
        camera = None if model is None else _camera_model(model)
    coding = {"preset": preset, "key_every": key_every, "chunk": chunk, "step": step}
    link = {"bandwidth": bandwidth * 1e6, "round_trip": round_trip / 1e3, "chunk": chunk}
    how: dict[str, Any] = {"every": every, "frames": frames, "reference": None if source else 30, "force": force}
    files = [network, *([] if people is None else [people])]
    video_evaluation.run(server, files, clips, camera, scheme, folder, coding=coding, link=link, **how)


def _until_broken(video: Any, broken: list[FileProblem], ended: Callable[[], bool]) -> Iterator[Any]:
    """The frames before the video's end, or before it is damaged: they are sent before that is told."""
    try:
        for frame in video:
            if ended():
                return
            yield frame
    except FileProblem as error:
        broken.append(error)


class _Times:
    """When frames were taken, in seconds since 1970: a camera's when they come; a file's first one, too.

    The next ones of a file come later by their time stamps; by a period, where these are missing, do not rise or leap.
    """

    def __init__(self, period: float, *, is_live: bool):
        self._period, self._is_live = period, is_live
        self._taken: dict[int, float] = {}
        self._count, self._last = 0, 0.0
        self._stamp: float | None = None

    def add(self, frame: Any) -> float:
        """Of the next frame."""
        stamp = float(frame.pts * frame.time_base) if frame.pts is not None and frame.time_base else None
        if self._is_live or not self._count:
            self._last = time.time()
        else:
            step = 0.0 if stamp is None or self._stamp is None else stamp - self._stamp
            self._last += step if 0 < step <= LEAP else self._period
        self._taken[self._count], self._stamp = self._last, stamp
        self._count += 1
        return self._last

    def of(self, number: int) -> float:
        """Of a frame; those long before it are not asked for again, those that encoders send later are."""
        for earlier in [known for known in self._taken if known < number - REORDERED]:
            del self._taken[earlier]
        return self._taken[number]


def _paced(frames: Iterator[Any], times: _Times, ended: Callable[[], bool] | None) -> Iterator[Any]:
    """The frames, not before they are taken, if it is given what ends the waiting."""
    for frame in frames:
        taken = times.add(frame)
        while ended and not ended() and (left := taken - time.time()) > 0:
            time.sleep(min(left, 0.2))
        yield frame


def _packets(frames: Iterator[Any], encoder: Any, sender: Sender) -> Iterator[Packet]:
    """Encodes the frames; one is a key frame each time the sender begins to want one."""
    before = False
    for frame in frames:
        wants = sender.wants_key
        yield from encoder.encode(frame, key=wants and not before)
        before = wants
    yield from encoder.flush()


def _send(
    chunks: Iterator[Chunk], sender: Sender, ended: Callable[[], bool], show: Callable[[str], None], *, waits: bool
) -> None:
    """Sends all; where nothing forces the pace, the spool is not filled beyond a half."""
    for count, chunk in enumerate(chunks, 1):
        sender.send(chunk)
        while True:
            show(" · ".join(filter(None, (f"{count} chunks, {sender.spool.pending} not stored yet", sender.problem))))
            if not (waits and sender.spool.pending and sender.spool.size > sender.spool.limit / 2) or ended():
                break
            sender.spool.wait(0.5)


def _show(sequence: int, results: list[Any]) -> None:
    if out.as_json:
        out.text(json.dumps({"sequence": sequence, "results": results}, separators=(",", ":")))
    else:
        for result in results:
            out.text(f"frame {result['pts']}: {_found(result)}")


def _found(result: dict[str, Any]) -> str:
    """What the server found in a frame, in a few words."""
    found = result.get("found")
    if not isinstance(found, dict):
        return f"nothing is known: {result.get('error', 'the server does not say why')}"
    if "boxes" in found:
        counts: Counter[int] = Counter(found["classes"])
        return ", ".join(f"{count} of class {kind}" for kind, count in sorted(counts.items())) or "nothing"
    if "people" in found:
        return f"{len(found['people'])} people"
    shares = sorted(found.get("shares", {}).items(), key=lambda item: -item[1])
    return ", ".join(f"class {kind} in {share:.0%}" for kind, share in shares) or "nothing"


def _quality(base: float | None, bitrate: int | None, size: int | None = None) -> dict[str, Any]:
    """Of `video.Camera`; a size is not among it."""
    if sum(one is not None for one in (base, bitrate, size)) > 1:
        raise WrongArgument("Give one of --base, --bitrate" + (" and --size." if size is not None else "."))
    return {"base": DEFAULT_BASE if base is None else base, "bitrate": bitrate}


def _camera_model(model: str) -> Any:
    """For `video.Camera`: a zoo model or that of a .keras file, the path of an exported file, or None."""
    from keras_efficient.cli import models

    if model == "none":
        return None
    return Path(model) if Path(model).suffix.lower() in models.EXPORTED else models.open_keras(model)


def _predictor(network: Path, task: str, preprocess: str, people: Path | None) -> Callable[[np.ndarray], list[Any]]:
    """Frames to results that JSON can hold."""
    import numpy as np

    from keras_efficient.video.transport import plain

    server = _server(network, task, preprocess, people)

    def predict(frames: np.ndarray) -> list[Any]:
        # One by one: memory is that of a frame, whatever a camera takes for a chunk.
        return [plain(server.predict(frame[None])[0]) for frame in frames]

    predict(np.zeros((1, 144, 176, 3), np.uint8))  # what is wrong with the network shows before a camera comes
    return predict


def _server(network: Path, task: str, preprocess: str, people: Path | None) -> Server:
    from keras_efficient.video import onnx_server

    if (task == "keypoints") != (people is not None):
        raise WrongArgument("--people is needed for --task keypoints, and only there.")
    finder = {} if people is None else {"people": onnx_server(people, "detection", "yolox")}
    return onnx_server(network, task, preprocess, **finder)


def _tls(certificate: Path | None, key: Path | None, authority: Path | None, insecure: bool) -> dict[str, Any]:
    given = {"certificate": certificate, "key": key, "authority": authority}
    if any(given.values()) if insecure else not all(given.values()):
        raise WrongArgument("Give --certificate, --key and --authority, or --insecure inside one machine.")
    return {"insecure": True} if insecure else given


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise WrongArgument(f"{text!r} is no address; write HOST:PORT.")
    return host.strip("[]"), int(port)


def _heed_signals() -> Callable[[], bool]:
    """Ctrl-C and SIGTERM end the work instead of the process; a second one ends that as well."""
    heard: list[int] = [signal.SIGINT] if out.interrupted else []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hear)
    return lambda: bool(heard)

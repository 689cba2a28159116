"""Cameras on loopback, with TLS, into one server: the link is cut and restored, the server killed and restarted.

Afterwards the journal is compared with what each camera sent. Cameras share processes, a thread each with an encoder, a
spool and a sender of its own, since each process holds a TensorFlow.

    python -m benchmarks.accmpeg_soak --camera-process …     is what the benchmark itself starts
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Row

CLIP, NETWORK = "video/traffic_highway_640x360.mp4", "models/yolox_nano.onnx"
CAMERAS, PROCESSES, SECONDS = 16, 4, 120
FPS, CHUNK, EVERY, KEY_SECONDS, BASE = 10, 10, 20, 5, 34
DIFFERENT = 100  # frames of the clip, shown again and again
CUTS, CUT_SECONDS, KILL = (1 / 6, 5 / 12, 5 / 6), 4.0, 7 / 12  # when, in parts of the whole time
SETTLE = 60  # seconds after the end for what is in the spools


class Link:
    """A TCP connection to a port, through this process, which can be cut and restored."""

    def __init__(self, port: int):
        self.port, self.is_up = port, True
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.target = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                if not self.is_up:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self.port), 5)
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for one in (source, target):
            self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.is_up = False
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        self.is_up = True


class Server:
    """`keras-efficient video serve` in a process of its own."""

    def __init__(self, folder: Path, port: int):
        certificates = folder / "certificates"
        tls = {"certificate": "server.pem", "key": "server.key", "authority": "authority.pem"}
        self.command = [
            *(sys.executable, "-m", "keras_efficient.cli", "video", "serve", "--listen", f"localhost:{port}"),
            *("--network", str(harness.data_folder() / NETWORK), "--every", str(EVERY), "--metrics", "none"),
            *("--journal", str(folder / "journal.sqlite")),
            *(word for name, file in tls.items() for word in (f"--{name}", str(certificates / file))),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("Serving at"):
                break
        else:
            sys.exit(f"The server did not start: {' '.join(self.command)}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """Told to end; gives the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def soak(quick: bool) -> Iterator[Row]:
    """The whole run: one row of what arrived, one of memory, one of latency."""
    from keras_efficient.video import transport

    count, seconds, processes = (4, 24, 2) if quick else (CAMERAS, SECONDS, PROCESSES)
    names = [f"cam{number:02}" for number in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transport.make_authority(folder / "certificates", ["localhost"], names, days=1)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        server = Server(folder, port)
        link = Link(port)
        start = time.time() + 25  # cameras have loaded by then
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.accmpeg_soak", "--camera-process", str(folder), link.target),
                    *(str(start), str(seconds), *names[part::processes]),
                ]
            )
            for part in range(processes)
        ]
        samples, events = _disturbed(server, link, workers, start, seconds)
        for worker in workers:
            worker.wait(SETTLE + 60)
        status = server.end()
        cameras = {camera: json.loads((folder / f"{camera}.json").read_text()) for camera in names}
        yield from _rows(folder / "journal.sqlite", cameras, samples, events, status, seconds)


def _disturbed(
    server: Server, link: Link, workers: list[Any], start: float, seconds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lets all that happens happen; gives samples of memory, and what was done when."""
    samples, events = [], []

    def sample(part: float) -> None:
        cameras = [_rss(worker.pid) for worker in workers]
        samples.append({"at": part, "server_mb": _rss(server.process.pid), "camera_processes_mb": cameras})

    def did(what: str) -> None:
        events.append({"at_seconds": round(time.time() - start, 1), "what": what})

    def cut() -> None:
        link.cut()
        did("link cut")
        time.sleep(CUT_SECONDS)
        link.restore()
        did("link restored")

    def kill() -> None:
        server.kill()
        did("server killed (SIGKILL)")
        server.start()
        did("server serves again")

    plan: list[tuple[float, Callable[[], None]]] = [(part, cut) for part in CUTS] + [(KILL, kill)]
    plan += [(part, lambda part=part: sample(part)) for part in (0.25, 0.5, 0.75, 0.99)]  # type: ignore[misc]
    for part, action in sorted(plan, key=lambda one: one[0]):
        time.sleep(max(start + part * seconds - time.time(), 0))
        action()
    return samples, events


def _rows(
    journal: Path, cameras: dict[str, Any], samples: list[Any], events: list[Any], status: int, seconds: int
) -> Iterator[Row]:
    connection = sqlite3.connect(journal)
    query = "SELECT sequence, crc, results, captured, stored FROM chunks WHERE camera = ? ORDER BY stored, sequence"
    totals = dict.fromkeys(("lost", "doubled", "out_of_order", "altered", "frames_lost_or_doubled"), 0)
    delays: list[float] = []
    stored_chunks = frames = 0
    for camera, told in cameras.items():
        rows = connection.execute(query, (camera,)).fetchall()
        sent = {int(sequence): crc for sequence, crc in told["sent"].items()}
        sequences = [row[0] for row in rows]
        totals["lost"] += len(set(sent) - set(sequences))
        totals["doubled"] += len(sequences) - len(set(sequences))
        totals["out_of_order"] += sum(b <= a for a, b in itertools.pairwise(sequences))
        totals["altered"] += sum(sent.get(row[0]) != row[1] for row in rows)
        pts = [result["pts"] for row in sorted(rows) for result in json.loads(row[2])]
        wanted = list(range(0, told["frames"], EVERY))
        totals["frames_lost_or_doubled"] += 0 if pts == wanted else max(len(set(pts) ^ set(wanted)), 1)
        # The camera heard the results of each chunk, once and in order, too.
        totals["out_of_order"] += told["heard"] != sorted(sent)
        delays += [row[4] - row[3] for row in rows]
        stored_chunks += len(rows)
        frames += told["frames"]
    given_up = {name: sum(told[name] for told in cameras.values()) for name in ("left", "dropped", "resent")}
    wrong = sum(totals.values()) + given_up["left"] + given_up["dropped"] + (status != 0)
    setting = (
        f"{len(cameras)} cameras × 640×360 at {FPS} frames/s, chunks of {CHUNK} frames, a key frame every"
        f" {KEY_SECONDS} s, crf {BASE}, mutual TLS, {seconds} s; YOLOX-nano on one frame in {EVERY}; SQLite"
    )
    yield Row(
        f"{setting}; link cut for {CUT_SECONDS:g} s three times, server killed once: chunks lost, doubled, altered, out"
        " of order, given up, or left",
        wrong,
        "chunks",
        bar="0",
        reached=wrong == 0,
        details={
            **totals,
            **given_up,
            "chunks_stored": stored_chunks,
            "frames": frames,
            "server_exit_status": status,
            "events": events,
            "largest_spool_bytes": max(told["largest_spool"] for told in cameras.values()),
        },
    )
    growth = samples[-1]["server_mb"] / samples[-2]["server_mb"]
    yield Row(
        "memory of the server at 99 % of the time over that at 75 % (it is another process since it was killed)",
        round(growth, 3),
        "ratio",
        bar="≤ 1.1, cameras too",
        reached=growth <= 1.1
        and sum(samples[-1]["camera_processes_mb"]) <= 1.1 * sum(samples[0]["camera_processes_mb"]),
        details={"samples": samples},
    )
    quantiles = {f"{q:g}": round(float(np.quantile(delays, q)), 3) for q in (0.1, 0.5, 0.9, 0.99, 1)}
    yield Row(
        "from the capture of a chunk's first frame until its results are stored, with outages: median"
        f" (filling a chunk takes {(CHUNK - 1) / FPS:g} s of it)",
        quantiles["0.5"],
        "s",
        details={"quantiles": quantiles},
    )


def _rss(pid: int) -> float:
    """Megabytes of a process now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(float(status.split("VmRSS:")[1].split()[0]) / 1e3, 1)


def _camera_process(folder: Path, target: str, start: float, seconds: float, names: list[str]) -> None:
    """Some cameras, a thread each; a file of each says what it did."""
    from keras_efficient.video import Video

    frames = list(itertools.islice(Video.open(harness.data_folder() / CLIP), DIFFERENT))
    threads = [threading.Thread(target=_camera, args=(folder, target, start, seconds, name, frames)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _camera(folder: Path, target: str, start: float, seconds: float, name: str, frames: list[Any]) -> None:
    from keras_efficient.video import RoiEncoder, transport

    encoder = RoiEncoder(640, 360, FPS, base=BASE, key_every=KEY_SECONDS * FPS, b_frames=0, threads=1, low_delay=True)
    spool = transport.Spool(folder / f"spool-{name}", name, limit=32 << 20)
    files = {"certificate": f"{name}.pem", "key": f"{name}.key", "authority": "authority.pem"}
    heard: list[int] = []
    sender = transport.Sender(
        target,
        spool,
        on_results=lambda sequence, results: heard.append(sequence),
        **{kind: folder / "certificates" / file for kind, file in files.items()},
    )
    # Cameras do not take their pictures at the same moment, and begin at different places of the clip.
    number = int(name.removeprefix("cam"))
    offset, first = number / CAMERAS, number * 7 % len(frames)
    count = int(seconds * FPS)

    def packets() -> Iterator[Any]:
        before = False
        for index in range(count):
            time.sleep(max(start + offset + index / FPS - time.time(), 0))
            wants = sender.wants_key
            yield from encoder.encode(frames[(first + index) % len(frames)], key=wants and not before)
            before = wants
        yield from encoder.flush()

    def captured(pts: int) -> float:
        return start + offset + pts / FPS

    sent, largest = {}, 0
    for chunk in transport.chunked(packets(), "libx264", 640, 360, encoder.fps, frames=CHUNK, captured=captured):
        sequence = sender.send(chunk)
        if sequence is not None:
            sent[sequence] = chunk.crc
        largest = max(largest, spool.size)
    left = sender.close(SETTLE)
    told = {
        "sent": sent,
        "heard": heard,
        "frames": count,
        "left": left,
        "dropped": spool.dropped,
        "resent": sender.resent,
        "largest_spool": largest,
    }
    (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--camera-process"]:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        _camera_process(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]), sys.argv[6:])
    else:
        harness.main("accmpeg_soak", {"soak": soak})

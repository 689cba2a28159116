"""Small videos, a network that costs nothing, and a link that can be cut."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from keras_efficient.video.encoder import Packet, RoiEncoder
from keras_efficient.video.transport import Chunk, Sender, Spool, chunked, make_authority

WIDTH, HEIGHT, FPS = 64, 48, Fraction(25)


def packet(key=False, pts=0, data=b"data"):
    return Packet(data, pts, pts, key)


def chunk(begins=False, ends=False, packets=None, **others):
    """A chunk that no decoder has to like."""
    packets = [packet(begins)] if packets is None else packets
    return Chunk(tuple(packets), "libx264", WIDTH, HEIGHT, FPS, begins, ends, 1.5, **others)


@functools.cache
def video(
    frames=40, key_every=10, width=WIDTH, height=HEIGHT, b_frames=None, size=5, seed=0, codec="libx264", open=False
):
    """Chunks of a real, small video; `open`: groups of pictures of libx265 that need those before them."""
    random = np.random.default_rng(seed)
    options = {"open-gop": 1, "scenecut": 0} if open else None
    kind = {"codec": codec, "options": options, "key_every": key_every, "b_frames": b_frames, "threads": 1}
    encoder = RoiEncoder(width, height, FPS, **kind)
    small = random.integers(0, 256, (frames, height // 8, width // 8, 3)).astype(np.uint8)
    pictures = small.repeat(8, axis=1).repeat(8, axis=2)
    packets = [p for picture in pictures for p in encoder.encode(picture)] + encoder.flush()
    return list(chunked(packets, codec, width, height, FPS, frames=size, captured=lambda pts: time.time()))


def mean(frames):
    """A network: the mean of each frame."""
    return [round(float(frame.mean()), 2) for frame in frames]


def certificates(folder, *cameras, **options):
    make_authority(folder, ["localhost", "127.0.0.1"], cameras, **options)
    return folder


def files(folder, name):
    return {"certificate": folder / f"{name}.pem", "key": folder / f"{name}.key", "authority": folder / "authority.pem"}


@contextlib.contextmanager
def camera(folder, name, target, limit=8 << 20, **options):
    """A sender with its spool; gives the sender and what it is told: a list of (sequence, results)."""
    told = []
    spool = Spool(folder / name, name, limit=limit)
    options = options or {"insecure": True}
    sender = Sender(target, spool, on_results=lambda *pair: told.append(pair), **options)
    try:
        yield sender, told
    finally:
        sender.close(0)
        spool.close()


def until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


class Proxy:
    """A TCP link to a port that can be cut and restored, and led elsewhere."""

    def __init__(self, port):
        self.port, self.is_up = port, True
        self._pairs = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if not self.is_up:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self.port), 5)
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        self._end(source, target)

    def _end(self, *sockets):
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def cut(self):
        self.is_up = False
        for pair in self._pairs:
            self._end(*pair)
        self._pairs = []

    def restore(self):
        self.is_up = True

    def close(self):
        self._listener.close()
        self.cut()


def rows(url, statement):
    """What a journal holds, read past it."""
    if str(url).startswith("postgresql"):
        import psycopg

        with psycopg.connect(url) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []
    import sqlite3

    with contextlib.closing(sqlite3.connect(url)) as connection, connection:
        return connection.execute(statement).fetchall()


class Server:
    """A server in a process of its own, which can be killed."""

    def __init__(self, journal, port=0):
        program = Path(__file__).parent / "server_process.py"
        command = [sys.executable, program, str(journal), str(port)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.port = int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()

"""What a server counts, for Prometheus, and a page that says whether it serves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from keras_efficient.errors import ConnectionProblem, MissingDependency

__all__ = ["Metrics"]

OTHER_PLACE = "Choose another address: --metrics HOST:PORT, or none."
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server; `keras_efficient_video_…` in Prometheus.

    Attributes:
        frames, analysed, bytes, chunks, repeats: what came, what the network saw, what was stored already.
        dropped: chunks that cameras gave up.
        missing: frames of stored groups of pictures that did not come out of the decoder.
        failed: chunks that are stored without results, since the server failed at them every time.
        refused: connections that were ended, by the name of the status.
        cameras: connected now.
        waiting: chunks that wait for the network.
        latency: seconds from when the first frame of a chunk was taken until its results were stored.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingDependency("prometheus-client", "A server for video", "video") from error
        self._text: Callable[[Any], bytes] = prometheus.generate_latest
        self._registry = registry = prometheus.CollectorRegistry()

        def made(kind: Any, name: str, words: str, **options: Any) -> Any:
            return kind(f"keras_efficient_video_{name}", words, registry=registry, **options)

        self.frames = made(prometheus.Counter, "frames", "Frames decoded and stored.")
        self.analysed = made(prometheus.Counter, "analysed", "Frames that the network has seen.")
        self.bytes = made(prometheus.Counter, "bytes", "Bytes of chunks received.")
        self.chunks = made(prometheus.Counter, "chunks", "Chunks stored.")
        self.repeats = made(prometheus.Counter, "repeats", "Chunks received that were stored already.")
        self.dropped = made(prometheus.Counter, "dropped", "Chunks that cameras gave up.")
        self.missing = made(prometheus.Counter, "missing", "Frames that did not come out of the decoder.")
        self.failed = made(prometheus.Counter, "failed", "Chunks stored without results: the server failed at them.")
        self.refused = made(prometheus.Counter, "refused", "Connections ended by the server.", labelnames=["reason"])
        self.cameras = made(prometheus.Gauge, "cameras", "Cameras connected.")
        self.waiting = made(prometheus.Gauge, "waiting", "Chunks that wait for the network.")
        self.latency = made(prometheus.Histogram, "latency_seconds", "From capture to stored.", buckets=SECONDS)

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return self._text(self._registry)

    def listen(self, host: str, port: int, healthy: Callable[[], bool]) -> ThreadingHTTPServer:
        """Serves `/metrics` and `/healthz` (200, or 503) from a thread of its own; end it with `shutdown()`.

        Raises:
            ConnectionProblem: the address cannot be listened at.
        """
        page = self.page

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                known = {"/metrics": page, "/healthz": lambda: b"serving\n" if healthy() else b""}
                text = known[self.path]() if self.path in known else None
                self.send_response(404 if text is None else 200 if text else 503)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write(b"not found\n" if text is None else text or b"not serving\n")

            def log_message(self, *_: Any) -> None:
                pass

        try:
            server = ThreadingHTTPServer((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConnectionProblem(
                f"Metrics cannot be served at {host}:{port}: {reason}.", hint=OTHER_PLACE
            ) from error
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return server

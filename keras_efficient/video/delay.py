"""From the taking of a frame to what the server says: a model of the delay of chunks.

```
delay = fill + hold + look + encode + queue + link + round trip + server
```

- fill: frames of a chunk / frames a second: how old its first frame is when the last one is taken;
- hold: how long the encoder keeps a chunk's last packet back, since it looks ahead and reorders;
- look, encode: seconds for the camera's model and for the encoder, of one chunk (measured here, or as given);
- queue: until the link is free of the chunks before: a chunk is sent when it is there and the link is free;
- link: 8 · bytes / bandwidth;
- round trip: a half, and a whole one more for each further pass;
- server: seconds for one frame, once a pass: its chunk's frames are looked at together (measured, or as given).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.video.evaluation import Evaluation, Point

__all__ = ["TERMS", "Link", "bandwidth_for", "delays"]

TERMS = ("fill", "hold", "look", "encode", "queue", "link", "round trip", "server")


@dataclass(frozen=True)
class Link:
    """Between a camera and its server.

    Args:
        bandwidth: bits a second.
        round_trip: seconds.
        chunk: frames that are sent together.
        queues: whether chunks wait for those before them.
        holds: whether what the encoder keeps back counts.
        look, encode, server: seconds, instead of those that were measured: of a chunk, of a chunk, of a frame.

    Raises:
        WrongArgument: numbers out of range.
    """

    bandwidth: float
    round_trip: float = 0.1
    chunk: int = 10
    queues: bool = True
    holds: bool = True
    look: float | None = None
    encode: float | None = None
    server: float | None = None

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.round_trip >= 0 and self.chunk >= 1):
            raise WrongArgument(f"There is no such link: {self}.")

    def delay(self, point: Point, rate: Fraction | float, of: Callable[[np.ndarray], Any] = np.mean) -> float:
        """Seconds, the mean over chunks, or something else of them."""
        return float(of(np.sum(list(delays(point, rate, self).values()), axis=0)))


def delays(point: Point, rate: Fraction | float, link: Link) -> dict[str, np.ndarray]:
    """Each of `TERMS`, (chunks,) seconds; their sum is the delay of a chunk's first frame.

    Args:
        point: what is sent.
        rate: frames a second.
        link: over which.
    """
    frames, rate = len(point.sizes), float(rate)
    starts = np.arange(0, frames, link.chunk)
    counts = np.diff([*starts, frames])
    sizes = np.add.reduceat(point.sizes, starts)
    last = starts + counts - 1
    held = np.maximum(np.maximum.reduceat(point.out_at, starts) - last, 0) if link.holds else 0 * last
    # Times of an own processor: all but the last chunk are whole, and a chunk takes its share of the clip's.
    look = np.full(len(starts), point.looking / len(starts)) if link.look is None else np.full(len(starts), link.look)
    encode = point.encoding * counts / frames if link.encode is None else np.full(len(starts), link.encode)
    ready = starts / rate + counts / rate + held / rate + look + encode
    takes = 8 * sizes / link.bandwidth
    queue = np.zeros(len(starts))
    free = 0.0
    for index, (begin, time) in enumerate(zip(ready, takes, strict=True)):
        queue[index] = max(free - begin, 0.0) if link.queues else 0.0
        free = begin + queue[index] + time
    whole = np.ones(len(starts))
    terms = (
        counts / rate,
        held / rate,
        look,
        encode,
        queue,
        takes,
        whole * link.round_trip * (point.passes - 0.5),
        whole * (point.serving if link.server is None else link.server) * point.passes,
    )
    return dict(zip(TERMS, terms, strict=True))


def bandwidth_for(
    found: Evaluation, scheme: str, accuracy: float, *, seconds: float = 0.6, chunk: int = 10
) -> float | None:
    """Bits a second at which the link takes so long for a mean chunk of a scheme; `None`: accuracy not reached."""
    needed = found.curve(scheme).bytes_at(accuracy)
    if needed is None:
        return None
    return 8 * needed / len(found.points[scheme][0].sizes) * chunk / seconds

"""A camera's chunks on its disk, from when they are encoded until the server has stored them."""

from __future__ import annotations

import bisect
import dataclasses
import errno
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from keras_efficient.atomic import replacing
from keras_efficient.errors import BadChunk, FileProblem
from keras_efficient.video.transport.chunks import Chunk, check_camera

__all__ = ["Spool"]

_FILE = re.compile(r"(\d{20})(-key)?\.chunk")


@dataclass(frozen=True)
class _Entry:
    sequence: int
    begins: bool
    size: int


class Spool:
    """A folder with a file for each chunk, named by its sequence; of one camera, in use by one process.

    A file is on the disk before its chunk can be sent. Chunks stay until the server has stored all of their group, and
    that has ended: a server that was restarted needs the group from its key frame on.

    When it is full, the oldest group is given up as a whole, then the next oldest. Is the group that is being written
    the only one left, it is given up too, and so is what follows it: `needs_key` says that a new group must begin.

    Opened again after a crash, it goes on behind the last whole file, and ends the group that was left open.

    Args:
        folder: where; it is made.
        camera: its name.
        limit: bytes of all files.

    Attributes:
        stream: a number that no other spool has.
        last: the sequence of the last chunk.
        dropped: chunks given up without an acknowledgement; the server may have stored the newest of them.
        needs_key: whether only a chunk that begins a group is taken.

    Raises:
        FileProblem: the folder cannot be used, is another camera's, or another process uses it.
    """

    def __init__(self, folder: str | Path, camera: str, *, limit: int = 256 << 20):
        self.folder, self.camera, self.limit = Path(folder), check_camera(camera), limit
        self.dropped, self.needs_key = 0, True
        self._has_ended = False  # the newest group
        self._changed = threading.Condition()
        self._entries: list[_Entry] = []  # in order
        self._acknowledged = self.last = self._size = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / "lock")
            try:
                self.stream = self._identity()
                self._open()
            except BaseException:
                self.close()
                raise
        except FileProblem:
            raise
        except OSError as error:
            raise FileProblem(self.folder, f"cannot be used as a spool: {error.strerror or error}.") from error

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        with self._changed:
            return self._size

    @property
    def pending(self) -> int:
        """How many chunks are not acknowledged."""
        with self._changed:
            return len(self._entries) - self._place(self._acknowledged + 1)

    @property
    def acknowledged(self) -> int:
        """The last sequence that the server has stored, as far as it has said since the spool was opened."""
        with self._changed:
            return self._acknowledged

    def append(self, chunk: Chunk) -> int | None:
        """Writes a chunk under the next sequence; `None` where it was given up for want of room.

        Raises:
            FileProblem: the disk fails otherwise than by being full.
            BadChunk: the chunk is over a limit.
        """
        with self._changed:
            if self.needs_key and not chunk.begins:
                self.dropped += 1
                return None
            while not self._written(chunk):
                oldest = self._group(0)
                is_own = len(oldest) == len(self._entries) and not chunk.begins
                self._give_up(oldest)
                if is_own or not oldest:
                    self.dropped += 1
                    self.needs_key = True
                    return None
            self.needs_key = False
            self._forget_stored()
            self._changed.notify_all()
            return self.last

    def read(self, sequence: int) -> Chunk | None:
        """A chunk; `None` where it was given up. One that is damaged is given up with the rest of its group."""
        with self._changed:
            place = self._place(sequence)
            if place == len(self._entries) or self._entries[place].sequence != sequence:
                return None
            try:
                return Chunk.from_bytes(self._path(self._entries[place]).read_bytes())
            except (BadChunk, OSError):
                self.refuse(sequence)
                return None

    def after(self, sequence: int) -> int | None:
        """The next chunk behind a sequence."""
        with self._changed:
            place = self._place(sequence + 1)
            return self._entries[place].sequence if place < len(self._entries) else None

    def beginning(self, sequence: int) -> int:
        """With which chunk the group of this one begins."""
        with self._changed:
            group = self._group(self._place(sequence))
            return group[0].sequence if group else sequence

    def acknowledge(self, sequence: int, *, anew: bool = False) -> None:
        """Notes that the server has stored all chunks up to this one.

        Args:
            sequence: the chunk's.
            anew: whether it counts also where it is lower than before: a journal may be lost, or be an older copy.
        """
        with self._changed:
            self._acknowledged = sequence if anew else max(self._acknowledged, sequence)
            self.last = max(self.last, sequence)
            self._forget_stored()
            self._changed.notify_all()

    def refuse(self, sequence: int) -> None:
        """Gives up the rest of a group, from a chunk on that nobody can use."""
        with self._changed:
            group = self._group(self._place(sequence))
            self.needs_key = self.needs_key or group[-1:] == self._entries[-1:]
            self._give_up([entry for entry in group if entry.sequence >= sequence])
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until something is appended or acknowledged, or the time is over."""
        with self._changed:
            self._changed.wait(seconds)

    def wake(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Lets another process use the folder."""
        os.close(self._lock)

    def _identity(self) -> int:
        """The stream's number, microseconds since 1970 when the folder was first used."""
        path = self.folder / "stream"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(f"{self.camera} {time.time_ns() // 1000}\n")
            _sync(self.folder)
        camera, _, stream = path.read_text(errors="replace").strip().partition(" ")
        if camera != self.camera or not stream.isdecimal() or len(stream) > 18:
            hint = "Give each camera a folder of its own."
            raise FileProblem(self.folder, f"is no spool of camera {self.camera!r}.", hint=hint)
        return int(stream)

    def _open(self) -> None:
        for leftover in self.folder.glob(".*.partial*"):
            leftover.unlink(missing_ok=True)
        found = sorted((int(name[1]), path) for path in self.folder.iterdir() if (name := _FILE.fullmatch(path.name)))
        last = None
        while found:  # the last whole file, or one that was emptied for its number
            data = found[-1][1].read_bytes()
            try:
                last = Chunk.from_bytes(data) if data else None
                break
            except BadChunk:
                found.pop()[1].unlink()
        self.last = found[-1][0] if found else 0
        for sequence, path in found:
            if size := path.stat().st_size:
                self._entries.append(_Entry(sequence, path.stem.endswith("-key"), size))
                self._size += size
            elif sequence < self.last:
                path.unlink()
        self._has_ended = last is not None and last.ends
        if last is not None and not last.ends:
            self._written(dataclasses.replace(last, packets=(), begins=False, ends=True))

    def _path(self, entry: _Entry) -> Path:
        return self.folder / f"{entry.sequence:020}{'-key' if entry.begins else ''}.chunk"

    def _place(self, sequence: int) -> int:
        """Of the first entry that is not before a sequence."""
        return bisect.bisect_left(self._entries, sequence, key=lambda entry: entry.sequence)

    def _group(self, place: int) -> list[_Entry]:
        """All entries of the group of one of them; none where there is none."""
        start, end = place, place + 1
        while 0 < start < len(self._entries) and not self._entries[start].begins:
            start -= 1
        while end < len(self._entries) and not self._entries[end].begins:
            end += 1
        return self._entries[start:end]

    def _written(self, chunk: Chunk) -> bool:
        """Writes and syncs a file under the next sequence, if there is room."""
        chunk = dataclasses.replace(chunk, camera=self.camera, stream=self.stream, sequence=self.last + 1)
        data = chunk.to_bytes()
        if self._size + len(data) > self.limit and chunk.packets:  # the end of a group may always be told
            return False
        entry = _Entry(chunk.sequence, chunk.begins, len(data))
        try:
            with replacing(self._path(entry), overwrite=True) as temporary:
                temporary.write_bytes(data)
            _sync(self.folder)
        except OSError as error:
            cause = error.__cause__ if isinstance(error, FileProblem) else error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return False
            raise
        self.last, self._has_ended = entry.sequence, chunk.ends
        self._entries.append(entry)
        self._size += entry.size
        return True

    def _give_up(self, entries: list[_Entry]) -> None:
        self.dropped += sum(entry.sequence > self._acknowledged for entry in entries)
        self._remove(entries)

    def _forget_stored(self) -> None:
        """Removes groups of which all is stored, the newest when it has ended."""
        while (group := self._group(0)) and group[-1].sequence <= self._acknowledged:
            if len(group) == len(self._entries) and not self._has_ended:
                return
            self._remove(group)

    def _remove(self, entries: list[_Entry]) -> None:
        """Removes neighbours."""
        for entry in entries:
            if entry.sequence == self.last:
                os.truncate(self._path(entry), 0)  # its number may have been sent: it must not come again
            else:
                self._path(entry).unlink(missing_ok=True)
            self._size -= entry.size
        if entries:
            place = self._place(entries[0].sequence)
            del self._entries[place : place + len(entries)]


def _locked(path: Path) -> int:
    """The descriptor of a file that is locked while this process lives."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FileProblem(path.parent, "is in use by another process.", hint="Give each camera its own.") from error
    return descriptor


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

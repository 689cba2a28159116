"""The one place where the program writes: results to stdout (for people, or as one JSON document), the rest to stderr.

Commands hand over values; how they look is decided here. With JSON asked for, stdout is taken away from everybody else
in the process, since converters and compilers print there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from keras_efficient.errors import KerasEfficientError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

__all__ = ["Output", "out"]

_WIDTH_OF_FILES = 160  # of tables, where stdout is no terminal


class Output:
    """Where a command's results, messages and progress go.

    Attributes:
        quiet: errors only.
        verbose: what is being done, line by line.
        debug: tracebacks, and what libraries write to stderr.
        as_json: results are one JSON document.
        interrupted: Ctrl-C came; whatever fails now fails because of it.
    """

    def __init__(self) -> None:
        self.quiet = self.verbose = self.debug = self.as_json = self.interrupted = False
        self._stdout: TextIO | None = None
        self._stderr: TextIO | None = None
        self._status: Status | None = None

    def begin(self, *, as_json: bool) -> None:
        """Called first by every command that has `--json`."""
        self.as_json = as_json
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        if as_json:
            sys.stdout.flush()
            # Bytes of a file name that are no UTF-8 become escapes (\udcff), which JSON has too.
            self._stdout = open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            os.dup2(2, 1)

    def rows(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
        """A table: the JSON has all keys of the rows; people see `columns` (key: heading)."""
        if self.as_json:
            return self._json(list(rows))
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for key, heading in columns.items():
            numbers = all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
            first = not table.columns  # a name, which people copy
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold", no_wrap=first)
        for row in rows:
            table.add_row(*(_words(row.get(key)) for key in columns))
        return self._console().print(table)

    def record(self, values: Mapping[str, Any], *, shown: Mapping[str, Any] | None = None) -> None:
        """One object: the JSON has `values`; people see `shown`, or `values`, one line each."""
        if self.as_json:
            return self._json(values)
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, value in (values if shown is None else shown).items():
            table.add_row(key, _words(value))
        return self._console().print(table)

    def text(self, text: str) -> None:
        """A result that is text as it stands."""
        stream, status = self._stdout or sys.stdout, self._status
        if status is not None:
            status.stop()  # else its line and this one get into one another
        stream.write(text if text.endswith("\n") else f"{text}\n")
        stream.flush()  # what is left in a buffer when the process ends is not always written
        if status is not None:
            status.start()

    def message(self, text: str) -> None:
        """For people, besides the result."""
        if not self.quiet:
            self._to_stderr(text)

    def detail(self, text: str) -> None:
        """For people who asked for more: the next step of the work begins, unless it was to end."""
        self._heed_interrupt()
        if self.verbose:
            self._to_stderr(text)

    def error(self, message: str, hint: str | None) -> None:
        """What went wrong and what to do about it; while an exception is handled, `debug` shows where."""
        if self.debug:
            import traceback

            self._to_stderr(traceback.format_exc().rstrip())
        self._to_stderr(f"Error: {message}" + (f"\n{hint}" if hint else ""))

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on stderr, where that is a terminal; gives the function to call with (done, in all)."""
        if not self._shows_progress():
            yield lambda done, total: self._heed_interrupt()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._error_console(), transient=True) as bar:
            task = bar.add_task(what, total=None)

            def show(done: int, total: int) -> None:
                self._heed_interrupt()
                bar.update(task, completed=done, total=total or None)

            yield show

    @contextlib.contextmanager
    def stages(self, what: str) -> Iterator[Callable[[str], None]]:
        """A line on stderr that says what is being done, where that is a terminal; gives the function to call."""
        if not self._shows_progress():
            self.detail(what)
            yield self.detail
            return
        with self._error_console().status(f"{what} …") as status:

            def show(stage: str) -> None:
                self.detail(stage)
                status.update(f"{what}: {stage} …")

            self._status = status
            try:
                yield show
            finally:
                self._status = None

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """Keeps back what compiled libraries and child processes write to stderr; it is shown when the block fails.

        TensorFlow writes some lines before its log levels hold, LiteRT one for every model. What Python writes
        (warnings, tracebacks) goes through. With `debug` nothing is kept back.
        """
        if self.debug:
            yield
            return
        stream, kept = sys.stderr, os.dup(2)
        sys.stderr = self._own_stderr()
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 2)
            try:
                yield
                self._heed_interrupt()
            except Exception as err:
                if not (isinstance(err, KerasEfficientError) or self.interrupted):
                    log.seek(0)
                    self._to_stderr(log.read().decode(errors="replace").rstrip())
                raise
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                sys.stderr = stream

    def _heed_interrupt(self) -> None:
        """Ctrl-C comes again where native code that was being loaded, or ran, has lost it."""
        if self.interrupted:
            raise KeyboardInterrupt

    def _json(self, value: Any) -> None:
        self.text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def _shows_progress(self) -> bool:
        return self._own_stderr().isatty() and not self.quiet

    def _to_stderr(self, text: str) -> None:
        if text:
            stream = self._own_stderr()
            stream.write(f"{text}\n")
            stream.flush()

    def _own_stderr(self) -> TextIO:
        """A descriptor of our own, which `hushed` leaves alone."""
        if self._stderr is None:
            self._stderr = open(os.dup(2), "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        return self._stderr

    def _error_console(self) -> Console:
        from rich.console import Console

        return Console(file=self._own_stderr())

    def _console(self) -> Console:
        from rich.console import Console

        is_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        return Console(width=_WIDTH_OF_FILES if is_file else None, markup=False, highlight=False)


def _words(value: Any) -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return "\n".join(_words(item) for item in value) or "–"
    return str(value)


out = Output()

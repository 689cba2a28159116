"""The program: its commands, the options that all of them share, and what its exit status means.

0: done. 1: the work failed. 2: the call was wrong. 130: interrupted. 143: told to end (SIGTERM). An error is one or two
lines on stderr; `--debug` adds the traceback. Nothing but typer and rich is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from keras_efficient.cli import advise, bench, env, export, upscale, ursabench, video, zoo
from keras_efficient.cli.output import out
from keras_efficient.errors import KerasEfficientError, WrongArgument

__all__ = ["app", "main"]

app = typer.Typer(
    name="keras-efficient",
    help="Efficient Keras models: load them pretrained, use them, ship them to phones, NPUs and GPUs.",
    epilog="Exit status: 0 done, 1 the work failed, 2 the call was wrong, 130 interrupted, 143 told to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo.app, name="zoo")
app.command("export")(export.export)
app.command("upscale")(upscale.upscale)
app.add_typer(video.app, name="video")
app.add_typer(ursabench.app, name="ursabench")
app.command("bench")(bench.bench)
app.command("advise")(advise.advise)
app.command("env")(env.env)

# These may stand anywhere in the call, as people write them.
_SHARED_FLAGS = ("--debug", "-q", "--quiet", "-v", "--verbose")


def _print_version(wanted: bool) -> None:
    if wanted:
        import keras_efficient

        out.text(f"keras-efficient {keras_efficient.__version__}")
        raise typer.Exit


@app.callback()
def _shared(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only; no messages, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is being done.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what libraries write.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    out.quiet, out.verbose, out.debug = quiet, verbose, debug


def main() -> None:
    """Runs the program on `sys.argv` and ends the process with its exit status."""
    # TensorFlow reads it when it is imported: no messages below errors, unless the user set it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    out.debug = "--debug" in sys.argv
    # Being told to end cleans up as Ctrl-C does: no half-written file stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(_flags_first(sys.argv[1:]), prog_name="keras-efficient")
    except KerasEfficientError as err:
        if out.interrupted:
            _leave(130)
        out.error(err.message, err.hint)
        sys.exit(2 if isinstance(err, WrongArgument) else 1)
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:  # the reader of our output is gone: `keras-efficient … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as err:
        if out.interrupted:
            _leave(130)
        out.error(f"{type(err).__name__}: {err}", "This is a bug, or a full disk or memory. --debug shows where.")
        sys.exit(1)


def _leave(status: int) -> NoReturn:
    """Ends the process at once: libraries whose loading was interrupted crash when they are taken down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C, remembered: native code that calls Python can lose a `KeyboardInterrupt` that reaches it there.

    It prints the traceback, goes on without the result, and what comes up is another error.
    """
    out.interrupted = True
    if not out.debug:
        sys.excepthook = lambda *_: None
        sys.unraisablehook = lambda _: None
    raise KeyboardInterrupt


def _flags_first(arguments: list[str]) -> list[str]:
    """Moves the shared flags before the command; what follows `--` is left alone."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [item for item in arguments[:end] if item in _SHARED_FLAGS]
    return [*flags, *(item for item in arguments[:end] if item not in _SHARED_FLAGS), *arguments[end:]]

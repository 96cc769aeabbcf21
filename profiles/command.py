"""What every command shares: one line and the right exit status for whatever goes wrong."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from profiles.errors import InputError, ZigzagError, one_line
from profiles.outputs import closed_streams
from profiles.start import called, told_exhaustion
from profiles.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, SupportsWrite

FAILED = 1
INTERRUPTED = 130
BROKEN_PIPE = 141
STDOUT = "stdout"
_ENDING_SIGNALS: dict[int, str] = {
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed; try: nohup",
    signal.SIGXCPU: "the limit of processor seconds is reached; try: raise it (ulimit -t)",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one ``InputError`` instead of usage and exit."""

    def __init__(self, *, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=called(prog),
            description=description,
            epilog=f"example:\n  {example.replace(f'python -m {prog}', called(prog))}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise InputError(
            "command line",
            got=message,
            allowed=f"the flags in {self.prog} --help",
            hint=self._near_flag(message),
        )

    def _near_flag(self, message: str) -> str:
        """Return the flag that looks most like one that does not exist, if there is any."""
        _, _, words = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
        near = (difflib.get_close_matches(f, self._option_string_actions, n=1) for f in flags)
        return next((found[0] for found in near if found), "")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help, and raise where it cannot be written."""
        print(self.format_help(), end="", file=file or sys.stdout)

    def add_bytes(self, flag: str, **options: Any) -> None:
        """Add a flag that takes a size such as ``8GiB``, and reads as bytes."""
        self.add_argument(flag, type=partial(parse_bytes, what=flag), metavar="SIZE", **options)

    def add_seconds(self, flag: str, **options: Any) -> None:
        """Add a flag that takes a duration such as ``600s``, and reads as seconds."""
        self.add_argument(
            flag, type=partial(parse_seconds, what=flag), metavar="DURATION", **options
        )


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command on ``sys.argv`` and end the process with its exit status.

    A ``ZigzagError``, an ``OSError`` or a machine that gives no more memory or threads becomes one
    line on stderr; Ctrl-C and signals end with 128 and their number, after the command's own
    ``with`` blocks have cleaned up.
    """
    _open_standard_streams()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for signum in _ENDING_SIGNALS:
        # A program that is started by nohup goes on when its terminal is closed.
        if signum == signal.SIGTERM or signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, _end_by_signal)
    status = _status_of(main, sys.argv[1:])
    sys.exit(_flushed(status))


def _open_standard_streams() -> None:
    """Let streams that were closed at the start lead nowhere, and print whatever they are given."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file opened would get the number, and with it what is printed.
            os.open(os.devnull, os.O_RDWR)
            closed_streams.add(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, mode), encoding="utf-8"))
    sys.stdout = _named(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        # A name that the encoding cannot hold must not end a run.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


class _NamedStdout(io.FileIO):
    """Standard output, whose errors name it, as those of other files do."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def _named(stream: TextIO) -> TextIO:
    """Return a stream like ``sys.stdout``, with ``_NamedStdout`` below it."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = _NamedStdout(1, "w", closefd=False)
    return io.TextIOWrapper(
        # As in the interpreter's own: with PYTHONUNBUFFERED, there is no buffer.
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Signalled(SystemExit):
    """A signal, raised in the main thread so that ``with`` blocks clean up, as for Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def _end_by_signal(signum: int, frame: object) -> NoReturn:
    # A second signal must not cut short the cleaning up that the first one began.
    signal.signal(signum, signal.SIG_IGN)
    raise _Signalled(signum)


def _status_of(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    try:
        main(arguments)
    except ZigzagError as error:
        return _report(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except _Signalled as signalled:
        return _report(_ENDING_SIGNALS[signalled.signum], 128 + signalled.signum)
    except SystemExit as ended:
        # After --help.
        return ended.code if isinstance(ended.code, int) else 0
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        if error.filename != STDOUT:
            return _report(one_line(str(error)), FAILED)
        _leave(sys.stdout)
        return _report(f"{STDOUT}: {error.strerror}", FAILED)
    except (MemoryError, RuntimeError) as error:
        told = told_exhaustion(error)
        if told is None:
            raise
        return _report(told, FAILED)
    return 0


def _flushed(status: int) -> int:
    """Write what stdout still holds; returns the exit status, which a failure of that changes."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            status = _report(f"{STDOUT}: {error.strerror}", status or FAILED)
        elif status == 0:
            status = BROKEN_PIPE
        _leave(sys.stdout)
    return status


def _leave(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: the interpreter flushes it on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(line: str, status: int) -> int:
    try:
        print(f"error: {line}", file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        # The status is all there is to tell by.
        _leave(sys.stderr)
    return status

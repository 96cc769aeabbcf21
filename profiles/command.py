"""What every command shares: one line and the right exit status for whatever goes wrong."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from profiles.errors import InputError, ZigzagError, one_line
from profiles.units import parse_bytes, parse_seconds

FAILED = 1
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one ``InputError`` instead of usage and exit."""

    def __init__(self, *, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise InputError("command line", got=message, allowed=f"the flags in {self.prog} --help")

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

    A ``ZigzagError`` or an ``OSError`` becomes one line on stderr; Ctrl-C ends with 130 and
    SIGTERM with 143, after the command's own ``with`` blocks have cleaned up.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_status_of(main, sys.argv[1:]))


class _Terminated(SystemExit):
    """SIGTERM, raised in the main thread so that ``with`` blocks clean up, as for Ctrl-C."""


def _terminate(signum: int, frame: object) -> NoReturn:
    # A second signal must not cut short the cleaning up that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated(TERMINATED)


def _status_of(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    try:
        main(arguments)
        sys.stdout.flush()
    except ZigzagError as error:
        return _report(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except _Terminated:
        return _report("terminated", TERMINATED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _report(one_line(str(error)), FAILED)
    return 0


def _report(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return status

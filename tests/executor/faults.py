"""Faults that come at a chosen call, and the command in a process that can be killed by one."""

from __future__ import annotations

import errno
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor import generate
from profiles.command import run

# Children are forked from a process that has imported everything and computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
PATIENCE_S = 40
SetAttribute = Callable[[Any, str, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens instead of, or right before, a call.

    Parameters
    ----------
    target
        The function, such as ``os:preadv`` or ``executor.stores.kv_cache:KVCache.write``.
    after
        Calls that go well before.
    does
        Called with the arguments; every later call too, as a broken disk stays broken.
    """

    target: str
    does: Callable[..., None]
    after: int = 0

    def arm(self, set_attribute: SetAttribute = setattr) -> list[int]:
        """Replace the target; the list returned gains an item with every strike."""
        module, _, names = self.target.partition(":")
        *owners, name = names.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original, calls, strikes = getattr(owner, name), itertools.count(), list[int]()

        @functools.wraps(original)
        def struck(*arguments: Any, **options: Any) -> Any:
            number = next(calls)
            if number >= self.after:
                strikes.append(number)
                self.does(*arguments)
            return original(*arguments, **options)

        set_attribute(owner, name, struck)
        return strikes


def fail_disk(number: int, *_: object) -> None:
    """Fail as a system call does."""
    raise OSError(number, os.strerror(number))


def is_full(*_: object) -> None:
    """Fail as on a full disk."""
    fail_disk(errno.ENOSPC)


def is_broken(*_: object) -> None:
    """Fail as a broken disk does."""
    fail_disk(errno.EIO)


def kill(*_: object) -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(*_: object) -> None:
    """Ask this process to end; returns when its main thread has taken notice."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            time.sleep(0.001)


def limit_files(num_bytes: int, *_: object) -> None:
    """Let no file of this process grow any further than this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended; a signal's number is negative."""

    status: int
    err: str


class Command:
    """``executor.generate`` in a process of its own."""

    def __init__(self, arguments: Sequence[str], log: Path, fault: Fault | None = None) -> None:
        self._log = log
        self._process = PROCESSES.Process(target=_generate, args=(arguments, log, fault))
        self._process.start()

    def end(self) -> Ended:
        """Wait until it has ended; one that hangs is killed, and fails the test."""
        self._process.join(PATIENCE_S)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
        assert status is not None, f"it hangs after {self._log.read_text()}"
        return Ended(status=status, err=self._log.read_text())


def _generate(arguments: Sequence[str], log: Path, fault: Fault | None) -> None:
    sys.argv = ["generate", *arguments]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if fault is not None:
        fault.arm()
    run(generate.main)

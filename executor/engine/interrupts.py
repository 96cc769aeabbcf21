"""Hold signals back while the main thread takes locks that worker threads need.

The locks of ``threading`` and ``queue`` are taken in Python code. A handler that raises after such
a lock was taken, and before its ``with`` block began, leaves it locked for ever.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# The signals that commands and notebooks answer with an exception.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HeldSignals:
    """A context whose handlers of signals pass each signal on, but not within ``held``.

    Outside the main thread, which alone runs handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: list[int] = []
        self._holds = False

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                handler = signal.getsignal(signum)
                # A signal that is ignored, or that ends the process, runs no Python code.
                if callable(handler):
                    self._handlers[signum] = handler
                    signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        # A generator may be closed by another thread; what then stays in place only passes on.
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._handlers.items():
                # A handler may have replaced itself.
                if signal.getsignal(signum) == self._receive:
                    signal.signal(signum, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Answer the signals that arrive within this context at its end."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
            while self._noted:
                signal.raise_signal(self._noted.pop())

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._holds:
            self._noted.append(signum)
        else:
            self._handlers[signum](signum, frame)

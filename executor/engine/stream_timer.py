"""When the tasks of a CUDA stream really ran: their handlers only queue them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from costmodel.schedule.tasks import Task
from executor.engine.trace import Span

MILLISECOND = 1e-3


class _TimedOnStream(NamedTuple):
    task: Task
    num_bytes: int
    began: torch.cuda.Event
    ended: torch.cuda.Event


class StreamTimer:
    """Turns pairs of events of one stream into spans, once the later one has passed.

    Parameters
    ----------
    stream
        The channel's own.
    emit
        Called with each span, in the order of the tasks.
    """

    def __init__(self, stream: torch.cuda.Stream, emit: Callable[[Span], None]) -> None:
        self._stream = stream
        self._emit = emit
        self._queued: deque[_TimedOnStream] = deque()
        # Events know only the time between two of them, so one is held against the run's clock.
        self._known = self.mark()
        self._known.synchronize()
        self._known_s = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """Queue an event."""
        # Who waits for it sleeps: a spinning thread would take a core from the CPU's attention.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return event

    def add(
        self, task: Task, num_bytes: int, began: torch.cuda.Event, ended: torch.cuda.Event
    ) -> None:
        """Take note of a task that is queued between two events."""
        self._queued.append(_TimedOnStream(task, num_bytes, began, ended))

    def emit_done(self) -> None:
        """Emit the spans of all tasks that have ended by now."""
        while self._queued and self._queued[0].ended.query():
            task, num_bytes, began, ended = self._queued.popleft()
            start_s = self._known_s + self._known.elapsed_time(began) * MILLISECOND
            end_s = start_s + began.elapsed_time(ended) * MILLISECOND
            # Elapsed times have 24 bits, so they are taken from near by.
            self._known, self._known_s = ended, end_s
            self._emit(Span(task=task, start_s=start_s, end_s=end_s, num_bytes=num_bytes))

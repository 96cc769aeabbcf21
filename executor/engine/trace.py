"""What every task did: its seconds, its bytes, and how long it waited for others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from costmodel.schedule.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One task as it ran: start and end in seconds on the run's clock, bytes that it moved.

    ``blocked_s`` is the time between the worker's picking the task and its start, in which it
    waited for tasks of other channels. It is not known, and zero, where a CUDA stream waits.
    """

    task: Task
    start_s: float
    end_s: float
    num_bytes: int
    blocked_s: float = 0.0


class Trace:
    """Sums over the spans of a run, by channel, and whoever else wants to see each span.

    Spans are not kept: a long run has millions of them.

    Parameters
    ----------
    listeners
        Called with each span by the worker of its channel.
    phases
        Names of the first pass and of all others; one name: of all passes.
    """

    def __init__(
        self,
        listeners: Sequence[Callable[[Span], None]] = (),
        *,
        phases: Sequence[str] = ("prefill", "decode"),
    ) -> None:
        self._listeners = listeners
        self._first, self._others = phases[0], phases[-1]
        self.busy_s: dict[str, dict[str, float]] = {name: defaultdict(float) for name in phases}
        self.blocked_s: dict[str, float] = defaultdict(float)
        self.moved_bytes: dict[str, int] = defaultdict(int)

    def record(self, span: Span) -> None:
        """Add one span; called by the worker of its channel, which alone writes its keys."""
        channel = span.task.channel
        phase = self._first if span.task.is_prefill else self._others
        self.busy_s[phase][channel] += span.end_s - span.start_s
        self.blocked_s[channel] += span.blocked_s
        self.moved_bytes[channel] += span.num_bytes
        for listen in self._listeners:
            listen(span)


class SpanLog:
    """Notes the first tasks of a run, up to a number of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.spans: list[Span] = []

    def record(self, span: Span) -> None:
        """Take a task; workers call this, and several of them may note one too many."""
        if len(self.spans) < self._most:
            self.spans.append(span)

"""What every task did: seconds, bytes, and how long it waited. Kept as running sums and, where a
timeline is wanted, as spans."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from costmodel.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One task as it ran: start and end in seconds on the run's clock, bytes that it moved."""

    task: Task
    start_s: float
    end_s: float
    num_bytes: int


@dataclass(slots=True, kw_only=True)
class Trace:
    """Sums over the spans of a run, by channel and phase.

    ``spans`` stays empty unless ``keeps_spans``: a long run has millions of them.
    """

    keeps_spans: bool = False
    spans: list[Span] = field(default_factory=list)
    busy_s: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"prefill": defaultdict(float), "decode": defaultdict(float)}
    )
    moved_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def record(self, span: Span) -> None:
        """Add one span; called by the worker of its channel, which alone writes its keys."""
        phase = "prefill" if span.task.is_prefill else "decode"
        self.busy_s[phase][span.task.channel] += span.end_s - span.start_s
        self.moved_bytes[span.task.channel] += span.num_bytes
        if self.keeps_spans:
            self.spans.append(span)

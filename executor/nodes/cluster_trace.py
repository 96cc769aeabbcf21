"""One timeline of a job on several nodes, with a track for each channel of each node.

Each node notes the tasks that it runs, by its own clock. The clocks are compared once, before the
job begins: the driver asks a node for its time, and takes the middle of the call as the moment of
the answer (Cristian 1989). Of several calls, the shortest one counts. It bounds the error by half
its duration.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from costmodel.pricing.memory import LANE_PHASE
from costmodel.schedule.chrome_trace import begin_trace
from executor.engine.trace import Span
from executor.nodes.ray_nodes import NodeActor, ask, load_ray
from profiles.errors import RunError, ZigzagError
from profiles.outputs import write_output
from profiles.units import format_figure

logger = logging.getLogger(__name__)

# Tasks in one file; viewers set the limit.
MOST_SPANS = 400_000
NUM_CALLS = 8
# A node that does not tell its tasks for so long after the job is left out.
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A node's clock beside the driver's.

    Parameters
    ----------
    ahead_s
        Seconds by which it is ahead of the driver's.
    error_s
        Most seconds by which this may be wrong.
    """

    ahead_s: float
    error_s: float


class ClusterTrace:
    """The timeline of one job.

    Parameters
    ----------
    path
        The file.
    num_nodes
        Nodes of the job.
    """

    def __init__(self, path: Path, num_nodes: int) -> None:
        self._path = path
        # Tasks that each node notes.
        self.num_spans = MOST_SPANS // num_nodes
        self._clocks: dict[str, Clock] = {}
        self._spans: dict[str, list[Span]] = {}
        self._zero_s = 0.0

    def begin(self, actors: Sequence[NodeActor]) -> None:
        """Compare the clocks of nodes without work, and set time zero."""
        for actor in actors:
            # Who has failed is told of when the job begins.
            with suppress(RunError):
                self._clocks[actor.name] = clock_of(actor)
        self._zero_s = time.perf_counter()

    def take(self, actors: Sequence[NodeActor]) -> None:
        """Take what these nodes have noted."""
        calls = {actor.handle.spans.remote(): actor for actor in actors}
        ready, late = load_ray().wait(list(calls), num_returns=len(calls), timeout=TIMEOUT_S)
        for call in late:
            logger.warning(
                "node %s: no answer within %.0f s; the trace has none of its tasks",
                calls[call].name,
                TIMEOUT_S,
            )
        for call in ready:
            actor = calls[call]
            try:
                # It may have taken the place of another node.
                if actor.name not in self._clocks:
                    self._clocks[actor.name] = clock_of(actor)
                self._spans[actor.name] = ask(actor, call)
            except ZigzagError as error:
                # The answers are there without it.
                logger.warning("%s; the trace has none of its tasks", error)

    def write(self) -> None:
        """Write the file."""
        write_output(self._path, self._render)

    def _render(self, handle: IO[str]) -> None:
        error_ms = 1e3 * max((self._clocks[name].error_s for name in self._spans), default=0.0)
        notes = (
            f"the first {self.num_spans} tasks of each node since it last started; clocks agree"
            f" within {format_figure(error_ms)} ms"
        )
        file = begin_trace(handle.write, notes=notes, phases=(LANE_PHASE,))
        for pid, (name, spans) in enumerate(sorted(self._spans.items()), 1):
            file.begin_process(pid, name)
            zero_s = self._zero_s + self._clocks[name].ahead_s
            for span in spans:
                file.add(pid, span, zero_s=zero_s, bytes=span.num_bytes, blocked_s=span.blocked_s)
        file.end()


def clock_of(actor: NodeActor) -> Clock:
    """Compare the clock of a node with this machine's."""
    found = []
    for _ in range(NUM_CALLS):
        begin_s = time.perf_counter()
        told_s: float = ask(actor, actor.handle.clock.remote())
        half_s = (time.perf_counter() - begin_s) / 2
        found.append(Clock(ahead_s=told_s - begin_s - half_s, error_s=half_s))
    return min(found, key=lambda clock: clock.error_s)

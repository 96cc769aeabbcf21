"""A job of copies: hands prompts out to nodes as they have room, and takes what they answer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from executor.nodes.facts import no_nodes_left
from executor.nodes.hand_out import HandOut
from executor.nodes.pipeline_actors import PipelineActors
from executor.nodes.ray_nodes import NodeActor, load_ray, told_failure
from executor.nodes.share import Handed, NodeJob, NodeNews
from executor.run.finished import Finished

logger = logging.getLogger(__name__)

# A node tells its news after so many seconds at the latest.
NEWS_S = 1.0
# A node that has failed so often is left alone.
MOST_FAILURES = 3


@dataclass(slots=True)
class CopyNode:
    """One node of the run, or the nodes of one pipeline.

    Parameters
    ----------
    actor
        Its process, or its processes.
    job
        What it runs.
    lacks
        Requests that have no room on it.

    Attributes
    ----------
    num_answered, num_tokens
        Requests that it was the first to answer, and their tokens.
    num_failures
        How often it has failed.
    """

    actor: NodeActor | PipelineActors
    job: NodeJob
    lacks: frozenset[int] = frozenset()
    num_answered: int = 0
    num_tokens: int = 0
    num_failures: int = 0
    call: Any = None
    beats: int = -1
    beat_s: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Its name."""
        return self.actor.name

    @property
    def predicted(self) -> float:
        """Predicted token/s."""
        return self.job.plan.predicted.throughput_tok_per_s


class CopyRun:
    """Runs a job to its end.

    Parameters
    ----------
    nodes
        The nodes, with what they run.
    handed
        Returns a request by its number.
    order
        The requests, in the order in which they are handed out.
    timeout_s
        A node with work that makes no step for so long has failed.
    """

    def __init__(
        self,
        nodes: Sequence[CopyNode],
        handed: Callable[[int], Handed],
        order: Sequence[int],
        timeout_s: float,
    ) -> None:
        self.nodes, self._handed, self._timeout_s = nodes, handed, timeout_s
        self._hand_out = HandOut(order)
        self._at_work: dict[str, CopyNode] = {}

    def run(self) -> Iterator[Sequence[Finished]]:
        """Yield the requests that have ended, each once.

        Raises
        ------
        RunError
            When the last node has failed for good.
        """
        ray = load_ray()
        for node in self.nodes:
            self._begin(node)
        while self._hand_out.num_left:
            calls: Mapping[Any, CopyNode] = {node.call: node for node in self._at_work.values()}
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=NEWS_S)
            for node in (calls[call] for call in ready):
                try:
                    news: NodeNews = ray.get(node.call)
                except ray.exceptions.RayError as error:
                    self._fail(node, str(told_failure(node.name, error)))
                    continue
                if finished := self._first_answers(node, news):
                    yield finished
                if news.error is not None:
                    self._fail(node, f"node {node.name}: {news.error}")
                    continue
                self._go_on(node, news)
            self._find_hanging()

    @property
    def actors(self) -> list[NodeActor]:
        """The actors at work that compute."""
        return [actor for node in self._at_work.values() for actor in node.actor.members]

    def close(self) -> None:
        """End the processes of all nodes."""
        for node in self._at_work.values():
            node.actor.end()
        self._at_work.clear()

    def _begin(self, node: CopyNode) -> None:
        node.beats, node.beat_s = -1, time.monotonic()
        node.call = node.actor.start(node.job)
        self._at_work[node.name] = node

    def _first_answers(self, node: CopyNode, news: NodeNews) -> list[Finished]:
        found = [f for f in news.finished if self._hand_out.answered(node.name, f.request)]
        node.num_answered += len(found)
        node.num_tokens += sum(done.num_generated for done in found)
        return found

    def _go_on(self, node: CopyNode, news: NodeNews) -> None:
        if news.beats != node.beats:
            node.beats, node.beat_s = news.beats, time.monotonic()
        numbers = self._hand_out.take(node.name, min(news.wanted, self._share(node)), node.lacks)
        if numbers:
            # It may have stood still because it had nothing to do.
            node.beat_s = time.monotonic()
        handed = [self._handed(number) for number in numbers]
        node.call = node.actor.handle.exchange.remote(handed, NEWS_S)

    def _share(self, node: CopyNode) -> int:
        """Return how many requests a node may get: it holds no more than its share of what is left,
        as fast as it is predicted to be."""
        total = sum(each.predicted for each in self._at_work.values())
        share = math.ceil(self._hand_out.num_left * node.predicted / total)
        return max(1, share - self._hand_out.num_held(node.name))

    def _find_hanging(self) -> None:
        now = time.monotonic()
        for node in list(self._at_work.values()):
            is_busy = node.beats < 0 or self._hand_out.num_held(node.name) > 0
            if is_busy and now - node.beat_s > self._timeout_s:
                self._fail(node, f"node {node.name}: no step for {self._timeout_s:.0f} s")

    def _fail(self, node: CopyNode, told: str) -> None:
        """Leave a node alone, or start it again; what it has not answered goes to others."""
        del self._at_work[node.name]
        node.actor.end()
        lost = self._hand_out.give_back(node.name)
        node.num_failures += 1
        again = node.num_failures < MOST_FAILURES and node.actor.find_node()
        what_next = "it starts again" if again else "it is left out"
        logger.warning("%s; its %d unfinished prompts go to others; %s", told, lost, what_next)
        if again:
            node.actor.begin()
            self._begin(node)
        if not self._at_work or self._hand_out.is_stuck(n.lacks for n in self._at_work.values()):
            raise no_nodes_left(told)

"""One node of a job of copies: the whole model, and requests that come as there is room. No Ray."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from costmodel.schedule.tasks import Task
from executor.checkpoint.opening import open_checkpoint
from executor.engine.trace import Span
from executor.expert_counts import kept_counts, record_counts
from executor.jobs.endings import RowChooser
from executor.model.logits_processors import History, Steps
from executor.model.sampling import no_history
from executor.nodes.handed_chooser import handed_chooser
from executor.nodes.share import Handed, NodeJob, NodeNews
from executor.run.finished import Finished
from executor.run.lanes import LaneRequest
from executor.run.results import BlockResult, Progress
from executor.run.runner import Runner
from profiles.errors import ZigzagError, one_line

logger = logging.getLogger(__name__)

# Of the lanes of a node, one in so many has a request waiting for it.
LANES_A_RESERVE = 8


class CopyEngine(Progress):
    """Answers requests in a thread of its own, until it is closed.

    Parameters
    ----------
    job
        The job, and how this node runs it.
    on_span
        Called with each ended task.
    """

    def __init__(self, job: NodeJob, on_span: Callable[[Span], None] | None = None) -> None:
        self._on_span = on_span
        self.lengths, self._job = job.lengths, job
        self._policy = job.plan.policy
        self._changed = threading.Condition()
        # Requests that have not ended, and of these the ones that the run has not taken yet.
        self._held: dict[int, Handed] = {}
        self._new: list[int] = []
        self._finished: list[Finished] = []
        self._num_waiting = 0
        # Whether the last pass has left requests without a lane.
        self._is_full = False
        self._is_closed = False
        self._beats = 0
        self._error: str | None = None
        self._wanted_told = -1
        self._chooser = handed_chooser(job.model, self._held)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin: load the weights, and then wait for requests."""
        self._thread.start()

    def exchange(self, handed: Sequence[Handed], seconds: float) -> NodeNews:
        """Take requests, and return what has happened since the last call, or after ``seconds``."""
        with self._changed:
            self._held.update((each.request, each) for each in handed)
            self._new += [each.request for each in handed]
            self._changed.notify_all()
            self._changed.wait_for(self._has_news, seconds)
            finished, self._finished = tuple(self._finished), []
            self._wanted_told = self._wanted
            return NodeNews(
                finished=finished,
                wanted=self._wanted_told,
                beats=self._beats,
                error=self._error,
            )

    def close(self) -> None:
        """End when the requests that were handed out have ended, and wait for that."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    # What the run asks for.

    def take(self, num_at_work: int, num_waiting: int) -> Sequence[int]:
        """Return the requests that came since the last call (see ``HandOuts``)."""
        with self._changed:
            self._is_full, self._num_waiting = num_waiting > 0, num_waiting
            if not num_at_work and not num_waiting:
                # Nobody hands anything out before it knows that there is room.
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._new or self._is_closed)
            taken, self._new = self._new, []
            self._num_waiting += len(taken)
            self._changed.notify_all()
            return taken

    def __getitem__(self, request: int, /) -> LaneRequest:
        """Return a request that was taken."""
        return LaneRequest(
            prompt_ids=self._held[request].prompt_ids,
            max_tokens=int(self.lengths.limits[request]),
            expected_tokens=int(self.lengths.outputs[request]),
        )

    # What the run tells.

    def loaded(self, num_bytes: int) -> None:
        """Count a piece of weights as a step."""
        self._beat()

    def computed(self, task: Task) -> None:
        """Count a layer of a batch as a step."""
        self._beat()

    def _beat(self) -> None:
        # Several workers may lose one of two beats, which changes nothing.
        self._beats += 1

    def _has_news(self) -> bool:
        is_new = self._wanted > 0 and self._wanted != self._wanted_told
        return bool(self._finished) or self._error is not None or is_new

    @property
    def _wanted(self) -> int:
        """Requests that there is room for."""
        if self._policy.lanes is None:
            return 0 if self._held else self._policy.block_size
        lanes = self._policy.block_size
        reserve = 1 + lanes // LANES_A_RESERVE
        if self._is_full:
            return max(0, reserve - self._num_waiting - len(self._new))
        return max(0, lanes + reserve - len(self._held))

    def _run(self) -> None:
        try:
            self._run_job()
        except ZigzagError as error:
            self._end(str(error))
        except BaseException as error:
            logger.exception("the run failed")
            self._end(one_line(f"{type(error).__name__}: {error}"))

    def _end(self, error: str) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _run_job(self) -> None:
        job, plan = self._job, self._job.plan
        source = open_checkpoint(job.model, dtype=plan.policy.model.dtype)
        renumbered = _Renumbered(self._chooser)
        has_lanes = plan.policy.lanes is not None
        counts = kept_counts(source)
        with Runner(
            plan.policy,
            plan.hardware,
            source,
            job.offload_dir,
            sampler=self._chooser if has_lanes else renumbered,
            progress=self,
            on_span=self._on_span,
            expert_shares=counts.shares(source.spec) if counts else None,
        ) as runner:
            blocks = runner.run_handed_out(self) if has_lanes else self._blocks(runner, renumbered)
            for block in blocks:
                self._take_finished(self._chooser.finish(block).finished)
            record_counts(source, runner.block.routing_counts.by_layer())

    def _take_finished(self, finished: Sequence[Finished]) -> None:
        with self._changed:
            for each in finished:
                del self._held[each.request]
            self._finished += finished
            self._changed.notify_all()

    def _blocks(self, runner: Runner, renumbered: _Renumbered) -> Iterator[BlockResult]:
        """Run what was handed out as one block, and then the next."""
        while requests := self.take(0, 0):
            renumbered.requests = requests
            for block in runner.run([self._held[request].prompt_ids for request in requests]):
                yield _of_requests(block, requests)


class _Renumbered:
    """Asks a chooser by the numbers of the job, where a run numbers the prompts of a block."""

    def __init__(self, chooser: RowChooser) -> None:
        self._chooser = chooser
        self.requests: Sequence[int] = ()

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence."""
        return self._chooser.sample(logits, self._of_job(sequence_ids), step, history)

    def has_ended(self, sequence_ids: Sequence[int]) -> torch.Tensor:
        """Return whether each sequence has ended: bool [batch]."""
        return self._chooser.has_ended(self._of_job(sequence_ids))

    def _of_job(self, sequence_ids: Sequence[int] | torch.Tensor) -> list[int]:
        return [self.requests[int(number)] for number in sequence_ids]


def _of_requests(block: BlockResult, requests: Sequence[int]) -> BlockResult:
    return replace(
        block,
        output_ids={requests[i]: ids for i, ids in block.output_ids.items()},
        stopped=frozenset(requests[i] for i in block.stopped),
        output_scores={requests[i]: scores for i, scores in block.output_scores.items()},
        prompt_scores={requests[i]: scores for i, scores in block.prompt_scores.items()},
    )

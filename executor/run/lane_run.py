"""The passes of a job whose sequences begin as others end."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from costmodel.plan.lengths import Lengths
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.schedule.admission import Admission
from costmodel.schedule.pass_lanes import LaneBatch, PassLanes
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import ZigzagSchedule
from executor.engine.channels import Ending, Engine
from executor.model.sampling import Chooser
from executor.model.token_scores import TokenScores, join
from executor.run.lane_block import LaneBlock
from executor.run.lanes import Lane, LaneRequest
from executor.run.pass_log import PassLog
from executor.run.pass_plan import PassPlan
from executor.run.prefixes import shared_prefixes
from executor.run.results import BlockResult, Progress
from executor.stores.pass_rows import RowBytes
from profiles import kernels
from profiles.errors import InputError
from profiles.hardware import HardwareProfile

# Tasks that are made in advance while the previous pass is computed.
TASKS_AHEAD = 256
# Tasks of a pass that run beside the one before it.
LOADS = frozenset({"read_weights", "send_weights", "read_cache"})


def check_lanes(policy: Policy, hardware: HardwareProfile) -> None:
    """Refuse what lanes cannot run with yet."""
    if policy.lanes is None:
        return
    lacks = ["a GPU"] if hardware.has_gpu else []
    if policy.activations.cpu < 1:
        lacks.append("activations elsewhere")
    if lacks:
        raise InputError(
            "policy.lanes",
            got=" and ".join(lacks),
            allowed="a CPU, with activations in its memory",
            hint="a policy without lanes",
        )


class Requests(Protocol):
    """The requests of a job, by number."""

    def __getitem__(self, index: int, /) -> LaneRequest: ...


class HandOuts(Requests, Protocol):
    """Requests that are handed out while the job runs.

    Attributes
    ----------
    lengths
        Those of every request that may be handed out.
    """

    lengths: Lengths

    def take(self, num_at_work: int, num_waiting: int) -> Sequence[int]:
        """Return the numbers of requests that were handed out since the last call.

        Where no sequence is at work and none waits for a lane, the call waits for a request. It
        then returns none if no more will come.
        """


class LaneRun:
    """One job: admits prompts, runs passes, and takes the tokens.

    Parameters
    ----------
    plan
        Of a policy with lanes.
    block, engine
        The handlers, and what runs them.
    chooser, eos_ids
        What chooses tokens, and the tokens that end a sequence, for requests without their own.
    log
        Takes what each pass did.
    progress
        Is told of each pass.
    """

    def __init__(
        self,
        plan: Plan,
        block: LaneBlock,
        engine: Engine,
        chooser: Chooser,
        eos_ids: frozenset[int],
        log: PassLog,
        progress: Progress | None = None,
    ) -> None:
        assert plan.policy.lanes is not None
        self._policy, self._lanes = plan.policy, plan.policy.lanes
        self._block, self._engine = block, engine
        self._chooser, self._eos_ids, self._log = chooser, eos_ids, log
        self._progress = progress or Progress()
        count = plan.policy.num_gpu_batches
        self._tasks = iter(ZigzagSchedule(plan, num_batches=count, num_tokens=None))
        self._ahead: deque[Task] = deque()
        # Scores of each token so far, and of the prompt, by lane.
        self._scores: dict[int, list[TokenScores]] = {}
        self._prompt_scores: dict[int, TokenScores] = {}

    def run(
        self, requests: Sequence[LaneRequest], prefixes: Prefixes | None = None
    ) -> Iterator[BlockResult]:
        """Generate for every request; yields the sequences that end in a pass, behind it.

        ``prefixes`` is what prompts share; ``None`` finds it.
        """
        lengths = Lengths(
            [len(request.prompt_ids) for request in requests],
            [request.expected_tokens or request.max_tokens for request in requests],
            [request.max_tokens for request in requests],
            prefixes=shared_prefixes(requests, self._policy) if prefixes is None else prefixes,
        )
        longest = int((lengths.prompts + lengths.limits).max()) - 1
        assert longest <= self._policy.workload.num_positions
        yield from self._run(requests, lengths, self._admission(lengths))

    def run_handed_out(self, hand_outs: HandOuts) -> Iterator[BlockResult]:
        """Generate for requests that come while the job runs, until no more will come."""
        lengths = hand_outs.lengths
        admission = self._admission(lengths, is_handed_out=True)
        yield from self._run(hand_outs, lengths, admission, hand_outs)

    def _admission(self, lengths: Lengths, *, is_handed_out: bool = False) -> Admission:
        return Admission(
            lengths,
            self._block.stores.cache.sizes,
            most_lanes=self._policy.block_size,
            batch_lanes=self._policy.gpu_batch_size,
            pass_rows=self._lanes.pass_rows,
            is_handed_out=is_handed_out,
        )

    def _run(
        self,
        requests: Requests,
        lengths: Lengths,
        admission: Admission,
        hand_outs: HandOuts | None = None,
    ) -> Iterator[BlockResult]:
        # This thread computes nothing from here on; its OpenMP threads would slow the workers down.
        kernels.end_idle_threads()
        first_pass, start_s = 0, time.perf_counter()
        self._log.begin(lengths, self._block.stores.cache.sizes)
        while (lanes := self._next_pass(admission, hand_outs)) is not None:
            pass_s = time.perf_counter()
            self._admit(lanes, requests, lengths.prefixes)
            num_tokens = len(lanes.decoding) + len(lanes.newcomers)
            self._progress.begin_pass(num_tokens)
            self._run_pass(lanes.number, lanes.batches)
            ended = self._take()
            at_work = self._block.table.lanes
            self._log.add(lanes, at_work, admission.used_pages, pass_s, time.perf_counter())
            done = [at_work[number] for number in ended]
            self._log.end(done)
            self._progress.end_pass(num_tokens, {x.request: len(x.generated) for x in done})
            admission.ended(ended)
            if ended:
                result = self._result(ended, lanes.number + 1 - first_pass, start_s)
                first_pass, start_s = lanes.number + 1, time.perf_counter()
                self._block.table.release(ended)
                yield result
        # The last lanes of the job have ended, and with them the last prefixes.
        self._block.table.drop_prefixes(self._block.table.prefixes)
        self._engine.drain()

    def _next_pass(self, admission: Admission, hand_outs: HandOuts | None) -> PassLanes | None:
        """Begin the next pass, with what was handed out for it; ``None`` at the end of the job."""
        if hand_outs is not None:
            at_work, waiting = len(admission.lanes), admission.num_waiting
            admission.hand_out(hand_outs.take(at_work, waiting))
        return admission.plan()

    def _admit(self, lanes: PassLanes, requests: Requests, prefixes: Prefixes) -> None:
        self._block.table.drop_prefixes(lanes.dropped)
        columns = lanes.newcomers, lanes.requests, lanes.prefixes, lanes.skipped
        for number, index, prefix, skipped in zip(*(x.tolist() for x in columns), strict=True):
            request = requests[index]
            lane = Lane(
                request=index,
                prompt=np.asarray(request.prompt_ids, np.int64),
                max_tokens=request.max_tokens,
                chooser=request.chooser or self._chooser,
                eos_ids=self._eos_ids if request.eos_ids is None else request.eos_ids,
                prefix=prefix,
                prefix_len=int(prefixes.tokens[prefix]) if prefix >= 0 else 0,
                skipped=skipped,
            )
            self._block.table.admit(number, lane)

    def _run_pass(
        self, number: int, batches: Sequence[LaneBatch], rows: RowBytes | None = None
    ) -> None:
        """Run the tasks of one pass, and with them the first loads of the next.

        The next pass gives lanes other batches and pages other lanes, which no task is to see: all
        tasks of this pass must have ended. ``rows`` are hidden states that an earlier stage of a
        pipeline has made.
        """
        plan = PassPlan.of(number, batches, self._block.table, chunk_rows=self._lanes.chunk_rows)
        self._block.begin_pass(plan)
        if rows is not None:
            self._block.stores.hidden.put(rows)
        # A channel works in order, so that its last task ends last.
        last: dict[str, Ending] = {}
        while (task := self._next()).token == number or task.kind in LOADS:
            ending = self._engine.submit(task)
            if task.kind not in LOADS:
                last[task.channel] = ending
        self._ahead.appendleft(task)
        # More tasks are made now, before the workers need the interpreter.
        self._ahead.extend(itertools.islice(self._tasks, TASKS_AHEAD - len(self._ahead)))
        for ending in last.values():
            self._engine.wait(ending)
        self._engine.forget_done()

    def _next(self) -> Task:
        return self._ahead.popleft() if self._ahead else next(self._tasks)

    def _take(self) -> list[int]:
        """Give each lane its token of this pass; returns the lanes that end."""
        ended = []
        head = self._block.head
        self._prompt_scores |= head.prompt_scores
        for number, token in head.chosen.items():
            lane = self._block.table.lanes[number]
            lane.length = len(lane.prompt) + len(lane.generated)
            lane.generated.append(token)
            if number in head.scores:
                self._scores.setdefault(number, []).append(head.scores[number])
            if lane.has_ended or number in head.ended:
                ended.append(number)
        return ended

    def _result(self, ended: Sequence[int], num_passes: int, start_s: float) -> BlockResult:
        output_ids, stopped, scores, prompt_scores = {}, set(), {}, {}
        for number in ended:
            lane = self._block.table.lanes[number]
            ids = lane.generated
            if lane.has_stopped:
                stopped.add(lane.request)
                ids = ids[:-1]
            output_ids[lane.request] = tuple(ids)
            if number in self._scores:
                scores[lane.request] = join(self._scores.pop(number)).first(len(ids))
            if number in self._prompt_scores:
                prompt_scores[lane.request] = self._prompt_scores.pop(number)
        return BlockResult(
            output_ids=output_ids,
            stopped=frozenset(stopped),
            num_batches=len(self._block.batches),
            prompt_len=max(len(self._block.table.lanes[number].prompt) for number in ended),
            num_tokens=num_passes,
            start_s=start_s,
            prefill_s=0.0,
            decode_s=time.perf_counter() - start_s,
            output_scores=scores,
            prompt_scores=prompt_scores,
        )

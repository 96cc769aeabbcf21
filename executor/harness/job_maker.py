"""Lists of requests in tokens, each planned and run as one job."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.opening import open_checkpoint
from executor.cli.job_flags import check_job_flags, read_job_options
from executor.cli.run_command import Job
from executor.harness.choosers import NextTokens
from executor.jobs.endings import Decode, RowChooser
from executor.jobs.lane_room import room_lacks
from executor.jobs.params import RowParams
from executor.model.sampling import Chooser, Sampler
from executor.model.token_scores import TokenScores
from executor.run.results import BlockResult
from profiles.errors import InputError

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A continuation to score behind its context, both in tokens."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding gives it."""

    log_prob: float
    is_greedy: bool


class JobMaker:
    """Runs lists of requests, each list as one job.

    Parameters
    ----------
    model
        Checkpoint folder.
    flags
        Those of ``add_offload_flags``: with a policy, its batch sizes and placements; else a policy
        is searched for each list.
    max_length
        Most tokens that the model is given at once; ``None`` for as many as it has positions.
    """

    def __init__(
        self, model: Path, flags: argparse.Namespace, *, max_length: int | None = None
    ) -> None:
        check_job_flags(flags)
        policy = Policy.load(flags.policy) if flags.policy else None
        self._options = read_job_options(flags, policy)
        self._source = open_checkpoint(model, dtype=policy.model.dtype if policy else None)
        most = self._source.spec.max_positions
        if max_length is not None and not 1 < max_length <= most:
            raise InputError("max_length", got=max_length, allowed=f"2 to {most}")
        self.max_length = max_length or most
        self.vocab_size = self._source.spec.vocab_size

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score continuations, all of them in one job.

        The last token of a continuation is never given to the model. Requests that differ in it
        alone are one prompt. Contexts are cut on the left where both are too long.
        """
        if not requests:
            return []
        prompts, rows = _number(self._prompt_of(request) for request in requests)
        targets: list[list[int]] = [[] for _ in prompts]
        for request, row in zip(requests, rows, strict=True):
            targets[row].append(request.continuation[-1])
        chooser = NextTokens(targets)
        is_longer = any(len(request.continuation) > 1 for request in requests)
        workload = Workload(prompt_len=1, gen_len=1, prompt_logprobs=0 if is_longer else None)
        before: dict[int, TokenScores] = {}
        for block in self._run(prompts, workload, chooser):
            before |= block.prompt_scores
        scores = []
        for request, row in zip(requests, rows, strict=True):
            last = request.continuation[-1]
            log_probs, is_greedy = [chooser.log_probs[row][last]], chooser.likeliest[row] == last
            if inner := len(request.continuation) - 1:
                log_probs += before[row].log_probs[-inner:].tolist()
                is_greedy = is_greedy and bool(before[row].is_greedy[-inner:].all())
            scores.append(Score(log_prob=math.fsum(log_probs), is_greedy=is_greedy))
        return scores

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[Sequence[str]],
        *,
        gen_len: int,
        sampler: Sampler,
        eos_ids: frozenset[int],
        decode: Decode,
    ) -> list[Tokens]:
        """Continue prompts by at most ``gen_len`` tokens, all of them in one job; each ends with
        the first of its ``stops``. Prompts are cut on the left where they are too long."""
        room = self.max_length - gen_len
        if room < 1:
            raise InputError(
                "tokens to generate", got=gen_len, allowed=f"less than {self.max_length}"
            )
        rules = [
            RowParams(max_tokens=gen_len, sampler=sampler, end_ids=eos_ids, stops=tuple(strings))
            for strings in stops
        ]
        chooser = RowChooser(rules.__getitem__, lambda request: request, decode)
        for prompt in prompts:
            self._check_ids(prompt)
        cut = [list(prompt[-room:]) for prompt in prompts]
        workload = Workload(prompt_len=1, gen_len=gen_len)
        blocks = [chooser.finish(block) for block in self._run(cut, workload, chooser)]
        found = {index: ids for block in blocks for index, ids in block.output_ids.items()}
        return [found[index] for index in range(len(prompts))]

    def _prompt_of(self, request: ScoreRequest) -> Tokens:
        num_tokens = len(request.continuation)
        if not request.context or not 0 < num_tokens <= self.max_length:
            raise InputError(
                "request",
                got=f"{len(request.context)} tokens and {num_tokens} to score",
                allowed=f"1 or more, and 1 to {self.max_length} to score",
            )
        whole = (*request.context, *request.continuation)
        self._check_ids(whole)
        return whole[-self.max_length - 1 : -1]

    def _check_ids(self, ids: Sequence[int]) -> None:
        if max(ids) >= self.vocab_size:
            raise InputError(
                "tokenizer",
                got=f"token id {max(ids)}",
                allowed=f"0 to {self.vocab_size - 1}, the model's vocabulary",
            )

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        workload: Workload,
        chooser: Chooser,
    ) -> list[BlockResult]:
        lengths = Lengths([len(ids) for ids in prompts], [workload.gen_len] * len(prompts))
        workload = replace(
            workload,
            prompt_len=int(lengths.prompts.max()),
            num_prompts=len(prompts),
            lengths=lengths.sketch(),
        )
        policy, hardware, source = self._options.choose_policy(self._source, workload)
        if policy.lanes is None:
            workload = replace(workload, lengths=None)
        for place, lack in room_lacks(policy, lengths).items():
            raise lack.error(f"prompt {place + 1}")
        job = Job(
            # Prompts of any length keep the batch sizes and placements of a policy.
            policy=replace(policy, workload=workload, predicted=None),
            hardware=hardware,
            source=source,
            prompts=prompts,
            sampler=chooser,
            lengths=lengths,
        )
        blocks: list[BlockResult] = []
        job.run(self._options.offload_dir, planned=job.predict(), on_block=blocks.append)
        return blocks


def _number(prompts: Iterable[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Return the different prompts, and of each prompt its number among them."""
    numbers: dict[Tokens, int] = {}
    rows = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return list(numbers), rows

"""What a run yields, block by block, and what it tells while it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from costmodel.schedule.tasks import Task
from executor.model.token_scores import TokenScores, stack_steps
from executor.run.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What one block generated, and its seconds; ``start_s`` is on the run's clock.

    ``output_ids`` holds the generated tokens of each prompt, by the prompt's index, up to and
    without an end-of-sequence token; ``stopped`` the prompts that met one. ``output_scores`` holds
    the scores of these tokens and ``prompt_scores`` those of each prompt's tokens after the first,
    where the policy's workload asks for them.
    """

    output_ids: dict[int, tuple[int, ...]]
    stopped: frozenset[int]
    num_batches: int
    prompt_len: int
    num_tokens: int
    start_s: float
    prefill_s: float
    decode_s: float
    output_scores: dict[int, TokenScores] = field(default_factory=dict)
    prompt_scores: dict[int, TokenScores] = field(default_factory=dict)


class Progress:
    """What a run tells while it works. This one tells nobody; subclasses show it."""

    def loading(self, num_bytes: int) -> None:
        """So many bytes of weights will be written to disk and read into memory."""

    def loaded(self, num_bytes: int) -> None:
        """So many of them are there now."""

    def started(self, num_batches: int) -> None:
        """A block begins."""

    def computed(self, task: Task) -> None:
        """One layer was computed for one batch; called from a worker's thread."""


def collect(
    batches: Sequence[Batch],
    eos_ids: frozenset[int],
    prompt_len: int,
    start_s: float,
    ends_s: list[float],
) -> BlockResult:
    """Cut what the batches generated at its end-of-sequence tokens.

    ``ends_s`` are the times at which each token was there, on the clock of ``start_s``.
    """
    output_ids, stopped = {}, set()
    output_scores: dict[int, TokenScores] = {}
    prompt_scores: dict[int, TokenScores] = {}
    for batch in batches:
        prompt_scores |= dict(zip(batch.sequence_ids, batch.prompt_scores, strict=False))
        if batch.output_scores:
            found = stack_steps(batch.output_scores[: len(ends_s)])
            output_scores |= dict(zip(batch.sequence_ids, found, strict=True))
        for index, row in zip(batch.sequence_ids, batch.generated.tolist(), strict=True):
            ids = row[: len(ends_s)]
            end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
            output_ids[index] = tuple(ids[:end])
            if index in output_scores:
                output_scores[index] = output_scores[index].first(len(output_ids[index]))
            if end is not None:
                stopped.add(index)
    return BlockResult(
        output_ids=output_ids,
        stopped=frozenset(stopped),
        num_batches=len(batches),
        prompt_len=prompt_len,
        num_tokens=len(ends_s),
        start_s=start_s,
        prefill_s=ends_s[0] - start_s,
        decode_s=ends_s[-1] - ends_s[0],
        output_scores=output_scores,
        prompt_scores=prompt_scores,
    )

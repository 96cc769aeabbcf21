"""The results of blocks, and the progress of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from costmodel.schedule.tasks import Task
from executor.model.token_scores import TokenScores, stack_steps
from executor.run.batch import Batch
from executor.run.finished import Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """The tokens and seconds of one block; ``start_s`` is on the run's clock.

    ``output_ids`` are the generated tokens of each prompt, by the prompt's index, up to the first
    end-of-sequence token, which is not included. ``stopped`` are the prompts with such a token.
    ``output_scores`` are the scores of these tokens, and ``prompt_scores`` those of each prompt's
    tokens after the first, if the policy's workload asks for them. ``finished`` are the requests as
    events, where whoever chooses the tokens knows their ends.
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
    finished: tuple[Finished, ...] = ()


class Progress:
    """Callbacks for the progress of a run. They do nothing here; subclasses show it."""

    def loading(self, num_bytes: int) -> None:
        """``num_bytes`` of weights will be written to disk and read into memory."""

    def loaded(self, num_bytes: int) -> None:
        """``num_bytes`` more of them are done."""

    def started(self, num_batches: int) -> None:
        """A block begins."""

    def begin_pass(self, num_tokens: int) -> None:
        """A pass over lanes begins, which makes so many tokens."""

    def end_pass(self, num_tokens: int, ended: Mapping[int, int]) -> None:
        """It has ended, and with it some requests, of each of which the generated tokens are told.

        End tokens are among them.
        """

    def computed(self, task: Task) -> None:
        """One layer was computed for one batch; called from a worker's thread."""


def collect(
    batches: Sequence[Batch],
    eos_ids: frozenset[int],
    prompt_len: int,
    start_s: float,
    ends_s: list[float],
) -> BlockResult:
    """Cut the generated tokens of all batches at their end-of-sequence tokens.

    ``ends_s`` are the times of each token, on the clock of ``start_s``.
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

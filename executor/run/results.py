"""The results of blocks, and the progress of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costmodel.schedule.tasks import Task
from executor.run.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """The tokens and seconds of one block; ``start_s`` is on the run's clock.

    ``output_ids`` are the generated tokens of each prompt, by the prompt's index, up to the first
    end-of-sequence token, which is not included. ``stopped`` are the prompts with such a token.
    """

    output_ids: dict[int, tuple[int, ...]]
    stopped: frozenset[int]
    num_batches: int
    prompt_len: int
    num_tokens: int
    start_s: float
    prefill_s: float
    decode_s: float


class Progress:
    """Callbacks for the progress of a run. They do nothing here; subclasses show it."""

    def loading(self, num_bytes: int) -> None:
        """``num_bytes`` of weights will be written to disk and read into memory."""

    def loaded(self, num_bytes: int) -> None:
        """``num_bytes`` more of them are done."""

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
    """Cut the generated tokens of all batches at their end-of-sequence tokens.

    ``ends_s`` are the times of each token, on the clock of ``start_s``.
    """
    output_ids, stopped = {}, set()
    for batch in batches:
        for index, row in zip(batch.sequence_ids, batch.generated.tolist(), strict=True):
            ids = row[: len(ends_s)]
            end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
            output_ids[index] = tuple(ids[:end])
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
    )

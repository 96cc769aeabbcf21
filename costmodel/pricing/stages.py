"""The stages of a block that are priced one by one: prefill, and decode in context segments."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.cache import CacheSpec
from costmodel.plan.workload import Workload
from costmodel.pricing.problem import Problem

# The busiest channel can change while the context grows. Within a segment, the context grows by
# at most this factor, unless there would be more than ``MAX_SEGMENTS``.
SEGMENT_GROWTH = 1.25
MAX_SEGMENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The work of one stage for one sequence.

    Parameters
    ----------
    phase
        ``prefill`` or ``decode``.
    first_pass
        The first pass over the model in the stage; prefill is pass 0.
    passes
        Passes over the model.
    prompt_len
        Tokens of the longest prompt.
    tokens
        Tokens that go through every layer.
    sequences_at_once, matmul_rows
        Sequences computed at once, and the rows of their matrix products. There are several numbers
        of rows where the prefill batch size is open; the fastest counts.
    expert_tokens
        Tokens that pass through experts at once. In decode these are the whole block's, where the
        hidden states are stored on the compute device.
    context_tokens
        Slots of the cache that are read in a layer without a window, summed over the passes.
    stored_tokens
        Slots of its cache that are written for later passes.
    scored_tokens
        Tokens whose log-probabilities are computed, besides the tokens that are chosen.
    chosen
        Tokens that are chosen; ``None``: one in each pass.
    parts
        Stages whose work is done at the same time, and adds up; empty for a single one.
    """

    phase: str
    first_pass: int
    passes: float
    prompt_len: int
    tokens: float
    sequences_at_once: float
    matmul_rows: tuple[int, ...]
    expert_tokens: tuple[int, ...]
    context_tokens: float
    stored_tokens: int
    scored_tokens: float = 0
    chosen: float | None = None
    parts: tuple[Stage, ...] = ()

    @property
    def is_prefill(self) -> bool:
        """Whether this is the pass over the prompts."""
        return self.phase == "prefill"

    @property
    def fullness(self) -> float:
        """Share of the passes of a full block whose tokens are chosen."""
        return 1.0 if self.chosen is None or not self.passes else self.chosen / self.passes

    @property
    def name(self) -> str:
        """The phase and, in decode, the first of its passes."""
        return self.phase if self.is_prefill else f"{self.phase} from pass {self.first_pass}"

    def slots_read(self, cache: CacheSpec) -> float:
        """Return the slots of a layer's cache that are read, summed over the passes."""
        if self.is_prefill or cache.window is None:
            return self.context_tokens
        first = self.prompt_len + self.first_pass - 1
        # The passes whose context is shorter than the window.
        growing = min(max(0, cache.window - first), self.passes)
        grown = growing * (first + (growing - 1) / 2)
        return grown + (self.passes - growing) * cache.window

    def slots_stored(self, cache: CacheSpec) -> int:
        """Return the slots of a layer's cache that are written for later passes."""
        return cache.num_slots(self.stored_tokens) if self.is_prefill else self.stored_tokens

    def slots_loaded(self, cache: CacheSpec) -> float:
        """Return the slots of a layer's cache that are loaded from other tiers, over the passes."""
        return self.slots_read(cache)

    def slots_returned(self, cache: CacheSpec) -> float:
        """Return the slots of a layer's cache that are written to other tiers."""
        return self.slots_stored(cache)

    def seen_twice(self, attention: AttentionSpec) -> float:
        """Return twice the keys that all queries of a sequence's prompt see in a layer."""
        return seen_twice(attention, int(self.tokens))


def seen_twice(attention: AttentionSpec, tokens: int) -> int:
    """Return twice the keys that all queries of a prompt see. Rates of prefill count each key
    twice, as without a mask."""
    if attention.is_chunked and attention.window is not None:
        chunks, rest = divmod(tokens, attention.window)
        return chunks * attention.window**2 + rest**2
    window = min(tokens, attention.window or tokens)
    return 2 * tokens * window - window**2


def read_cache_bytes(problem: Problem, stage: Stage) -> float:
    """Return the bytes of cache at rest that one sequence's attention reads in all layers."""
    return sum(
        kind.count * kind.cache.token_bytes * stage.slots_read(kind.cache)
        for kind in problem.layer_kinds
    )


def stored_cache_bytes(problem: Problem, stage: Stage) -> int:
    """Return the bytes of cache at rest that one sequence writes in all layers."""
    return sum(
        kind.count * kind.cache.token_bytes * stage.slots_stored(kind.cache)
        for kind in problem.layer_kinds
    )


def disk_cache_bytes(problem: Problem, stage: Stage) -> tuple[float, float]:
    """Return the bytes of cache that one sequence reads from disk and writes to it, were all of
    it there."""
    padding, kinds = problem.disk_cache_padding, problem.layer_kinds
    read = sum(k.count * k.cache.token_bytes * stage.slots_loaded(k.cache) for k in kinds)
    written = sum(k.count * k.cache.token_bytes * stage.slots_returned(k.cache) for k in kinds)
    return padding * read, padding * written


def stages_of(problem: Problem) -> tuple[Stage, ...]:
    """Return the stages of a block in order; with one token to generate there is prefill only."""
    workload = problem.workload
    prefill_rows = tuple(size * workload.prompt_len for size in problem.prefill_batch_sizes)
    prefill = Stage(
        phase="prefill",
        first_pass=0,
        passes=1,
        prompt_len=workload.prompt_len,
        tokens=workload.prompt_len,
        sequences_at_once=max(problem.prefill_batch_sizes),
        matmul_rows=prefill_rows,
        expert_tokens=prefill_rows,
        context_tokens=0,
        stored_tokens=workload.kept_prompt_len,
        # Nothing predicts a prompt's first token.
        scored_tokens=workload.prompt_len - 1 if workload.scores_prompts else 0,
    )
    decode = (_segment(problem, first, end) for first, end in decode_segments(workload))
    return (prefill, *decode)


def decode_segments(workload: Workload) -> list[tuple[int, int]]:
    """Return the first pass of each context segment of decode, and the one just behind its last."""
    steps = workload.gen_len - 1
    growth = (workload.prompt_len + steps) / workload.prompt_len
    wanted = math.ceil(math.log(growth) / math.log(SEGMENT_GROWTH)) if steps else 0
    num_segments = min(max(1, wanted), MAX_SEGMENTS, steps)
    bounds = [1 + round(i * steps / num_segments) for i in range(num_segments)] + [steps + 1]
    return list(itertools.pairwise(bounds))


def _segment(problem: Problem, first: int, end: int) -> Stage:
    workload = problem.workload
    passes = end - first
    # Pass t, from 1 on, reads the prompt and the t - 1 tokens before its own.
    context = passes * (workload.prompt_len + (first + end - 1) / 2 - 1)
    # The last token is chosen and never attended to.
    stored = passes - (1 if end == workload.gen_len else 0)
    return Stage(
        phase="decode",
        first_pass=first,
        passes=passes,
        prompt_len=workload.prompt_len,
        tokens=passes,
        sequences_at_once=problem.gpu_batch_size,
        matmul_rows=(problem.gpu_batch_size,),
        expert_tokens=(problem.gpu_batch_size * problem.batches_at_once[1],),
        context_tokens=context,
        stored_tokens=stored,
    )

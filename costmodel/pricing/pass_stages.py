"""Stages of one pass over lanes, whose sequences have lengths of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.cache import CacheSpec
from costmodel.plan.pages import PAGE
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage

# What an attention sees of a prompt: its window, and whether that is a chunk.
Reach = tuple[int | None, bool]


def reach_of(attention: AttentionSpec) -> Reach:
    """Return what decides which keys of a prompt an attention sees."""
    return attention.window, attention.is_chunked


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStage(Stage):
    """The work of one sequence in one pass, with the use of its cache given for each window.

    Parameters
    ----------
    slots
        Slots that decode reads in a layer, by its window; others are 0.
    stored
        Slots that are written in a layer, by its window; others are 0.
    seen
        Twice the keys that the queries of a prompt see in a layer, by its ``Reach``; others are 0.
    held
        Slots of the pages that are in use in a layer, by its window; others are 0.
    """

    slots: Mapping[int | None, float] = field(default_factory=dict)
    stored: Mapping[int | None, float] = field(default_factory=dict)
    seen: Mapping[Reach, float] = field(default_factory=dict)
    held: Mapping[int | None, float] = field(default_factory=dict)

    def slots_read(self, cache: CacheSpec) -> float:
        """Return the slots of a layer's cache that are read."""
        return self.slots.get(cache.window, 0.0)

    def slots_stored(self, cache: CacheSpec) -> int:
        """Return the slots of a layer's cache that are written."""
        # A mean of several sequences may be a fraction.
        return self.stored.get(cache.window, 0.0)  # type: ignore[return-value]

    def slots_loaded(self, cache: CacheSpec) -> float:
        """Return the slots that a pass reads of a layer on disk: all of its pages in use."""
        return self.held.get(cache.window, 0.0)

    def slots_returned(self, cache: CacheSpec) -> float:
        """Return the slots that a pass writes to a layer on disk: the whole page of a new token,
        and those of prompts."""
        return self.slots_stored(cache) * (1 if self.is_prefill else PAGE)

    def seen_twice(self, attention: AttentionSpec) -> float:
        """Return twice the keys that all queries of a prompt see in a layer."""
        return self.seen.get(reach_of(attention), 0.0)


def decode_stage(
    problem: Problem, *, tokens: int, slots: Mapping[int | None, float] | None = None
) -> PassStage:
    """Return a pass in which each lane decodes ``tokens``, 1 or 0; with 0 only the costs of loads,
    tasks and the choice of a token are left."""
    windows = {kind.cache.window for kind in problem.layer_kinds}
    return PassStage(
        phase="decode",
        first_pass=1,
        passes=1,
        prompt_len=problem.workload.prompt_len,
        tokens=tokens,
        sequences_at_once=problem.gpu_batch_size,
        matmul_rows=(problem.gpu_batch_size,),
        expert_tokens=(problem.gpu_batch_size * problem.batches_at_once[1],),
        context_tokens=0,
        stored_tokens=tokens,
        slots=slots or {},
        stored=dict.fromkeys(windows, float(tokens)),
    )


def prompt_stage(
    problem: Problem,
    *,
    tokens: int,
    rows: int,
    scored_tokens: float = 0,
    stored: Mapping[int | None, float] | None = None,
    seen: Mapping[Reach, float] | None = None,
) -> PassStage:
    """Return the prompts of a pass as one sequence of ``tokens``, multiplied ``rows`` at a time."""
    return PassStage(
        phase="prefill",
        first_pass=0,
        passes=1,
        prompt_len=tokens,
        tokens=tokens,
        sequences_at_once=1,
        matmul_rows=(rows,),
        expert_tokens=(rows,),
        context_tokens=0,
        stored_tokens=0,
        scored_tokens=scored_tokens,
        stored=stored or {},
        seen=seen or {},
    )

"""The work of lanes between the start of a job and its end, as one stage of the program.

A lane is filled again as soon as it is empty. So all passes are alike in the mean: each decodes a
token of every lane, and takes so many tokens of prompts as lanes end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.pricing.lane_memory import num_lanes
from costmodel.pricing.pass_stages import decode_stage, prompt_stage, reach_of
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage, seen_twice, stages_of


def stages_to_solve(problem: Problem) -> tuple[Stage, ...]:
    """Return the stages that a program has rows for."""
    if problem.lanes is None:
        return stages_of(problem)
    lanes, rows = num_lanes(problem), min(problem.lanes.chunk_rows, problem.lanes.pass_rows)
    lengths = problem.workload.sketch(lanes).lengths()
    return (steady_stage(problem, lengths, lanes, rows),)


def steady_stage(problem: Problem, lengths: Lengths, lanes: float, prompt_rows: int) -> Stage:
    """Return the least mean work of a sequence, with passes by ``lanes`` sequences at once.

    The longest answer takes a pass for each of its tokens, so that a job has at least as many.
    ``prompt_rows`` tokens of prompts are multiplied at once.
    """
    prompts, outputs, limits = lengths.prompts, lengths.outputs, lengths.limits
    longest = float(outputs.max()) * lanes / len(lengths)
    passes = max(lengths.mean_output, longest)
    # When few lanes are left, they are one batch.
    batches = max(lengths.mean_output, longest / problem.num_batches[1])
    kinds = problem.layer_kinds
    windows = {kind.cache.window for kind in kinds}
    # What prompts share is computed once for many of them.
    shared = lengths.prefixes.of_prompts * problem.shares_prefixes
    own = lengths.own if problem.shares_prefixes else lengths
    kept = np.where(limits > 1, prompts - shared, 0)

    def mean_up_to(most: int | None) -> float:
        return float((kept if most is None else np.minimum(kept, most)).mean())

    def mean_of(count: Callable[[int], int]) -> float:
        def mean(tokens: IntArray) -> float:
            different, weights = np.unique(tokens, return_counts=True)
            return float(np.average([count(n) for n in different.tolist()], weights=weights))

        return mean(prompts) - (mean(shared) if shared.any() else 0.0)

    attentions = {reach_of(kind.spec.attention): kind.spec.attention for kind in kinds}
    decode = replace(
        decode_stage(problem, tokens=1),
        passes=passes,
        sequences_at_once=problem.gpu_batch_size * passes / batches,
        chosen=lengths.mean_output,
        tokens=lengths.mean_output - 1,
        slots={window: decoded_slots(lengths, window) for window in windows},
        # At least; pages may be filled in part, and prefixes take some.
        held={window: decoded_slots(own, window) for window in windows},
        stored=dict.fromkeys(windows, lengths.mean_output - 1),
    )
    scored = (lengths.mean_prompt - 1) * problem.workload.scores_prompts
    prompt = replace(
        prompt_stage(problem, tokens=1, rows=prompt_rows),
        passes=0,
        tokens=float((prompts - shared).mean()),
        scored_tokens=scored,
        stored={window: mean_up_to(window) for window in windows},
        seen={
            reach: mean_of(lambda n, a=attention: seen_twice(a, n))  # type: ignore[misc]
            for reach, attention in attentions.items()
        },
    )
    return replace(decode, parts=(decode, prompt))


def decoded_slots(lengths: Lengths, window: int | None) -> float:
    """Return the mean slots that a sequence reads in a layer, summed over the passes that decode.

    The first of them reads the prompt, and each one more.
    """
    prompts, passes = lengths.prompts.astype(float), lengths.outputs - 1.0
    growing = passes if window is None else np.clip(window - prompts, 0, passes)
    slots = growing * prompts + growing * (growing - 1) / 2
    if window is not None:
        slots += (passes - growing) * window
    return float(slots.mean())

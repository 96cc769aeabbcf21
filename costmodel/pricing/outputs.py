"""Bytes of continuations and their scores, until they are written."""

from __future__ import annotations

from costmodel.pricing.lane_memory import TOKEN_BYTES, held_tokens, num_lanes
from costmodel.pricing.problem import Problem

# Until the run ends, each generated token takes a Python int, its place in a list, and its text.
# Each continuation takes a fixed number of bytes besides.
OUTPUT_BYTES = 512
# A log-probability and whether the token is the likeliest; and each alternative beside it.
SCORE_BYTES = 5
ALTERNATIVE_BYTES = 12
# The arrays of one sequence's scores.
SCORED_SEQUENCE_BYTES = 1024


def output_bytes(problem: Problem) -> int:
    """Count the bytes of the continuations of all prompts; those of one block are negligible."""
    workload = problem.workload
    each = workload.gen_len * TOKEN_BYTES + OUTPUT_BYTES
    scored = (
        (workload.gen_len, workload.logprobs),
        (workload.prompt_len, workload.prompt_logprobs),
    )
    for num_tokens, num_top in scored:
        if num_top is not None:
            each += num_tokens * (SCORE_BYTES + num_top * ALTERNATIVE_BYTES) + SCORED_SEQUENCE_BYTES
    return (workload.num_prompts or 0) * each


def held_bytes(problem: Problem) -> int:
    """Count the bytes of the answers of lanes at work, with their scores so far."""
    workload, each = problem.workload, TOKEN_BYTES
    if workload.logprobs is not None:
        each += SCORED_SEQUENCE_BYTES + SCORE_BYTES + workload.logprobs * ALTERNATIVE_BYTES
    if workload.prompt_logprobs is not None:
        each += SCORE_BYTES + workload.prompt_logprobs * ALTERNATIVE_BYTES
    return held_tokens(problem) * each + num_lanes(problem) * SCORED_SEQUENCE_BYTES

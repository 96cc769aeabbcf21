"""What each pass of a job over lanes computes, and what the cache holds."""

from __future__ import annotations

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PAGE, ring_tokens
from costmodel.plan.policy import Policy
from costmodel.pricing.pass_stages import reach_of
from costmodel.pricing.passes import FloatArray, PassCounts
from costmodel.pricing.problem import problem_of
from costmodel.pricing.stages import seen_twice
from costmodel.schedule.job_trace import JobTrace
from profiles.hardware import HardwareProfile


def count_passes(
    trace: JobTrace, lengths: Lengths, policy: Policy, hardware: HardwareProfile
) -> PassCounts:
    """Count what each pass of a job computes."""
    kinds, size = problem_of(policy, hardware).layer_kinds, trace.num_passes
    prompts = lengths.prompts[trace.requests]
    skipped = trace.skipped
    kept = np.where(lengths.limits[trace.requests] > 1, prompts, 0)
    runs = trace.runs

    def at_admission(weights: FloatArray | IntArray) -> FloatArray:
        return np.bincount(trace.admitted, weights, size).astype(float)

    def slots(window: int | None) -> FloatArray:
        """A run reads one slot more with each pass, up to the window."""
        if window is None:
            return _ramps(runs.first, runs.passes, runs.slots, size)
        growing = np.clip(window - runs.slots, 0, runs.passes)
        full = _steps(runs.first + growing, runs.passes - growing, size) * window
        return full + _ramps(runs.first, growing, runs.slots, size)

    different, place = np.unique(np.stack([prompts, skipped]), return_inverse=True)
    attentions = {reach_of(kind.spec.attention): kind.spec.attention for kind in kinds}
    windows = {kind.cache.window: kind.cache for kind in kinds}
    seen = {
        reach: np.array([seen_twice(attention, n) for n in different.tolist()], float)[place]
        for reach, attention in attentions.items()
    }
    return PassCounts(
        decoding=_steps(runs.first, runs.passes, size),
        newcomers=at_admission(np.ones(len(prompts))),
        prompt_tokens=at_admission(prompts - skipped),
        slots={window: slots(window) for window in windows},
        stored={
            window: at_admission(
                np.maximum(kept - skipped, 0) if window is None else np.minimum(kept, window)
            )
            for window in windows
        },
        seen={reach: at_admission(keys[0] - keys[1]) for reach, keys in seen.items()},
        held={w: _held_slots(trace, lengths, w) for w in windows if policy.cache.disk},
    )


def _held_slots(trace: JobTrace, lengths: Lengths, window: int | None) -> FloatArray:
    """Return the slots of all pages in use before each pass, in a layer with a window, float64
    [passes]. Lanes that wait for a page are left out."""
    runs, size, prefixes = trace.runs, trace.num_passes, lengths.prefixes
    ring = ring_tokens(window)
    tokens = prefixes.tokens if ring is None else np.minimum(prefixes.tokens, ring)
    first, growing = runs.slots, runs.passes
    if ring is None:
        # The pages of a prefix are in the table of each of its lanes.
        first = first - prefixes.of_prompts[runs.requests]
    else:
        growing = np.clip(ring - first, 0, growing)
    # The last page of a growing lane is filled by half in the mean.
    own = _ramps(runs.first, growing, first, size)
    own += _steps(runs.first, growing, size) * ((PAGE - 1) / 2)
    if ring is not None:
        own += _steps(runs.first + growing, runs.passes - growing, size) * ring
    numbers = prefixes.numbers[trace.requests]
    ends: IntArray = np.zeros(len(lengths), np.int64)
    np.maximum.at(ends, runs.requests, runs.first + runs.passes)
    # A prefix is held from the pass behind its first prompt until its last lane ends.
    begins = np.full(len(tokens), size, np.int64)
    np.minimum.at(begins, numbers[numbers >= 0], trace.admitted[numbers >= 0] + 1)
    until = begins.copy()
    np.maximum.at(until, numbers[numbers >= 0], ends[trace.requests[numbers >= 0]])
    return own + _steps(begins, until - begins, size, tokens)


def cached_tokens(trace: JobTrace, lengths: Lengths) -> FloatArray:
    """Return the tokens of all sequences in the cache after each pass, float64 [passes]."""
    runs, size = trace.runs, trace.num_passes
    kept = lengths.stored[trace.requests] > 0
    # A pass of decode adds a token to what it reads; a lane that waits keeps what it reads next.
    prompts = np.bincount(trace.admitted[kept], lengths.prompts[trace.requests[kept]], size)
    order = np.lexsort((runs.first, runs.requests))
    requests, first, slots = runs.requests[order], runs.first[order], runs.slots[order]
    ends = first + runs.passes[order]
    begins: IntArray = np.zeros(len(lengths), np.int64)
    begins[trace.requests] = trace.admitted + 1
    same = np.append(False, requests[1:] == requests[:-1])
    before = np.where(same, np.roll(ends, 1), begins[requests])
    waited = _steps(before, first - before, size, slots)
    return prompts + _ramps(runs.first, runs.passes, runs.slots + 1, size) + waited


def _steps(
    first: IntArray, passes: IntArray, size: int, heights: IntArray | None = None
) -> FloatArray:
    """Return for each of ``size`` passes the sum of the heights, 1 by default, of its runs."""
    up = np.bincount(first, heights, size + 1)
    down = np.bincount(first + passes, heights, size + 1)
    return np.cumsum(up - down)[:size].astype(float)


def _ramps(first: IntArray, passes: IntArray, start: IntArray, size: int) -> FloatArray:
    """Return for each pass the sum of its runs' slots: ``start``, and one more with each pass."""
    base = _steps(first, passes, size, start - first)
    return base + np.arange(size) * _steps(first, passes, size)

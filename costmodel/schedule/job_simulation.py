"""A job over lanes, pass by pass: who runs when, and how long it takes.

Requests are admitted by the code that the executor runs (``Admission``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PoolSizes
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.rounding import round_policy
from costmodel.pricing.pass_stages import reach_of
from costmodel.pricing.passes import FloatArray, PassCounts, PassPrice
from costmodel.pricing.problem import problem_of
from costmodel.pricing.stages import seen_twice
from costmodel.schedule.admission import Admission, longest_first
from costmodel.schedule.page_rules import runs_alone
from profiles.errors import InputError
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRuns:
    """Passes in which one lane decodes without a break; every array is int64 [runs].

    ``requests`` are the requests, ``first`` the first passes, ``passes`` their numbers, and
    ``slots`` the slots of the cache that the first of them reads.
    """

    requests: IntArray
    first: IntArray
    passes: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTrace:
    """What the passes of a job do, without seconds.

    Parameters
    ----------
    requests, admitted
        The requests that run, and the pass of each one's prompt; int64 [requests].
    runs
        All passes in which lanes decode.
    num_passes
        Passes of the job.
    waiting
        Lanes that wait for a page of the cache, by pass; float64 [passes].
    most_pages
        Most pages in use after a pass, of each pool.
    skipped
        Tokens of each prompt that are not computed with it: its prefix, where that is in the cache;
        int64 [requests].
    """

    requests: IntArray
    admitted: IntArray
    runs: LaneRuns
    num_passes: int
    waiting: FloatArray
    most_pages: tuple[int, ...]
    skipped: IntArray

    @property
    def waited(self) -> int:
        """Passes of single lanes that waited for a page of the cache."""
        return int(self.waiting.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTimeline:
    """A job with its seconds.

    Parameters
    ----------
    seconds
        Of each pass, float64 [passes].
    counts
        What each pass computes.
    generated_tokens
        Tokens of all answers.
    num_refused
        Requests that can never run, which are left out.
    """

    trace: JobTrace
    counts: PassCounts
    seconds: FloatArray
    generated_tokens: int
    num_refused: int

    @property
    def total_s(self) -> float:
        """Seconds of all passes."""
        return float(self.seconds.sum())

    @property
    def throughput_tok_per_s(self) -> float:
        """Generated tokens in a second."""
        return self.generated_tokens / self.total_s

    @property
    def waiting_s(self) -> float:
        """Seconds of all passes, times the share of lanes that waited for a page."""
        worked = float(self.counts.decoding.sum() + self.counts.newcomers.sum())
        return self.total_s * self.trace.waited / (worked + self.trace.waited)


def simulate_job(
    policy: Policy,
    hardware: HardwareProfile,
    lengths: Lengths,
    *,
    answers: IntArray | None = None,
    prompt_tokens: int | None = None,
    trace: JobTrace | None = None,
) -> JobTimeline:
    """Simulate a job with a policy of lanes.

    Parameters
    ----------
    lengths
        Of all prompts. Those that can never run are left out.
    answers
        The true lengths of the answers, int64 [requests]; ``None``: as expected.
    prompt_tokens
        Tokens of prompts after which a pass admits nobody else, see ``Admission``.
    trace
        The passes of the job, where they are known: with the same number of lanes, cache and rows,
        and answers as expected.

    Raises
    ------
    InputError
        For a policy without lanes, and where no request can run.
    """
    policy = round_policy(policy, has_gpu=hardware.has_gpu)
    price = PassPrice(policy, hardware)
    if not policy.shares_prefixes:
        lengths = lengths.sharing(Prefixes.none(len(lengths)))
    answers = lengths.outputs if answers is None else np.minimum(answers, lengths.limits)
    if trace is None:
        trace = _trace_policy(policy, lengths, answers, prompt_tokens)
    counts = count_passes(trace, lengths, policy, hardware)
    return JobTimeline(
        trace=trace,
        counts=counts,
        seconds=price.seconds(counts),
        generated_tokens=int(answers[trace.requests].sum()),
        num_refused=len(lengths) - len(trace.requests),
    )


def _trace_policy(
    policy: Policy, lengths: Lengths, answers: IntArray, prompt_tokens: int | None
) -> JobTrace:
    assert policy.lanes is not None
    lanes, rows = policy.lanes, policy.lanes.pass_rows
    # More lanes than requests are never at work, but have rows.
    most = min(policy.block_size, len(lengths))
    pool = PoolSizes.of(policy.model, pool_tokens=lanes.pool_tokens, most_lanes=most)
    runs = runs_alone(lengths, pool, most_lanes=policy.block_size, pass_rows=rows)
    served = np.flatnonzero(runs)
    if not len(served):
        raise InputError(
            "policy.lanes",
            got=f"{lanes.pool_tokens} tokens of cache and {rows} rows",
            allowed="room for at least one prompt and its answer",
        )
    admission = Admission(
        lengths,
        pool,
        batch_lanes=policy.gpu_batch_size,
        order=longest_first(lengths, served),
        prompt_tokens=prompt_tokens,
        most_lanes=most,
        pass_rows=rows,
    )
    return trace_job(admission, lengths, answers, served)


def trace_job(
    admission: Admission, lengths: Lengths, answers: IntArray, served: IntArray
) -> JobTrace:
    """Run an admission to its end, with answers of the lengths given."""
    admitted: IntArray = np.zeros(len(lengths), np.int64)
    in_cache = np.zeros_like(admitted)
    # For each request: the first pass of its present run, and the slots that it read there.
    first, slots = np.zeros_like(admitted), lengths.prompts.copy()
    runs: list[IntArray] = []
    number, waiting = -1, dict[int, int]()
    most_pages = np.zeros_like(admission.used_pages)

    def close(requests: IntArray, end: int) -> None:
        """End runs before the pass ``end``."""
        passes = end - first[requests]
        runs.append(np.stack([requests, first[requests], passes, slots[requests]]))
        slots[requests] += passes

    while (lanes := admission.plan()) is not None:
        number += 1
        admitted[lanes.requests] = number
        in_cache[lanes.requests] = lanes.skipped
        first[lanes.requests] = number + 1
        if len(lanes.waiting):
            waiting[number] = len(lanes.waiting)
            stopped = admission.requests[np.isin(admission.lanes, lanes.waiting)]
            close(stopped, number)
            first[stopped] = number + 1
        left = answers[admission.requests] - admission.steps
        if skipped := admission.skip(int(left.min()) - 1):
            number += skipped
            left = left - skipped
        most_pages = np.maximum(most_pages, admission.used_pages)
        if (ends := left <= 0).any():
            close(admission.requests[ends], number + 1)
            admission.ended(admission.lanes[ends].tolist())
    columns = np.concatenate(runs, axis=1)
    columns = columns[:, columns[2] > 0]
    return JobTrace(
        requests=served,
        admitted=admitted[served],
        runs=LaneRuns(requests=columns[0], first=columns[1], passes=columns[2], slots=columns[3]),
        num_passes=number + 1,
        waiting=_sparse(waiting, number + 1),
        most_pages=tuple(most_pages.tolist()),
        skipped=in_cache[served],
    )


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
    )


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


def _sparse(values: Mapping[int, int], size: int) -> FloatArray:
    found: FloatArray = np.zeros(size)
    found[list(values)] = list(values.values())
    return found


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

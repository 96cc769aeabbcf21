"""A job over lanes, pass by pass: who runs when, and how long it takes.

Requests are admitted by the code that the executor runs (``Admission``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PoolSizes
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.rounding import round_policy
from costmodel.pricing.passes import FloatArray, PassCounts, PassPrice
from costmodel.schedule.admission import Admission, longest_first
from costmodel.schedule.job_trace import JobTrace, trace_job
from costmodel.schedule.page_rules import runs_alone
from costmodel.schedule.pass_counts import count_passes
from profiles.errors import InputError
from profiles.hardware import HardwareProfile


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
        trace = trace_policy(policy, lengths, answers=answers, prompt_tokens=prompt_tokens)
    counts = count_passes(trace, lengths, policy, hardware)
    return JobTimeline(
        trace=trace,
        counts=counts,
        seconds=price.seconds(counts),
        generated_tokens=int(answers[trace.requests].sum()),
        num_refused=len(lengths) - len(trace.requests),
    )


def trace_policy(
    policy: Policy,
    lengths: Lengths,
    *,
    answers: IntArray | None = None,
    prompt_tokens: int | None = None,
) -> JobTrace:
    """Return who runs in each pass of a job; takes and raises what ``simulate_job`` does."""
    assert policy.lanes is not None
    answers = lengths.outputs if answers is None else answers
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

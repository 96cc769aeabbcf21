"""The waits of a schedule, for the fastest policies by their limits and for others near them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from costmodel.optimizer.fitting import fit, fits
from costmodel.optimizer.found import Found
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.schedule.prediction import slowdown

# So many of the fastest policies by their limits are simulated, and so many of these are varied.
MOST_SIMULATED_POLICIES, MOST_VARIED = 12, 3


def with_waits(found: Sequence[Found], max_latency_s: float | None) -> list[Found]:
    """Return the fastest of some policies with their waits, and variants of the best of them."""
    ordered = sorted(found, key=lambda each: -each.tok_per_s)
    fastest = [with_slowdown(each) for each in ordered[:MOST_SIMULATED_POLICIES]]
    best = sorted(fastest, key=lambda each: -each.predicted_tok_per_s)[:MOST_VARIED]
    variants: list[Found] = []
    for each in best:
        for other in _variants(each, max_latency_s):
            if all(other.policy != known.policy for known in [*fastest, *variants]):
                variants.append(with_slowdown(other))
    return fastest + variants


def with_slowdown(found: Found) -> Found:
    """Return a policy with its waits."""
    return replace(found, slowdown=slowdown(found.policy, found.problem.hardware))


def _variants(found: Found, max_latency_s: float | None) -> Iterator[Found]:
    """Yield policies that divide less: with the cache on the GPU, with all experts in CPU memory
    multiplied there, and with both.

    The program counts a transfer as free while something else takes longer. The schedule may still
    wait for it.
    """
    policy, program = found.policy, found.program
    if not program.problem.hardware.has_gpu:
        return
    placed = [(policy, found.solution)]
    if policy.cache.gpu < 1:
        fixed = {"cache_cpu": 0.0, "cache_disk": 0.0}
        batches = policy.num_gpu_batches
        on_gpu = fit(program, batches, max_latency_s=max_latency_s, fixed=fixed)
        if on_gpu is not None:
            placed.append(on_gpu)
    for other, solution in placed:
        options = [other]
        if 0 < other.cpu_experts < 1:
            options.append(replace(other, cpu_experts=1.0))
        for option in options:
            if option is not policy and fits(option, program, max_latency_s=max_latency_s):
                rate = job_throughput(option, program.problem.hardware)
                yield Found(rate, option, program, solution)

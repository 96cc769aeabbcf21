"""The experts that a stage needs, the rows of their products, and their bytes.

The routing of a run is not known in advance. Uniform routing needs the most experts
(``ExpertsSpec.touched``), so that a run never loads more bytes than predicted. Where earlier runs
have shown how often each expert is chosen (``Workload.expert_skew``), the most used experts are
those in memory, and the rarest are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import ComponentLayout
from costmodel.pricing.buffers import num_expert_chunks
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage

# Where choices do not depend on each other, a cache that follows the latest uses loads more than
# the rarest experts, 3 to 20 % by tests/bench/expert_cache.py.
OF_CACHE = 1.2


def experts_of(problem: Problem) -> Iterator[tuple[ExpertsSpec, ComponentLayout, int]]:
    """Yield each kind of experts, with their layout and the number of layers that have them."""
    for kind in problem.layer_kinds:
        for component in kind.components:
            if component.is_experts:
                assert kind.spec.experts is not None
                yield kind.spec.experts, component, kind.count


def expert_rows(problem: Problem, experts: ExpertsSpec, num_tokens: float) -> float:
    """Return the average rows of a needed expert when ``num_tokens`` tokens are routed."""
    needed = experts.touched(num_tokens, problem.workload.expert_skew)
    return num_tokens * experts.experts_per_token / needed


def touched_elements(problem: Problem, stage: Stage) -> float:
    """Return the elements of the experts that one visit of all layers needs."""
    tokens, skew = max(stage.expert_tokens), problem.workload.expert_skew
    return sum(
        count * experts.touched(tokens, skew) * component.unit_elements
        for experts, component, count in experts_of(problem)
    )


def touched_bytes(problem: Problem, stage: Stage) -> float:
    """Return the stored bytes of the experts that one visit of all layers needs."""
    tokens, skew = max(stage.expert_tokens), problem.workload.expert_skew
    return sum(
        count * experts.touched(tokens, skew) * component.unit_bytes
        for experts, component, count in experts_of(problem)
    )


def demanded_share(problem: Problem, stage: Stage, rarest: float) -> float:
    """Return the bytes that a pass of a stage loads on demand, as a multiple of the bytes of all
    experts that are not on the tier that they are loaded to.

    The smallest block of the range counts, so that no block loads less. Batches that do not pass
    through experts together load them one after another.

    Parameters
    ----------
    rarest
        The share of the experts that are not on that tier. The fewer they are, the more rarely each
        of them is needed, so that a program counts the least share.
    """
    at_once, skew = problem.batches_at_once[0], problem.workload.expert_skew
    tokens, visits = at_once * problem.gpu_batch_size, problem.num_batches[0] / at_once
    tokens *= stage.prompt_len if stage.is_prefill else 1
    rarest = rarest if problem.orders_experts and rarest > 0 else 1.0
    parts = [
        (visits * _loaded(e, tokens, skew, rarest) / (rarest * e.num_experts), c.num_bytes * n)
        for e, c, n in experts_of(problem)
    ]
    return sum(share * size for share, size in parts) / sum(size for _, size in parts)


def _loaded(experts: ExpertsSpec, tokens: int, skew: float, rarest: float) -> float:
    """Return how many experts a pass loads of a layer, whose rarest ones are not in memory."""
    alike = rarest * experts.touched(tokens, skew)
    return min(alike, OF_CACHE * experts.touched(tokens, skew, rarest))


def num_chunks(problem: Problem, stage: Stage) -> int:
    """Return the most chunks in which a visit of a layer loads experts (see
    ``num_expert_chunks``), at least one. In a search, all experts of a layer may be on disk."""
    tokens = problem.batches_at_once[1] * problem.gpu_batch_size
    tokens *= stage.prompt_len if stage.is_prefill else 1
    on_disk = 1.0 if problem.experts is None else problem.experts.disk
    counts = (
        # Shares are whole numbers of experts, but for rounding.
        num_expert_chunks(e, tokens, math.ceil(on_disk * e.num_experts - 1e-6))
        for e, _, _ in experts_of(problem)
    )
    return max(1, *counts)

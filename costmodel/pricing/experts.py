"""The experts that a stage needs, the rows of their products, and their bytes.

The routing of a run is not known in advance. Uniform routing needs the most experts
(``ExpertsSpec.touched``), so that a run never loads more bytes than predicted. Where earlier runs
have shown how often each expert is chosen (``Workload.expert_skew``), the most used experts are
those in memory, and the rarest are loaded. Experts that are read before routing count, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import ComponentLayout
from costmodel.pricing.buffers import Chunks, chunks_of
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


def expert_passes(stage: Stage) -> float:
    """Passes of the tokens of a stage through each mixture of experts, per sequence."""
    at_once = max(stage.expert_tokens) / (stage.tokens if stage.is_prefill else 1)
    return stage.passes / at_once


def expert_visits(stage: Stage) -> float:
    """The same in full passes: those with few lanes need fewer experts."""
    return expert_passes(stage) * stage.fullness


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
    total_share = total_bytes = 0.0
    for experts, component, count in experts_of(problem):
        share = _loaded(experts, tokens, skew, rarest) / (rarest * experts.num_experts)
        if problem.experts is not None and (on_disk := _on_disk(problem, experts)):
            # Of those that are read before routing, some are not needed. A search takes the least.
            share += (1 - share) * _experts_ahead(problem, stage, experts, component) / on_disk
        total_share += visits * share * component.num_bytes * count
        total_bytes += component.num_bytes * count
    return total_share / total_bytes


def _loaded(experts: ExpertsSpec, tokens: int, skew: float, rarest: float) -> float:
    """Return how many experts a pass loads of a layer, whose rarest ones are not in memory."""
    alike = rarest * experts.touched(tokens, skew)
    return min(alike, OF_CACHE * experts.touched(tokens, skew, rarest))


def bytes_ahead(problem: Problem, stage: Stage) -> int:
    """Return the bytes of the experts that one visit of all layers reads before its tokens are
    routed. In a search, see ``_experts_ahead``."""
    return sum(
        count * component.unit_bytes * _experts_ahead(problem, stage, experts, component)
        for experts, component, count in experts_of(problem)
    )


def _experts_ahead(
    problem: Problem, stage: Stage, experts: ExpertsSpec, component: ComponentLayout
) -> int:
    """Return how many experts a visit of a layer reads before its tokens are routed: none where
    batches are routed one after another, or where a CPU does not walk through them.

    In a search, all experts of a layer may be on disk. Where routing is skewed, the fewest that
    memory leaves there count. So a search may miss a policy with more on disk, of which enough are
    needed to be read early.
    """
    if not problem.walks_experts or not _routes_together(problem):
        return 0
    loaded, skew = _on_disk(problem, experts), problem.workload.expert_skew
    if problem.orders_experts:
        loaded = math.ceil(problem.rarest_on_disk * experts.num_experts - 1e-6)
    tokens = _visit_tokens(problem, stage, problem.batches_at_once[1])
    chunks = chunks_of(experts, tokens, loaded, skew, expert_bytes=component.unit_bytes)
    return min(loaded, chunks.ahead * chunks.size)


def _routes_together(problem: Problem) -> bool:
    """Whether all batches of a block may be routed together."""
    return problem.batches_at_once[1] >= problem.num_batches[0]


def _visit_tokens(problem: Problem, stage: Stage, at_once: int) -> int:
    """Return the most tokens of ``at_once`` batches, which pass through experts together where a
    CPU walks through them."""
    tokens = at_once * problem.gpu_batch_size
    return tokens * stage.prompt_len if stage.is_prefill else tokens


def _on_disk(problem: Problem, experts: ExpertsSpec) -> int:
    """Return how many experts of a layer are on disk. In a search, all may be."""
    on_disk = 1.0 if problem.experts is None else problem.experts.disk
    # Shares are whole numbers of experts, but for rounding.
    return math.ceil(on_disk * experts.num_experts - 1e-6)


def num_chunks(problem: Problem, stage: Stage) -> int:
    """Return the most chunks in which a visit of a layer loads experts (see ``chunks_of``), at
    least one. In a search, all experts of a layer may be on disk."""
    return max(1, *(c.count for c, _ in _chunks(problem, stage, problem.batches_at_once[1])))


def visit_chunks(problem: Problem, stage: Stage) -> int:
    """Return the chunks of one visit of all layers, the fewest of a range of batches. In a search,
    they are those of layers whose experts are all on disk."""
    return sum(c.count * count for c, count in _chunks(problem, stage, problem.batches_at_once[0]))


def _chunks(problem: Problem, stage: Stage, at_once: int) -> Iterator[tuple[Chunks, int]]:
    """Yield how a visit of ``at_once`` batches loads each kind of experts, with the number of
    layers that have them."""
    tokens, skew = _visit_tokens(problem, stage, at_once), problem.workload.expert_skew
    for experts, component, count in experts_of(problem):
        chunks = chunks_of(
            experts,
            tokens,
            _on_disk(problem, experts),
            skew,
            expert_bytes=component.unit_bytes,
            may_read_ahead=_routes_together(problem),
        )
        yield chunks, count

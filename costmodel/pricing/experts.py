"""The experts that a stage needs, the rows of their products, and their bytes.

The routing of a run is not known in advance. Uniform routing needs the most experts
(``ExpertsSpec.touched``), so that a run never loads more bytes than predicted.
"""

from __future__ import annotations

from collections.abc import Iterator

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import ComponentLayout
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage


def experts_of(problem: Problem) -> Iterator[tuple[ExpertsSpec, ComponentLayout, int]]:
    """Yield each kind of experts, with their layout and the number of layers that have them."""
    for kind in problem.layer_kinds:
        for component in kind.components:
            if component.is_experts:
                assert kind.spec.experts is not None
                yield kind.spec.experts, component, kind.count


def expert_rows(experts: ExpertsSpec, num_tokens: float) -> float:
    """Return the average rows of a needed expert when ``num_tokens`` tokens are routed."""
    return num_tokens * experts.experts_per_token / experts.touched(num_tokens)


def touched_elements(problem: Problem, stage: Stage) -> float:
    """Return the elements of the experts that one visit of all layers needs."""
    tokens = max(stage.expert_tokens)
    return sum(
        count * experts.touched(tokens) * component.unit_elements
        for experts, component, count in experts_of(problem)
    )


def touched_bytes(problem: Problem, stage: Stage) -> float:
    """Return the stored bytes of the experts that one visit of all layers needs."""
    tokens = max(stage.expert_tokens)
    return sum(
        count * experts.touched(tokens) * component.unit_bytes
        for experts, component, count in experts_of(problem)
    )


def demanded_share(problem: Problem) -> float:
    """Return the bytes that a pass of decode loads on demand, as a multiple of all experts' bytes.

    The smallest block of the range counts, so that no block loads less. Batches that do not pass
    through experts together load them one after another.
    """
    at_once = problem.batches_at_once[0]
    tokens, visits = at_once * problem.gpu_batch_size, problem.num_batches[0] / at_once
    parts = [
        (visits * e.touched(tokens) / e.num_experts, c.num_bytes * n)
        for e, c, n in experts_of(problem)
    ]
    return sum(share * size for share, size in parts) / sum(size for _, size in parts)

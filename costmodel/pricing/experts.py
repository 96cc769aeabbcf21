"""What mixtures of experts need in one stage: experts, rows of their products, bytes.

Which experts a token takes is not known. Uniform routing needs the most of them, ``touched(n)`` of
``ExpertsSpec``, so that bytes are never under those of a run.
"""

from __future__ import annotations

from collections.abc import Iterator

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import ComponentLayout
from costmodel.pricing.problem import Problem
from costmodel.pricing.stages import Stage


def experts_of(problem: Problem) -> Iterator[tuple[ExpertsSpec, ComponentLayout, int]]:
    """Yield each kind of experts, with their layout and how many layers have them."""
    for kind in problem.layer_kinds:
        for component in kind.components:
            if component.name == "experts":
                assert kind.spec.experts is not None
                yield kind.spec.experts, component, kind.count


def expert_rows(experts: ExpertsSpec, num_tokens: float) -> float:
    """Return the rows that an expert which is needed multiplies, of ``num_tokens`` tokens."""
    return num_tokens * experts.experts_per_token / experts.touched(num_tokens)


def touched_elements(problem: Problem, stage: Stage) -> float:
    """Return the elements of the experts that are needed at once, in all layers."""
    tokens = max(stage.expert_tokens)
    return sum(
        count * experts.touched(tokens) * component.unit_elements
        for experts, component, count in experts_of(problem)
    )


def demanded_share(problem: Problem) -> float:
    """Return how often a pass of decode loads the experts' bytes on demand: those of the fewest
    sequences that a block may have, so that no block loads less. Batches that do not pass through
    experts together load each for itself."""
    at_once = problem.batches_at_once[0]
    tokens, visits = at_once * problem.gpu_batch_size, problem.num_batches[0] / at_once
    parts = [
        (visits * e.touched(tokens) / e.num_experts, c.num_bytes * n)
        for e, c, n in experts_of(problem)
    ]
    return sum(share * size for share, size in parts) / sum(size for _, size in parts)

"""The experts that a router has chosen for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of each token.

    Parameters
    ----------
    experts
        Their numbers, int64 [tokens, experts per token].
    weights
        The factors of their outputs, in the same shape.
    """

    experts: torch.Tensor
    weights: torch.Tensor

    def counts(self, num_experts: int) -> torch.Tensor:
        """Count the tokens of each expert, int64 [num_experts]."""
        return self.experts.flatten().bincount(minlength=num_experts)

    def by_expert(self, num_experts: int) -> SortedRouting:
        """Return the same, sorted by expert."""
        order = self.experts.flatten().argsort(stable=True)
        return SortedRouting(
            tokens=order // self.experts.shape[1],
            weights=self.weights.flatten()[order, None],
            ends=[0, *self.counts(num_experts).cumsum(0).tolist()],
        )


def joined(routings: Sequence[Routing]) -> Routing:
    """Return the choices of all tokens, one routing behind the other."""
    if len(routings) == 1:
        return routings[0]
    experts = torch.cat([routing.experts for routing in routings])
    return Routing(experts, torch.cat([routing.weights for routing in routings]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedRouting:
    """The tokens of each expert.

    Parameters
    ----------
    tokens
        Their numbers, int64 [choices], those of the first expert first.
    weights
        The factors of the expert's outputs, [choices, 1].
    ends
        By expert its first choice, and the number of all choices.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    ends: Sequence[int]

"""Which experts stay in memory where a CPU loads others on demand.

The least frequently used expert is evicted, by counts that decay: older uses count less with every
pass. The counts begin with those of earlier runs and of the prompts. A loaded expert takes the
place of the least used one in memory that the visit no longer needs, if it is used more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from costmodel.schedule.tasks import Task
from executor.model.routing import Routing
from executor.stores.weights import WeightStore

FloatArray = NDArray[np.float64]

# Share of a use that counts one pass later (docs/guide/experts.md has a comparison).
KEPT = 0.98
# Share of the prompts' uses beside that of earlier runs.
OF_PROMPTS = 0.5


class ExpertCache:
    """The uses of the experts of all layers.

    Parameters
    ----------
    shares
        By layer of the schedule, the share of all tokens that chose each expert in earlier runs,
        float64 [experts].
    """

    def __init__(self, weights: WeightStore, shares: dict[int, FloatArray]) -> None:
        self._weights = weights
        self._shares = shares
        self._num_sequences = 1
        # By layer, the share of the latest passes that needed each expert.
        self._scores: dict[int, FloatArray] = {}
        # By layer, the choices of the prompts, and their tokens.
        self._prompts: dict[int, tuple[FloatArray, int]] = {}

    def start_block(self, num_sequences: int) -> None:
        """Forget what other sequences than those of the next block have used."""
        self._num_sequences = num_sequences
        self._scores.clear()
        self._prompts.clear()

    def count(self, task: Task, choices: Sequence[Routing], is_needed: torch.Tensor) -> None:
        """Count one visit of a layer: the choices of its tokens, or in decode the experts that any
        token needs, bool [experts]."""
        if not self._weights.has_cache(task):
            return
        if task.is_prefill:
            self._count_prompts(task.layer, choices)
            return
        scores = self._scores[task.layer]
        scores *= KEPT
        scores[is_needed.numpy()] += 1 - KEPT

    def keep(self, task: Task, loaded: Sequence[int], is_idle: torch.Tensor) -> None:
        """Let the most used of some loaded experts take the places of the least used in memory.

        Only experts that are idle, bool [experts], give up their places.
        """
        if not self._weights.has_cache(task):
            return
        scores = self._scores[task.layer]
        idle = (is_idle & self._weights.resident_experts(task.layer)).nonzero().flatten().tolist()
        least_used = sorted(idle, key=lambda e: float(scores[e]))
        most_used = sorted(loaded, key=lambda e: -float(scores[e]))
        for expert, other in zip(most_used, least_used, strict=False):
            if scores[expert] <= scores[other]:
                break
            self._weights.keep_expert(task, expert, other)

    def _count_prompts(self, layer: int, choices: Sequence[Routing]) -> None:
        """Count the choices of tokens of the prompts, and how likely passes use each expert."""
        shares = self._shares[layer]
        counts, tokens = self._prompts.get(layer, (np.zeros(len(shares)), 0))
        for routing in choices:
            counts = counts + routing.counts(len(shares)).numpy()
            tokens += len(routing.experts)
        self._prompts[layer] = counts, tokens
        if tokens:
            shares = (1 - OF_PROMPTS) * shares + OF_PROMPTS * counts / tokens
        self._scores[layer] = 1 - (1 - np.minimum(shares, 1)) ** self._num_sequences

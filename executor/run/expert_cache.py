"""Which experts stay in memory where a CPU loads others on demand.

The least frequently used expert is evicted, by counts that decay: older uses count less with every
pass. The counts begin with those of earlier runs and of the prompts. A loaded expert takes the
place of the least used one in memory, if it is used more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodel.schedule.tasks import Task
from executor.model.experts import Routing
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
        # By layer, the share of the latest passes that needed each expert.
        self._scores: dict[int, FloatArray] = {}
        # By layer, the choices of the prompts, and their tokens.
        self._prompts: dict[int, tuple[FloatArray, int]] = {}

    def start_block(self) -> None:
        """Forget what other sequences have used."""
        self._scores.clear()
        self._prompts.clear()

    def count_prompts(self, layer: int, routing: Routing) -> None:
        """Count the choices of some tokens of the prompts."""
        size = len(self._shares[layer])
        counts, tokens = self._prompts.get(layer, (np.zeros(size), 0))
        counts = counts + routing.counts(size).numpy()
        self._prompts[layer] = counts, tokens + len(routing.experts)

    def after_prompts(self, task: Task, num_tokens: int) -> None:
        """Keep the experts that passes of ``num_tokens`` tokens are likely to use.

        All experts of the layer are in memory or in staging.
        """
        if not self._weights.has_cache(task):
            return
        shares = self._shares[task.layer]
        if task.layer in self._prompts:
            counts, tokens = self._prompts[task.layer]
            shares = (1 - OF_PROMPTS) * shares + OF_PROMPTS * counts / tokens
        self._scores[task.layer] = 1 - (1 - np.minimum(shares, 1)) ** num_tokens
        self._keep(task, range(len(shares)))

    def after_pass(self, task: Task, routing: Routing) -> None:
        """Keep the experts that were loaded, where they are used more than others in memory."""
        if task.layer not in self._scores:
            return
        needed = np.unique(routing.experts.numpy())
        scores = self._scores[task.layer]
        scores *= KEPT
        scores[needed] += 1 - KEPT
        self._keep(task, needed.tolist())

    def _keep(self, task: Task, present: Sequence[int]) -> None:
        """Let the most used of the experts that are present take the places of the least used."""
        scores = self._scores[task.layer]
        is_here = self._weights.resident_experts(task).numpy()
        staged = sorted((e for e in present if not is_here[e]), key=lambda e: -scores[e])
        here = sorted(np.flatnonzero(is_here).tolist(), key=lambda e: float(scores[e]))
        for expert, other in zip(staged, here, strict=False):
            if scores[expert] <= scores[other]:
                break
            self._weights.keep_expert(task, expert, other)

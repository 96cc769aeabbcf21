"""The steps of a layer's mixture of experts, for rows of prompts and of decode together."""

from __future__ import annotations

from functools import partial

import torch

from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.model import layers
from executor.run.routing_counts import RoutingCounts
from executor.stores.weights import WeightStore


class LaneExperts:
    """The handlers of layers with experts.

    The rows of several batches pass through experts together, so many at a time as the policy says.
    """

    def __init__(self, policy: Policy, weights: WeightStore, counts: RoutingCounts) -> None:
        assert policy.lanes is not None
        self._counts = counts
        self._model, self._weights = policy.model, weights
        self._numbers = decoder_numbers(policy.model)
        self._chunk_rows = policy.lanes.chunk_rows
        # By layer, the experts to load on demand.
        self._needed: dict[int, list[int]] = {}

    def compute(self, task: Task, rows: torch.Tensor) -> None:
        """Add the experts' output to ``rows`` [rows, 1, hidden_size] in place."""
        weights, layer = self._weights.layer(task), self._model.layer(self._numbers[task.layer])
        count = partial(self._counts.add, task.layer)
        for part in rows.split(self._chunk_rows):
            layers.feed_forward(part, weights, layer, count)

    def route(self, task: Task, rows: torch.Tensor) -> None:
        """Find the experts that ``rows`` need, which are then loaded."""
        weights, layer = self._weights.layer(task), self._model.layer(self._numbers[task.layer])
        assert layer.experts is not None
        counts = torch.zeros(layer.experts.num_experts, dtype=torch.int64, device=rows.device)
        for part in rows.split(self._chunk_rows):
            normed = layers.feed_forward_input(part, weights, layer)
            counts += layers.routing_of(normed, weights, layer).counts(len(counts))
        in_place = self._weights.experts_in_place(task)
        self._needed[task.layer] = [i for i in counts.nonzero()[:, 0].tolist() if i not in in_place]

    def read_experts(self, task: Task) -> int:
        """Read one piece of the needed experts into CPU staging."""
        return self._weights.read_experts(task, self._needed[task.layer])

"""The steps of a layer's mixture of experts: routing, loads on demand, and experts on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.model import layers
from executor.model.experts import add_routed, add_shared, routed_ranges
from executor.model.routing import Routing
from executor.run.batch import Batch
from executor.run.routing_counts import RoutingCounts
from executor.stores.activations import HiddenStates
from executor.stores.weights import WeightStore


@dataclass(slots=True)
class _Visit:
    """One visit to a layer's experts: the normalised tokens, their routing, and the outputs."""

    normed: torch.Tensor
    routing: Routing
    made: torch.Tensor | None = None
    tokens_on_cpu: tuple[torch.Tensor, Routing] | None = None
    made_on_cpu: torch.Tensor | None = None
    made_there: torch.Tensor | None = None


class ExpertSteps:
    """The handlers of layers whose experts are loaded ahead, or on demand to a GPU.

    In decode, the tokens of several batches pass through experts together, because an expert then
    has more rows. Beside a GPU, the CPU may run experts in place: ``route``, then ``return_tokens``
    and ``run_experts`` beside ``compute``, then ``send_made`` and ``combine``.
    """

    def __init__(
        self, policy: Policy, weights: WeightStore, hidden: HiddenStates, counts: RoutingCounts
    ) -> None:
        self.policy = policy
        self._counts = counts
        self.weights = weights
        self.hidden = hidden
        self._numbers = decoder_numbers(policy.model)
        self._batches_at_once = weights.plan.batches_at_once
        self._batches: Sequence[Batch] = ()
        # By layer and first batch.
        self._visits: dict[tuple[int, int], _Visit] = {}
        # By layer, the experts to load on demand.
        self._needed: dict[int, list[int]] = {}

    def start_block(self, batches: Sequence[Batch]) -> None:
        """Prepare for a block."""
        self._batches = batches
        self._visits.clear()

    def compute(self, task: Task) -> None:
        """Pass the tokens of one decode step through the experts."""
        if task.layer in self.weights.plan.route.experts_in_place:
            self._compute_beside_cpu(task)
            return
        parts = self._parts(task)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        count = partial(self._counts.add, task.layer)
        layers.feed_forward(whole, self.weights.layer(task), self._layer(task), count)
        self._hand_back(task, parts, whole)

    def route(self, task: Task) -> int:
        """Route the tokens of a layer, and find the experts that they need."""
        parts = self._parts(task)
        layer = self._layer(task)
        normed = layers.feed_forward_input(torch.cat(parts), self.weights.layer(task), layer)
        routing = layers.routing_of(normed, self.weights.layer(task), layer)
        needed = routing.counts(self._experts(task).num_experts).nonzero().flatten().tolist()
        in_place = self.weights.experts_in_place(task)
        self._needed[task.layer] = [expert for expert in needed if expert not in in_place]
        if task.layer in self.weights.plan.route.experts_in_place:
            self._visits[task.layer, task.batch] = _Visit(normed=normed, routing=routing)
        return 0

    def read_experts(self, task: Task) -> int:
        """Read one piece of the needed experts into CPU staging."""
        return self.weights.read_experts(task, self._needed[task.layer])

    def send_experts(self, task: Task) -> int:
        """Copy one piece of the needed experts into GPU staging."""
        return self.weights.send_experts(task, self._needed[task.layer])

    def return_tokens(self, task: Task) -> int:
        """Copy the normalised tokens and their routing to the CPU."""
        visit = self._visits[task.layer, task.batch]
        rows = visit.normed.flatten(0, 1).to("cpu", non_blocking=True)
        experts, factors = (
            t.to("cpu", non_blocking=True) for t in (visit.routing.experts, visit.routing.weights)
        )
        visit.tokens_on_cpu = rows, Routing(experts, factors)
        return rows.nbytes + experts.nbytes + factors.nbytes

    def run_experts(self, task: Task) -> int:
        """Run the CPU's experts in place."""
        visit, spec = self._visits[task.layer, task.batch], self._experts(task)
        assert visit.tokens_on_cpu is not None
        rows, routing = visit.tokens_on_cpu
        made = torch.zeros_like(rows, pin_memory=visit.normed.is_cuda)
        here = self.weights.experts_in_place(task)
        chosen, weights = routing.by_expert(spec.num_experts), self.weights.layer_in_place(task)
        add_routed(made, rows, chosen, weights, spec, here)
        visit.made_on_cpu = made
        return 0

    def send_made(self, task: Task) -> int:
        """Copy the output of the CPU's experts to the GPU."""
        visit = self._visits[task.layer, task.batch]
        assert visit.made_on_cpu is not None
        visit.made_there = visit.made_on_cpu.to(visit.normed.device, non_blocking=True)
        return visit.made_on_cpu.nbytes

    def combine(self, task: Task) -> int:
        """Add the outputs of both devices to the hidden states."""
        visit = self._visits[task.layer, task.batch]
        assert visit.made is not None and visit.made_there is not None
        visit.made += visit.made_there
        parts = self._parts(task)
        whole = torch.cat(parts)
        made = visit.made.view(whole.shape)
        layers.add_feed_forward(whole, made, self.weights.layer(task), self._layer(task))
        self._hand_back(task, parts, whole)
        return 0

    def _compute_beside_cpu(self, task: Task) -> None:
        visit, spec = self._visits[task.layer, task.batch], self._experts(task)
        self._counts.add(task.layer, visit.routing)
        rows = visit.normed.flatten(0, 1)
        made, weights = torch.zeros_like(rows), self.weights.layer(task)
        chosen = visit.routing.by_expert(spec.num_experts)
        for experts in routed_ranges(spec, self.weights.experts_in_place(task)):
            add_routed(made, rows, chosen, weights, spec, experts)
        if spec.shared is not None:
            add_shared(made, rows, weights, spec)
        visit.made = made

    def group(self, task: Task) -> range:
        """Return the batches whose tokens pass through experts together."""
        return range(task.batch, min(task.batch + self._batches_at_once, len(self._batches)))

    def _parts(self, task: Task) -> list[torch.Tensor]:
        return [self.hidden.gather(replace(task, batch=batch)) for batch in self.group(task)]

    def _hand_back(self, task: Task, parts: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
        self._visits.pop((task.layer, task.batch), None)
        hand_out(whole, parts)
        for batch in self.group(task):
            self.hidden.hand_back(replace(task, batch=batch))

    def _layer(self, task: Task) -> LayerSpec:
        return self.policy.model.layer(self._numbers[task.layer])

    def _experts(self, task: Task) -> ExpertsSpec:
        experts = self._layer(task).experts
        assert experts is not None
        return experts


def hand_out(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy the tokens of several batches back to each of them, unless they are its own."""
    for own, made in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        if own.data_ptr() != made.data_ptr():
            own.copy_(made)

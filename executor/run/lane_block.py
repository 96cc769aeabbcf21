"""The handlers of the tasks of lanes, where every pass may have prompts and decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.engine.channels import Handler
from executor.machine.tiers import Machine
from executor.run.lane_attention import LaneAttention
from executor.run.lane_experts import LaneExperts
from executor.run.lane_head import LaneHead
from executor.run.lanes import LaneTable
from executor.run.layer_steps import finish_layer, finishes_all
from executor.run.pass_plan import PassBatch, PassPlan
from executor.run.routing_counts import RoutingCounts
from executor.run.token_embedding import TokenEmbedding
from executor.stores.paged_cache import PagedCache
from executor.stores.pass_rows import PassRows
from executor.stores.weights import WeightStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStores:
    """The stores of weights and cache, and the rows of a pass."""

    weights: WeightStore
    embedding: TokenEmbedding
    cache: PagedCache
    hidden: PassRows


class LaneBlock:
    """The state of one pass after another, and the handlers of their tasks.

    A pass is set up while none of its tasks, and no other task that reads its rows, is at work.
    """

    def __init__(self, policy: Policy, machine: Machine, stores: LaneStores) -> None:
        self.policy, self.stores = policy, stores
        self.kinds = [layer.kind for layer in stores.weights.layers]
        self.table = LaneTable(
            stores.cache.sizes,
            most_lanes=policy.block_size * policy.blocks_in_flight,
            most_tokens=policy.workload.num_positions,
        )
        self.attention = LaneAttention(policy, stores.cache, self.table)
        self.routing_counts = RoutingCounts(policy.model)
        self.experts = LaneExperts(policy, stores.weights, self.routing_counts)
        self.head = LaneHead(policy, machine, stores.weights, stores.hidden, self.table.lanes)
        self.batches: tuple[PassBatch, ...] = ()
        self._first_rows: tuple[int, ...] = ()
        self._numbers = decoder_numbers(policy.model)
        # A later stage of a pipeline is given hidden states, and an earlier one hands them over.
        self._has_embedding, self._has_head = policy.model.has_embedding, policy.model.has_head
        stores.weights.has_prompts = self._has_prompts

    def begin_pass(self, plan: PassPlan) -> None:
        """Set up a pass."""
        self.batches = plan.batches
        self._first_rows = plan.first_rows
        self.stores.hidden.start_pass(plan.first_rows)
        self.stores.cache.start_pass(plan.number, plan.pages)
        self.attention.start_pass(plan.batches)
        self.head.start_pass(plan.batches)

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handler of each kind of task."""
        weights = self.stores.weights
        return {
            "read_weights": weights.read,
            "read_experts": self.experts.read_experts,
            "read_cache": self.stores.cache.read,
            "write_cache": self.stores.cache.write,
            "route": self.route,
            "compute": self.compute,
        }

    def compute(self, task: Task) -> int:
        """Run a whole layer of the schedule for one batch, or for experts for several."""
        group = self._group(task)
        if not group:
            # Fewer sequences are left than there are batches.
            return 0
        kind, hidden = self.kinds[task.layer], self.stores.hidden.of(group)
        if kind == "head":
            if self._has_head:
                self.head.compute(task)
        elif kind == "experts":
            rows = self._rows_that_go_on(task, group)
            whole = hidden if rows is None else hidden[rows]
            self.experts.compute(task, whole)
            if rows is not None:
                hidden[rows] = whole
        elif kind == "embed" and self._has_embedding:
            batch = self.batches[task.batch]
            for chunk in batch.chunks:
                ids, positions = (x[chunk.rows, None] for x in (batch.ids, batch.positions))
                self.stores.embedding.fill(hidden[chunk.rows], ids, positions)
        elif kind != "embed":
            self._attend(task, hidden)
        return 0

    def route(self, task: Task) -> int:
        """Route the rows of a layer, and find the experts that they need."""
        group = self._group(task)
        hidden, rows = self.stores.hidden.of(group), self._rows_that_go_on(task, group)
        self.experts.route(task, hidden if rows is None else hidden[rows])
        return 0

    def _attend(self, task: Task, hidden: torch.Tensor) -> None:
        """Run attention, and what the layer has behind it, on the rows of a batch."""
        weights = self.stores.weights.layer(task)
        layer = self.policy.model.layer(self._numbers[task.layer])
        has_feed_forward = self.kinds[task.layer] == "decoder"
        for chunk in self.batches[task.batch].chunks:
            x = hidden[chunk.rows]
            attended = self.attention.attend(task, chunk, x, weights, layer)
            if self._finishes_all(task):
                finish_layer(x, attended, weights, layer, has_feed_forward=has_feed_forward)
                continue
            rows = chunk.emit_rows
            if not len(rows):
                continue
            picked = x[rows]
            finish_layer(picked, attended[rows], weights, layer, has_feed_forward=has_feed_forward)
            x[rows] = picked

    def _finishes_all(self, task: Task) -> bool:
        scores_prompts = self.head.scores_prompts or not self._has_head
        return finishes_all(self.kinds, task.layer, scores_prompts=scores_prompts)

    def _rows_that_go_on(self, task: Task, group: range) -> torch.Tensor | None:
        """Return the rows of a group that go through a layer, counted from the group's first, or
        ``None`` where all do."""
        if self._finishes_all(task):
            return None
        first = self._first_rows[group.start] if group else 0
        rows = [self.batches[i].emit_rows + (self._first_rows[i] - first) for i in group]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)

    def _group(self, task: Task) -> range:
        """Return the batches of a task that have any rows."""
        count = 1
        if self.kinds[task.layer] == "experts":
            count = self.stores.weights.plan.batches_at_once
        end = min(task.batch + count, len(self.batches))
        return range(min(task.batch, end), end)

    def _has_prompts(self, task: Task) -> bool:
        """Whether many rows are multiplied with a layer's weights."""
        is_head = self.kinds[task.layer] == "head"
        return not is_head and any(self.batches[i].prompts for i in self._group(task))

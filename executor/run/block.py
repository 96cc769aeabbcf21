"""One block of sequences: its state, and the handlers of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.engine.channels import Handler
from executor.machine.tiers import Machine
from executor.model import layers, projections
from executor.model.matrices import LayerWeights
from executor.model.rotations import Rotations
from executor.model.sampling import Chooser
from executor.run.batch import Batch
from executor.run.cache_attention import DecodeAttention
from executor.run.expert_steps import ExpertSteps, hand_out
from executor.run.expert_walk import ExpertWalk, WalkedTokens
from executor.run.head import Head
from executor.run.layer_steps import finish_layer, finishes_all
from executor.run.routing_counts import RoutingCounts
from executor.run.token_embedding import TokenEmbedding
from executor.stores.activations import HiddenStates
from executor.stores.kv_cache import KVCache
from executor.stores.weights import WeightStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The stores of weights, cache and hidden states."""

    weights: WeightStore
    embedding: TokenEmbedding
    cache: KVCache
    hidden: HiddenStates


class Block:
    """The state of one block and the handlers of its tasks.

    The waits of the schedule order all accesses to buffers that several channels use.
    """

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        stores: Stores,
        sampler: Chooser,
        eos_ids: frozenset[int],
    ) -> None:
        self.policy = policy
        self.spec = policy.model
        self.device = machine.compute.device
        self.stores = stores
        self.batches: list[Batch] = []
        self.attention = DecodeAttention(policy, machine, stores.cache)
        self.routing_counts = RoutingCounts(policy.model)
        self.experts = ExpertSteps(policy, stores.weights, stores.hidden, self.routing_counts)
        self.walk = ExpertWalk(policy, stores.weights, self.routing_counts)
        self.rotations = Rotations(policy.model, policy.workload.num_positions)
        # For each batch, the number of tokens of each prompt, int64 [batch] on the compute device.
        self._lengths: list[torch.Tensor] = []
        self.kinds = [layer.kind for layer in stores.weights.layers]
        self._numbers = decoder_numbers(policy.model)
        self.head = Head(policy, machine, stores.weights, stores.hidden, sampler, eos_ids)

    def start(self, batches: list[Batch]) -> None:
        """Start a new block."""
        self.batches = batches
        self._lengths = [batch.lengths.to(self.device) for batch in batches]
        sizes = [len(batch) for batch in batches]
        prompt_len = batches[0].prompt_ids.shape[1]
        self.attention.start_block(batches)
        self.experts.start_block(batches)
        self.walk.start_block(sizes, prompt_len)
        self.head.start_block(batches, self._lengths)
        self.rotations.start_block(self._lengths, prompt_len)
        self.stores.weights.start_block(len(batches))
        self.stores.cache.start_block(self._lengths, prompt_len)
        self.stores.hidden.start_block(sizes, prompt_len)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has an end-of-sequence token."""
        return all(bool(batch.is_finished.all()) for batch in self.batches)

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handler of each kind of task."""
        stores = self.stores
        return {
            "read_weights": stores.weights.read,
            "send_weights": stores.weights.send,
            "read_cache": stores.cache.read,
            "send_cache": stores.cache.send,
            "return_cache": stores.cache.bring_back,
            "write_cache": stores.cache.write,
            "read_hidden": stores.hidden.read,
            "send_hidden": stores.hidden.send,
            "return_hidden": stores.hidden.bring_back,
            "write_hidden": stores.hidden.write,
            "route": self.route,
            "run_chunk": self.walk.run_chunk,
            "read_experts": self.read_experts,
            "send_experts": self.experts.send_experts,
            "return_tokens": self.experts.return_tokens,
            "run_experts": self.experts.run_experts,
            "send_made": self.experts.send_made,
            "combine": self.experts.combine,
            "compute": self.compute,
            "project": self.project,
            "return_queries": self.attention.return_queries,
            "attend": self.attention.attend,
            "send_attended": self.attention.send_attended,
            "finish": self.finish,
        }

    def compute(self, task: Task) -> int:
        """Run a whole layer of the schedule for one batch, or for experts for several."""
        kind = self.kinds[task.layer]
        if kind == "head":
            self.head.compute(task)
            return 0
        if kind == "experts":
            self._compute_experts(task)
            return 0
        hidden = self.stores.hidden.gather(task)
        if kind == "embed":
            self._embed(task, hidden)
        elif task.is_prefill:
            self._prefill(task, hidden)
        else:
            self._decode(task, hidden)
        self.stores.hidden.hand_back(task)
        return 0

    def project(self, task: Task) -> int:
        """Make queries and what is cached, and attend to the rows on the GPU."""
        qkv = self._project(task, self.stores.hidden.gather(task))
        self.attention.begin(task, qkv, self._sinks(task))
        return 0

    def finish(self, task: Task) -> int:
        """Run the rest of the layer on the merged attention of GPU and CPU."""
        hidden = self.stores.hidden.gather(task)
        self._finish_token(task, hidden, self.attention.end(task))
        self.stores.hidden.hand_back(task)
        return 0

    def _layer(self, task: Task) -> LayerSpec:
        return self.spec.layer(self._numbers[task.layer])

    def _weights(self, task: Task) -> LayerWeights:
        return self.stores.weights.layer(task)

    def _embed(self, task: Task, hidden: torch.Tensor) -> None:
        batch = self.batches[task.batch]
        step = self.policy.prefill_batch_size if task.is_prefill else len(batch)
        ids = batch.token_ids(task.token)
        for first in range(0, len(batch), step):
            part = slice(first, first + step)
            # All prompts start at the first position.
            positions = torch.arange(ids.shape[1])[None]
            if not task.is_prefill:
                positions = batch.lengths[part, None] + (task.token - 1)
            self.stores.embedding.fill(hidden[part], ids[part], positions)
        if task.is_prefill and batch.is_padded:
            # Rows of padding may be NaN, which a product with zero does not remove.
            lengths = self._lengths[task.batch][:, None]
            is_padding = torch.arange(ids.shape[1], device=self.device) >= lengths
            hidden.masked_fill_(is_padding[..., None], 0)

    def _prefill(self, task: Task, hidden: torch.Tensor) -> None:
        for first in range(0, len(hidden), self.policy.prefill_batch_size):
            part = slice(first, first + self.policy.prefill_batch_size)
            layer, weights = self._layer(task), self._weights(task)
            rotation = self.rotations.of(task, layer.attention)
            queries, cached = projections.project_prompt(hidden[part], weights, rotation, layer)
            if self.policy.workload.kept_prompt_len:
                self.stores.cache.write_prompt(task, first, cached)
            lengths = self.batches[task.batch].lengths[part].tolist()
            attended = projections.attend_prompt(queries, cached, weights, layer.attention, lengths)
            del queries, cached
            if self._finishes_all(task):
                self._finish(task, hidden[part], attended)
                continue
            rows, last = self._last_tokens(task, part)
            picked, put_back = self._picked(task, hidden, part)
            self._finish(task, picked, attended[rows, last][:, None])
            put_back()

    def _decode(self, task: Task, hidden: torch.Tensor) -> None:
        qkv = self._project(task, hidden)
        attended = self.attention.attend_here(task, qkv, self._sinks(task))
        self._finish_token(task, hidden, attended)

    def _compute_experts(self, task: Task) -> None:
        """Run the mixture of experts of a layer, or what is left of it behind the last chunk."""
        if self._walks(task):
            self.walk.finish(task)
            for batch in self.experts.group(task):
                self.stores.hidden.hand_back(replace(task, batch=batch))
            return
        if not task.is_prefill:
            self.experts.compute(task)
            return
        hidden = self.stores.hidden.gather(task)
        # Padding is routed too, and says nothing.
        is_counted = not self.batches[task.batch].is_padded
        add = partial(self.routing_counts.add, task.layer)
        count = add if is_counted else lambda routing: None
        for first in range(0, len(hidden), self.policy.prefill_batch_size):
            part = slice(first, first + self.policy.prefill_batch_size)
            picked, put_back = self._picked(task, hidden, part)
            layers.feed_forward(picked, self._weights(task), self._layer(task), count)
            put_back()
        self.stores.hidden.hand_back(task)

    def route(self, task: Task) -> int:
        """Route the tokens of a layer, and find the experts that they need."""
        if not self._walks(task):
            return self.experts.route(task)
        self.walk.route(task, self._walked_tokens(task))
        return 0

    def read_experts(self, task: Task) -> int:
        """Read needed experts: a chunk of them, or one piece of CPU staging."""
        return self.walk.read(task) if self._walks(task) else self.experts.read_experts(task)

    def _walks(self, task: Task) -> bool:
        plan = self.stores.weights.plan
        return plan.walks_experts and task.layer in plan.route.demanding

    def _walked_tokens(self, task: Task) -> Iterator[WalkedTokens]:
        """Yield the tokens that are normalised and routed together; experts take all of them."""
        there = [replace(task, batch=batch) for batch in self.experts.group(task)]
        parts = [self.stores.hidden.gather(each) for each in there]
        if not task.is_prefill:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield WalkedTokens(hidden=whole, done=partial(hand_out, whole, parts))
            return
        for each, hidden in zip(there, parts, strict=True):
            is_counted = not self.batches[each.batch].is_padded
            for first in range(0, len(hidden), self.policy.prefill_batch_size):
                part = slice(first, first + self.policy.prefill_batch_size)
                picked, put_back = self._picked(each, hidden, part)
                yield WalkedTokens(hidden=picked, done=put_back, is_counted=is_counted)

    def _picked(
        self, task: Task, hidden: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return the hidden states of some prompts that go through the rest of a layer, and what
        puts them back when they have."""
        of_part = hidden[part]
        if self._finishes_all(task):
            return of_part, lambda: None
        rows, last = self._last_tokens(task, part)
        picked = of_part[rows, last][:, None]

        def put_back() -> None:
            of_part[rows, last] = picked[:, 0]

        return picked, put_back

    def _finishes_all(self, task: Task) -> bool:
        return finishes_all(self.kinds, task.layer, scores_prompts=self.head.scores_prompts)

    def _last_tokens(self, task: Task, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows and positions of each prompt's last token."""
        last = self._lengths[task.batch][part] - 1
        return torch.arange(len(last), device=last.device), last

    def _project(self, task: Task, hidden: torch.Tensor) -> torch.Tensor:
        layer = self._layer(task)
        rotation = self.rotations.of(task, layer.attention)
        return projections.project_token(hidden, self._weights(task), rotation, layer)

    def _sinks(self, task: Task) -> torch.Tensor | None:
        return projections.sinks_of(self._weights(task), self._layer(task).attention)

    def _finish_token(self, task: Task, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        attention = self._layer(task).attention
        self._finish(
            task, hidden, projections.make_values(attended, self._weights(task), attention)
        )

    def _finish(self, task: Task, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        finish_layer(
            hidden,
            attended,
            self._weights(task),
            self._layer(task),
            has_feed_forward=self.kinds[task.layer] == "decoder",
        )

"""Walks through the experts of a layer that a CPU loads on demand, a chunk at a time.

One chunk is loaded while the experts before are computed. Experts go in the order of their numbers,
those in memory among them. With the native kernels, sums are those of a layer that is in memory as
a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.pricing.buffers import Chunks
from costmodel.schedule.tasks import Task
from executor.model import layers
from executor.model.experts import add_routed, add_shared, room_for
from executor.model.routing import SortedRouting, joined
from executor.run.expert_cache import ExpertCache
from executor.run.routing_counts import RoutingCounts
from executor.stores.weights import WeightStore


@dataclass(slots=True, kw_only=True)
class WalkedTokens:
    """Tokens that are normalised and routed together.

    Parameters
    ----------
    hidden
        Their hidden states [sequences, tokens, hidden size], to which the output is added in place.
    done
        Called when it is.
    is_counted
        Whether their choices are counted: those of padding say nothing.
    """

    hidden: torch.Tensor
    done: Callable[[], None] = lambda: None
    is_counted: bool = True


@dataclass(slots=True)
class _Part:
    """Some tokens with their normalised copy and the outputs of their experts."""

    tokens: WalkedTokens
    rows: torch.Tensor
    made: torch.Tensor


@dataclass(slots=True)
class _Visit:
    """One visit of a layer: the parts of its tokens, and what all parts have together."""

    parts: list[_Part]
    rows: torch.Tensor
    made: torch.Tensor
    routing: SortedRouting
    # Which experts any token has chosen, bool [experts].
    is_needed: torch.Tensor
    # By chunk, the experts that are loaded, and the range of all that are computed.
    loaded: list[list[int]]
    ranges: list[range]
    # For the temporaries of all chunks.
    room: torch.Tensor | None = None


class ExpertWalk:
    """The handlers of layers whose experts are walked through."""

    def __init__(self, policy: Policy, weights: WeightStore, counts: RoutingCounts) -> None:
        # Set where experts may change places.
        self.cache: ExpertCache | None = None
        self._model = policy.model
        self._weights = weights
        self._counts = counts
        self._numbers = decoder_numbers(policy.model)
        # By layer and whether it is prefill.
        self._chunks: dict[tuple[int, bool], Chunks] = {}
        # By layer, the numbers of the experts on disk, as the last visit has left them.
        self._outside: dict[int, list[int]] = {}
        # Layers are visited one after another.
        self._visit: _Visit | None = None

    def start_block(self, sizes: Sequence[int], prompt_len: int) -> None:
        """Prepare for a block of batches of ``sizes``, padded to ``prompt_len``."""
        self._visit = None
        plan = self._weights.plan
        for layer in plan.route.demanding if plan.walks_experts else ():
            self._outside[layer] = self._experts_outside(layer)
            for is_prefill in (True, False):
                tokens = max(sizes) * (prompt_len if is_prefill else 1)
                self._chunks[layer, is_prefill] = plan.chunks(layer, len(sizes), tokens)
        if self.cache is not None:
            self.cache.start_block(sum(sizes))

    def route(self, task: Task, tokens: Iterable[WalkedTokens]) -> None:
        """Route the tokens of some batches, and deal the experts that they need into chunks."""
        weights, layer, spec = self._weights.layer(task), self._layer(task), self._experts(task)
        walked, routings = list(tokens), []
        sizes = [part.hidden.shape[:2].numel() for part in walked]
        # One piece of memory for all parts. Between those of a layer, a heap would keep gaps.
        normed = walked[0].hidden.new_empty(sum(sizes), self._model.hidden_size)
        made = torch.zeros_like(normed)
        parts = list(map(_Part, walked, normed.split(sizes), made.split(sizes)))
        for part in parts:
            shaped = layers.feed_forward_input(part.tokens.hidden, weights, layer)
            routings.append(layers.routing_of(shaped, weights, layer))
            part.rows.copy_(shaped.flatten(0, 1))
        counted = [r for part, r in zip(walked, routings, strict=True) if part.is_counted]
        for routing in counted:
            self._counts.add(task.layer, routing)
        whole = joined(routings)
        is_needed = whole.counts(spec.num_experts) > 0
        if self.cache is not None:
            self.cache.count(task, counted, is_needed)
        count, ahead = self._chunks_of(task).count, self._read_ahead(task)
        others = self._outside[task.layer][sum(map(len, ahead)) :]
        missing = [expert for expert in others if is_needed[expert]]
        loaded = [*ahead, *deal_chunks(missing, count - len(ahead))]
        self._visit = _Visit(
            parts,
            normed,
            made,
            whole.by_expert(spec.num_experts),
            is_needed,
            loaded,
            ranges_of(loaded, spec.num_experts),
        )

    def read(self, task: Task) -> int:
        """Read a chunk of experts."""
        chunks = self._chunks_of(task)
        if task.batch < chunks.ahead:
            experts = self._read_ahead(task)[task.batch]
        else:
            assert self._visit is not None
            experts = self._visit.loaded[task.batch]
        return self._weights.read_chunk(task, experts, task.batch % chunks.staged * chunks.size)

    def _read_ahead(self, task: Task) -> list[list[int]]:
        """Return the experts of each chunk that is read before tokens are routed: the first on
        disk."""
        chunks, outside = self._chunks_of(task), self._outside[task.layer]
        starts = range(0, chunks.ahead * chunks.size, chunks.size)
        return [outside[start : start + chunks.size] for start in starts]

    def _chunks_of(self, task: Task) -> Chunks:
        return self._chunks[task.layer, task.is_prefill]

    def _experts_outside(self, layer: int) -> list[int]:
        found: list[int] = (~self._weights.resident_experts(layer)).nonzero().flatten().tolist()
        return found

    def run_chunk(self, task: Task) -> int:
        """Compute a chunk of experts, and those in memory between them."""
        visit = self._visit
        assert visit is not None
        experts = visit.ranges[task.batch]
        weights, spec = self._weights.layer(task), self._experts(task)
        if visit.room is None:
            # All parts share it. It has room for the rows of the largest.
            visit.room = room_for(max((part.rows for part in visit.parts), key=len), spec)
        if experts:
            rows, made = visit.rows, visit.made
            add_routed(made, rows, visit.routing, weights, spec, experts, visit.room)
        if self.cache is not None and visit.loaded[task.batch]:
            is_idle = ~visit.is_needed
            is_idle[: experts.stop] = True
            self.cache.keep(task, visit.loaded[task.batch], is_idle)
        return 0

    def finish(self, task: Task) -> None:
        """Add the outputs of all experts to the hidden states."""
        weights, layer, spec = self._weights.layer(task), self._layer(task), self._experts(task)
        visit, self._visit = self._visit, None
        assert visit is not None
        # Shared experts need memory of their own.
        visit.room = None
        for part in visit.parts:
            if spec.shared is not None:
                add_shared(part.made, part.rows, weights, spec)
            hidden = part.tokens.hidden
            layers.add_feed_forward(hidden, part.made.view(hidden.shape), weights, layer)
            part.tokens.done()
        if self.cache is not None:
            self._outside[task.layer] = self._experts_outside(task.layer)

    def _layer(self, task: Task) -> LayerSpec:
        return self._model.layer(self._numbers[task.layer])

    def _experts(self, task: Task) -> ExpertsSpec:
        experts = self._layer(task).experts
        assert experts is not None
        return experts


def deal_chunks(missing: list[int], num_chunks: int) -> list[list[int]]:
    """Deal experts evenly into chunks, in the order of their numbers."""
    if not num_chunks:
        assert not missing, "experts for which there is no chunk"
        return []
    bounds = (len(missing) * number // num_chunks for number in range(num_chunks + 1))
    return [missing[low:high] for low, high in itertools.pairwise(bounds)]


def ranges_of(loaded: list[list[int]], num_experts: int) -> list[range]:
    """Return the experts that are computed with each chunk: its own, and those in memory up to the
    first one of the next chunk that loads any."""
    ends, end = [], num_experts
    for chunk in reversed(loaded):
        ends.append(end)
        end = chunk[0] if chunk else end
    # The experts before the first one that is missing need no load.
    return [range(low, high) for low, high in itertools.pairwise([0, *reversed(ends)])]

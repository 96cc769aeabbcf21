"""A policy with its cuts and its moves, derived once."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import LayerLayout, decoder_numbers, has_small_chunks
from costmodel.plan.cuts import (
    ExpertOrder,
    PlacedComponent,
    PlacedLayers,
    Segment,
    cache_spec,
    cut_cache,
    place_weights,
    policy_layers,
)
from costmodel.plan.policy import Policy
from costmodel.plan.route import Route, route_of
from costmodel.pricing.buffers import Chunks, chunks_of, expert_staging, staged_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A policy with its cuts.

    Parameters
    ----------
    layers
        Layouts in the order of the schedule: embedding, decoder layers, chunks of the head.
    weights
        The components of each of these layers, with their cuts.
    segments
        For each kind of decoder layer, the segments of a full batch's cache; none with lanes.
    route
        The moves that the policy needs.
    numbers
        See ``decoder_numbers``.
    """

    policy: Policy
    has_gpu: bool
    layers: tuple[LayerLayout, ...]
    weights: PlacedLayers
    segments: tuple[tuple[Segment, ...], ...]
    route: Route
    numbers: tuple[int, ...]

    @property
    def batches_at_once(self) -> int:
        """Batches whose tokens pass through experts together: in decode, and where a CPU walks.

        All batches do, where the hidden states are stored on the compute device.
        """
        placement = self.policy.activations
        is_in_place = (placement.gpu if self.has_gpu else placement.cpu) >= 1
        return self.policy.num_gpu_batches if is_in_place else 1

    @property
    def head_batches_at_once(self) -> int:
        """Batches that pass through a chunk of the head together: as many as through experts, where
        the head is in several small chunks."""
        in_chunks = sum(layer.kind == "head" for layer in self.layers) > 1
        in_chunks &= has_small_chunks(self.policy.model, has_gpu=self.has_gpu)
        return self.batches_at_once if in_chunks and self.policy.lanes is None else 1

    def batches_together(self, layer: int, *, is_prefill: bool) -> int:
        """Return the batches that pass through a layer of the schedule together."""
        kind = self.layers[layer].kind
        if kind == "head":
            return self.head_batches_at_once
        walks = self.walks_experts and layer in self.route.demanding
        return self.batches_at_once if kind == "experts" and (walks or not is_prefill) else 1

    @property
    def walks_experts(self) -> bool:
        """See ``Policy.walks_experts``."""
        return self.policy.walks_experts(has_gpu=self.has_gpu)

    @property
    def expert_staging(self) -> str:
        """The kind of the staging buffers of experts, see ``costmodel.pricing.buffers``."""
        return expert_staging(
            loads_on_demand=self.policy.loads_on_demand,
            multiplies_in_place=self.policy.cpu_experts > 0,
            has_gpu=self.has_gpu,
            has_lanes=self.policy.lanes is not None,
        )

    def experts(self, layer: int) -> PlacedComponent:
        """Return the experts of a layer of the schedule that has some."""
        (found,) = (c for c in self.weights[layer] if c.layout.is_experts)
        return found

    def chunks(self, layer: int, num_batches: int, batch_tokens: int) -> Chunks:
        """Return how a visit loads experts of a layer of the schedule, in a pass of
        ``num_batches`` of ``batch_tokens`` tokens each, at most. None is read early where batches
        are routed one after another."""
        together = min(self.batches_at_once, num_batches)
        placed = self.experts(layer)
        return chunks_of(
            self._experts_spec(layer),
            together * batch_tokens,
            placed.cut.disk_bytes // placed.layout.unit_bytes,
            self.policy.workload.expert_skew,
            expert_bytes=placed.layout.unit_bytes,
            may_read_ahead=together == num_batches,
        )

    def num_slots(self, layer: int) -> int:
        """Return the experts of a layer of the schedule for which visits need room."""
        return staged_experts(self._experts_spec(layer), self.experts(layer).layout.unit_bytes)

    def _experts_spec(self, layer: int) -> ExpertsSpec:
        experts = self.policy.model.layer(self.numbers[layer]).experts
        assert experts is not None
        return experts

    @classmethod
    def of(cls, policy: Policy, *, has_gpu: bool, expert_order: ExpertOrder | None = None) -> Plan:
        """Derive the plan of a policy; ``expert_order`` is that of ``place_weights``."""
        layers = policy_layers(policy, has_gpu=has_gpu)
        weights = place_weights(policy, has_gpu=has_gpu, expert_order=expert_order)
        batch = policy.gpu_batch_size
        segments = tuple(
            cut_cache(policy, cache_spec(policy, kind), batch, has_gpu=has_gpu)
            for kind in (policy.model.layer_kinds if policy.lanes is None else ())
        )
        return cls(
            policy=policy,
            has_gpu=has_gpu,
            layers=layers,
            weights=weights,
            segments=segments,
            route=route_of(policy, layers, weights, segments, has_gpu=has_gpu),
            numbers=decoder_numbers(policy.model),
        )

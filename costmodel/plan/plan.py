"""A policy with its cuts and its moves, derived once."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.layout import LayerLayout, decoder_numbers, model_layers
from costmodel.plan.cuts import (
    ExpertOrder,
    PlacedComponent,
    PlacedLayers,
    Segment,
    cache_spec,
    cut_cache,
    place_weights,
)
from costmodel.plan.policy import Policy
from costmodel.plan.route import Route, route_of
from costmodel.pricing.buffers import expert_staging, num_expert_chunks


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
    """

    policy: Policy
    has_gpu: bool
    layers: tuple[LayerLayout, ...]
    weights: PlacedLayers
    segments: tuple[tuple[Segment, ...], ...]
    route: Route

    @property
    def batches_at_once(self) -> int:
        """Batches whose tokens pass through experts together: in decode, and where a CPU walks.

        All batches do, where the hidden states are stored on the compute device.
        """
        placement = self.policy.activations
        is_in_place = (placement.gpu if self.has_gpu else placement.cpu) >= 1
        return self.policy.num_gpu_batches if is_in_place else 1

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

    def num_chunks(self, layer: int, num_batches: int, *, is_prefill: bool) -> int:
        """Return the chunks in which the tokens of some batches load the experts of a layer of the
        schedule."""
        number = decoder_numbers(self.policy.model)[layer]
        experts = self.policy.model.layer(number).experts
        assert experts is not None
        placed = self.experts(layer)
        tokens = num_batches * self.policy.gpu_batch_size
        tokens *= self.policy.workload.prompt_len if is_prefill else 1
        loaded = placed.cut.disk_bytes // placed.layout.unit_bytes
        return num_expert_chunks(experts, tokens, loaded)

    @classmethod
    def of(cls, policy: Policy, *, has_gpu: bool, expert_order: ExpertOrder | None = None) -> Plan:
        """Derive the plan of a policy; ``expert_order`` is that of ``place_weights``."""
        layers = model_layers(policy.model, policy.weight_bits, policy.group_size)
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
        )

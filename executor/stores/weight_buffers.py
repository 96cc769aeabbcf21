"""The memory of weights: what is resident on each tier, and staging for layers to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.layout import LayerLayout
from costmodel.plan.cuts import PlacedComponent
from costmodel.plan.plan import Plan
from costmodel.pricing.buffers import num_weight_buffers, staging_kind
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.stores.expert_slots import ExpertSlots
from executor.stores.staging import StagedComponent, StagedLayer
from executor.stores.tensor_views import ComponentRuns


class WeightBuffers:
    """Buffers for all weights of a model, on the tiers of a plan.

    Parameters
    ----------
    plan
        Sets the cuts.
    machine
        Its arenas have room for resident weights and staging.
    """

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._layers = plan.layers
        self._experts = plan.expert_staging
        self._placed = plan.weights
        self._machine = machine
        # The places of each layer's components in staging.
        self._walks_experts = plan.walks_experts
        self.staged = [StagedLayer.of(self._staged_parts(c)) for c in plan.weights]
        # By tier, layer and name of component.
        self._resident: dict[tuple[str, int, str], torch.Tensor] = {}
        for tier in machine.arenas:
            self._allocate(tier)
        self._staging = {tier: self._allocate_staging(tier) for tier in machine.arenas}
        self.slots: ExpertSlots | None = None
        if plan.walks_experts:
            self.slots = ExpertSlots(plan, machine.arenas["cpu"])

    def _staged_parts(self, layer: Sequence[PlacedComponent]) -> list[PlacedComponent]:
        """Return the components with places in staging: experts may have slots instead."""
        return [c for c in layer if not (self._walks_experts and c.layout.is_experts)]

    def _allocate(self, tier: str) -> None:
        components = [component for layer in self._placed for component in layer]
        cuts = [component.cut for component in components]
        sizes = [cut.gpu_end if tier == "gpu" else cut.cpu_bytes for cut in cuts]
        buffer = self._machine.arenas[tier].allocate("weights", sum(sizes))
        for component, home in zip(components, buffer.split(sizes), strict=True):
            self._resident[tier, component.layer, component.layout.name] = home

    def _allocate_staging(self, tier: str) -> dict[str, list[torch.Tensor]]:
        """Allocate the staging buffers of each kind, with the size of the largest layer."""
        sizes: dict[str, int] = {}
        # The embedding is gathered, never staged.
        for layout, staged in zip(self._layers[1:], self.staged[1:], strict=True):
            size = staged.gpu_bytes if tier == "gpu" else staged.cpu_bytes
            kind = self._kind(layout)
            sizes[kind] = max(sizes.get(kind, 0), size)
        arena = self._machine.arenas[tier]
        return {
            kind: [arena.allocate("weight staging", size) for _ in range(num_weight_buffers(kind))]
            for kind, size in sizes.items()
        }

    def staging_of(self, tier: str, task: Task) -> torch.Tensor:
        """Return the staging buffer on a tier for the weights of a task's layer."""
        slot = task.sent_slot if tier == "gpu" else task.read_slot
        return self._buffer(tier, task.layer, slot)

    def _buffer(self, tier: str, layer: int, slot: int) -> torch.Tensor:
        return self._staging[tier][self._kind(self._layers[layer])][slot]

    def _kind(self, layout: LayerLayout) -> str:
        return staging_kind(layout, experts=self._experts)

    def home(self, tier: str, placed: PlacedComponent) -> torch.Tensor:
        """Return the resident bytes of a component on a tier."""
        return self._resident[tier, placed.layer, placed.layout.name]

    def resident_runs(self, placed: PlacedComponent) -> list[tuple[int, torch.Tensor]]:
        """Return the resident runs of a component's bytes, each with its offset."""
        offsets = {"gpu": 0, "cpu": placed.cut.gpu_end}
        return [
            (offset, self.home(tier, placed))
            for tier, offset in offsets.items()
            if tier in self._machine.arenas
        ]

    def window(self, task: Task, component: StagedComponent, first: int, end: int) -> torch.Tensor:
        """Return the place of a component's bytes [first, end) in CPU staging."""
        start = component.window_offset - component.window_start
        return self.staging_of("cpu", task)[start + first : start + end]

    def runs(self, component: StagedComponent, slot: int) -> ComponentRuns:
        """Return a component's resident bytes on the device that computes, and its staged ones."""
        cut, layer = component.placed.cut, component.placed.layer
        if self._machine.has_gpu:
            border, resident = cut.gpu_end, self.home("gpu", component.placed)
            staged = self._buffer("gpu", layer, slot)[component.gpu_offset :]
        else:
            border, resident = cut.cpu_end, self.home("cpu", component.placed)
            first = component.window_offset + cut.cpu_end - component.window_start
            staged = self._buffer("cpu", layer, slot)[first:]
        return ComponentRuns(
            layout=component.placed.layout,
            border=border,
            resident=resident,
            staged=staged,
            num_units=component.placed.layout.num_units,
            places=component.placed.places,
        )

    def expert_runs(self, placed: PlacedComponent) -> ComponentRuns:
        """Return a layer's experts in memory, and the slots for others."""
        assert self.slots is not None
        staged, count = self.slots.of_layer(placed.layer)
        return ComponentRuns(
            layout=placed.layout,
            border=placed.cut.cpu_end,
            resident=self.home("cpu", placed),
            staged=staged,
            num_units=placed.cut.cpu_end // placed.layout.unit_bytes + count,
            places=self.slots.places(placed),
        )

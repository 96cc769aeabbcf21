"""Room for the experts that a CPU loads on demand, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.plan.cuts import PlacedComponent
from costmodel.plan.plan import Plan
from executor.machine.arena import Arena


class ExpertSlots:
    """One buffer with slots for a few chunks of experts: one is loaded while another is computed.

    All layers share the buffer. The schedule's waits order its uses.

    Parameters
    ----------
    plan
        A plan that walks through experts.
    arena
        That of CPU memory, which has room for the buffer.
    """

    def __init__(self, plan: Plan, arena: Arena) -> None:
        # By layer, the experts on disk, and the slots.
        self._placed = {layer: plan.experts(layer) for layer in sorted(plan.route.demanding)}
        self._counts = {layer: plan.num_slots(layer) for layer in self._placed}
        sizes = (
            self._counts[layer] * placed.layout.unit_bytes for layer, placed in self._placed.items()
        )
        self._buffer = arena.allocate("weight staging", max(sizes, default=0))
        # The slot of each expert that is loaded, by layer and number.
        self._held: dict[tuple[int, int], int] = {}

    def hold(self, layer: int, first: int, experts: Sequence[int]) -> list[torch.Tensor]:
        """Return the slots of the experts of a chunk from slot ``first`` on, uint8 [expert bytes]
        each. What was in them is gone."""
        assert first + len(experts) <= self._counts[layer], "more experts than the schedule plans"
        taken = {(layer, expert): first + i for i, expert in enumerate(experts)}
        gone = set(taken.values())
        # Another thread may look up experts of other chunks.
        self._held = {k: v for k, v in self._held.items() if v not in gone} | taken
        return [self._slot(layer, slot) for slot in taken.values()]

    def loaded(self, layer: int, expert: int) -> torch.Tensor:
        """Return the slot that has an expert, uint8 [expert bytes]."""
        return self._slot(layer, self.number(layer, expert))

    def of_layer(self, layer: int) -> tuple[torch.Tensor, int]:
        """Return all slots of a layer as one run of bytes, and their number."""
        count = self._counts.get(layer, 0)
        size = self._placed[layer].layout.unit_bytes if count else 0
        return self._buffer[: count * size], count

    def places(self, placed: PlacedComponent) -> Sequence[int]:
        """Return the place of each expert of a layer among those in memory and the slots behind
        them."""
        return _Places(self, placed)

    def number(self, layer: int, expert: int) -> int:
        """Return the number of the slot that has an expert."""
        slot = self._held.get((layer, expert))
        # A mapping of weights takes a KeyError as a name that it does not have.
        assert slot is not None, "an expert that is not loaded"
        return slot

    def _slot(self, layer: int, slot: int) -> torch.Tensor:
        size = self._placed[layer].layout.unit_bytes
        return self._buffer[slot * size : (slot + 1) * size]


class _Places(Sequence[int]):
    """Places by the number of the expert; one that is neither in memory nor loaded has none."""

    def __init__(self, slots: ExpertSlots, placed: PlacedComponent) -> None:
        self._slots = slots
        self._placed = placed
        self._in_memory = placed.cut.cpu_end // placed.layout.unit_bytes

    def __getitem__(self, expert: int) -> int:  # type: ignore[override]  # no slices
        place = self._placed.places[expert]
        if place < self._in_memory:
            return place
        return self._in_memory + self._slots.number(self._placed.layer, expert)

    def __len__(self) -> int:
        return self._placed.layout.num_units

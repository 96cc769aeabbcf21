"""Weights on their tiers, and the staging buffers for the layers that are computed.

A component is one run of bytes: first the part on the GPU, then the part in CPU memory, then the
part on disk. The parts off the compute device are staged there as one run. So a component is at
most two runs, a resident one and a staged one, which meet between two rows or two experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from costmodel.model.layout import round_up
from costmodel.plan.cuts import PlacedComponent
from costmodel.plan.plan import Plan
from costmodel.pricing.problem import problem_of
from costmodel.schedule.lookahead import num_load_pieces
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import WeightSource
from executor.machine.tiers import Machine
from executor.model.matrices import LayerWeights, Matrix
from executor.stores.staging import StagedComponent, page_floor, resident_parts
from executor.stores.tensor_views import CpuExperts, TensorView, tensor_views
from executor.stores.unpacked import UnpackedLayer, UnpackedMatrices
from executor.stores.weight_buffers import WeightBuffers
from executor.stores.weight_file import OnBytes, ReadRequest, WeightFile
from profiles import kernels
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_plan import DTYPES
from profiles.units import MIB

LOAD_PIECE_BYTES = 16 * MIB
NUM_LOADERS = 2
# Bytes of one copy to the GPU: copies of other streams wait for its end.
SEND_PIECE_BYTES = 16 * MIB


class WeightStore:
    """All weights of a model, on the tiers of a plan.

    Parameters
    ----------
    plan
        Sets the cuts.
    machine
        Its arenas have room for resident weights and staging.
    file
        The weights on disk; ``None`` where there are none.
    """

    def __init__(self, plan: Plan, machine: Machine, file: WeightFile | None) -> None:
        policy = plan.policy
        self.plan = plan
        self.layers = plan.layers
        self.placed = plan.weights
        self.machine = machine
        self.file = file
        self.dtype = DTYPES[policy.model.dtype]
        # Whether prompts begin in every pass, and which of its tasks have any.
        self._mixes = policy.lanes is not None
        self.has_prompts: Callable[[Task], bool] = _is_prefill
        self.start_block(policy.num_gpu_batches)
        self.buffers = WeightBuffers(plan, machine)
        # By layer and slot of staging.
        self._views: dict[tuple[int, int], tuple[LayerWeights, LayerWeights]] = {}
        self._unpacked: UnpackedMatrices | None = None
        problem = problem_of(policy, machine.hardware)
        self._decodes_packed = problem.multiplies_packed(machine.hardware.compute)
        # Rows of prompts must be multiplied as those of decode are, whatever a profile knows.
        # Latent attention is an exception: it unpacks the matrix that decode absorbs.
        is_coded = kernels.multiplies_codes(self.dtype, policy.group_size)
        on_cpu = machine.compute.device.type == "cpu"
        self._prefills_packed = self._decodes_packed and is_coded and on_cpu
        if problem.unpacks_layers:
            self._unpacked = UnpackedMatrices(plan.layers, self.dtype, machine.compute)

    def start_block(self, num_batches: int) -> None:
        """Prepare for a block."""
        self.num_pieces = num_load_pieces(self.plan, num_batches)
        # By layer, slot of staging, piece, and whether in prefill. What reads a piece is the same
        # in every pass, and finding it takes longer than reading 1 MiB.
        self._reads: dict[tuple[int, int, int, bool], tuple[list[ReadRequest], int]] = {}

    def load(self, source: WeightSource, on_bytes: OnBytes) -> None:
        """Read resident weights from the checkpoint, in pieces; ``on_bytes`` gets their sizes.

        While one piece is read, another one is checked and copied.
        """
        pieces = [
            (component, stored + start, part[start : start + LOAD_PIECE_BYTES])
            for layer in self.placed
            for component in layer
            for first, home in self.buffers.resident_runs(component)
            for stored, place in component.stored_ranges(first, first + len(home))
            for part in [home[place]]
            for start in range(0, len(part), LOAD_PIECE_BYTES)
        ]

        def read(piece: tuple[PlacedComponent, int, torch.Tensor]) -> int:
            component, start, target = piece
            is_here = target.device.type == "cpu"
            host = target if is_here else torch.empty_like(target, device="cpu")
            source.read_range(component.layer, component.layout, start, host)
            if host is not target:
                target.copy_(host)
            return len(target)

        pool = ThreadPoolExecutor(NUM_LOADERS)
        try:
            for num_bytes in pool.map(read, pieces):
                on_bytes(num_bytes)
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights in memory."""
        return sum(component.cut.cpu_end for layer in self.placed for component in layer)

    @property
    def disk_bytes(self) -> int:
        """Bytes of weights on disk: of experts that may change places, all."""
        components = (component for layer in self.placed for component in layer)
        return sum(c.cut.num_bytes - c.first_disk_byte for c in components if c.cut.disk_bytes)

    def read(self, task: Task) -> int:
        """Read one piece of a layer's weights on disk into CPU staging."""
        assert self.file is not None
        # Beside a GPU, prefill also loads experts that decode loads on demand.
        place = task.layer, task.read_slot, task.batch, task.is_prefill
        if place not in self._reads:
            self._reads[place] = self._requests_ahead(task)
        requests, num_bytes = self._reads[place]
        self.file.read(requests)
        return num_bytes

    def _requests_ahead(self, task: Task) -> tuple[list[ReadRequest], int]:
        """Return what reads a piece of a layer's weights on disk, and its bytes."""
        assert self.file is not None
        low, high = self._disk_piece(task)
        parts = []
        for component in self._loaded_ahead(task):
            first, end = component.window_part(low, high)
            if first < end:
                buffer = self.buffers.window(task, component, first, end)
                parts.append((component.placed, buffer, first))
        return self.file.requests_of(parts), sum(len(buffer) for _, buffer, _ in parts)

    def read_experts(self, task: Task, experts: Sequence[int]) -> int:
        """Read one piece of the needed experts on disk into CPU staging."""
        assert self.file is not None
        component, parts = self._experts(task)[0], []
        for _, first, end in self._needed_on_disk(task, experts):
            first = page_floor(first)
            buffer = self.buffers.window(task, component, first, round_up(end, PAGE_BYTES))
            parts.append((component.placed, buffer, first))
        self.file.read(self.file.requests_of(parts))
        return sum(len(buffer) for _, buffer, _ in parts)

    def send_experts(self, task: Task, experts: Sequence[int]) -> int:
        """Copy one piece of the needed experts off the GPU into GPU staging."""
        component, size = self._experts(task)
        cut, target = component.placed.cut, self.buffers.staging_of("gpu", task)
        start, home = component.gpu_offset - cut.gpu_end, self.buffers.home("cpu", component.placed)
        places = component.placed.places_of(experts)
        here = [place for place in places if cut.gpu_end <= place * size < cut.cpu_end]
        low, high = (len(here) * (task.batch + i) // self.num_pieces for i in (0, 1))
        moved = 0
        for first, end in _adjacent(here[low:high], size):
            source = home[first - cut.gpu_end : end - cut.gpu_end]
            self._queue_copy(target[start + first : start + end], source)
            moved += end - first
        for _, first, end in self._needed_on_disk(task, experts):
            window = self.buffers.window(task, component, first, end)
            self._queue_copy(target[start + first : start + end], window)
            moved += end - first
        return moved

    def _needed_on_disk(
        self, task: Task, experts: Sequence[int]
    ) -> Iterator[tuple[StagedComponent, int, int]]:
        """Yield the bytes of the needed experts in one piece of CPU staging.

        A piece is the same part of staging for every layer, because tasks wait for pieces.
        """
        component, size = self._experts(task)
        low, high = component.window_part(*self._disk_piece(task))
        low = max(low, component.placed.cut.cpu_end)
        for start, stop in _adjacent(component.placed.places_of(experts), size):
            first, end = max(start, low), min(stop, high)
            if first < end:
                yield component, first, end

    def resident_experts(self, layer: int) -> torch.Tensor:
        """Return which experts of a layer are in CPU memory, bool [experts]."""
        placed = self.plan.experts(layer)
        return torch.tensor(placed.places) < placed.cut.cpu_end // placed.layout.unit_bytes

    def read_chunk(self, task: Task, experts: Sequence[int], first: int) -> int:
        """Read a chunk of the experts of a layer into its slots from ``first`` on, all of them at
        once."""
        if not experts:
            return 0
        assert self.file is not None and self.buffers.slots is not None
        placed = self.plan.experts(task.layer)
        slots = self.buffers.slots.hold(task.layer, first, experts)
        starts = [placed.places[expert] * placed.layout.unit_bytes for expert in experts]
        parts = [(placed, slot, start) for slot, start in zip(slots, starts, strict=True)]
        self.file.read(self.file.requests_of(parts))
        return sum(map(len, slots))

    def keep_expert(self, task: Task, expert: int, other: int) -> None:
        """Let an expert that is loaded take the place of ``other``, which is in memory."""
        assert self.buffers.slots is not None
        placed = self.plan.experts(task.layer)
        assert placed.order is not None
        size = placed.layout.unit_bytes
        start = placed.order.places[other] * size
        home = self.buffers.home("cpu", placed)
        home[start : start + size].copy_(self.buffers.slots.loaded(task.layer, expert))
        placed.order.exchange(expert, other)

    def has_cache(self, task: Task) -> bool:
        """Whether experts of a layer may change places: some are in memory, and some on disk."""
        placed = self.plan.experts(task.layer)
        return placed.order is not None and 0 < placed.cut.cpu_end < placed.cut.num_bytes

    def experts_in_place(self, task: Task) -> range:
        """Return the experts of a layer that the CPU multiplies in place."""
        return self.plan.experts(task.layer).units_in_place

    def layer_in_place(self, task: Task) -> LayerWeights:
        """Return the matrices of the experts in CPU memory, by the number of the expert."""
        component, size = self._experts(task)
        first, home = component.placed.cut.gpu_end, self.buffers.home("cpu", component.placed)
        tensors = {tensor.name: tensor for tensor in component.placed.layout.tensors}
        found: dict[str, CpuExperts] = {}
        for tensor in component.placed.layout.tensors:
            experts = CpuExperts(
                home, self.dtype, tensor, tensors, first_byte=first, unit_bytes=size
            )
            found[TensorView(layout=tensor, chunks=(), is_expert=True).name] = experts
        return found

    def _experts(self, task: Task) -> tuple[StagedComponent, int]:
        """Return the component of a layer's experts, and the bytes of one expert."""
        components = self.buffers.staged[task.layer].components
        (found,) = (c for c in components if c.placed.layout.is_experts)
        return found, found.placed.layout.unit_bytes

    def _loaded_ahead(self, task: Task) -> Iterator[StagedComponent]:
        """Yield the components of a layer that are not loaded on demand."""
        demands = (self._mixes or not task.is_prefill) and task.layer in self.plan.route.demanding
        for component in self.buffers.staged[task.layer].components:
            if not demands or not component.placed.layout.is_experts:
                yield component

    def send(self, task: Task) -> int:
        """Copy one piece of a layer's weights off the GPU into GPU staging."""
        target, ahead = self.buffers.staging_of("gpu", task), list(self._loaded_ahead(task))
        moved = 0
        for component, part in resident_parts(
            ahead, task.batch, self.num_pieces, in_prefill=task.is_prefill and not self._mixes
        ):
            start = component.gpu_offset
            home = self.buffers.home("cpu", component.placed)
            self._queue_copy(target[start + part.start : start + part.stop], home[part])
            moved += part.stop - part.start
        low, high = self._disk_piece(task)
        for component in ahead:
            cut = component.placed.cut
            first, end = component.window_part(low, high)
            first, end = max(first, cut.cpu_end), min(end, cut.num_bytes)
            if first < end:
                start = component.gpu_offset - cut.gpu_end
                window = self.buffers.window(task, component, first, end)
                self._queue_copy(target[start + first : start + end], window)
                moved += end - first
        return moved

    @staticmethod
    def _queue_copy(target: torch.Tensor, source: torch.Tensor) -> None:
        for to, piece in zip(
            target.split(SEND_PIECE_BYTES), source.split(SEND_PIECE_BYTES), strict=True
        ):
            to.copy_(piece, non_blocking=True)

    def layer(self, task: Task) -> LayerWeights:
        """Return the tensors of a task's layer.

        A tensor comes as its row chunks, a tensor of experts as one matrix for each. Where the
        device does not multiply compressed matrices directly, they are unpacked on access.
        """
        key = (task.layer, task.sent_slot if self.machine.has_gpu else task.read_slot)
        if key not in self._views:
            self._views[key] = self._layer_views(*key)
        direct, unpacked = self._views[key]
        packed = self._prefills_packed if self.has_prompts(task) else self._decodes_packed
        return direct if packed else unpacked

    def resident_runs(self, layer: int, component: str) -> list[tuple[int, torch.Tensor]]:
        """Return the resident runs of a component's bytes, each with its offset."""
        (placed,) = (c for c in self.placed[layer] if c.layout.name == component)
        return self.buffers.resident_runs(placed)

    def _disk_piece(self, task: Task) -> tuple[int, int]:
        """Return the part of CPU staging for one piece of a layer's weights.

        A piece is the same part for layers of any size, so that reading it waits only for the same
        piece of an earlier layer.
        """
        pages = len(self.buffers.staging_of("cpu", task)) // PAGE_BYTES
        low, high = (pages * (task.batch + i) // self.num_pieces * PAGE_BYTES for i in (0, 1))
        return low, high

    def _layer_views(self, layer: int, slot: int) -> tuple[LayerWeights, LayerWeights]:
        """Return a layer's tensors as they are stored, and with matrices that are unpacked."""
        runs = [self.buffers.runs(c, slot) for c in self.buffers.staged[layer].components]
        if self.plan.walks_experts:
            experts = (c for c in self.placed[layer] if c.layout.is_experts)
            runs += [self.buffers.expert_runs(component) for component in experts]
        tensors = [tensor for run in runs for tensor in tensor_views(run, self.dtype)]
        direct: dict[str, Sequence[Matrix]] = {}
        for tensor in tensors:
            if tensor.is_expert:
                direct[tensor.name] = tensor.chunks
            else:
                direct[tensor.name] = (*direct.get(tensor.name, ()), *tensor.chunks)
        if self._unpacked is None:
            return direct, direct
        return direct, UnpackedLayer(tensors, self._unpacked, layer)


def _adjacent(places: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield the bytes of experts of ``size`` each at places in increasing order; those of
    neighbours are one run."""
    for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        numbers = [place for _, place in run]
        yield numbers[0] * size, (numbers[-1] + 1) * size


def _is_prefill(task: Task) -> bool:
    return task.is_prefill

"""Weights at rest on their tiers, and the staging buffers that bring a layer together.

A layer is one run of bytes: first what lives on the GPU, then what lives in CPU memory, then what
lives on disk. What is not at rest on the compute device is staged there as one run, so a layer
is at most two runs: a resident one and a staged one, which meet between two rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.layout import LayerLayout, TensorLayout, round_up
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import cut_layer
from costmodel.pricing.memory import NUM_BUFFERS
from costmodel.pricing.problem import problem_of
from costmodel.schedule.tasks import Task
from costmodel.schedule.zigzag import num_weight_pieces
from executor.checkpoint.folder import WeightSource
from executor.machine.tiers import Machine
from executor.model.layers import LayerWeights
from executor.stores.unpacked import PackedLayer, UnpackedMatrices
from executor.stores.weight_file import Progress, WeightFile, page_floor
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_plan import DTYPES
from profiles.units import MIB

LOAD_PIECE_BYTES = 16 * MIB
# What is copied to the GPU at once: other copies wait for its end, whatever their stream.
SEND_PIECE_BYTES = 16 * MIB


class WeightStore:
    """All weights of a model, where a policy puts them.

    Parameters
    ----------
    policy
        Decides the cuts.
    layers
        Layouts of all layers.
    machine
        Whose arenas hold what is resident, and the staging.
    file
        Holds what lives on disk; ``None`` where nothing does.
    """

    def __init__(
        self,
        policy: Policy,
        layers: Sequence[LayerLayout],
        machine: Machine,
        file: WeightFile | None,
    ) -> None:
        self.layers = layers
        self.machine = machine
        self.file = file
        self.dtype = DTYPES[policy.model.dtype]
        self.cuts = [cut_layer(layer, policy.weights) for layer in layers]
        self.num_pieces = num_weight_pieces(policy.num_gpu_batches)
        self._resident = {
            "cpu": self._allocate("cpu", [cut.cpu_end - cut.gpu_end for cut in self.cuts])
        }
        if machine.has_gpu:
            self._resident["gpu"] = self._allocate("gpu", [cut.gpu_end for cut in self.cuts])
        staged = [cut for cut, c in zip(self.cuts, layers, strict=True) if c.kind != "embed"]
        windows = [
            self._window_bytes(cut.cpu_end, cut.num_bytes) for cut in staged if cut.disk_bytes
        ]
        sizes = {"cpu": max(windows, default=0)}
        if machine.has_gpu:
            sizes["gpu"] = max(cut.num_bytes - cut.gpu_end for cut in staged)
        self._staging = {
            tier: [machine.arenas[tier].allocate("weight staging", n) for _ in range(NUM_BUFFERS)]
            for tier, n in sizes.items()
        }
        self._views: dict[tuple[int, int], dict[str, tuple[torch.Tensor, ...]]] = {}
        self._unpacked: UnpackedMatrices | None = None
        if any(tensor.packing for layer in layers for tensor in layer.tensors):
            self._unpacked = UnpackedMatrices(layers, self.dtype, machine.compute)
        problem = problem_of(policy, machine.hardware)
        self._multiplies_packed = problem.multiplies_packed(machine.hardware.compute)

    def load(self, source: WeightSource, progress: Progress) -> None:
        """Read what is resident from the checkpoint, in pieces; ``progress`` counts bytes."""
        for index, (layer, cut) in enumerate(zip(self.layers, self.cuts, strict=True)):
            for tier, first in (("gpu", 0), ("cpu", cut.gpu_end)):
                if tier not in self._resident:
                    continue
                home = self._resident[tier][index]
                for start in range(0, len(home), LOAD_PIECE_BYTES):
                    piece = home[start : start + LOAD_PIECE_BYTES]
                    host = (
                        piece
                        if piece.device.type == "cpu"
                        else torch.empty_like(piece, device="cpu")
                    )
                    source.read_range(index, layer, first + start, host)
                    if host is not piece:
                        piece.copy_(host)
                    progress(len(piece))

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are held in memory."""
        return sum(cut.cpu_end for cut in self.cuts)

    def read(self, task: Task) -> int:
        """Read one piece of what a layer has on disk into CPU staging."""
        assert self.file is not None
        first, end = self._disk_piece(task)
        if first == end:
            return 0
        window = page_floor(self.cuts[task.layer].cpu_end)
        buffer = self._staging["cpu"][task.slot][first - window : end - window]
        self.file.read_into(buffer, task.layer, first)
        return end - first

    def send(self, task: Task) -> int:
        """Copy one piece of what a layer has below the GPU into GPU staging."""
        cut = self.cuts[task.layer]
        target = self._staging["gpu"][task.slot]
        cpu = self._resident["cpu"][task.layer]
        first, end = (len(cpu) * (task.batch + i) // self.num_pieces for i in (0, 1))
        self._queue_copy(target[first:end], cpu[first:end])
        moved = end - first
        if cut.disk_bytes:
            window = page_floor(cut.cpu_end)
            first, end = self._disk_piece(task)
            first, end = max(first, cut.cpu_end), min(end, cut.num_bytes)
            if first < end:
                staged = self._staging["cpu"][task.slot][first - window : end - window]
                self._queue_copy(target[first - cut.gpu_end : end - cut.gpu_end], staged)
                moved += end - first
        return moved

    @staticmethod
    def _queue_copy(target: torch.Tensor, source: torch.Tensor) -> None:
        for to, piece in zip(
            target.split(SEND_PIECE_BYTES), source.split(SEND_PIECE_BYTES), strict=True
        ):
            to.copy_(piece, non_blocking=True)

    def layer(self, task: Task) -> LayerWeights:
        """Return the tensors of the layer that a task computes, each as the row chunks that it is
        cut into; a packed matrix is whole, and unpacked when it is first asked for, unless few
        rows are multiplied with it."""
        # The embedding takes no turn in the staging buffers.
        visit = task.token * (len(self.layers) - 1) + task.layer - 1
        key = (task.layer, visit % NUM_BUFFERS)
        layout = self.layers[task.layer]
        if key not in self._views:
            self._views[key] = {t.name: self._chunks(*key, t) for t in layout.tensors}
        if self._unpacked is None:
            return self._views[key]
        return PackedLayer(
            layout, self._views[key], self._unpacked, task.layer,
            is_direct=self._multiplies_packed and not task.is_prefill,
        )  # fmt: skip

    def resident_runs(self, index: int) -> list[tuple[int, torch.Tensor]]:
        """Return a layer's resident runs of bytes with the offset at which each begins."""
        cut = self.cuts[index]
        runs = [(cut.gpu_end, self._resident["cpu"][index])]
        if self.machine.has_gpu:
            runs.insert(0, (0, self._resident["gpu"][index]))
        return runs

    def _allocate(self, tier: str, sizes: Sequence[int]) -> list[torch.Tensor]:
        buffer = self.machine.arenas[tier].allocate("weights", sum(sizes))
        return list(buffer.split(list(sizes)))

    @staticmethod
    def _window_bytes(start: int, end: int) -> int:
        return round_up(end, PAGE_BYTES) - page_floor(start)

    def _disk_piece(self, task: Task) -> tuple[int, int]:
        """Return the pages of a layer that one piece of its disk part covers.

        A piece is the same part of the staging buffer for every layer, however large: what is
        read into it then waits for no other piece of the layer before.
        """
        cut = self.cuts[task.layer]
        first = page_floor(cut.cpu_end)
        held = self._window_bytes(cut.cpu_end, cut.num_bytes) if cut.disk_bytes else 0
        pages = len(self._staging["cpu"][0]) // PAGE_BYTES
        bounds = [pages * (task.batch + i) // self.num_pieces * PAGE_BYTES for i in (0, 1)]
        return first + min(bounds[0], held), first + min(bounds[1], held)

    def _chunks(self, index: int, slot: int, tensor: TensorLayout) -> tuple[torch.Tensor, ...]:
        cut = self.cuts[index]
        if self.machine.has_gpu:
            border, resident = cut.gpu_end, self._resident["gpu"][index]
            staged = self._staging["gpu"][slot]
        else:
            border, resident = cut.cpu_end, self._resident["cpu"][index]
            staged = self._staging["cpu"][slot][cut.cpu_end - page_floor(cut.cpu_end) :]
        start, end = tensor.offset_bytes, tensor.end_bytes
        middle = min(max(border, start), end)
        runs = [resident[start:middle], staged[max(0, middle - border) : max(0, end - border)]]
        if tensor.packing is not None:
            return tuple(run.view(-1, tensor.row_bytes) for run in runs if len(run))
        return tuple(run.view(self.dtype).view(-1, *tensor.shape[1:]) for run in runs if len(run))

"""Hidden states of a block between two layers.

Where all of them are stored on the compute device, a layer updates them in place. Otherwise a batch
passes through a staging buffer: it is gathered from its tiers before a layer, and stored to them
after it. The sequences of a batch are in the order disk, CPU, GPU.
"""

from __future__ import annotations

import torch

from costmodel.model.layout import round_up
from costmodel.plan.cuts import cut_hidden
from costmodel.plan.policy import Policy
from costmodel.pricing.buffers import num_hidden_buffers
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.stores.scratch_file import ScratchFile
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_plan import DTYPES


class HiddenStates:
    """Stored and staged hidden states, and the moves between them.

    Parameters
    ----------
    policy
        Sets the cuts; its workload bounds the number of tokens.
    machine
        Its arenas have room for all buffers.
    file_offset
        The offset in ``file`` of the sequences on disk. ``file`` must be set before a run where
        ``disk_bytes`` is above zero.
    """

    def __init__(self, policy: Policy, machine: Machine, *, file_offset: int) -> None:
        self.policy = policy
        self.machine = machine
        self.file: ScratchFile | None = None
        self.file_offset = file_offset
        self.dtype = DTYPES[policy.model.dtype]
        self.disk_end, self.cpu_end = cut_hidden(policy, policy.gpu_batch_size)
        batch = policy.gpu_batch_size
        self.in_place = (self.disk_end, self.cpu_end) == ((0, 0) if machine.has_gpu else (0, batch))
        counts = {"cpu": self.cpu_end - self.disk_end, "gpu": batch - self.cpu_end}
        self._home_bytes = {tier: n * self._sequence_bytes for tier, n in counts.items()}
        self._homes = {
            tier: arena.allocate("hidden states", self._home_bytes[tier] * policy.num_gpu_batches)
            for tier, arena in machine.arenas.items()
        }
        size = 0 if self.in_place else round_up(batch * self._sequence_bytes, PAGE_BYTES)
        self._staging = {
            tier: [
                arena.allocate("hidden staging", size)
                for _ in range(num_hidden_buffers(has_gpu=machine.has_gpu))
            ]
            for tier, arena in machine.arenas.items()
        }
        self._batch_sizes: list[int] = []
        self._prompt_len = 0

    def start_block(self, batch_sizes: list[int], prompt_len: int) -> None:
        """Prepare for a block; a batch smaller than the policy's drops its last sequences."""
        self._batch_sizes = batch_sizes
        self._prompt_len = prompt_len

    def disk_bytes(self) -> int:
        """Bytes of these hidden states in the file."""
        return self._region_bytes * self.policy.num_gpu_batches if self.disk_end else 0

    def gather(self, task: Task) -> torch.Tensor:
        """Return the batch's hidden states [batch, tokens, hidden_size] on the compute device.

        Parts from other tiers must be staged already; the part on the compute device is copied now.
        """
        if self.in_place:
            return self._whole_home(task)
        whole = self._staged(self._compute_tier, task)
        own, home = self._own_part(task)
        whole[own].copy_(home)
        return whole

    def hand_back(self, task: Task) -> None:
        """Copy the part that is stored on the compute device out of the staging buffer."""
        if not self.in_place:
            own, home = self._own_part(task)
            home.copy_(self._staged(self._compute_tier, task)[own])

    def read(self, task: Task) -> int:
        """Read the sequences on disk into CPU staging."""
        assert self.file is not None
        part = self._disk_part(task)
        self.file.read_into(part, self._file_position(task))
        return part.numel()

    def write(self, task: Task) -> int:
        """Write the sequences on disk from CPU staging."""
        assert self.file is not None
        part = self._disk_part(task)
        self.file.write_from(part, self._file_position(task))
        return part.numel()

    def send(self, task: Task) -> int:
        """Copy the sequences off the GPU into GPU staging."""
        return self._copy(task, down=False)

    def bring_back(self, task: Task) -> int:
        """Copy the sequences off the GPU out of GPU staging."""
        return self._copy(task, down=True)

    @property
    def _compute_tier(self) -> str:
        return "gpu" if self.machine.has_gpu else "cpu"

    @property
    def _sequence_bytes(self) -> int:
        model = self.policy.model
        return self.policy.workload.prompt_len * model.hidden_size * model.dtype_bytes

    @property
    def _region_bytes(self) -> int:
        return round_up(self.disk_end * self._sequence_bytes, PAGE_BYTES)

    def _num_tokens(self, task: Task) -> int:
        return self._prompt_len if task.is_prefill else 1

    def _file_position(self, task: Task) -> int:
        return self.file_offset + task.batch * self._region_bytes

    def _clip(self, task: Task, first: int, end: int) -> slice:
        size = self._batch_sizes[task.batch]
        return slice(min(first, size), min(end, size))

    def _as_hidden(self, buffer: torch.Tensor, task: Task, num_sequences: int) -> torch.Tensor:
        shape = (num_sequences, self._num_tokens(task), self.policy.model.hidden_size)
        used = num_sequences * shape[1] * shape[2] * self.policy.model.dtype_bytes
        return buffer[:used].view(self.dtype).view(shape)

    def _home(self, tier: str, task: Task, num_sequences: int) -> torch.Tensor:
        size = self._home_bytes[tier]
        buffer = self._homes[tier][task.batch * size : (task.batch + 1) * size]
        return self._as_hidden(buffer, task, num_sequences)

    def _whole_home(self, task: Task) -> torch.Tensor:
        return self._home(self._compute_tier, task, self._batch_sizes[task.batch])

    def _staged(self, tier: str, task: Task) -> torch.Tensor:
        buffer = self._staging[tier][task.hidden_slot]
        return self._as_hidden(buffer, task, self._batch_sizes[task.batch])

    def _own_part(self, task: Task) -> tuple[slice, torch.Tensor]:
        if self.machine.has_gpu:
            own = self._clip(task, self.cpu_end, self.policy.gpu_batch_size)
        else:
            own = self._clip(task, self.disk_end, self.cpu_end)
        return own, self._home(self._compute_tier, task, own.stop - own.start)

    def _disk_part(self, task: Task) -> torch.Tensor:
        model = self.policy.model
        part = self._clip(task, 0, self.disk_end)
        used = part.stop * self._num_tokens(task) * model.hidden_size * model.dtype_bytes
        return self._staging["cpu"][task.hidden_slot][: round_up(used, PAGE_BYTES)]

    def _copy(self, task: Task, *, down: bool) -> int:
        from_disk = self._clip(task, 0, self.disk_end)
        from_cpu = self._clip(task, self.disk_end, self.cpu_end)
        above, staged = self._staged("gpu", task), self._staged("cpu", task)
        pairs = [
            (above[from_disk], staged[from_disk]),
            (above[from_cpu], self._home("cpu", task, from_cpu.stop - from_cpu.start)),
        ]
        for high, low in pairs:
            target, source = (low, high) if down else (high, low)
            target.copy_(source, non_blocking=True)
        return sum(high.numel() * high.element_size() for high, _ in pairs)

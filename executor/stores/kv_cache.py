"""Keys and values of a block, on their home tiers and in the staging buffers between them.

A row is one key head of one sequence (see ``costmodel.plan.rounding.Segment``). The context of a
segment is ``[tokens, 2, rows, head_dim]``: keys, then values. What moves lies token by token, so
that a new token is appended with one contiguous write, and the context so far is one contiguous
read (a token on disk is rounded up to whole pages). With few bits, the key or value of each row
is packed by itself when it comes, and lies as bytes, ``[tokens, 2, rows, row_bytes]``. What the CPU
attends where it lives lies row by row, ``[rows, 2, tokens, head_dim]``, because attention reads it
so at the memory's own rate; views make both look the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from costmodel.model.layout import row_packing
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import Segment, cut_cache
from costmodel.pricing.memory import NUM_BUFFERS, SUM_BYTES
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.stores.scratch_file import ScratchFile
from executor.stores.strided_copy import copy_runs
from profiles.compute_plan import DTYPES
from profiles.errors import RunError
from profiles.kernels import pack_rows


class KVCache:
    """The cache of one block and the moves between its tiers.

    Parameters
    ----------
    policy
        Decides the segments; its workload bounds the number of tokens.
    machine
        Whose arenas hold homes and staging.

    ``file`` must be set before a run where ``disk_bytes`` is above zero.
    """

    def __init__(self, policy: Policy, machine: Machine) -> None:
        self.model = policy.model
        self.policy = policy
        self.machine = machine
        self.file: ScratchFile | None = None
        self.context_len = policy.workload.context_len
        # How a key or value of one row is packed, if it is.
        self.packing = row_packing(policy.model.head_dim, policy.cache_bits, policy.group_size)
        self._dtype = torch.uint8 if self.packing else DTYPES[policy.model.dtype]
        self._width = self.packing.row_bytes if self.packing else policy.model.head_dim
        self.segments = cut_cache(policy, policy.gpu_batch_size, has_gpu=machine.has_gpu)
        self._batch_segments: list[tuple[Segment, ...]] = []
        self._prompt_len = 0
        # What ``attended_at`` has found in this block, whole: views cost more than a small step.
        self._contexts: dict[tuple[int, int, str], list[tuple[Segment, torch.Tensor]]] = {}
        self._homes = {
            tier: arena.allocate("cache", self._home_bytes(tier) * self._num_units)
            for tier, arena in machine.arenas.items()
        }
        self._staging = {
            tier: [
                arena.allocate("cache staging", self._staging_bytes(tier))
                for _ in range(NUM_BUFFERS)
            ]
            for tier, arena in machine.arenas.items()
        }
        # Of the rows that are attended sparsely on the CPU, [rows, head_dim] for each unit.
        self._value_sums = machine.arenas["cpu"].allocate(
            "value sums", self._value_sum_bytes * self._num_units
        )

    @property
    def _value_sum_bytes(self) -> int:
        if self.policy.attention_sparsity == 1:
            return 0
        rows = sum(s.num_rows for s in self.segments if s.attended == "cpu")
        return rows * self.model.head_dim * SUM_BYTES

    @property
    def _num_units(self) -> int:
        return self.model.num_layers * self.policy.num_gpu_batches

    def start_block(self, batch_sizes: list[int], prompt_len: int) -> None:
        """Prepare for a block: a batch smaller than the policy's drops its last rows."""
        self._prompt_len = prompt_len
        self._contexts = {}
        self._batch_segments = []
        for size in batch_sizes:
            rows = size * self.model.num_kv_heads
            kept = [
                replace(s, end_row=min(s.end_row, rows))
                for s in self.segments
                if s.first_row < rows
            ]
            self._batch_segments.append(tuple(kept))

    def disk_bytes(self) -> int:
        """Bytes that the file must hold."""
        return self._home_bytes("disk") * self._num_units

    def write_prompt(
        self, task: Task, first_sequence: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store the keys and values [batch, tokens, heads, head_dim] of some of the sequences."""
        heads = self.model.num_kv_heads
        first, end = first_sequence * heads, (first_sequence + keys.shape[0]) * heads
        by_token = [self._at_rest(t).transpose(0, 1).flatten(1, 2) for t in (keys, values)]
        num_tokens = keys.shape[1]
        for segment, context in self._views(task, appends_prompt=True):
            start, stop = max(first, segment.first_row), min(end, segment.end_row)
            if start >= stop:
                continue
            rows = slice(start - segment.first_row, stop - segment.first_row)
            for kind, source in enumerate(by_token):
                context[:num_tokens, kind, rows].copy_(source[:, start - first : stop - first])

    def append(self, context: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Fill the last token of a context with keys and values [2, rows, head_dim]."""
        if self.packing is None:
            context[-1].copy_(keys_values)
        else:
            self._pack(keys_values, context[-1])

    def attended_at(self, task: Task, place: str) -> list[tuple[Segment, torch.Tensor]]:
        """Return the segments attended at ``place`` with their context up to and including the
        new token: [tokens, 2, rows, head_dim]."""
        key = self._unit(task), task.slot, place
        if key not in self._contexts:
            views = self._views(task, appends_prompt=False)
            self._contexts[key] = [view for view in views if view[0].attended == place]
        num_tokens = self._new_slot(task) + 1
        return [(segment, context[:num_tokens]) for segment, context in self._contexts[key]]

    def value_sums(self, task: Task, segment: Segment) -> torch.Tensor | None:
        """Return where the sums of a segment's values are kept, float32 [rows, head_dim], if it is
        attended sparsely on the CPU."""
        if not self._value_sum_bytes or segment.attended != "cpu":
            return None
        start = self._unit(task) * self._value_sum_bytes
        unit = self._value_sums[start : start + self._value_sum_bytes].view(torch.float32)
        first = sum(s.num_rows for s in self._before(segment) if s.attended == "cpu")
        return unit.view(-1, self.model.head_dim)[first : first + segment.num_rows]

    def first_row_attended_at(self, task: Task, place: str) -> int:
        """Return the first of a batch's rows attended at ``place``; behind the last if none is."""
        segments = self._batch_segments[task.batch]
        firsts = [s.first_row for s in segments if s.attended == place]
        return min(firsts, default=max(s.end_row for s in segments))

    def read(self, task: Task) -> int:
        """Read the context so far of the rows on disk into CPU staging."""
        moved = 0
        for segment, offset in self._disk_segments(task):
            num_bytes = self._new_slot(task) * segment.token_bytes
            buffer = self._staged("cpu", task.slot, segment, offset)[:num_bytes]
            assert self.file is not None
            self.file.read_into(buffer, self._file_position(task, offset))
            moved += num_bytes
        return moved

    def send(self, task: Task) -> int:
        """Copy the context so far of the fetched rows to the GPU."""
        return self._copy_off_gpu(task, slice(0, self._new_slot(task)), down=False)

    def bring_back(self, task: Task) -> int:
        """Copy new keys and values of rows that live off the GPU down from GPU staging."""
        tokens = slice(0, self._prompt_len)
        if not task.is_prefill:
            tokens = slice(self._new_slot(task), self._new_slot(task) + 1)
        return self._copy_off_gpu(task, tokens, down=True)

    def write(self, task: Task) -> int:
        """Write new keys and values of the rows on disk from CPU staging."""
        moved = 0
        first = 0 if task.is_prefill else self._new_slot(task)
        end = self._prompt_len if task.is_prefill else first + 1
        for segment, offset in self._disk_segments(task):
            tokens = slice(first * segment.token_bytes, end * segment.token_bytes)
            buffer = self._staged("cpu", task.slot, segment, offset)[tokens]
            assert self.file is not None
            self.file.write_from(buffer, self._file_position(task, offset) + tokens.start)
            moved += buffer.numel()
        return moved

    def _new_slot(self, task: Task) -> int:
        return self._prompt_len + task.token - 1

    def _home_bytes(self, tier: str) -> int:
        return self.context_len * sum(s.token_bytes for s in self.segments if s.home == tier)

    def _staging_bytes(self, tier: str) -> int:
        if tier == "cpu":
            return self._home_bytes("disk")
        off_gpu = [s for s in self.segments if s.home != "gpu"]
        fetched = sum(s.token_bytes for s in off_gpu if s.attended == "gpu")
        stored = sum(s.token_bytes for s in off_gpu)
        return max(self.policy.workload.prompt_len * stored, self.context_len * fetched)

    def _unit(self, task: Task) -> int:
        # Layer 0 of the schedule is the embedding.
        return (task.layer - 1) * self.policy.num_gpu_batches + task.batch

    def _home(self, task: Task, segment: Segment) -> torch.Tensor:
        before = sum(s.token_bytes for s in self._before(segment) if s.home == segment.home)
        start = self._unit(task) * self._home_bytes(segment.home) + before * self.context_len
        size = segment.token_bytes * self.context_len
        return self._homes[segment.home][start : start + size]

    def _before(self, segment: Segment) -> list[Segment]:
        return [s for s in self.segments if s.first_row < segment.first_row]

    def _disk_segments(self, task: Task) -> Iterator[tuple[Segment, int]]:
        for segment in self._batch_segments[task.batch]:
            if segment.home == "disk":
                before = [s for s in self._before(segment) if s.home == "disk"]
                yield segment, self.context_len * sum(s.token_bytes for s in before)

    def _file_position(self, task: Task, offset: int) -> int:
        return self._unit(task) * self._home_bytes("disk") + offset

    def _staged(self, tier: str, slot: int, segment: Segment, offset: int) -> torch.Tensor:
        size = segment.token_bytes * self.context_len
        return self._staging[tier][slot][offset : offset + size]

    def _gpu_staged(self, task: Task, segment: Segment, *, in_prefill: bool) -> torch.Tensor:
        """Find a segment's place in GPU staging: prompts of all rows off the GPU, or contexts of
        those that are fetched."""
        before = [s for s in self._before(segment) if s.home != "gpu"]
        if in_prefill:
            num_tokens = self.policy.workload.prompt_len
        else:
            before = [s for s in before if s.attended == "gpu"]
            num_tokens = self.context_len
        start = num_tokens * sum(s.token_bytes for s in before)
        size = num_tokens * segment.token_bytes
        return self._staging["gpu"][task.slot][start : start + size]

    def _views(self, task: Task, *, appends_prompt: bool) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield each segment with its context where it is computed on: at home, or staged."""
        offsets = {s.first_row: offset for s, offset in self._disk_segments(task)}
        for segment in self._batch_segments[task.batch]:
            on_gpu = self.machine.has_gpu and (appends_prompt or segment.attended == "gpu")
            if on_gpu and segment.home != "gpu":
                buffer = self._gpu_staged(task, segment, in_prefill=appends_prompt)
            elif segment.home == "disk":
                buffer = self._staged("cpu", task.slot, segment, offsets[segment.first_row])
            else:
                buffer = self._home(task, segment)
            yield segment, self._as_context(segment, buffer)

    def _as_context(self, segment: Segment, buffer: torch.Tensor) -> torch.Tensor:
        row_bytes = self._width * self._dtype.itemsize
        if _lies_by_row(segment):
            rows = segment.token_bytes // (2 * row_bytes)
            by_row = buffer.view(self._dtype).view(rows, 2, -1, self._width)
            return by_row[: segment.num_rows].permute(2, 1, 0, 3)
        used = 2 * segment.num_rows * row_bytes
        tokens = buffer.view(-1, segment.token_bytes)[:, :used].view(self._dtype)
        context: torch.Tensor = tokens.unflatten(1, (2, segment.num_rows, self._width))
        return context

    def _at_rest(self, x: torch.Tensor) -> torch.Tensor:
        """Return keys or values [batch, tokens, heads, head_dim] as they lie, packed or not."""
        if self.packing is None:
            return x
        packed = x.new_empty(*x.shape[:3], self._width, dtype=torch.uint8)
        self._pack(x.flatten(0, 1), packed.flatten(0, 1))
        return packed

    def _pack(self, x: torch.Tensor, out: torch.Tensor) -> None:
        assert self.packing is not None
        if not pack_rows(x, self.packing, out):
            raise RunError(
                "a key or value is not a finite number, and cannot be quantized; try computing in"
                " bfloat16 or float32, or check the checkpoint"
            )

    def _copy_off_gpu(self, task: Task, tokens: slice, *, down: bool) -> int:
        offsets = {s.first_row: offset for s, offset in self._disk_segments(task)}
        moved = 0
        for segment in self._batch_segments[task.batch]:
            if segment.home == "gpu" or (segment.attended == "cpu" and not task.is_prefill):
                continue
            if segment.home == "disk":
                below = self._staged("cpu", task.slot, segment, offsets[segment.first_row])
            else:
                below = self._home(task, segment)
            above = self._gpu_staged(task, segment, in_prefill=task.is_prefill)
            source, target = (above, below) if down else (below, above)
            runs = (self._runs(segment, buffer, tokens) for buffer in (target, source))
            moved += copy_runs(*runs)
        return moved

    def _runs(self, segment: Segment, buffer: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Return some tokens of a segment as the runs that they are in memory: [runs, elements]."""
        if _lies_by_row(segment):
            by_row = self._as_context(segment, buffer)[tokens].permute(2, 1, 0, 3)
            return by_row.flatten(0, 1).flatten(1)
        size = segment.token_bytes
        return buffer[tokens.start * size : tokens.stop * size][None]


def _lies_by_row(segment: Segment) -> bool:
    """Whether the context of each row lies in one run, where it lives and on its way there."""
    return segment.home == "cpu" and segment.attended == "cpu"

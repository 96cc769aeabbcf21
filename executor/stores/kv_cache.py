"""Keys and values of a block, on their tiers and in the staging buffers between them.

A row is one key head of one sequence (see ``costmodel.plan.cuts.Segment``). The context of a
segment is ``[tokens, 2, rows, head_dim]``: keys, then values. Of latent attention it is ``[tokens,
1, rows, head_dim]``, because a row is key and value. There are two memory orders, and views give
both the same shape:

- Segments that move are stored token by token. A new token is one contiguous write, and the context
  so far is one contiguous read. On disk, a token is padded to whole pages.
- Segments that the CPU attends to in place are stored row by row, ``[rows, 2, tokens, head_dim]``.
  Attention reads this order at the rate of the memory.

A layer with a sliding window keeps the last tokens of a sequence, as many as the window has. Where
these are fewer than all, its slots are a ring (see ``CacheLayout.void_slots``).

In a packed cache, the key or value of each row is packed on arrival and stored as bytes,
``[tokens, 2, rows, row_bytes]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from costmodel.model.layout import decoder_numbers
from costmodel.plan.cuts import Segment
from costmodel.plan.plan import Plan
from costmodel.pricing.buffers import NUM_BUFFERS
from costmodel.pricing.memory import SUM_BYTES
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.stores.cache_layout import CacheLayout
from executor.stores.cache_rows import in_stored_form, last_tokens, pack
from executor.stores.scratch_file import ScratchFile
from executor.stores.strided_copy import copy_runs


class KVCache:
    """The cache of one block and the moves between its tiers.

    Parameters
    ----------
    plan
        Sets the segments; the workload bounds the number of tokens.
    machine
        Its arenas have room for all buffers.

    ``file`` must be set before a run where ``disk_bytes`` is above zero.
    """

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.machine, policy = machine, plan.policy
        self.file: ScratchFile | None = None
        model = policy.model
        kinds = [
            CacheLayout.of(policy, kind, segments)
            for kind, segments in zip(model.layer_kinds, plan.segments, strict=True)
        ]
        # By decoder layer.
        self._layouts = [kinds[kind] for kind in model.layer_order]
        self._numbers = decoder_numbers(model)
        self._num_batches = policy.num_gpu_batches
        self._sums_values = policy.attention_sparsity < 1
        # The segments of each batch, by layout.
        self._segments: list[dict[int, tuple[Segment, ...]]] = []
        self._prompt_len = 0
        # By batch, the tokens of each prompt, int64 [batch] on the compute device.
        self._lengths: Sequence[torch.Tensor] = ()
        # Views of whole contexts in this block: making views costs more than a small decode step.
        self._contexts: dict[tuple[int, int, int, str], list[tuple[Segment, torch.Tensor]]] = {}
        # The offset of each layer on each tier.
        self._starts = {
            tier: self._accumulated(partial(CacheLayout.home_bytes, tier=tier))
            for tier in (*machine.arenas, "disk")
        }
        self._homes = {
            tier: arena.allocate("cache", self._starts[tier][-1])
            for tier, arena in machine.arenas.items()
        }
        self._staging = {
            tier: [
                arena.allocate("cache staging", max(k.staging_bytes(tier) for k in kinds))
                for _ in range(NUM_BUFFERS)
            ]
            for tier, arena in machine.arenas.items()
        }
        # For sparse attention on the CPU: sums of values [rows, head_dim] by layer and batch.
        self._sum_starts = self._accumulated(self._value_sum_bytes)
        self._value_sums = machine.arenas["cpu"].allocate("value sums", self._sum_starts[-1])

    def _accumulated(self, num_bytes: Callable[[CacheLayout], int]) -> list[int]:
        """Return the offset of each layer, with ``num_bytes`` for each batch, and the end."""
        sizes = (num_bytes(layout) * self._num_batches for layout in self._layouts)
        return list(itertools.accumulate(sizes, initial=0))

    def _value_sum_bytes(self, layout: CacheLayout) -> int:
        if not self._sums_values or layout.vectors == 1:
            return 0
        return layout.num_rows_on_cpu * layout.head_dim * SUM_BYTES

    def layout(self, task: Task) -> CacheLayout:
        """Return the layout of a task's layer."""
        return self._layouts[self._numbers[task.layer]]

    def start_block(self, lengths: Sequence[torch.Tensor], prompt_len: int) -> None:
        """Prepare for a block: a batch smaller than the policy's drops its last rows.

        ``lengths`` has the number of tokens of each prompt, int64 [batch] for each batch on the
        compute device.
        """
        self._lengths, self._prompt_len = lengths, prompt_len
        self._contexts = {}
        kinds = {id(layout): layout for layout in self._layouts}
        self._segments = [
            {key: layout.of_batch(len(batch)) for key, layout in kinds.items()} for batch in lengths
        ]

    def disk_bytes(self) -> int:
        """Bytes of the cache in the file."""
        return self._starts["disk"][-1]

    def write_prompt(
        self, task: Task, first_sequence: int, vectors: Sequence[torch.Tensor]
    ) -> None:
        """Store the keys and values of some of the sequences, or the rows that are both:
        [batch, tokens, heads, head_dim] each."""
        count, _, heads, _ = vectors[0].shape
        layout = self.layout(task)
        first, end = first_sequence * heads, (first_sequence + count) * heads
        lengths = self._lengths[task.batch][first_sequence : first_sequence + count]
        num_tokens = layout.kept(self._prompt_len)
        kept = list(vectors)
        if layout.is_ring:
            kept = [last_tokens(t, lengths, num_tokens) for t in kept]
        packed = [in_stored_form(t, layout.packing) for t in kept]
        by_token = [t.transpose(0, 1).flatten(1, 2) for t in packed]
        for segment, context in self._views(task, appends_prompt=True):
            start, stop = max(first, segment.first_row), min(end, segment.end_row)
            if start >= stop:
                continue
            rows = slice(start - segment.first_row, stop - segment.first_row)
            for kind, source in enumerate(by_token):
                context[:num_tokens, kind, rows].copy_(source[:, start - first : stop - first])

    def append(self, task: Task, context: torch.Tensor, keys_values: torch.Tensor) -> None:
        """Fill the new token's slot of a context with keys and values [vectors, rows,
        head_dim]."""
        layout, slot = self.layout(task), self._new_slot(task)
        if layout.packing is None:
            context[slot].copy_(keys_values)
        else:
            pack(keys_values, layout.packing, context[slot])

    def attended_at(self, task: Task, place: str) -> list[tuple[Segment, torch.Tensor]]:
        """Return the segments that a device attends to, each with its context including the new
        token: [tokens, vectors, rows, head_dim]."""
        key = task.layer, task.batch, task.slot, place
        if key not in self._contexts:
            views = self._views(task, appends_prompt=False)
            self._contexts[key] = [view for view in views if view[0].attended == place]
        num_slots = self.layout(task).used_slots(self._prompt_len, task.token)
        return [(segment, context[:num_slots]) for segment, context in self._contexts[key]]

    def value_sums(self, task: Task, segment: Segment) -> torch.Tensor | None:
        """Return the buffer for a segment's sums of values, float32 [rows, head_dim].

        ``None`` where no sums are kept: without sparse attention on the CPU, with latent attention,
        which reads all values, and in a ring that drops older tokens.
        """
        layout = self.layout(task)
        replaces = layout.kept(self._prompt_len) + task.token > layout.num_slots
        sums_are_kept = not replaces and not layout.is_chunked
        if segment.attended != "cpu" or not sums_are_kept or not self._value_sum_bytes(layout):
            return None
        size = self._value_sum_bytes(layout)
        start = self._sum_starts[self._numbers[task.layer]] + task.batch * size
        sums = self._value_sums[start : start + size].view(torch.float32)
        first = layout.rows_on_cpu_before(segment)
        return sums.view(-1, layout.head_dim)[first : first + segment.num_rows]

    def first_row_attended_at(self, task: Task, place: str) -> int:
        """Return the first row of a batch that a device attends to, or one past the last."""
        segments = self._of_batch(task)
        firsts = [s.first_row for s in segments if s.attended == place]
        return min(firsts, default=max(s.end_row for s in segments))

    def read(self, task: Task) -> int:
        """Read the context so far of the rows on disk into CPU staging."""
        moved = 0
        for segment, offset in self._disk_segments(task):
            num_bytes = self._slots_before(task) * segment.token_bytes
            buffer = self._cpu_staged(task, segment, offset)[:num_bytes]
            assert self.file is not None
            self.file.read_into(buffer, self._home_start(task, "disk") + offset)
            moved += num_bytes
        return moved

    def send(self, task: Task) -> int:
        """Copy the context so far of the fetched rows to the GPU."""
        return self._copy_off_gpu(task, slice(0, self._slots_before(task)), down=False)

    def bring_back(self, task: Task) -> int:
        """Copy new keys and values of rows off the GPU from GPU staging to CPU memory."""
        tokens = slice(0, self.layout(task).kept(self._prompt_len))
        if not task.is_prefill:
            tokens = slice(self._new_slot(task), self._new_slot(task) + 1)
        return self._copy_off_gpu(task, tokens, down=True)

    def write(self, task: Task) -> int:
        """Write new keys and values of the rows on disk from CPU staging."""
        moved = 0
        first = 0 if task.is_prefill else self._new_slot(task)
        end = self.layout(task).kept(self._prompt_len) if task.is_prefill else first + 1
        for segment, offset in self._disk_segments(task):
            tokens = slice(first * segment.token_bytes, end * segment.token_bytes)
            buffer = self._cpu_staged(task, segment, offset)[tokens]
            assert self.file is not None
            position = self._home_start(task, "disk") + offset + tokens.start
            self.file.write_from(buffer, position)
            moved += buffer.numel()
        return moved

    def _new_slot(self, task: Task) -> int:
        return self.layout(task).new_slot(self._prompt_len, task.token)

    def _slots_before(self, task: Task) -> int:
        """Return the slots that are used before a pass. In a full ring, the oldest token is moved
        with the others although its slot is filled anew."""
        return self.layout(task).used_slots(self._prompt_len, task.token - 1)

    def _of_batch(self, task: Task) -> tuple[Segment, ...]:
        return self._segments[task.batch][id(self.layout(task))]

    def _home_start(self, task: Task, tier: str) -> int:
        before = task.batch * self.layout(task).home_bytes(tier)
        return self._starts[tier][self._numbers[task.layer]] + before

    def _home(self, task: Task, segment: Segment) -> torch.Tensor:
        found, start = self.layout(task).home_range(segment), self._home_start(task, segment.home)
        return self._homes[segment.home][start + found.start : start + found.stop]

    def _disk_segments(self, task: Task) -> Iterator[tuple[Segment, int]]:
        return self.layout(task).disk_segments(self._of_batch(task))

    def _cpu_staged(self, task: Task, segment: Segment, offset: int) -> torch.Tensor:
        size = segment.token_bytes * self.layout(task).num_slots
        return self._staging["cpu"][task.slot][offset : offset + size]

    def _gpu_staged(self, task: Task, segment: Segment, *, in_prefill: bool) -> torch.Tensor:
        found = self.layout(task).gpu_staged_range(segment, in_prefill=in_prefill)
        return self._staging["gpu"][task.slot][found]

    def _views(self, task: Task, *, appends_prompt: bool) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield each segment with its context, stored or staged, on the device that uses it."""
        offsets = {s.first_row: offset for s, offset in self._disk_segments(task)}
        for segment in self._of_batch(task):
            on_gpu = self.machine.has_gpu and (appends_prompt or segment.attended == "gpu")
            if on_gpu and segment.home != "gpu":
                buffer = self._gpu_staged(task, segment, in_prefill=appends_prompt)
            elif segment.home == "disk":
                buffer = self._cpu_staged(task, segment, offsets[segment.first_row])
            else:
                buffer = self._home(task, segment)
            yield segment, self.layout(task).as_context(segment, buffer)

    def _copy_off_gpu(self, task: Task, tokens: slice, *, down: bool) -> int:
        layout = self.layout(task)
        offsets = {s.first_row: offset for s, offset in self._disk_segments(task)}
        moved = 0
        for segment in self._of_batch(task):
            if segment.home == "gpu" or (segment.attended == "cpu" and not task.is_prefill):
                continue
            if segment.home == "disk":
                below = self._cpu_staged(task, segment, offsets[segment.first_row])
            else:
                below = self._home(task, segment)
            above = self._gpu_staged(task, segment, in_prefill=task.is_prefill)
            source, target = (above, below) if down else (below, above)
            runs = (layout.as_runs(segment, buffer, tokens) for buffer in (target, source))
            moved += copy_runs(*runs)
        return moved

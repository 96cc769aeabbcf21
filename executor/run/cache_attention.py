"""Attention of one decode step on the devices of the cache: the GPU, the CPU, or both at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layout import decoder_numbers
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.model.alibi import slopes_of
from executor.run.batch import Batch
from executor.stores.kv_cache import KVCache
from profiles import kernels


class DecodeAttention:
    """Appends a batch's new keys and values to its cache and attends to it.

    ``attend_here`` does all of this on the compute device. Where the CPU attends beside a GPU,
    ``begin`` does the GPU's rows, three handlers do the CPU's rows and the copies, and ``end``
    returns the merged result. A batch keeps its staging slot from ``begin`` to ``end``.
    """

    def __init__(self, policy: Policy, machine: Machine, cache: KVCache) -> None:
        self.model = policy.model
        self._numbers = decoder_numbers(policy.model)
        self.cache = cache
        self.device = machine.compute.device
        self._sparsity = policy.attention_sparsity
        self._batches: Sequence[Batch] = ()
        # By device, for each batch the number of tokens of each prompt, int32 [batch].
        self._lengths: dict[str, list[torch.Tensor]] = {}
        # By device, layout and batch, the last pass with void slots and what they were in it.
        self._void_slots: dict[tuple[str, int, int], tuple[int, torch.Tensor]] = {}
        # By staging slot: queries, keys and values on the GPU, and the layer's sinks; those of the
        # CPU's sequences in CPU memory; the CPU's result by rows; and the merged result.
        self._projected: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._returned: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._attended: dict[int, list[tuple[slice, torch.Tensor]]] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    def start_block(self, batches: Sequence[Batch]) -> None:
        """Prepare for a block."""
        self._batches = batches
        for kept in (self._projected, self._returned, self._attended, self._outputs):
            kept.clear()
        self._void_slots.clear()
        self._lengths = {
            place: [batch.lengths.to(device, torch.int32) for batch in batches]
            for place, device in (("cpu", torch.device("cpu")), ("gpu", self.device))
        }

    def attend_here(
        self, task: Task, qkv: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Append keys and values of ``qkv`` [batch, 1, query + cached], and attend to all of a
        batch's cache; returns [batch, 1, attended]."""
        out = self._empty_rows(task, qkv)
        # Without a GPU, all rows are attended to on the CPU, the compute device.
        for place in ("gpu", "cpu"):
            self._attend_rows(task, place, qkv, sinks, out)
        return out.view(len(qkv), 1, -1)

    def begin(self, task: Task, qkv: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """Attend to the rows on the GPU, and keep the queries of the rest for the CPU."""
        out = self._empty_rows(task, qkv)
        self._attend_rows(task, "gpu", qkv, sinks, out)
        self._projected[task.slot], self._outputs[task.slot] = (qkv, sinks), out

    def return_queries(self, task: Task) -> int:
        """Copy queries, keys and values to the CPU, from the first sequence with rows there on.

        The layer's sinks, a number for each head, are not counted.
        """
        qkv, sinks = self._projected[task.slot]
        down = qkv[self._first_on_cpu(task) :].to("cpu", non_blocking=True)
        if sinks is not None:
            sinks = sinks.to("cpu", non_blocking=True)
        self._returned[task.slot] = down, sinks
        return down.nbytes

    def attend(self, task: Task) -> int:
        """Attend to the CPU's rows."""
        qkv, sinks = self._returned[task.slot]
        # Pinned memory is sent at the link's full rate and asynchronously.
        out = self._empty_rows(task, qkv, pins=self.device.type == "cuda")
        first = self._first_on_cpu(task)
        self._attended[task.slot] = self._attend_rows(task, "cpu", qkv, sinks, out, first)
        return 0

    def send_attended(self, task: Task) -> int:
        """Copy the CPU's result into the merged result on the GPU."""
        out = self._outputs[task.slot]
        for rows, part in self._attended[task.slot]:
            out[rows].copy_(part, non_blocking=True)
        return sum(part.nbytes for _, part in self._attended[task.slot])

    def end(self, task: Task) -> torch.Tensor:
        """Return the merged result, [batch, 1, attended]."""
        return self._outputs[task.slot].view(len(self._batches[task.batch]), 1, -1)

    def _first_on_cpu(self, task: Task) -> int:
        """Return the first sequence of a batch with a row that the CPU attends to."""
        heads = self._attention(task).num_kv_heads
        return self.cache.first_row_attended_at(task, "cpu") // heads

    def _attention(self, task: Task) -> AttentionSpec:
        return self.model.layer(self._numbers[task.layer]).attention

    def _empty_rows(self, task: Task, qkv: torch.Tensor, *, pins: bool = False) -> torch.Tensor:
        spec = self._attention(task)
        shape = len(qkv) * spec.num_kv_heads, spec.group_size, spec.attended_dim
        return qkv.new_empty(shape, pin_memory=pins)

    def _attend_rows(
        self,
        task: Task,
        place: str,
        qkv: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        first_sequence: int = 0,
    ) -> list[tuple[slice, torch.Tensor]]:
        """Append the new token to each segment of a device, and attend to the segment.

        ``qkv`` and ``out`` [rows, group, attended_dim] are those of the batch's sequences from
        ``first_sequence`` on. Returns the filled rows of the batch, each with its part of ``out``.
        """
        segments = self.cache.attended_at(task, place)
        if not segments:
            return []
        spec = self._attention(task)
        q, keys_values = _by_row(qkv, spec)
        void_slots = self._void_slots_of(task, place)
        before = first_sequence * spec.num_kv_heads
        filled = []
        for segment, context in segments:
            rows = slice(segment.first_row - before, segment.end_row - before)
            self.cache.append(task, context, keys_values[:, rows])
            kernels.decode_attention(
                q,
                context,
                out[rows],
                first_row=rows.start,
                void_slots=None if void_slots is None else void_slots[first_sequence:],
                # Grouped-query attention has scaled its queries.
                scale=spec.scale if spec.latent else None,
                soft_cap=spec.soft_cap,
                sinks=sinks,
                slopes=slopes_of(spec, context.device),
                packing=self.cache.layout(task).packing,
                sparsity=self._sparsity,
                value_sums=self.cache.value_sums(task, segment),
                begins=task.token == 1,
            )
            filled.append((slice(segment.first_row, segment.end_row), out[rows]))
        return filled

    def _void_slots_of(self, task: Task, place: str) -> torch.Tensor | None:
        """Return the void slots of a batch (see ``CacheLayout.void_slots``), made once a pass for
        all layers of a kind; ``None`` where no sequence has any."""
        layout, batch = self.cache.layout(task), self._batches[task.batch]
        prompt_len = batch.prompt_ids.shape[1]
        if not layout.has_void_slots(batch.shortest, prompt_len, task.token):
            return None
        key = place, id(layout), task.batch
        token, found = self._void_slots.get(key, (0, None))
        if found is None or (layout.is_ring and token != task.token):
            lengths = self._lengths[place][task.batch]
            found = layout.void_slots(lengths, prompt_len, task.token)
            self._void_slots[key] = task.token, found
        return found


def _by_row(qkv: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [sequences, heads, head_dim] as a view, and a copy of the vectors to cache,
    such as keys and values: [vectors, rows, head_dim]."""
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    keys_values = heads[:, spec.num_heads :].unflatten(1, (spec.cached_vectors, spec.num_kv_heads))
    return heads[:, : spec.num_heads], keys_values.transpose(0, 1).flatten(1, 2)

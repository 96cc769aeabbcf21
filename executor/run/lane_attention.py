"""Attention of lanes: those that decode to their pages, prompts within themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.model import projections
from executor.model.alibi import slopes_of
from executor.model.matrices import LayerWeights
from executor.model.rotations import PassRotations
from executor.run.chunks import Chunk, PromptPart
from executor.run.lanes import LaneTable
from executor.run.pass_plan import PassBatch, void_slots
from executor.run.prompt_keys import PromptKeys
from executor.stores.paged_cache import PagedCache
from profiles import kernels

# Keys and values of some tokens, or the rows that are both: [tokens, 1, rows, head_dim] each.
Vectors = tuple[torch.Tensor, ...]


class LaneAttention:
    """Caches what a layer makes of the rows of a batch, and attends to it.

    Parameters
    ----------
    cache
        The pages of all layers.
    table
        The lanes, with the numbers of their pages.
    """

    def __init__(self, policy: Policy, cache: PagedCache, table: LaneTable) -> None:
        self._cache, self._table = cache, table
        self._sparsity = policy.attention_sparsity
        self._rotations = PassRotations(policy.model)
        self._prompt_keys = PromptKeys()
        self._batches: Sequence[PassBatch] = ()
        # By batch, window and kind of window, of this pass.
        self._voids: dict[tuple[int, int | None, bool], torch.Tensor | None] = {}

    def start_pass(self, batches: Sequence[PassBatch]) -> None:
        """Prepare for a pass."""
        self._batches = batches
        self._voids = {}
        self._rotations.start_pass([(batch.positions, batch.most_positions) for batch in batches])

    def attend(
        self, task: Task, chunk: Chunk, x: torch.Tensor, weights: LayerWeights, layer: LayerSpec
    ) -> torch.Tensor:
        """Run a layer up to its output projection for the rows of a chunk.

        Parameters
        ----------
        x
            Hidden states [rows, 1, hidden_size]; not changed.

        Returns
        -------
        torch.Tensor
            [rows, 1, ``output_size``].
        """
        attention, count = layer.attention, chunk.num_decode
        rotation = self._rotations.of(task.batch, attention, chunk.rows)
        queries, cached = projections.project_prompt(x, weights, rotation, layer)
        out = x.new_empty(len(x), 1, attention.output_size)
        if count:
            first = tuple(vector[:count] for vector in cached)
            attended = self._decode(task, queries[:count], first, weights, attention)
            out[:count] = projections.make_values(attended, weights, attention)
        for part in chunk.prompts:
            own = tuple(vector[part.rows, 0] for vector in cached)
            so_far = self._prompt_keys.so_far(part, own)
            if part.is_last:
                self._write_prompt(task, part, so_far)
            prefix = self._prefix_runs(task, part)
            out[part.rows, 0] = projections.attend_part(
                queries[part.rows, 0],
                [*prefix, kernels.KeyRun.of(so_far[0], so_far[-1])],
                weights,
                attention,
                first_position=part.first_position,
                first_key=part.begins - sum(run.num_tokens for run in prefix),
            )
        return out

    def _write_prompt(self, task: Task, part: PromptPart, vectors: Vectors) -> None:
        """Cache a prompt's tokens, and those of its prefix if it is the first to have it."""
        lane, cache = self._table.lanes[part.lane], self._cache
        sequence, first = [vector[None] for vector in vectors], part.begins
        if lane.prefix >= 0:
            prefix = self._table.prefix_pages(lane.prefix)
            is_ring = cache.of(task).ring is not None
            if not lane.skipped:
                cache.write_prompt(task, prefix, [x[:, : lane.prefix_len] for x in sequence])
            elif lane.is_cached and is_ring:
                cache.copy_prefix(task, prefix, self._table.pages(part.lane), lane.prefix_len)
            if not is_ring:
                # What is before is in the prefix's pages.
                sequence = [x[:, lane.prefix_len - first :] for x in sequence]
                first = lane.prefix_len
        if lane.is_cached:
            cache.write_prompt(task, self._table.pages(part.lane), sequence, first)

    def _prefix_runs(self, task: Task, part: PromptPart) -> list[kernels.KeyRun]:
        """Return what the cache keeps of the tokens before a prompt's rows, if there are any."""
        if not part.begins:
            return []
        pages = self._table.prefix_pages(self._table.lanes[part.lane].prefix)
        return [self._cache.prefix_run(task, pages, part.begins)]

    def _decode(
        self,
        task: Task,
        queries: torch.Tensor,
        cached: Vectors,
        weights: LayerWeights,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Cache the new tokens of a batch, and attend; returns [lanes, 1, ``attended_size``]."""
        batch, layer = self._batches[task.batch], self._cache.of(task)
        slots = batch.slots[layer.ring_number]
        self._cache.append(task, slots.pages, slots.offsets, cached)
        shape = len(queries) * spec.num_kv_heads, spec.group_size, spec.attended_dim
        out = queries.new_empty(shape)
        kernels.paged_attention(
            projections.decode_queries(queries, cached, weights, spec),
            layer.pool,
            out,
            tables=slots.tables,
            lengths=slots.lengths,
            voids=self._voids_of(task.batch, spec, layer.ring),
            order=batch.order,
            # Grouped-query attention has scaled its queries.
            scale=spec.scale if spec.latent else None,
            soft_cap=spec.soft_cap,
            sinks=projections.sinks_of(weights, spec),
            slopes=slopes_of(spec, queries.device),
            packing=layer.packing,
            sparsity=self._sparsity,
            value_sums=layer.value_sums,
            lanes=batch.lanes,
            begins=batch.begins,
        )
        return out.view(len(queries), 1, -1)

    def _voids_of(self, batch: int, spec: AttentionSpec, ring: int | None) -> torch.Tensor | None:
        """Return the void slots of a batch, made once a pass for all layers of a kind."""
        key = batch, spec.window, spec.is_chunked
        if key not in self._voids:
            self._voids[key] = void_slots(self._batches[batch], spec, ring)
        return self._voids[key]

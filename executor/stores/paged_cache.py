"""Keys and values of lanes, in pages.

The pages of a layer are [pages, rows, vectors, PAGE, width]. Rows are the key heads of one
sequence. Vectors are keys and values, or of latent attention one that is both. In a packed cache,
each vector of a token is packed on arrival and stored as ``width`` bytes. A layer with a window
keeps a ring of whole pages: the token at a position takes the slot of that position modulo the
ring.

A layer's cache may rest on disk. Its pages in use are then read into one of two buffers, which has
the same layout, before the layer is computed. The pages with new tokens are written back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import decoder_numbers, round_up
from costmodel.model.tensor_layout import row_packing
from costmodel.plan.cuts import cache_spec
from costmodel.plan.lane_cache import cache_sizes, layers_on_disk
from costmodel.plan.pages import PAGE, PoolSizes, ring_tokens, rings_of
from costmodel.plan.policy import Policy
from costmodel.pricing.buffers import NUM_BUFFERS
from costmodel.pricing.memory import SUM_BYTES
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.stores.cache_rows import in_stored_form
from executor.stores.page_runs import READ_THROUGH_BYTES, Integers, PassPages, byte_runs
from executor.stores.scratch_file import ScratchFile
from profiles.aligned_io import PAGE_BYTES
from profiles.compute_plan import DTYPES
from profiles.kernels import KeyRun
from profiles.packing import Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPages:
    """The cache of one layer.

    Parameters
    ----------
    pool
        [pages, rows, vectors, PAGE, width].
    steps
        From a vector of a token to its others, int64 [rows * vectors], in vectors.
    ring, ring_number
        Slots of a sequence, ``None`` for all of its tokens; and the place of that ring in
        ``rings_of`` the model.
    packing
        Of a vector; ``None`` for a cache in the model's dtype.
    value_sums
        For sparse attention: the sums of the values of each lane, float32 [lanes, rows, head_dim].
    """

    pool: torch.Tensor
    steps: torch.Tensor
    ring: int | None
    ring_number: int
    packing: Packing | None
    value_sums: torch.Tensor | None = None


class PagedCache:
    """The pages of all layers, allocated once.

    Parameters
    ----------
    policy
        Whose ``lanes`` set the number of pages.
    machine
        Its CPU arena has room for the pages.

    Attributes
    ----------
    layers
        The cache of each decoder layer: one entry where it is in memory, and where it is on disk
        one for each staging buffer.
    file
        Must be set before a run where ``disk_bytes`` is above zero.
    """

    def __init__(self, policy: Policy, machine: Machine) -> None:
        assert policy.lanes is not None
        model = policy.model
        self._policy, self._arena = policy, machine.arenas["cpu"]
        self._rings = rings_of(model)
        self.sizes = PoolSizes.of(
            model,
            pool_tokens=policy.lanes.pool_tokens,
            most_lanes=policy.block_size * policy.blocks_in_flight,
        )
        self._numbers = decoder_numbers(model)
        on_disk = layers_on_disk(policy)
        sizes = [round_up(size, PAGE_BYTES) for size in cache_sizes(policy)]
        starts = itertools.accumulate((sizes[layer] for layer in on_disk), initial=0)
        *self._starts, self._disk_bytes = starts
        self._places = {layer: place for place, layer in enumerate(on_disk)}
        self._staging = [
            self._arena.allocate("cache staging", max(sizes)) for _ in range(NUM_BUFFERS) if on_disk
        ]
        self.layers = [self._pages(layer) for layer in range(model.num_layers)]
        self.file: ScratchFile | None = None
        self._pass: tuple[int, Sequence[PassPages]] = (0, ())

    def disk_bytes(self) -> int:
        """Bytes of the cache in the file."""
        return self._disk_bytes

    def of(self, task: Task) -> LayerPages:
        """Return the cache of a task's layer."""
        held = self.layers[self._numbers[task.layer]]
        return held[task.slot] if len(held) > 1 else held[0]

    def start_pass(self, number: int, pages: Sequence[PassPages]) -> None:
        """Prepare for a pass; ``pages`` are by ring of the model."""
        # At once: a layer of this pass may be read at any time, see ``read``.
        self._pass = number, pages

    def read(self, task: Task) -> int:
        """Read a layer's pages in use from disk; returns the bytes."""
        number, rings = self._pass
        pages = rings[self.of(task).ring_number]
        # The first layer of the next pass is read in this one, and takes what this one adds.
        wanted = pages.present if task.token == number else pages.used
        runs = self._runs(task, wanted, gap_bytes=READ_THROUGH_BYTES)
        assert self.file is not None
        self.file.read_runs(self._staging[task.slot], runs, self._start(task))
        return sum(run.stop - run.start for run in runs)

    def write(self, task: Task) -> int:
        """Write a layer's pages with new tokens to disk; returns the bytes."""
        _, rings = self._pass
        runs = self._runs(task, rings[self.of(task).ring_number].written)
        assert self.file is not None
        self.file.write_runs(self._staging[task.slot], runs, self._start(task))
        return sum(run.stop - run.start for run in runs)

    def _runs(self, task: Task, pages: Integers, *, gap_bytes: int = 0) -> list[slice]:
        pool = self.of(task).pool
        return byte_runs(pages, pool.nbytes // len(pool), gap_bytes=gap_bytes)

    def _start(self, task: Task) -> int:
        """Return where a layer's pages begin in the file."""
        return self._starts[self._places[self._numbers[task.layer]]]

    def append(
        self,
        task: Task,
        pages: torch.Tensor,
        offsets: torch.Tensor,
        vectors: Sequence[torch.Tensor],
    ) -> None:
        """Store one token of each lane.

        Parameters
        ----------
        pages, offsets
            The token's page and its place there, int64 [lanes].
        vectors
            Keys and values, or the rows that are both: [lanes, 1, rows, head_dim] each.
        """
        layer = self.of(task)
        stored = [in_stored_form(vector, layer.packing)[:, 0] for vector in vectors]
        # Whole vectors by their number in the pool: an index of several dimensions is slower.
        firsts = pages * (layer.steps.numel() * PAGE) + offsets
        places = (firsts[:, None] + layer.steps).flatten()
        width = layer.pool.shape[-1]
        layer.pool.view(-1, width)[places] = torch.stack(stored, dim=2).view(-1, width)

    def write_prompt(
        self,
        task: Task,
        pages: Sequence[Sequence[int]],
        vectors: Sequence[torch.Tensor],
        first_position: int = 0,
    ) -> None:
        """Store the tokens of one prompt that its layer keeps, the last ones of a ring.

        Parameters
        ----------
        pages
            Those of the lane, by ring of the model, in order.
        vectors
            Keys and values, or the rows that are both: [1, tokens, rows, head_dim] each.
        first_position
            The position of the first token.
        """
        layer = self.of(task)
        held, end = pages[layer.ring_number], first_position + vectors[0].shape[1]
        oldest = first_position if layer.ring is None else max(first_position, end - layer.ring)
        for kind, vector in enumerate(vectors):
            kept = vector[:, oldest - first_position :]
            stored = in_stored_form(kept, layer.packing)[0].transpose(0, 1)
            for first in range(oldest - oldest % PAGE, end, PAGE):
                # The part of the prompt on one page; only the oldest may begin within it.
                begin, stop = max(first, oldest), min(first + PAGE, end)
                page = layer.pool[held[first // PAGE % len(held)], :, kind]
                page[:, begin - first : stop - first] = stored[:, begin - oldest : stop - oldest]

    def copy_prefix(
        self,
        task: Task,
        prefix_pages: Sequence[Sequence[int]],
        pages: Sequence[Sequence[int]],
        num_tokens: int,
    ) -> None:
        """Copy what a ring keeps of a prefix of ``num_tokens``, whole pages, into a lane's pages;
        both are by ring of the model."""
        layer = self.of(task)
        source = _in_order(prefix_pages[layer.ring_number], num_tokens)
        target = _in_order(pages[layer.ring_number], num_tokens)[-len(source) :]
        layer.pool[target] = layer.pool[source]

    def prefix_run(
        self, task: Task, prefix_pages: Sequence[Sequence[int]], num_tokens: int
    ) -> KeyRun:
        """Return what a layer keeps of a prefix of ``num_tokens``, the last ones of a ring."""
        layer = self.of(task)
        assert layer.packing is None
        pages = _in_order(prefix_pages[layer.ring_number], num_tokens)
        table = torch.tensor(pages, dtype=torch.int32)
        return KeyRun.of_pages(layer.pool, table, len(pages) * PAGE)

    def _pages(self, number: int) -> tuple[LayerPages, ...]:
        """Allocate the cache of a decoder layer."""
        policy, kind = self._policy, self._policy.model.layer(number)
        cache = cache_spec(policy, kind)
        packing = row_packing(cache.width, policy.cache_bits, policy.group_size)
        dtype = torch.uint8 if packing else DTYPES[policy.model.dtype]
        ring = ring_tokens(cache.window)
        ring_number = self._rings.index(ring)
        width = packing.row_bytes if packing else cache.width
        shape = self.sizes.pages[ring_number], cache.rows_per_sequence, cache.vectors, PAGE, width
        num_bytes = math.prod(shape) * dtype.itemsize
        buffers = self._staging
        if number not in self._places:
            buffers = [self._arena.allocate("cache", num_bytes)]
        value_sums = self._sums(kind, cache.rows_per_sequence, cache.width)
        return tuple(
            LayerPages(
                pool=buffer[:num_bytes].view(dtype).view(shape),
                steps=torch.arange(cache.rows_per_sequence * cache.vectors) * PAGE,
                ring=ring,
                ring_number=ring_number,
                packing=packing,
                value_sums=value_sums,
            )
            for buffer in buffers
        )

    def _sums(self, kind: LayerSpec, rows: int, width: int) -> torch.Tensor | None:
        """Return a buffer for the sums of values, where sparse attention keeps them.

        Latent attention reads all values. In a ring, older values drop out of the sum.
        """
        attention = kind.attention
        is_dense = self._policy.attention_sparsity == 1
        if is_dense or attention.latent is not None or attention.window is not None:
            return None
        shape = self._policy.block_size * self._policy.blocks_in_flight, rows, width
        raw = self._arena.allocate("value sums", math.prod(shape) * SUM_BYTES)
        return raw.view(torch.float32).view(shape)


def _in_order(pages: Sequence[int], num_tokens: int) -> list[int]:
    """Return the pages that have the last of ``num_tokens`` tokens, whole pages, in their order;
    in a ring they begin anywhere."""
    count = num_tokens // PAGE
    return [pages[i % len(pages)] for i in range(max(0, count - len(pages)), count)]

"""The cuts of a policy: its fractions as whole rows, experts and sequences.

- Each component is cut between two rows, at the place nearest to the fraction.
- Experts are never cut. Some layers keep one expert more on a tier than others, so that all layers
  together are nearest to the fraction.
- The cache of a batch is cut between (sequence, key head) rows, in the order GPU, CPU, disk. The
  CPU attends to the last of these rows.
- Hidden states are cut between sequences.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from costmodel.model.cache import CacheSpec, cache_of
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import (
    ComponentLayout,
    LayerLayout,
    has_small_chunks,
    model_layers,
    round_up,
)
from costmodel.plan.policy import Placement, Policy
from profiles.aligned_io import PAGE_BYTES

# For each layer with experts, all of their numbers, the most used first.
ExpertOrder = Sequence[tuple[int, ...]]
# The fractional parts of its multiples spread evenly over [0, 1), for any number of multiples.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentCut:
    """Bytes [0, gpu_end) of a component are on the GPU, [gpu_end, cpu_end) on the CPU, the rest
    on disk."""

    gpu_end: int
    cpu_end: int
    num_bytes: int

    @property
    def off_gpu_bytes(self) -> int:
        """Bytes outside the GPU."""
        return self.num_bytes - self.gpu_end

    @property
    def cpu_bytes(self) -> int:
        """Bytes in CPU memory."""
        return self.cpu_end - self.gpu_end

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk."""
        return self.num_bytes - self.cpu_end


class ExpertPlaces:
    """Where each expert of a layer is among those stored: the first are on the fastest tier.

    A cache changes it as a run goes on.
    """

    def __init__(self, order: Sequence[int]) -> None:
        # By place, and by number.
        self.experts = list(order)
        self.places = sorted(range(len(order)), key=self.experts.__getitem__)

    def exchange(self, expert: int, other: int) -> None:
        """Let two experts change places."""
        place, there = self.places[expert], self.places[other]
        self.places[expert], self.places[other] = there, place
        self.experts[place], self.experts[there] = other, expert


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedComponent:
    """A component of a layer and its cuts."""

    layer: int
    layout: ComponentLayout
    cut: ComponentCut
    # Bytes of experts in CPU memory that the CPU multiplies in place in decode. They are the last
    # bytes there.
    bytes_in_place: int = 0
    # Where each expert is among those stored here; ``None``: by number. The weight file and the
    # checkpoint have them by number in any case.
    order: ExpertPlaces | None = None

    @property
    def places(self) -> Sequence[int]:
        """The place of each expert among those stored here."""
        return self.order.places if self.order else range(self.layout.num_units)

    def places_of(self, experts: Sequence[int]) -> list[int]:
        """Return the places of some experts, in increasing order."""
        places = self.places
        return sorted(places[expert] for expert in experts)

    @property
    def first_disk_byte(self) -> int:
        """The first byte of the weight file that may be read: any expert, where places change."""
        return 0 if self.order else self.cut.cpu_end

    def stored_ranges(self, first: int, end: int) -> Iterator[tuple[int, slice]]:
        """Yield the parts of bytes [first, end) that are adjacent in the weight file.

        Each is its first byte there, and its place in the range.
        """
        if self.order is None:
            yield first, slice(0, end - first)
            return
        size = self.layout.unit_bytes
        for place in self.layout.units_between(first, end):
            low, high = max(first, place * size), min(end, (place + 1) * size)
            expert = self.order.experts[place]
            yield low + (expert - place) * size, slice(low - first, high - first)

    @property
    def units_in_place(self) -> range:
        """The experts that the CPU multiplies in place."""
        size = self.layout.unit_bytes
        end = self.cut.cpu_end // size if self.bytes_in_place else 0
        return range(end - self.bytes_in_place // size, end)


# For each layer, its components.
PlacedLayers = tuple[tuple[PlacedComponent, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows of a batch's cache that one tier stores and one device attends to.

    A row is one key head of one sequence: row ``s * num_kv_heads + h``. ``home`` is the tier,
    ``attended`` the tier of the device.
    """

    first_row: int
    end_row: int
    home: str
    attended: str
    token_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows in the segment."""
        return self.end_row - self.first_row


def cut_component(layout: ComponentLayout, placement: Placement) -> ComponentCut:
    """Cut a component's run of bytes at the boundaries nearest to the placement."""
    # Both cuts are measured from the start of the run, so that their errors do not add up.
    gpu_end = layout.cut_near(placement.gpu * layout.num_bytes)
    cpu_end = layout.num_bytes
    if placement.disk > 0:
        cpu_end = max(gpu_end, layout.cut_near((1 - placement.disk) * layout.num_bytes))
    if placement.cpu == 0:
        gpu_end = cpu_end
    return ComponentCut(gpu_end=gpu_end, cpu_end=cpu_end, num_bytes=layout.num_bytes)


def deal_units(
    layout: ComponentLayout, placement: Placement, num_layers: int
) -> list[ComponentCut]:
    """Cut the experts in each of the layers that have them.

    One layer has too few experts to come near to a fraction, so some layers get one more than
    others. These layers are spread evenly, because weights are loaded only a few layers ahead.
    """
    whole = layout.num_units * num_layers
    cpu_end = whole - round(placement.disk * whole)
    gpu_end = min(round(placement.gpu * whole), cpu_end) if placement.cpu > 0 else cpu_end
    # Layers get their extra unit in the same order at both cuts, so ``gpu_end <= cpu_end``.
    return [
        ComponentCut(
            gpu_end=_dealt(gpu_end, num_layers, turn) * layout.unit_bytes,
            cpu_end=_dealt(cpu_end, num_layers, turn) * layout.unit_bytes,
            num_bytes=layout.num_bytes,
        )
        for turn in spread(num_layers)
    ]


def _dealt(units: int, num_layers: int, turn: int) -> int:
    """Return the units of one layer; the layers with the first turns get one more."""
    each, rest = divmod(units, num_layers)
    return each + (turn < rest)


@functools.cache
def spread(count: int) -> tuple[int, ...]:
    """Return the turn of each of ``count`` places; places of consecutive turns are far apart."""
    order = sorted(range(count), key=lambda place: place * GOLDEN_RATIO % 1)
    turns = {place: turn for turn, place in enumerate(order)}
    return tuple(turns[place] for place in range(count))


def policy_layers(policy: Policy, *, has_gpu: bool) -> tuple[LayerLayout, ...]:
    """Return the layouts of all layers that a policy's schedule visits. Of a policy, only the
    encoding of the weights counts."""
    return model_layers(
        policy.model,
        policy.weight_bits,
        policy.group_size,
        has_small_chunks=has_small_chunks(policy.model, has_gpu=has_gpu),
    )


def place_weights(
    policy: Policy, *, has_gpu: bool, expert_order: ExpertOrder | None = None
) -> PlacedLayers:
    """Cut every component of every layer by a policy.

    ``expert_order`` is the order of the experts in each layer that has any: the first are stored on
    the fastest tier. ``None`` stores them by number.
    """
    orders = iter(expert_order or ())
    layers = policy_layers(policy, has_gpu=has_gpu)
    # Equal layers are the same object.
    counts = Counter(id(layout) for layer in layers for layout in layer.components)
    dealt: dict[int, Iterator[ComponentCut]] = {}
    placed = []
    cpu_units = units_in_place = 0
    for index, layer in enumerate(layers):
        components = []
        for layout in layer.components:
            placement, in_place, order = policy.weights[layout.name], 0, None
            if not layout.is_experts:
                cut = cut_component(layout, placement)
            else:
                if id(layout) not in dealt:
                    dealt[id(layout)] = iter(deal_units(layout, placement, counts[id(layout)]))
                cut, order = next(dealt[id(layout)]), next(orders, None)
                # Of the experts in CPU memory so far, the number that is nearest to the fraction.
                cpu_units += cut.cpu_bytes // layout.unit_bytes
                if has_gpu:
                    # round() rounds halves to even, which would put a layer's number one off.
                    in_place = math.floor(policy.cpu_experts * cpu_units + 0.5) - units_in_place
                    units_in_place += in_place
            components.append(
                PlacedComponent(
                    layer=index,
                    layout=layout,
                    cut=cut,
                    bytes_in_place=in_place * layout.unit_bytes,
                    order=ExpertPlaces(order) if order else None,
                )
            )
        placed.append(tuple(components))
    return tuple(placed)


def cache_spec(policy: Policy, layer: LayerSpec) -> CacheSpec:
    """Return the cache of a layer under a policy."""
    return cache_of(layer, policy.cache_bits, policy.group_size, policy.model.dtype_bytes)


def cut_cache(
    policy: Policy, cache: CacheSpec, batch_size: int, *, has_gpu: bool
) -> tuple[Segment, ...]:
    """Cut a layer's cache rows for a batch of ``batch_size`` sequences into segments.

    On disk, a token of a segment takes whole pages, so that one aligned write appends it. The
    number of rows on disk is therefore rounded to a multiple of the rows that fill a page.
    """
    rows = batch_size * cache.rows_per_sequence
    row_bytes, unit = cache.row_bytes, cache.rows_per_page
    gpu_end, cpu_end = _cut_rows(policy.cache, rows, unit)
    attended_from = rows - round(policy.cpu_attention * (rows - gpu_end)) if has_gpu else 0
    if attended_from > cpu_end:
        # A cut among the rows on disk must not add a page. Where a unit of rows fills whole pages,
        # the cut falls between two units; otherwise the rows on disk are not cut.
        if unit * row_bytes % PAGE_BYTES:
            unit = rows - cpu_end
        fetched = attended_from - cpu_end
        fewer = fetched // unit * unit
        more = min(fewer + unit, rows - cpu_end)
        attended_from = cpu_end + (fewer if fetched - fewer < more - fetched else more)
    bounds = [("gpu", 0, gpu_end), ("cpu", gpu_end, cpu_end), ("disk", cpu_end, rows)]
    segments = []
    for home, start, end in bounds:
        split = end if home == "gpu" and has_gpu else min(max(attended_from, start), end)
        for attended, first, last in (("gpu", start, split), ("cpu", split, end)):
            if first < last:
                token_bytes = (last - first) * row_bytes
                if home == "disk":
                    token_bytes = round_up(token_bytes, PAGE_BYTES)
                segments.append(
                    Segment(
                        first_row=first,
                        end_row=last,
                        home=home,
                        attended=attended,
                        token_bytes=token_bytes,
                    )
                )
    return tuple(segments)


def _cut_rows(cache: Placement, rows: int, rows_per_page: int) -> tuple[int, int]:
    disk_rows = round(cache.disk * rows)
    if 0 < disk_rows < rows:
        disk_rows = min(rows, round(cache.disk * rows / rows_per_page) * rows_per_page)
    gpu_end = min(round(cache.gpu * rows), rows - disk_rows)
    if cache.cpu == 0:
        gpu_end = rows - disk_rows
    return gpu_end, rows - disk_rows


def cut_hidden(policy: Policy, batch_size: int) -> tuple[int, int]:
    """Return the ends of the disk part and of the CPU part of a batch's hidden states, in
    sequences; the GPU stores the rest.

    The disk part comes first, because direct reads need an aligned start of the buffer.
    """
    placement = policy.activations
    disk_end = round(placement.disk * batch_size)
    cpu_end = max(disk_end, batch_size - round(placement.gpu * batch_size))
    return disk_end, cpu_end

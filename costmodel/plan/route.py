"""The moves that a policy needs, derived from its cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from costmodel.model.layout import LayerLayout, decoder_numbers
from costmodel.plan.cuts import PlacedLayers, Segment, cut_hidden
from costmodel.plan.lane_cache import layers_on_disk
from costmodel.plan.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The moves that a policy needs: tasks without anything to move are never made."""

    has_gpu: bool
    disk_weights: frozenset[int]
    sent_weights: frozenset[int]
    disk_cache: bool
    sends_cache: bool
    fetches_from_disk: bool
    stores_cache: bool
    attends_on_cpu: bool
    disk_hidden: bool
    sends_hidden: bool
    # Layers whose experts are loaded on demand in decode; those of prompts, too, where a CPU walks
    # through them (see ``Policy.walks_experts``).
    demanding: frozenset[int] = frozenset()
    # Layers with experts that the CPU multiplies in place in decode.
    experts_in_place: frozenset[int] = frozenset()
    # Layers whose cache of lanes is on disk, in order.
    staged_caches: tuple[int, ...] = ()

    @property
    def compute_channel(self) -> str:
        """The channel of the device that computes."""
        return "gpu_compute" if self.has_gpu else "cpu_compute"


def route_of(
    policy: Policy,
    layers: Sequence[LayerLayout],
    weights: PlacedLayers,
    segments: Sequence[Sequence[Segment]],
    *,
    has_gpu: bool,
) -> Route:
    """Derive the moves that a policy needs from its cuts."""
    # The embedding is gathered, never staged. Experts that are walked through have room elsewhere.
    walks = policy.walks_experts(has_gpu=has_gpu)
    staged = {
        index: [c.cut for c in components if not (walks and c.layout.is_experts)]
        for index, (layer, components) in enumerate(zip(layers, weights, strict=True))
        if layer.kind != "embed"
    }
    on_disk = {i for i, cuts in staged.items() if any(cut.disk_bytes for cut in cuts)}
    off_gpu = {i for i, cuts in staged.items() if any(c.gpu_end < c.num_bytes for c in cuts)}
    cache = [segment for kind in segments for segment in kind]
    fetched = [s for s in cache if s.attended == "gpu" and s.home != "gpu"]
    disk_end, cpu_end = cut_hidden(policy, policy.gpu_batch_size)
    # The first layer of the schedule that belongs to a decoder layer attends.
    numbers = decoder_numbers(policy.model)
    return Route(
        has_gpu=has_gpu,
        disk_weights=frozenset(on_disk),
        sent_weights=frozenset(off_gpu if has_gpu else ()),
        disk_cache=any(s.home == "disk" for s in cache),
        sends_cache=bool(fetched),
        fetches_from_disk=any(s.home == "disk" for s in fetched),
        stores_cache=has_gpu and any(s.home != "gpu" for s in cache),
        attends_on_cpu=has_gpu and any(s.attended == "cpu" for s in cache),
        demanding=frozenset(_demanding(layers, weights, has_gpu) if policy.loads_on_demand else ()),
        experts_in_place=frozenset(c.layer for layer in weights for c in layer if c.bytes_in_place),
        disk_hidden=disk_end > 0,
        sends_hidden=has_gpu and cpu_end > 0,
        staged_caches=tuple(numbers.index(layer) for layer in layers_on_disk(policy)),
    )


def _demanding(
    layers: Sequence[LayerLayout], weights: PlacedLayers, has_gpu: bool
) -> Iterator[int]:
    """Yield the layers with experts that are stored off the compute device."""
    for index, layer in enumerate(layers):
        for component in weights[index] if layer.kind == "experts" else ():
            cut = component.cut
            here = cut.gpu_end if has_gpu else cut.cpu_end
            if component.layout.is_experts and here < cut.num_bytes:
                yield index

"""Which moves a policy needs at all, derived from its cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costmodel.model.layout import LayerLayout
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import cache_spec, cut_cache, cut_hidden, cut_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which moves a policy needs at all: tasks that would move nothing are never made."""

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

    @property
    def compute_channel(self) -> str:
        """The channel of the device that computes."""
        return "gpu_compute" if self.has_gpu else "cpu_compute"


def route_of(policy: Policy, layers: Sequence[LayerLayout], *, has_gpu: bool) -> Route:
    """Derive from a policy's cuts which moves it needs."""
    cuts = {i: cut_layer(c, policy.weights) for i, c in enumerate(layers) if c.kind != "embed"}
    batch = policy.gpu_batch_size
    segments = [
        segment
        for layer in policy.model.layer_kinds
        for segment in cut_cache(policy, cache_spec(policy, layer), batch, has_gpu=has_gpu)
    ]
    disk_end, cpu_end = cut_hidden(policy, batch)
    fetched = [s for s in segments if s.attended == "gpu" and s.home != "gpu"]
    return Route(
        has_gpu=has_gpu,
        disk_weights=frozenset(i for i, cut in cuts.items() if cut.disk_bytes),
        sent_weights=frozenset(i for i, c in cuts.items() if has_gpu and c.gpu_end < c.num_bytes),
        disk_cache=any(s.home == "disk" for s in segments),
        sends_cache=bool(fetched),
        fetches_from_disk=any(s.home == "disk" for s in fetched),
        stores_cache=has_gpu and any(s.home != "gpu" for s in segments),
        attends_on_cpu=has_gpu and any(s.attended == "cpu" for s in segments),
        disk_hidden=disk_end > 0,
        sends_hidden=has_gpu and cpu_end > 0,
    )

"""The cache of lanes, layer by layer: its bytes, and which layers keep it on disk. No torch.

A layer's cache is wholly in memory or wholly on disk. Passes read the layers in turn, so that a
cache on disk is staged while other layers are computed. All of its pages are one run of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from costmodel.plan.cuts import cache_spec, spread
from costmodel.plan.pages import PoolSizes, layer_bytes
from costmodel.plan.policy import Placement, Policy


def cache_sizes(policy: Policy) -> list[int]:
    """Return the bytes of the pages of each decoder layer under a policy with lanes."""
    assert policy.lanes is not None
    model = policy.model
    pool = PoolSizes.of(model, pool_tokens=policy.lanes.pool_tokens, most_lanes=policy.block_size)
    sizes = layer_bytes(model, pool, (cache_spec(policy, kind) for kind in model.layer_kinds))
    return [sizes[kind] for kind in model.layer_order]


def layers_on_disk(policy: Policy) -> tuple[int, ...]:
    """Return the decoder layers that keep their cache on disk, by number.

    They are as many as come nearest to the fraction of the policy, and spread evenly: caches are
    staged only one layer of them ahead.
    """
    if policy.lanes is None or not policy.cache.disk:
        return ()
    shares = list(_shares(policy))
    count = min(range(len(shares)), key=lambda n: abs(shares[n] - policy.cache.disk))
    return tuple(layer for layer, turn in enumerate(spread(len(shares) - 1)) if turn < count)


def round_cache(policy: Policy) -> Policy:
    """Replace the fraction of the cache on disk by that of whole layers."""
    sizes = cache_sizes(policy)
    on_disk = sum(sizes[layer] for layer in layers_on_disk(policy)) / sum(sizes)
    return replace(policy, cache=Placement(cpu=1 - on_disk, disk=on_disk))


def cache_roundings(policy: Policy) -> Iterator[Placement]:
    """Yield the placements of whole layers that are next to a policy's, with less and more on
    disk."""
    wanted, shares = policy.cache.disk, list(_shares(policy))
    below = max(share for share in shares if share <= wanted + 1e-6)
    above = min(share for share in shares if share >= wanted - 1e-6)
    for share in dict.fromkeys((below, above)):
        yield Placement(cpu=1 - share, disk=share)


def _shares(policy: Policy) -> Iterator[float]:
    """Yield the share of the cache on disk with none, one, two and more layers there."""
    sizes = cache_sizes(policy)
    turns = spread(len(sizes))
    order = sorted(range(len(sizes)), key=turns.__getitem__)
    for held in itertools.accumulate((sizes[layer] for layer in order), initial=0):
        yield held / sum(sizes)

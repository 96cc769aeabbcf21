"""The cache of lanes: its tokens, its bytes, and which layers keep it on disk. No torch.

A layer's cache is wholly in memory or wholly on disk. Passes read the layers in turn, so that a
cache on disk is staged while other layers are computed. All of its pages are one run of the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from costmodel.plan.cuts import cache_spec, spread
from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE, PoolSizes, layer_bytes, pages_of
from costmodel.plan.policy import Placement, Policy


def pool_tokens(
    lengths: Lengths, lanes: int, deviations: float, *, shares_prefixes: bool = False
) -> int:
    """Return the tokens that the cache of some lanes has room for: whole pages.

    There is always room for the longest sequence alone, and no more than the longest ones can use
    together. Where the lanes need more, some of them wait (see ``Admission``).

    Parameters
    ----------
    lengths
        Of all requests.
    deviations
        Standard deviations of the tokens of all lanes that there is room for beside their mean;
        infinite: room for the longest sequences together.
    shares_prefixes
        Whether prefixes that requests share are kept once.
    """
    least, shared = pages_of(int(lengths.stored.max())) * PAGE, 0
    if shares_prefixes:
        shared = int(lengths.prefixes.tokens.sum())
        lengths = lengths.own
    stored = np.sort(lengths.stored)[::-1]
    most = sum(pages_of(int(n)) for n in stored[:lanes].tolist()) * PAGE + shared
    most = max(most, least)
    if math.isinf(deviations):
        return most
    mean = lengths.mean_context + PAGE / 2
    needed = shared + lanes * mean + deviations * lengths.sd_context * math.sqrt(lanes)
    return min(most, max(least, pages_of(math.ceil(needed)) * PAGE))


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

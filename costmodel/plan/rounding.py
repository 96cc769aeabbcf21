"""Round a policy's fractions to those that its cuts can keep."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from costmodel.model.layout import model_layers
from costmodel.plan.cuts import (
    cache_spec,
    cut_cache,
    cut_component,
    cut_hidden,
    deal_units,
    place_weights,
    policy_layers,
)
from costmodel.plan.lane_cache import cache_roundings, round_cache
from costmodel.plan.policy import Placement, Policy


def round_policy(policy: Policy, *, has_gpu: bool) -> Policy:
    """Replace a policy's fractions by the fractions of its cuts."""
    return round_rows(round_weights(policy, has_gpu=has_gpu), has_gpu=has_gpu)


def round_weights(policy: Policy, *, has_gpu: bool) -> Policy:
    """Round the fractions of the weights only."""
    return replace(
        policy,
        weights=_weight_fractions(policy, has_gpu),
        cpu_experts=_share_in_place(policy) if has_gpu else policy.cpu_experts,
    )


def round_rows(policy: Policy, *, has_gpu: bool) -> Policy:
    """Round the fractions of the cache and of the hidden states only."""
    batch = policy.gpu_batch_size
    disk_end, cpu_end = cut_hidden(policy, batch)
    hidden = _fractions((batch - cpu_end) / batch, disk_end / batch)
    if policy.lanes is not None and not has_gpu:
        return replace(round_cache(policy), activations=hidden)
    rows = {"gpu": 0, "disk": 0}
    attended = total = 0
    for layer, count in policy.model.kinds_and_counts:
        cache = cache_spec(policy, layer)
        segments = cut_cache(policy, cache, batch, has_gpu=has_gpu)
        for home in rows:
            rows[home] += count * sum(s.num_rows for s in segments if s.home == home)
        attended += count * sum(s.num_rows for s in segments if s.attended == "cpu")
        total += count * batch * cache.rows_per_sequence
    off_gpu = total - rows["gpu"]
    return replace(
        policy,
        cache=_fractions(rows["gpu"] / total, rows["disk"] / total),
        activations=hidden,
        cpu_attention=attended / off_gpu if off_gpu else policy.cpu_attention,
    )


def roundings_of(policy: Policy, *, has_gpu: bool) -> Iterator[Policy]:
    """Yield the policy with its cache, attention and hidden states rounded down and up on each
    tier.

    With few rows or sequences, the nearest number may be far from the best: one too many on a slow
    tier costs more than several too few.
    """
    hidden = list(_hidden_roundings(policy))
    for cache, cpu_attention in _cache_roundings(policy, has_gpu=has_gpu):
        for activations in hidden:
            yield replace(policy, cache=cache, cpu_attention=cpu_attention, activations=activations)


def _cache_roundings(policy: Policy, *, has_gpu: bool) -> Iterator[tuple[Placement, float]]:
    if policy.lanes is not None and not has_gpu:
        yield from ((cache, policy.cpu_attention) for cache in cache_roundings(policy))
        return
    # Only the first kind of layer is rounded both ways; the others take their nearest rows.
    cache = cache_spec(policy, policy.model.layer_kinds[0])
    rows, unit = policy.gpu_batch_size * cache.rows_per_sequence, cache.rows_per_page
    attended = policy.cpu_attention * (1 - policy.cache.gpu) * rows
    on_disk = {min(rows, count * unit) for count in integers_near(policy.cache.disk * rows / unit)}
    for gpu, disk in itertools.product(integers_near(policy.cache.gpu * rows), on_disk):
        if gpu + disk > rows:
            continue
        off_gpu = rows - gpu
        counts = {off_gpu}
        if has_gpu and policy.cpu_attention < 1:
            counts = {min(off_gpu, count) for count in integers_near(attended)}
        for count in counts:
            yield _fractions(gpu / rows, disk / rows), count / off_gpu if off_gpu else 1.0


def _hidden_roundings(policy: Policy) -> Iterator[Placement]:
    batch = policy.gpu_batch_size
    for gpu, disk in itertools.product(
        integers_near(policy.activations.gpu * batch),
        integers_near(policy.activations.disk * batch),
    ):
        if gpu + disk <= batch:
            yield _fractions(gpu / batch, disk / batch)


def integers_near(value: float, tolerance: float = 1e-6) -> set[int]:
    """Return the integers below and above a value, or the only one within ``tolerance`` of it."""
    nearest = round(value)
    is_one = abs(value - nearest) < tolerance
    return {nearest} if is_one else {math.floor(value), math.ceil(value)}


def _weight_fractions(policy: Policy, has_gpu: bool) -> dict[str, Placement]:
    """Return the fractions of each class of components after its cuts."""
    layers = policy_layers(policy, has_gpu=has_gpu)
    sums = {name: [0, 0, 0] for name in policy.weights}
    counts = Counter(map(id, layers))
    for layer in {id(layer): layer for layer in layers}.values():
        for component in layer.components:
            placement, count = policy.weights[component.name], counts[id(layer)]
            cuts, times = [cut_component(component, placement)], count
            if component.is_experts:
                cuts, times = deal_units(component, placement, count), 1
            of_name = sums[component.name]
            of_name[0] += times * sum(cut.gpu_end for cut in cuts)
            of_name[1] += times * sum(cut.disk_bytes for cut in cuts)
            of_name[2] += count * component.num_bytes
    return {
        name: _fractions(gpu / total, disk / total) for name, (gpu, disk, total) in sums.items()
    }


def _share_in_place(policy: Policy) -> float:
    """Return the fraction of the experts in CPU memory that the CPU multiplies in place."""
    placed = place_weights(policy, has_gpu=True) if policy.cpu_experts else ()
    experts = [c for layer in placed for c in layer if c.layout.is_experts]
    # Counted, because experts of one layer may have more bytes than those of another.
    in_memory = sum(c.cut.cpu_bytes // c.layout.unit_bytes for c in experts)
    in_place = sum(len(c.units_in_place) for c in experts)
    return in_place / in_memory if in_memory else policy.cpu_experts


def overall_weights(policy: Policy) -> Placement:
    """Return the fraction of all weight bytes on each tier."""
    layers = model_layers(policy.model, policy.weight_bits, policy.group_size)
    sizes = dict.fromkeys(policy.weights, 0)
    for layer in layers:
        for component in layer.components:
            sizes[component.name] += component.num_bytes
    total = sum(sizes.values())
    gpu, disk = (
        sum(getattr(policy.weights[name], tier) * size for name, size in sizes.items()) / total
        for tier in ("gpu", "disk")
    )
    return _fractions(min(gpu, 1.0), min(disk, 1.0))


def _fractions(gpu: float, disk: float) -> Placement:
    # The middle tier takes the remainder, so that rounding errors do not change the sum.
    return Placement(gpu=gpu, cpu=max(0.0, 1 - gpu - disk), disk=disk)

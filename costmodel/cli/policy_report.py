"""Policies and predictions as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.cli.stored_weights import told_weights
from costmodel.optimizer.optimum import SearchResult
from costmodel.optimizer.sensitivity import shadow_prices
from costmodel.optimizer.whatif import Change
from costmodel.plan.policy import TIERS, Placement, Policy, Prediction
from costmodel.pricing.experts import bytes_ahead, demanded_share
from costmodel.pricing.lane_memory import pool_bytes
from costmodel.pricing.memory import capacities, memory_rows
from costmodel.pricing.price import limits_by_phase, phase_channels
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from costmodel.pricing.stages import stages_of
from profiles.hardware import HardwareProfile
from profiles.units import format_bytes, format_count, format_figure, format_seconds


def format_prediction(policy: Policy, hardware: HardwareProfile, prediction: Prediction) -> str:
    """Lay out a policy, what limits it and what it needs, one fact a line."""
    return "\n".join(
        [
            *_policy_lines(policy, hardware),
            "",
            *_time_lines(policy, hardware, prediction),
            "",
            *_memory_lines(hardware, prediction),
        ]
    )


def tiers_of(hardware: HardwareProfile) -> tuple[str, ...]:
    """Return the tiers of a machine, the fastest first."""
    return TIERS if hardware.has_gpu else tuple(tier for tier in TIERS if tier != "gpu")


def placed_bytes(policy: Policy, hardware: HardwareProfile) -> dict[str, tuple[Placement, float]]:
    """Return the placement and the bytes of each component, of the cache and of hidden states."""
    problem = problem_of(policy, hardware)
    sizes: dict[str, tuple[Placement, float]] = {
        name.replace("_", " "): (placement, problem.sizes.component_bytes[name])
        for name, placement in policy.weights.items()
    }
    rows = policy.workload.prompt_len * policy.block_size
    cache_bytes = problem.cache_sequence_bytes * policy.block_size
    if policy.lanes is not None:
        rows, cache_bytes = policy.lanes.pass_rows, pool_bytes(problem)
    return sizes | {
        "KV cache": (policy.cache, cache_bytes),
        "hidden states": (policy.activations, problem.hidden_token_bytes * rows),
    }


def _work_lines(policy: Policy) -> list[str]:
    """Tell of the prompts, and of the sequences that are at work together."""
    work, lanes = policy.workload, policy.lanes
    count = (
        format_count(work.num_prompts, "prompt") if work.num_prompts else "any number of prompts"
    )
    batches = format_count(policy.num_gpu_batches, "batch")
    told = f"{count} of {work.prompt_len} tokens, {work.gen_len} generated for each"
    if work.lengths is not None:
        told = (
            f"{count} of up to {work.prompt_len} tokens, up to {work.gen_len} generated for each,"
            f" {format_figure(work.mean_output)} in the mean"
        )
    if lanes is None:
        return [
            told,
            f"block of {format_count(policy.block_size, 'sequence')}: {batches} of"
            f" {policy.gpu_batch_size},"
            f" prefilled {policy.prefill_batch_size} at a time",
        ]
    return [
        told,
        f"{policy.block_size} lanes, filled again as sequences end: {batches} of"
        f" {policy.gpu_batch_size}, cache for {lanes.pool_tokens} tokens, passes of at most"
        f" {lanes.pass_rows} tokens",
    ]


def _policy_lines(policy: Policy, hardware: HardwareProfile) -> list[str]:
    tiers = tiers_of(hardware)
    known_as = " (the GPU is emulated)" if hardware.is_emulated else ""
    if hardware.calibrations:
        known_as += f", its rates fitted to {hardware.calibrations[-1].source}"
    lines = [
        f"{policy.model.name} in {policy.model.dtype} on {hardware.name}{known_as}",
        *_work_lines(policy),
        "",
        f"  {'':<15}" + "".join(f"{tier:>22}" for tier in tiers),
    ]
    for name, (placement, total) in placed_bytes(policy, hardware).items():
        cells = [
            f"{getattr(placement, tier):7.1%} {format_bytes(getattr(placement, tier) * total):>12}"
            for tier in tiers
        ]
        lines.append(f"  {name:<15}" + "".join(f"{cell:>22}" for cell in cells))
    if hardware.has_gpu and policy.cache.gpu < 1:
        lines.append(
            f"  the CPU attends to {policy.cpu_attention:.0%} of the cache outside the GPU"
        )
    full = policy.model.full_bits
    if (policy.weight_bits, policy.cache_bits) != (full, full) or policy.model.is_encoded:
        lines.append(f"  weights {told_weights(policy)}; cache in {policy.cache_bits} bits")
    if "experts" in policy.weights:
        lines += _expert_lines(policy, hardware)
    if policy.attention_sparsity < 1:
        lines.append(f"  in decode, a query attends to {policy.attention_sparsity:.0%} of the keys")
    return lines


def _expert_lines(policy: Policy, hardware: HardwareProfile) -> list[str]:
    """Tell how experts outside the memory of the device that computes are loaded."""
    placement = policy.weights["experts"]
    outside = 1 - placement.gpu if hardware.has_gpu else placement.disk
    if not outside:
        return []
    compute_memory = "the GPU" if hardware.has_gpu else "memory"
    lines = []
    if policy.cpu_experts:
        share = policy.cpu_experts
        lines.append(f"  in decode, the CPU multiplies {share:.0%} of the experts in its memory")
    which = "other experts" if policy.cpu_experts else f"experts outside {compute_memory}"
    if not policy.loads_on_demand:
        return [*lines, f"  {which}: all of a layer are loaded ahead"]
    skew = policy.workload.expert_skew
    routing = f"Zipf's law with exponent {skew:.3g}" if skew else "uniform routing"
    lines.append(f"  {which}: loaded on demand, as many as {routing} needs")
    problem = problem_of(policy, hardware)
    stage = stages_of(problem)[-1]
    if early := bytes_ahead(problem, stage):
        size = outside * problem.sizes.component_bytes["experts"]
        loaded = size * demanded_share(problem, stage, problem.rarest_on_disk)
        when = "prefill" if stage.is_prefill else "a pass of decode"
        lines.append(
            f"  {when} reads {format_bytes(loaded)} of experts, {early / loaded:.0%} of it before"
            " tokens are routed"
        )
    return lines


def _time_lines(policy: Policy, hardware: HardwareProfile, prediction: Prediction) -> list[str]:
    if policy.lanes is None:
        limits = limits_by_phase(policy, hardware)
        limited = ", ".join(f"{limit} in {phase}" for phase, limit in limits.items())
        taken = (
            f"a block in {format_seconds(prediction.latency_s)}"
            f" (prefill {format_seconds(prediction.prefill_s)},"
            f" decode {format_seconds(prediction.decode_s)})"
        )
    else:
        limited, taken = prediction.bottleneck, f"the job in {format_seconds(prediction.latency_s)}"
    lines = [
        f"predicted  {format_figure(prediction.throughput_tok_per_s)} token/s: {taken}",
        f"limited by {limited}",
    ]
    busy = sorted(prediction.channel_s.items(), key=lambda item: -item[1])
    lines += [
        f"  {channel:<15}{format_seconds(seconds):>12}  {seconds / prediction.latency_s:4.0%} busy"
        for channel, seconds in busy
        if seconds > 0
    ]
    return lines


def _memory_lines(hardware: HardwareProfile, prediction: Prediction) -> list[str]:
    return [
        f"peak {tier:<10}{format_bytes(prediction.peak_bytes[tier]):>12} of"
        f" {format_bytes(capacity)}"
        for tier, capacity in capacities(hardware).items()
    ]


def format_explanation(result: SearchResult, changes: Sequence[Change]) -> str:
    """Lay out what stands behind a policy: bound, seconds, memory by buffer, what more of
    anything is worth, and what would change the answer."""
    cost, whole, part = "rounding costs", "block", "phase"
    if result.policy.lanes is not None:
        cost = "its start, its end and the size of the cache cost at most"
        whole, part = "job", "pass"
    waits = f", waits {result.cost_of_waits:.1%}" if result.cost_of_waits else ""
    lines = [
        f"bound: no policy exceeds {format_figure(result.bound_tok_per_s, 4)} token/s; this one"
        f" reaches {format_figure(result.job_tok_per_s, 4)} over the whole job"
        f" ({cost} {result.gap:.1%}{waits})",
        f"lower bound of a {whole}: {format_seconds(result.predicted.lower_bound_s)}, the busiest"
        f" channel of each {part} without fixed costs",
        *_channel_lines(result.policy, result.hardware),
        *_buffer_lines(result.policy, result.hardware),
        *_price_lines(result),
        "\nthroughput of the best policy with",
    ]
    for change in changes:
        gain = change.job_tok_per_s / result.job_tok_per_s - 1
        lines.append(
            f"  {change.what:<38}{format_figure(change.job_tok_per_s, 4):>10} token/s  {gain:+7.1%}"
        )
    return "\n".join(lines)


def _channel_lines(policy: Policy, hardware: HardwareProfile) -> list[str]:
    phases = phase_channels(policy, hardware)
    lines = [f"\n  {'busy seconds':<18}" + "".join(f"{phase:>14}" for phase in phases)]
    for channel in next(iter(phases.values())):
        cells = [f"{format_seconds(seconds[channel]):>14}" for seconds in phases.values()]
        lines.append(f"  {channel:<18}" + "".join(cells))
    return lines


def _buffer_lines(policy: Policy, hardware: HardwareProfile) -> list[str]:
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    lines = []
    for tier, rows in memory_rows(problem, shares).items():
        name, terms = max(rows.items(), key=lambda row: sum(row[1].values()))
        lines.append(f"\n{tier} at its peak ({name})")
        lines += [
            f"  {buffer:<18}{format_bytes(use * policy.block_size):>12}"
            for buffer, use in terms.items()
            if use * policy.block_size >= 1
        ]
    return lines


def _price_lines(result: SearchResult) -> list[str]:
    lines = ["\nvalue of one unit more, at this block size (shadow prices)"]
    prices = shadow_prices(result.problem, result.solution, margin=result.margin)
    # What rounds to zero says nothing.
    prices = [price for price in prices if abs(price.tok_per_s) >= 5e-5]
    for price in prices:
        lines.append(
            f"  {price.name:<15}{price.tok_per_s:+10.4f} token/s per {price.unit:<8}"
            f" (of {format_figure(price.amount, 4)})"
        )
    return lines if prices else [*lines, "  zero: no capacity and no rate limits it alone"]

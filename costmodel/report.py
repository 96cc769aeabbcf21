"""Policies and predictions as tables for people."""

from __future__ import annotations

from costmodel.memory import capacities, memory_rows
from costmodel.optimum import SearchResult, shadow_price
from costmodel.policy import Policy, Prediction
from costmodel.problem import problem_of, shares_of
from profiles.hardware import HardwareProfile
from profiles.units import format_bytes, format_seconds


def format_prediction(policy: Policy, hardware: HardwareProfile, prediction: Prediction) -> str:
    """Lay out a policy, what limits it and what it needs, one fact a line."""
    return "\n".join(
        [
            *_policy_lines(policy, hardware),
            "",
            *_time_lines(policy, prediction),
            "",
            *_memory_lines(hardware, prediction),
        ]
    )


def _policy_lines(policy: Policy, hardware: HardwareProfile) -> list[str]:
    problem, workload = problem_of(policy, hardware), policy.workload
    tiers = ("gpu", "cpu", "disk") if hardware.has_gpu else ("cpu", "disk")
    sizes = {
        "weights": (policy.weights, problem.weight_bytes),
        "KV cache": (policy.cache, problem.cache_sequence_bytes * policy.block_size),
        "hidden states": (
            policy.activations,
            problem.hidden_token_bytes * workload.prompt_len * policy.block_size,
        ),
    }
    emulated = " (the GPU is emulated)" if hardware.is_emulated else ""
    count = f"{workload.num_prompts} prompts" if workload.num_prompts else "any number of prompts"
    lines = [
        f"{policy.model.name} in {policy.model.dtype} on {hardware.name}{emulated}",
        f"{count} of {workload.prompt_len} tokens, {workload.gen_len} generated for each",
        f"block of {policy.block_size} sequences: {policy.num_gpu_batches} batches of"
        f" {policy.gpu_batch_size}, prefilled {policy.prefill_batch_size} at a time",
        "",
        f"  {'':<15}" + "".join(f"{tier:>22}" for tier in tiers),
    ]
    for name, (placement, total) in sizes.items():
        cells = [
            f"{getattr(placement, tier):7.1%} {format_bytes(getattr(placement, tier) * total):>12}"
            for tier in tiers
        ]
        lines.append(f"  {name:<15}" + "".join(f"{cell:>22}" for cell in cells))
    if hardware.has_gpu and policy.cache.gpu < 1:
        lines.append(
            f"  of the cache off the GPU, {policy.cpu_attention:.0%} is attended on the CPU"
        )
    return lines


def _time_lines(policy: Policy, prediction: Prediction) -> list[str]:
    lines = [
        f"predicted  {prediction.throughput_tok_per_s:.3g} token/s: a block in"
        f" {format_seconds(prediction.latency_s)} (prefill {format_seconds(prediction.prefill_s)},"
        f" decode {format_seconds(prediction.decode_s)})",
        f"limited by {prediction.bottleneck}",
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


def format_explanation(result: SearchResult, hardware: HardwareProfile) -> str:
    """Lay out what stands behind a policy: bound, memory by buffer, what more memory is worth."""
    policy = result.policy
    problem, shares = problem_of(policy, hardware), shares_of(policy)
    lines = [
        f"no policy exceeds {result.bound_tok_per_s:.4g} token/s in this model; this one reaches"
        f" {result.job_tok_per_s:.4g} over the whole job, {result.gap:.1%} less",
    ]
    for tier, rows in memory_rows(problem, shares).items():
        name, terms = max(rows.items(), key=lambda row: sum(row[1].values()))
        lines.append(f"\n{tier} at its peak ({name})")
        lines += [
            f"  {buffer:<18}{format_bytes(use * policy.block_size):>12}"
            for buffer, use in terms.items()
            if use > 0
        ]
    lines.append("\none GiB more, at this block size")
    for tier, capacity in capacities(hardware).items():
        worth = shadow_price(result.solution, problem, tier, capacity)
        lines.append(f"  {tier:<18}{worth:+9.3f} token/s")
    return "\n".join(lines)

"""The throughput of a job: full blocks, and a last block with the remaining prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from costmodel.plan.policy import Policy
from costmodel.pricing.price import block_seconds
from profiles.hardware import HardwareProfile


def job_throughput(policy: Policy, hardware: HardwareProfile) -> float:
    """Return token/s over all prompts, a partly filled last block included."""
    num_prompts = policy.workload.num_prompts or policy.block_size
    latency_s = 0.0
    if num_full := num_prompts // policy.block_size:
        latency_s += num_full * block_seconds(policy, hardware)
    if last := _last_block(policy, num_prompts % policy.block_size):
        latency_s += block_seconds(last, hardware)
    return num_prompts * policy.workload.gen_len / latency_s


def blocks_of(policy: Policy) -> Iterator[Policy]:
    """Yield the policy of every block of a job; the last block has only the batches it needs."""
    num_prompts = policy.workload.num_prompts or policy.block_size
    for _ in range(num_prompts // policy.block_size):
        yield policy
    if last := _last_block(policy, num_prompts % policy.block_size):
        yield last


def _last_block(policy: Policy, num_sequences: int) -> Policy | None:
    """Return the policy of a partly filled block, whose batches share the sequences evenly."""
    if not num_sequences:
        return None
    num_gpu_batches = -(-num_sequences // policy.gpu_batch_size)
    size = -(-num_sequences // num_gpu_batches)
    return replace(
        policy,
        gpu_batch_size=size,
        prefill_batch_size=min(policy.prefill_batch_size, size),
        num_gpu_batches=num_gpu_batches,
    )

"""The throughput of a job: full blocks, and a last block with the remaining prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.pricing.price import block_seconds
from profiles.hardware import HardwareProfile

# Blocks of a job in step that are priced.
MOST_BLOCKS = 32


def job_throughput(policy: Policy, hardware: HardwareProfile) -> float:
    """Return token/s over all prompts, a partly filled last block included."""
    num_prompts = policy.workload.num_prompts or policy.block_size
    latency_s = 0.0
    if num_full := num_prompts // policy.block_size:
        latency_s += num_full * block_seconds(policy, hardware)
    if last := _last_block(policy, num_prompts % policy.block_size):
        latency_s += block_seconds(last, hardware)
    return num_prompts * policy.workload.gen_len / latency_s


def seconds_in_step(policy: Policy, hardware: HardwareProfile, lengths: Lengths) -> float:
    """Return the seconds of a job whose prompts and answers differ, run in step.

    Prompts of similar length share a block. Each block has the length of its longest prompt and
    takes a pass for each token of its longest answer.
    """
    order = np.argsort(-lengths.prompts, kind="stable")
    blocks = np.split(order, np.arange(policy.block_size, len(order), policy.block_size))
    # Neighbours are alike: of many blocks, some are priced.
    step = -(-len(blocks) // MOST_BLOCKS)
    seconds = 0.0
    for first in range(0, len(blocks), step):
        block = blocks[first]
        work = replace(
            policy.workload,
            prompt_len=int(lengths.prompts[block].max()),
            gen_len=int(lengths.outputs[block].max()),
            num_prompts=len(block),
            lengths=None,
        )
        last = _last_block(policy, len(block) % policy.block_size) or policy
        count = min(step, len(blocks) - first)
        seconds += count * block_seconds(replace(last, workload=work), hardware)
    return seconds


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

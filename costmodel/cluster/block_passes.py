"""The passes that one block makes through the stages of a pipeline.

All blocks are alike: each has every ``S``-th prompt where there are ``S`` of them. The executor
runs lanes, so that a block takes a new sequence for each that ends. FlexGen runs the sequences of a
block in step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from costmodel.optimizer.choices import Pipeline
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.passes import FloatArray
from costmodel.pricing.stages import decode_segments
from costmodel.schedule.admission import longest_first
from costmodel.schedule.job_simulation import trace_policy
from costmodel.schedule.job_trace import JobTrace
from costmodel.schedule.pass_counts import count_passes
from profiles.hardware import HardwareProfile

# A longer job is priced by a smaller one with the same lengths, and by half of that: what the one
# takes longer than the other, all further prompts take. The least prompts of the smaller one, and
# those of a lane.
LEAST_SIMULATED = 512
SIMULATED_OF_LANE = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockPasses:
    """Passes of a block; every array is float64 [passes], and the first pass begins the job.

    Parameters
    ----------
    counts
        How often a pass of this kind is made. Those of lanes may be negative (see ``jobs``).
    rows
        Rows of hidden states that go from stage to stage.
    chosen
        Tokens whose ids go from the last stage to the first.
    num_prompts
        Prompts that all blocks answer together.
    jobs
        Of lanes, the lengths of the prompts of one block, and who runs in its passes. A long job
        has two, one behind the other, whose weighted sum has the seconds of all prompts.
    """

    counts: FloatArray
    rows: FloatArray
    chosen: FloatArray
    num_prompts: int
    jobs: tuple[tuple[Lengths, JobTrace], ...] = ()


def passes_in_step(workload: Workload, pipeline: Pipeline) -> BlockPasses:
    """Return the passes of a round, in which each block is answered once.

    Ids that are chosen in prefill return while other blocks are computed.
    """
    segments = decode_segments(workload)
    size = pipeline.block_size
    return BlockPasses(
        counts=np.array([1.0, *(float(end - first) for first, end in segments)]),
        rows=np.array([float(size * workload.prompt_len), *[float(size)] * len(segments)]),
        chosen=np.array([0.0, *[float(size)] * len(segments)]),
        num_prompts=size * pipeline.num_stages,
    )


def passes_of_lanes(policy: Policy, hardware: HardwareProfile, workload: Workload) -> BlockPasses:
    """Return the passes of a whole job over lanes.

    Parameters
    ----------
    policy, hardware
        Of any stage. Its lanes have room for every block in flight.
    workload
        The prompts that the pipeline answers; where their number is open, a block for each stage.
    """
    size, num_blocks = policy.block_size, policy.blocks_in_flight
    sketch = workload.sketch(size * num_blocks)
    num_prompts = sketch.num_prompts
    half = size * -(-max(LEAST_SIMULATED, SIMULATED_OF_LANE * size) // size)
    parts, weights = [sketch.lengths()], [1.0]
    if num_prompts > 2 * half * num_blocks:
        parts = [sketch.scaled(n * num_blocks).lengths() for n in (2 * half, half)]
        further = (num_prompts - len(parts[0])) / (len(parts[0]) - len(parts[1]))
        weights = [1.0 + further, -further]
    jobs = [_job_of(policy, lengths) for lengths in parts]
    counts = [count_passes(trace, lengths, policy, hardware) for lengths, trace in jobs]
    decoding = np.concatenate([count.decoding for count in counts])
    return BlockPasses(
        counts=np.repeat(weights, [trace.num_passes for _, trace in jobs]),
        rows=decoding + np.concatenate([count.prompt_tokens for count in counts]),
        chosen=decoding + np.concatenate([count.newcomers for count in counts]),
        num_prompts=num_prompts,
        jobs=tuple(jobs),
    )


def _job_of(policy: Policy, lengths: Lengths) -> tuple[Lengths, JobTrace]:
    """Return the prompts of one block, and who runs in its passes."""
    assert policy.lanes is not None
    picked = longest_first(lengths)[:: policy.blocks_in_flight]
    part = Lengths(lengths.prompts[picked], lengths.outputs[picked], lengths.limits[picked])
    lanes = replace(policy.lanes, pool_tokens=policy.lanes.pool_tokens // policy.blocks_in_flight)
    return part, trace_policy(replace(policy, lanes=lanes), part)

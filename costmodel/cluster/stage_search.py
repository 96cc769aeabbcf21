"""The policies of a stage as the executor runs it: over lanes, on a CPU, its cache in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.stages import stage_model
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.lane_search import NUM_BATCHES, lane_problems
from costmodel.optimizer.program import Program
from costmodel.optimizer.rows import RowTable
from costmodel.plan.lane_cache import pool_tokens
from costmodel.plan.pages import PAGE
from costmodel.plan.policy import LanePolicy, Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import with_margin
from profiles.hardware import HardwareProfile

# Tokens of prompts that a stage multiplies at once.
CHUNK_ROWS = 512
IN_MEMORY = Placement(cpu=1.0)


# Every stage of a pipeline, and each way to cut it, asks for the same.
@lru_cache(maxsize=1024)
def stage_lanes(
    workload: Workload, pipeline: Pipeline, *, chunk_rows: int = CHUNK_ROWS
) -> LanePolicy:
    """Return lanes for every block in flight.

    Each block has an equal part of the cache, whose size is that of ``pool_tokens``. The hidden
    states have room for a block of the longest prompts, and for what admission asks for beside one.
    """
    size, count, prompt_len = pipeline.block_size, pipeline.num_stages, workload.prompt_len
    rows = max(size * prompt_len, prompt_len + count * size)
    lengths = workload.sketch(count * size).lengths()
    return LanePolicy(
        pool_tokens=count * max(PAGE, pool_tokens(lengths, size, pipeline.deviations)),
        pass_rows=rows,
        chunk_rows=max(1, min(chunk_rows, rows)),
    )


def admission_policy(model: ModelSpec, pipeline: Pipeline, workload: Workload) -> Policy:
    """Return a policy of the first layer with the lanes of all stages.

    It says which requests get lanes in each pass. Nobody runs it.
    """
    stage = stage_model(model, 0, 1)
    return Policy(
        model=stage,
        workload=workload,
        gpu_batch_size=pipeline.block_size,
        num_gpu_batches=1,
        prefill_batch_size=1,
        weights=placed_alike(stage, IN_MEMORY),
        cache=IN_MEMORY,
        activations=IN_MEMORY,
        weight_bits=model.full_bits,
        cache_bits=model.full_bits,
        lanes=stage_lanes(workload, pipeline),
        blocks_in_flight=pipeline.num_stages,
    )


def stage_policies(
    hardware: HardwareProfile, model: ModelSpec, pipeline: Pipeline, question: ClusterQuestion
) -> Iterator[Policy]:
    """Yield the best placement of a stage for each precision, each way to load experts, and each
    number of batches; nothing where none fits.

    Parameters
    ----------
    model
        The stage.
    """
    hardware = hardware.with_budget(gpu_memory=0)
    machine = with_margin(hardware, question.margin)
    table, lanes = RowTable(machine), stage_lanes(question.workload, pipeline)
    for problem in lane_problems(machine, model, question.workload, question.permitted):
        for count in NUM_BATCHES:
            # The stages take blocks of one size.
            size, rest = divmod(pipeline.block_size, count)
            if problem.stages_cache or rest:
                continue
            program = Program(
                replace(
                    problem,
                    gpu_batch_size=size,
                    num_batches=(count, count),
                    lanes=lanes,
                    blocks_in_flight=pipeline.num_stages,
                ),
                table,
            )
            if (fitted := fit(program, count, max_latency_s=None)) is not None:
                yield replace(fitted[0], hardware=replace(hardware, measurements=()))

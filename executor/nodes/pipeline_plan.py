"""What the nodes of a pipeline run: the policies of its plan, with lanes for blocks in flight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from costmodel.cluster.plan import CopyPlan
from costmodel.cluster.stage_search import IN_MEMORY, stage_lanes
from costmodel.gguf.paths import is_gguf
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.plan.policy import LanePolicy, Policy, placed_alike
from costmodel.plan.workload import Workload
from profiles.errors import InputError


def lanes_of(copy: CopyPlan, place: int) -> LanePolicy:
    """Return the lanes of a stage. Those of a plan in step have room for all of its blocks."""
    policy = copy.stages[place].policy
    if policy.lanes is not None:
        return policy.lanes
    pipeline = Pipeline(num_stages=len(copy.stages), block_size=copy.block_size)
    # All stages have the lengths of the first one.
    workload = copy.stages[0].policy.workload
    chunk_rows = policy.prefill_batch_size * workload.prompt_len
    return stage_lanes(workload, pipeline, chunk_rows=chunk_rows)


def check_pipeline(copy: CopyPlan, model: Path) -> None:
    """Refuse what stages cannot run.

    Raises
    ------
    InputError
        For a GGUF file, for a node with a GPU, and for a policy that keeps its cache or its hidden
        states elsewhere than in CPU memory.
    """
    if is_gguf(model):
        raise InputError(
            f"model {model}",
            got="a GGUF file over several stages",
            allowed="a Hugging Face folder",
            hint="copies, one on each node",
        )
    for plan in copy.stages:
        if plan.policy.hardware is not None and plan.policy.hardware.has_gpu:
            raise InputError(
                f"policy of node {plan.node}",
                got="a GPU",
                allowed="CPU memory and disk, in a stage of a pipeline",
                hint="copies, one on each node",
            )
        if plan.policy.cache.cpu < 1 or plan.policy.activations.cpu < 1:
            raise InputError(
                f"policy of node {plan.node}",
                got="a cache or hidden states outside of CPU memory",
                allowed="cpu 1 for both, in a stage of a pipeline",
                hint="a smaller block, or copies",
            )


def stage_policy(copy: CopyPlan, place: int, workload: Workload) -> Policy:
    """Return what the node of a stage runs."""
    return replace(copy.stages[place].policy, workload=workload, lanes=lanes_of(copy, place))


def whole_policy(copy: CopyPlan, model: ModelSpec, workload: Workload) -> Policy:
    """Return a policy of the whole model with the lanes of all blocks in flight.

    Its cache is that of one block, where a request must have room. It also says what is
    approximated. Nobody runs it.
    """
    first, lanes = copy.stages[0].policy, lanes_of(copy, 0)
    return Policy(
        model=model,
        workload=workload,
        gpu_batch_size=copy.block_size,
        num_gpu_batches=len(copy.stages),
        prefill_batch_size=1,
        weights=placed_alike(model, IN_MEMORY),
        cache=IN_MEMORY,
        activations=IN_MEMORY,
        weight_bits=first.weight_bits,
        cache_bits=first.cache_bits,
        group_size=first.group_size,
        attention_sparsity=first.attention_sparsity,
        lanes=replace(lanes, pool_tokens=lanes.pool_tokens // len(copy.stages)),
        hardware=first.hardware,
    )

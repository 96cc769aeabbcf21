"""What the nodes of a pipeline run: the policies of its plan, with lanes for blocks in flight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from costmodel.cluster.plan import CopyPlan
from costmodel.gguf.paths import is_gguf
from costmodel.model.spec import ModelSpec
from costmodel.plan.pages import PAGE, pages_of
from costmodel.plan.policy import LanePolicy, Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from profiles.errors import InputError

IN_MEMORY = Placement(cpu=1)


def lanes_of(copy: CopyPlan, prefill_batch_size: int) -> LanePolicy:
    """Return lanes with room for every block in flight, whatever its requests are.

    Lanes let a block take a new sequence for each that ends. The cache of a block has room for as
    many tokens as a block in step would.
    """
    size, count, workload = copy.block_size, len(copy.stages), copy.stages[0].policy.workload
    pages = pages_of(workload.prompt_len + workload.gen_len - 1)
    return LanePolicy(
        pool_tokens=count * size * pages * PAGE,
        # The hidden states of a whole block of prompts, and what admission asks for beside one.
        pass_rows=max(size * workload.prompt_len, workload.prompt_len + count * size),
        chunk_rows=max(1, prefill_batch_size * workload.prompt_len),
    )


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
    policy = copy.stages[place].policy
    lanes = lanes_of(copy, policy.prefill_batch_size)
    return replace(policy, workload=workload, lanes=lanes)


def whole_policy(copy: CopyPlan, model: ModelSpec, workload: Workload) -> Policy:
    """Return a policy of the whole model with the lanes of all blocks in flight.

    It says who has room and what is approximated. Nobody runs it.
    """
    first = copy.stages[0].policy
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
        lanes=lanes_of(copy, 1),
        hardware=first.hardware,
    )

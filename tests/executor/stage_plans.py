"""Pipelines of tiny models, written by hand: models, cuts and placements that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from costmodel.cluster.plan import CopyPlan, StagePlan
from costmodel.cluster.stages import stages_of_counts
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, placed_alike
from profiles.hardware import HardwareProfile
from tests.executor.tiny_machines import ON_CPU, ON_DISK, change_policy, make_policy
from tests.executor.tiny_models import MIXTURES

HALVES = Placement(cpu=0.5, disk=0.5)
MODELS: dict[str, dict[str, Any]] = {
    # A window, so that the stages have other rings; a tied table is in both ends.
    "dense": {"family": "gemma3_text", "num_layers": 5, "tied": True},
    "mixture": {**MIXTURES["qwen3_moe"], "num_layers": 4},
}
# Layers of each stage, and where its weights are.
TWO_DENSE = ("dense", (2, 3), (ON_CPU, ON_DISK))
THREE_DENSE = ("dense", (2, 1, 2), (HALVES, ON_CPU, ON_DISK))
TWO_MIXTURE = ("mixture", (3, 1), (HALVES, HALVES))
THREE_MIXTURE = ("mixture", (1, 2, 1), (ON_DISK, HALVES, ON_CPU))


def staged_copy(
    model: ModelSpec,
    counts: Sequence[int],
    placements: Sequence[Placement],
    *,
    hardware: HardwareProfile,
    prompt_len: int,
    gen_len: int,
) -> CopyPlan:
    """Cut the layers of a model over nodes ``a``, ``b``, ``c``.

    Each stage has its own placement; blocks of four are batches of four, or of two, in turn.
    """
    stages = []
    for place, part in enumerate(stages_of_counts(model, counts)):
        num_batches = 1 + place % 2
        policy = change_policy(
            make_policy(part, prompt_len=prompt_len, gen_len=gen_len),
            hardware=hardware,
            weights=placed_alike(part, placements[place]),
            gpu_batch_size=4 // num_batches,
            num_gpu_batches=num_batches,
            blocks_in_flight=len(counts),
        )
        stages.append(StagePlan(node="abc"[place], policy=policy))
    return CopyPlan(stages=tuple(stages), share=1.0)

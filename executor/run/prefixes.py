"""Which requests of a job share a prefix that is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes, find_prefixes
from executor.run.lanes import LaneRequest


def shared_prefixes(requests: Sequence[LaneRequest], policy: Policy) -> Prefixes:
    """Find what the prompts of a job begin with in common.

    Nothing is shared where every token of a prompt is scored. Nor is it in a packed cache: prompts
    attend to keys and values as they were before they were packed.
    """
    model, workload = policy.model, policy.workload
    if workload.scores_prompts or policy.cache_bits < model.full_bits:
        return Prefixes.none(len(requests))
    prompts = [np.asarray(request.prompt_ids, np.uint32) for request in requests]
    ends = np.array([len(prompt) for prompt in prompts], np.int64)
    offsets = np.concatenate([[0], ends.cumsum()])
    longest = ends + [request.max_tokens for request in requests]
    # Rotations may depend on the length of the whole sequence.
    limits = {
        kind.attention.rotary.original_max_positions
        for kind in model.layer_kinds
        if kind.attention.rotary is not None and kind.attention.rotary.kind == "longrope"
    }
    groups = sum(((longest - 1 > limit).astype(np.int64) for limit in limits), np.zeros_like(ends))
    return find_prefixes(np.concatenate(prompts), offsets, groups)

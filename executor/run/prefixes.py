"""Which requests of a job share a prefix that is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes, find_prefixes
from executor.run.lanes import LaneRequest


def prefixes_of(
    prompts: Iterable[Sequence[int]], most_tokens: ArrayLike, model: ModelSpec
) -> Prefixes:
    """Find what prompts of a job begin with in common.

    Parameters
    ----------
    prompts
        The ids of each prompt.
    most_tokens
        The most tokens that are generated for each, int64 [prompts].
    """
    arrays = [np.asarray(ids, np.uint32) for ids in prompts]
    lengths = np.array([len(ids) for ids in arrays], np.int64)
    longest = lengths + np.asarray(most_tokens, np.int64) - 1
    # Rotations may depend on the length of the whole sequence.
    limits = {
        kind.attention.rotary.original_max_positions
        for kind in model.layer_kinds
        if kind.attention.rotary is not None and kind.attention.rotary.kind == "longrope"
    }
    groups = np.zeros_like(lengths)
    for limit in limits:
        groups += longest > limit
    return find_prefixes(np.concatenate(arrays), np.append(0, lengths.cumsum()), groups)


def shared_prefixes(requests: Sequence[LaneRequest], policy: Policy) -> Prefixes:
    """Find what a run of some requests shares; nothing where its policy does not."""
    if not policy.shares_prefixes:
        return Prefixes.none(len(requests))
    asked = [(request.prompt_ids, request.max_tokens) for request in requests]
    prompts, most_tokens = zip(*asked, strict=True)
    return prefixes_of(prompts, most_tokens, policy.model)

"""Random routers that choose some experts more often than others, as real routers do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from statistics import NormalDist

import torch

from costmodel.families import family_named
from costmodel.model.expert_use import chances
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.layout import decoder_numbers, model_layers
from costmodel.model.spec import ModelSpec
from profiles.errors import InputError

ROUTERS = ("router.weight", "router.float32_weight")


@functools.lru_cache(maxsize=4)
def router_scales(spec: ModelSpec, seed: int, skew: float) -> Mapping[str, torch.Tensor]:
    """Return a factor for each row of each router, float32 [num_experts], by the tensor's name.

    The logits of a random router are normal with the mean zero. An expert is chosen where its logit
    exceeds about the same number ``t`` for all experts. So its chance is ``p`` where the standard
    deviation of its logit is ``t / q``, with the quantile ``q`` of ``1 - p``. Chances follow Zipf's
    law (``costmodel.model.expert_use``), and the ranks are drawn for each layer.
    """
    if not skew:
        return {}
    found, numbers = {}, decoder_numbers(spec)
    for index, layer in enumerate(model_layers(spec)[: len(numbers)]):
        for component in layer.components:
            for tensor in component.tensors:
                if tensor.name in ROUTERS:
                    number = numbers[index]
                    experts = spec.layer(number).experts
                    assert experts is not None
                    family = family_named(spec.family)
                    (name,) = family.tensor_names(spec, tensor.name, number, 0)
                    found[name] = _scales(experts, seed + number, skew)
    return found


def _scales(experts: ExpertsSpec, seed: int, skew: float) -> torch.Tensor:
    count, chosen = experts.num_experts, experts.experts_per_token
    if 2 * chosen >= count:
        raise InputError(
            "skewed routing", got=f"{chosen} of {count} experts", allowed="fewer than half of them"
        )
    normal = NormalDist()
    threshold = normal.inv_cdf(1 - chosen / count)
    by_rank = [threshold / normal.inv_cdf(1 - p) for p in chances(count, chosen, skew).tolist()]
    ranks = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(by_rank, dtype=torch.float32)[ranks]

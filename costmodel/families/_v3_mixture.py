"""Mixtures as in DeepSeek-V3: sigmoids with a bias for the choice, groups, dense layers first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from costmodel.families._shared import experts, gated_mlp, num_layers
from costmodel.families._tables import EXPERTS_MODULES
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec

V3_MODULES: Mapping[str, tuple[str, ...]] = {
    **EXPERTS_MODULES,
    "router.bias": ("layers.{layer}.mlp.gate.e_score_correction_bias",),
    "shared_gate_up": (
        "layers.{layer}.mlp.shared_experts.gate_proj",
        "layers.{layer}.mlp.shared_experts.up_proj",
    ),
    "shared_down": ("layers.{layer}.mlp.shared_experts.down_proj",),
}


def v3_experts(
    config: HFConfig,
    count_keys: Sequence[str] = ("num_local_experts", "n_routed_experts"),
    shared_key: str = "n_shared_experts",
) -> ExpertsSpec:
    """Read the experts of a layer; the shared one is as wide as several of them."""
    return experts(
        config,
        count_keys=count_keys,
        size_key="moe_intermediate_size",
        router=RouterSpec(
            score="sigmoid",
            renormalises=config.flag("norm_topk_prob"),
            scale=config.number("routed_scaling_factor"),
            has_bias=True,
            num_groups=config.whole("n_group"),
            groups_per_token=config.whole("topk_group"),
            in_float32=True,
            rounds_weights=False,
        ),
        shared=gated_mlp(config, "moe_intermediate_size", times=config.whole(shared_key)),
    )


def v3_layers(
    config: HFConfig, attention: AttentionSpec, mixture: ExpertsSpec, norm: NormSpec
) -> list[LayerSpec]:
    """Return the layers of a model: the first ``first_k_dense_replace`` have no experts."""
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm)
    sparse = LayerSpec(attention=attention, experts=mixture, norm=norm)
    first = config.whole("first_k_dense_replace", least=0)
    return [dense if i < first else sparse for i in range(num_layers(config))]

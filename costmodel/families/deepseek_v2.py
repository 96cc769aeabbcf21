"""DeepSeek V2: latent attention, a softmax router that may choose groups first."""

from __future__ import annotations

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._shared import decoder, experts, gated_mlp, require, rms_norm
from costmodel.families._v3_mixture import v3_layers
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

# What the original code makes of these keys, the only ones that transformers reads as well.
ONLY = {"scoring_func": "softmax", "moe_layer_freq": 1}


def _describe(config: HFConfig) -> ModelSpec:
    for key, value in ONLY.items():
        if config.raw.get(key, value) != value:
            raise config.refusal(key, config.raw[key], str(value))
    # transformers does not renormalise, whatever the key says.
    require(config, mlp_bias=False, norm_topk_prob=False)
    attention = latent_attention(config, is_interleaved=True, takes_null=("num_key_value_heads",))
    return decoder(config, v3_layers(config, attention, _experts(config), rms_norm(config)))


def _experts(config: HFConfig) -> ExpertsSpec:
    method, groups, chosen = config.get("topk_method"), 1, 1
    if method == "group_limited_greedy":
        groups, chosen = config.whole("n_group"), config.whole("topk_group")
    elif method != "greedy":
        raise config.refusal("topk_method", method, "greedy or group_limited_greedy")
    return experts(
        config,
        count_keys=("num_experts", "n_routed_experts"),
        size_key="moe_intermediate_size",
        router=RouterSpec(
            score="softmax",
            renormalises=False,
            scale=config.number("routed_scaling_factor"),
            in_float32=True,
            rounds_weights=False,
            num_groups=groups,
            groups_per_token=chosen,
            scores_per_group=1,
        ),
        shared=gated_mlp(config, "moe_intermediate_size", times=config.whole("n_shared_experts")),
    )


FAMILY = Family(
    defaults={
        **LATENT_DEFAULTS,
        "vocab_size": 102400,
        "mlp_bias": False,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "num_experts_per_tok": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    describe=_describe,
    modules=latent_modules,
)

"""Hunyuan with experts, and a shared expert of the same size beside them."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._hunyuan import HUNYUAN_MODULES, hunyuan_attention
from costmodel.families._shared import decoder, experts, gated_mlp, num_layers, rms_norm
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _mixtures(config: HFConfig) -> list[ExpertsSpec]:
    """Read the experts of each layer; the number for each token may be a list of one a layer."""
    count, chosen = num_layers(config), config.get("num_experts_per_tok")
    if not isinstance(chosen, list):
        chosen = [chosen] * count
    if len(chosen) < count:
        raise config.refusal("moe_topk", chosen, f"a list of at least {count}, one for each layer")
    return [
        experts(
            replace(config, raw={**config.raw, "num_experts_per_tok": number}),
            count_keys=("num_local_experts", "num_experts"),
            size_key="intermediate_size",
            shared=gated_mlp(config),
        )
        for number in chosen[:count]
    ]


def _describe(config: HFConfig) -> ModelSpec:
    attention, norm = hunyuan_attention(config), rms_norm(config)
    layers = [LayerSpec(attention=attention, experts=e, norm=norm) for e in _mixtures(config)]
    return decoder(config, layers)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 290943,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "num_experts": 1,
        "moe_topk": 1,
    },
    aliases={"num_experts_per_tok": "moe_topk"},
    describe=_describe,
    modules={
        **EXPERTS_MODULES,
        **HUNYUAN_MODULES,
        "router": ("layers.{layer}.mlp.gate.wg",),
        "shared_gate_up": (
            "layers.{layer}.mlp.shared_mlp.gate_proj",
            "layers.{layer}.mlp.shared_mlp.up_proj",
        ),
        "shared_down": ("layers.{layer}.mlp.shared_mlp.down_proj",),
    },
)

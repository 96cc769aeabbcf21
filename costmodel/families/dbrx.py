"""DBRX: clipped queries, keys and values; the experts of a layer in three flat tensors."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families._plain import equal_heads
from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import decoder, equal_layers, experts, llama_attention, require
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

# That of torch's LayerNorm: no key has it.
NORM = NormSpec(kind="layer", eps=1e-5, has_bias=False)
ATTENTION_DEFAULTS = {"kv_n_heads": 1, "clip_qkv": None, "rope_theta": DEFAULT_THETA}
EXPERTS_DEFAULTS = {
    "ffn_hidden_size": 3584,
    "ffn_act_fn": None,
    "moe_num_experts": 4,
    "moe_top_k": 1,
    "moe_normalize_expert_weights": 1.0,
}


def _attention(config: HFConfig) -> AttentionSpec:
    own = config.nested("attn_config", ATTENTION_DEFAULTS)
    _, head_dim = equal_heads(config)
    sizes = {"num_key_value_heads": own.whole("kv_n_heads"), "head_dim": head_dim}
    # transformers 5 reads the base elsewhere only; the model's own code reads it here.
    theta = own.positive("rope_theta", own.get("rope_theta"))
    return llama_attention(
        replace(config, raw={**config.raw, **sizes}),
        theta=theta,
        clip=own.positive("clip_qkv", own.get("clip_qkv")),
    )


def _describe(config: HFConfig) -> ModelSpec:
    require(config, tie_word_embeddings=False)
    own = config.nested("ffn_config", EXPERTS_DEFAULTS)
    power = own.get("moe_normalize_expert_weights")
    if power not in (None, 1.0):
        raise own.refusal("moe_normalize_expert_weights", power, "1.0 or null")
    keys = {
        "hidden_act": own.nested("ffn_act_fn", {"name": "silu"}).get("name"),
        "num_experts": own.whole("moe_num_experts"),
        "num_experts_per_tok": own.whole("moe_top_k"),
        "size": own.whole("ffn_hidden_size"),
    }
    layer = LayerSpec(
        attention=_attention(config),
        experts=experts(
            replace(own, raw=keys),
            count_keys=("num_experts",),
            size_key="size",
            router=RouterSpec(renormalises=power is not None),
        ),
        norm=NORM,
    )
    return decoder(config, equal_layers(config, layer), final_norm=NORM)


FAMILY = Family(
    defaults={
        "vocab_size": 32000,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "max_seq_len": 2048,
        "attn_config": None,
        "ffn_config": None,
        "tie_word_embeddings": False,
    },
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    },
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "attention_norm": ("blocks.{layer}.norm_attn_norm.norm_1",),
        "qkv": ("blocks.{layer}.norm_attn_norm.attn.Wqkv",),
        "output": ("blocks.{layer}.norm_attn_norm.attn.out_proj",),
        "mlp_norm": ("blocks.{layer}.norm_attn_norm.norm_2",),
        "router": ("blocks.{layer}.ffn.router.layer",),
        "expert_gate_up.weight": (
            "blocks.{layer}.ffn.experts.mlp.w1",
            "blocks.{layer}.ffn.experts.mlp.v1",
        ),
        "expert_down.weight": ("blocks.{layer}.ffn.experts.mlp.w2",),
        "final_norm": ("norm_f",),
    },
    stacked={
        "expert_gate_up.weight": StackedTensor(is_flat=True),
        "expert_down.weight": StackedTensor(is_transposed=True, is_flat=True),
    },
    prefix="transformer.",
    tokenizer_class="GPT2Tokenizer",
)

"""Qwen 3 with experts: 30B-A3B, 235B-A22B, Coder."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    rms_norm,
    sparse_layers,
)
from costmodel.families._tables import EXPERTS_MODULES, LLAMA_DEFAULTS
from costmodel.families._windows import only_window
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=absent(config, "head_dim"),
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    norm = rms_norm(config)
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm)
    sparse = LayerSpec(
        attention=attention,
        experts=experts(
            config,
            count_keys=("num_local_experts", "num_experts"),
            size_key="moe_intermediate_size",
            router=RouterSpec(renormalises=config.flag("norm_topk_prob")),
        ),
        norm=norm,
    )
    layers = [sparse if is_sparse else dense for is_sparse in sparse_layers(config)]
    is_on = config.flag("use_sliding_window")
    return decoder(config, layers, windows=only_window(config, is_on=is_on))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    describe=_describe,
    modules=EXPERTS_MODULES,
    tokenizer_class="Qwen2Tokenizer",
)

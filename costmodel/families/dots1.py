"""dots.llm1: the experts of DeepSeek-V3 with the attention of Qwen 3."""

from __future__ import annotations

from costmodel.families._shared import absent, decoder, llama_attention, num_layers, rms_norm
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES, v3_experts, v3_layers
from costmodel.families._windows import window_size, windows_from
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _windows(config: HFConfig) -> list[str]:
    """Read the kinds of layers; without ``layer_types``, those from ``max_window_layers`` on have
    a window."""
    first = config.whole("max_window_layers", least=0)
    return windows_from(config, num_layers(config) if window_size(config) is None else first)


def _describe(config: HFConfig) -> ModelSpec:
    has_bias = config.flag("attention_bias")
    attention = llama_attention(
        config,
        takes_null=("num_key_value_heads", *absent(config, "head_dim")),
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    layers = v3_layers(config, attention, v3_experts(config), rms_norm(config))
    return decoder(config, layers, windows=_windows(config))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 152064,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": None,
        "n_shared_experts": None,
        "n_routed_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "layer_types": None,
    },
    describe=_describe,
    modules=V3_MODULES,
)

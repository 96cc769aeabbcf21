"""Defaults of configs, and names in checkpoints, that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN2_DEFAULTS: Mapping[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("embed_tokens",),
    "attention_norm": ("layers.{layer}.input_layernorm",),
    "qkv": (
        "layers.{layer}.self_attn.q_proj",
        "layers.{layer}.self_attn.k_proj",
        "layers.{layer}.self_attn.v_proj",
    ),
    "q_norm": ("layers.{layer}.self_attn.q_norm",),
    "k_norm": ("layers.{layer}.self_attn.k_norm",),
    "output": ("layers.{layer}.self_attn.o_proj",),
    "mlp_norm": ("layers.{layer}.post_attention_layernorm",),
    "gate_up": ("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.up_proj"),
    "down": ("layers.{layer}.mlp.down_proj",),
    "final_norm": ("norm",),
}
# For norms after each half.
OLMO2_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "attention_output_norm": ("layers.{layer}.post_attention_layernorm",),
    "mlp_output_norm": ("layers.{layer}.post_feedforward_layernorm",),
}
# For norms before and after each half.
GEMMA_MODULES: Mapping[str, tuple[str, ...]] = {
    **OLMO2_MODULES,
    "mlp_norm": ("layers.{layer}.pre_feedforward_layernorm",),
}
GLM_DEFAULTS: Mapping[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 0.00000015625,
    "attention_bias": True,
}
GLM_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "gate_up": ("layers.{layer}.mlp.gate_up_proj",),
}
# For families with experts; the names in their dense layers are those of Llama.
EXPERTS_MODULES: Mapping[str, tuple[str, ...]] = {
    **LLAMA_MODULES,
    "router": ("layers.{layer}.mlp.gate",),
    "expert_gate_up": (
        "layers.{layer}.mlp.experts.{expert}.gate_proj",
        "layers.{layer}.mlp.experts.{expert}.up_proj",
    ),
    "expert_down": ("layers.{layer}.mlp.experts.{expert}.down_proj",),
}

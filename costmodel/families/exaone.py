"""EXAONE 3: Llama with the names of GPT-2 for its tensors and for some keys."""

from __future__ import annotations

from costmodel.families._llama import llama_layer
from costmodel.families._shared import decoder, equal_layers, gated_mlp
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

THETA = 500000.0
NAMES = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}


def _describe(config: HFConfig) -> ModelSpec:
    config = config.renamed(NAMES)
    mlp = gated_mlp(config, has_bias=config.flag("mlp_bias"))
    layer = llama_layer(config, mlp, theta=THETA, has_bias=config.flag("attention_bias"))
    return decoder(config, equal_layers(config, layer))


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 102400,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "attention_norm": ("h.{layer}.ln_1",),
        "qkv": (
            "h.{layer}.attn.attention.q_proj",
            "h.{layer}.attn.attention.k_proj",
            "h.{layer}.attn.attention.v_proj",
        ),
        "output": ("h.{layer}.attn.attention.out_proj",),
        "mlp_norm": ("h.{layer}.ln_2",),
        "gate_up": ("h.{layer}.mlp.c_fc_0", "h.{layer}.mlp.c_fc_1"),
        "down": ("h.{layer}.mlp.c_proj",),
        "final_norm": ("ln_f",),
    },
    prefix="transformer.",
)

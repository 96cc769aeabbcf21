"""GPT-2: learned positions, LayerNorm, an MLP without a gate, matrices stored transposed."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES, GPT2_DEFAULTS, GPT2_MODULES, gpt2_decoder
from costmodel.families._shared import require
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    require(config, add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    return gpt2_decoder(config, has_one_kv_head=False, dtype="float32")


FAMILY = Family(
    defaults={**GPT2_DEFAULTS, "scale_attn_by_inverse_layer_idx": False},
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules=GPT2_MODULES,
    transposed=("qkv", "output", "up", "down"),
    prefix="transformer.",
    # The mask and its value, as old versions saved them.
    unread=(r".*\.attn\.(bias|masked_bias)",),
    tokenizer_class="GPT2Tokenizer",
)

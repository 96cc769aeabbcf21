"""GPT-J: parallel halves with one norm, neighbours rotated in pairs, a head with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from costmodel.families._plain import GPT2_ALIASES, equal_heads, gpt2_mlp
from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import decoder, equal_layers, layer_norm
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.rotary_spec import RotarySpec
from costmodel.model.spec import ModelSpec

GPTJ_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
GPTJ_MODULES: Mapping[str, tuple[str, ...]] = {
    "tokens": ("wte",),
    "attention_norm": ("h.{layer}.ln_1",),
    "qkv": ("h.{layer}.attn.q_proj", "h.{layer}.attn.k_proj", "h.{layer}.attn.v_proj"),
    "output": ("h.{layer}.attn.out_proj",),
    "up": ("h.{layer}.mlp.fc_in",),
    "down": ("h.{layer}.mlp.fc_out",),
    "final_norm": ("ln_f",),
}


def gptj_decoder(config: HFConfig) -> ModelSpec:
    """Read a decoder of GPT-J's kind."""
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            rotary=RotarySpec(
                theta=DEFAULT_THETA, dim=config.whole("rotary_dim"), is_interleaved=True
            ),
        ),
        mlp=gpt2_mlp(config),
        norm=layer_norm(config, "layer_norm_epsilon"),
        is_parallel=True,
        shares_norm=True,
    )
    return decoder(
        config, equal_layers(config, layer), final_norm=layer.norm, head_bias=True, dtype="float32"
    )


FAMILY = Family(
    defaults=GPTJ_DEFAULTS,
    aliases=GPT2_ALIASES,
    describe=gptj_decoder,
    modules=GPTJ_MODULES,
    prefix="transformer.",
    # The mask and its value, as old versions saved them.
    unread=(r".*\.attn\.(bias|masked_bias)",),
    tokenizer_class="GPT2Tokenizer",
)

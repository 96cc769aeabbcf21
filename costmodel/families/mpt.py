"""MPT: ALiBi, LayerNorm without bias, an MLP without a gate, no biases."""

from __future__ import annotations

from costmodel.families._alibi import alibi_slopes
from costmodel.families._plain import equal_heads
from costmodel.families._shared import decoder, equal_layers, layer_norm, require
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

# Of the dictionary ``attn_config``.
ATTENTION_DEFAULTS = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    "alibi_bias_max": 8,
}


def _attention(config: HFConfig) -> AttentionSpec:
    keys = config.nested("attn_config", ATTENTION_DEFAULTS)
    require(keys, prefix_lm=False, qk_ln=False, alibi=True)
    for key in ("attn_type", "alibi_bias_max"):
        if keys.get(key) != ATTENTION_DEFAULTS[key]:
            raise keys.refusal(key, keys.get(key), str(ATTENTION_DEFAULTS[key]))
    heads, head_dim = equal_heads(config)

    def number(key: str) -> float | None:
        return None if keys.get(key) is None else keys.positive(key, keys.get(key))

    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        scale=number("softmax_scale"),
        clip=number("clip_qkv"),
        alibi_slopes=alibi_slopes(heads),
    )


def _describe(config: HFConfig) -> ModelSpec:
    layer = LayerSpec(
        attention=_attention(config),
        # transformers computes so whatever ``expansion_ratio`` says.
        mlp=MlpSpec(size=4 * config.whole("hidden_size"), activation="gelu", is_gated=False),
        norm=layer_norm(config, "layer_norm_epsilon", has_bias=False),
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm)


FAMILY = Family(
    defaults={
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "max_seq_len": 2048,
        "vocab_size": 50368,
        "layer_norm_epsilon": 1e-5,
        "attn_config": None,
        "tie_word_embeddings": True,
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
        "attention_norm": ("blocks.{layer}.norm_1",),
        "qkv": ("blocks.{layer}.attn.Wqkv",),
        "output": ("blocks.{layer}.attn.out_proj",),
        "mlp_norm": ("blocks.{layer}.norm_2",),
        "up": ("blocks.{layer}.ffn.up_proj",),
        "down": ("blocks.{layer}.ffn.down_proj",),
        "final_norm": ("norm_f",),
    },
    prefix="transformer.",
    tokenizer_class="GPTNeoXTokenizer",
)

"""CodeGen: GPT-J with queries, keys and values stored together."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES, equal_heads, gpt2_mlp
from costmodel.families._rotary import DEFAULT_THETA
from costmodel.families._shared import decoder, equal_layers, layer_norm
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.rotary_spec import RotarySpec
from costmodel.model.spec import ModelSpec

# Parts of the stored projection, one for each of the machines that it was trained on.
NUM_PARTS = 4


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    if heads * head_dim % NUM_PARTS:
        raise config.refusal("n_embd", heads * head_dim, f"a multiple of {NUM_PARTS}")
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


def _parts(layer: LayerSpec) -> list[tuple[int, int]]:
    """Return the blocks of rows: each part has queries, then values, then keys."""
    size = layer.attention.query_size // NUM_PARTS
    return [((3 * part + place) * size, size) for place in (0, 2, 1) for part in range(NUM_PARTS)]


FAMILY = Family(
    defaults={
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
    },
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "attention_norm": ("h.{layer}.ln_1",),
        "qkv": ("h.{layer}.attn.qkv_proj",),
        "output": ("h.{layer}.attn.out_proj",),
        "up": ("h.{layer}.mlp.fc_in",),
        "down": ("h.{layer}.mlp.fc_out",),
        "final_norm": ("ln_f",),
    },
    row_blocks={"qkv": _parts},
    prefix="transformer.",
    # The mask, as old versions saved it.
    unread=(r".*\.attn\.causal_mask",),
    tokenizer_class="GPT2Tokenizer",
)

"""GPT-Neo: GPT-2 with windows in every other layer, and scores that are not scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any

from costmodel.families._plain import equal_heads, gpt2_mlp
from costmodel.families._shared import decoder, layer_norm, num_layers
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import EmbeddingSpec, ModelSpec

LOCAL, GLOBAL = "local", "global"
# What an absent or null ``attention_types`` means.
DEFAULT_TYPES = [[[GLOBAL, LOCAL], 12]]


def _describe(config: HFConfig) -> ModelSpec:
    heads, head_dim = equal_heads(config)
    layer = LayerSpec(
        attention=AttentionSpec(
            num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=1.0, output_bias=True
        ),
        mlp=gpt2_mlp(config, "intermediate_size"),
        norm=layer_norm(config, "layer_norm_epsilon"),
    )
    window = config.whole("window_size")
    local = replace(layer, attention=replace(layer.attention, window=window))
    # A window of all positions hides nothing.
    local = local if window < config.whole("max_position_embeddings") else layer
    return decoder(
        config,
        [local if kind == LOCAL else layer for kind in _attention_layers(config)],
        embedding=EmbeddingSpec(has_positions=True),
        final_norm=layer.norm,
        dtype="float32",
    )


def _attention_layers(config: HFConfig) -> list[str]:
    """Read the kind of attention of each layer."""
    count, found = num_layers(config), config.get("attention_types")
    try:
        expanded = _expanded(DEFAULT_TYPES if found is None else found)
        # One more shows that there are too many.
        kinds = list(islice(expanded, count + 1))
    except (OverflowError, TypeError, ValueError):
        kinds = []
    listed = config.raw.get("attention_layers", kinds)
    if len(kinds) != count or listed != kinds:
        allowed = f'"{GLOBAL}" or "{LOCAL}" for each of {count} layers, as in [[["{GLOBAL}"], 2]]'
        if listed != kinds:
            raise config.refusal("attention_layers", listed, "what attention_types says")
        raise config.refusal("attention_types", found, allowed)
    return kinds


def _expanded(found: Any) -> Iterator[str]:
    """Yield the kind of each layer, of lists of kinds with how often each is repeated."""
    for kinds, times in found:
        if not isinstance(kinds, list) or not kinds:
            raise ValueError("no list of kinds")
        for kind in chain.from_iterable(repeat(kinds, times)):
            if kind not in (LOCAL, GLOBAL):
                raise ValueError("no kind of attention")
            yield kind


FAMILY = Family(
    defaults={
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "attention_types": None,
        "num_heads": 16,
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    describe=_describe,
    modules={
        "tokens": ("wte",),
        "positions": ("wpe",),
        "attention_norm": ("h.{layer}.ln_1",),
        "qkv": tuple(f"h.{{layer}}.attn.attention.{name}_proj" for name in "qkv"),
        "output": ("h.{layer}.attn.attention.out_proj",),
        "mlp_norm": ("h.{layer}.ln_2",),
        "up": ("h.{layer}.mlp.c_fc",),
        "down": ("h.{layer}.mlp.c_proj",),
        "final_norm": ("ln_f",),
    },
    prefix="transformer.",
    # The mask and its value, as old versions saved them.
    unread=(r".*\.attn\.attention\.(bias|masked_bias)",),
    tokenizer_class="GPT2Tokenizer",
)

"""StableLM 2: LayerNorm, a quarter of each head rotated; by choice parallel halves, and norms of
queries and keys."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    equal_layers,
    gated_mlp,
    layer_norm,
    llama_attention,
)
from costmodel.families._tables import LLAMA_MODULES
from costmodel.model.family import Family, Modules
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    is_parallel = config.flag("use_parallel_residual")
    layer = LayerSpec(
        attention=llama_attention(
            config,
            takes_null=absent(config, "head_dim"),
            rotary_share=0.25,
            qkv_bias=config.flag("use_qkv_bias"),
            qk_norm="heads" if config.flag("qk_layernorm") else "none",
            qk_norm_spec=layer_norm(config, has_bias=False),
        ),
        mlp=gated_mlp(config),
        norm=layer_norm(config),
        is_parallel=is_parallel,
        shares_norm=is_parallel,
    )
    return decoder(config, equal_layers(config, layer), final_norm=layer.norm)


def _modules(spec: ModelSpec) -> Modules:
    attention = spec.layer(0).attention
    counts = {"q": attention.num_heads, "k": attention.num_kv_heads}
    norms = {
        f"{name}_norm": tuple(
            f"layers.{{layer}}.self_attn.{name}_layernorm.norms.{head}" for head in range(count)
        )
        for name, count in counts.items()
    }
    return {**LLAMA_MODULES, **norms}


FAMILY = Family(
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    describe=_describe,
    modules=_modules,
    fixes_tokenizer_class=True,
)

"""ERNIE 4.5 with experts: a bias for the choice beside a softmax, some layers dense."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
)
from costmodel.families._tables import LLAMA_DEFAULTS
from costmodel.families._v3_mixture import V3_MODULES
from costmodel.families.ernie4_5 import THETA
from costmodel.model.family import ROTARY_BUFFERS, Family
from costmodel.model.feed_forward_spec import ExpertsSpec, RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

SIZE = "moe_intermediate_size"


def _sparse_layers(config: HFConfig) -> list[bool]:
    """Read which layers have experts."""
    count, step = num_layers(config), config.whole("moe_layer_interval")
    first = config.whole("moe_layer_start_index", least=0)
    last = config.whole("moe_layer_end_index", least=-1)
    last = count - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % step == 0 for i in range(count)]


def _experts(config: HFConfig) -> ExpertsSpec:
    shared = config.whole("moe_num_shared_experts", least=0)
    has_bias = config.flag("use_bias")
    return experts(
        config,
        count_keys=("num_experts", "moe_num_experts"),
        size_key=SIZE,
        router=RouterSpec(has_bias=True, in_float32=True, least_sum=config.number("moe_norm_min")),
        shared=gated_mlp(config, SIZE, times=shared, has_bias=has_bias) if shared else None,
    )


def _describe(config: HFConfig) -> ModelSpec:
    has_bias, norm = config.flag("use_bias"), rms_norm(config)
    attention = llama_attention(
        config,
        takes_null=absent(config, "head_dim"),
        theta=THETA,
        is_interleaved=True,
        qkv_bias=has_bias,
        output_bias=has_bias,
    )
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config, has_bias=has_bias), norm=norm)
    sparse = LayerSpec(attention=attention, experts=_experts(config), norm=norm)
    layers = [sparse if is_sparse else dense for is_sparse in _sparse_layers(config)]
    return decoder(config, layers, head_bias=has_bias)


FAMILY = Family(
    defaults={
        **LLAMA_DEFAULTS,
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    },
    aliases={"num_experts_per_tok": "moe_k"},
    describe=_describe,
    modules={
        **V3_MODULES,
        "router.bias": ("layers.{layer}.mlp.moe_statics.e_score_correction_bias",),
    },
    # One row for one group of experts.
    stacked={"router.bias": StackedTensor()},
    # Layers of multi-token prediction.
    unread=(ROTARY_BUFFERS, r".*mtp.*"),
    fixes_tokenizer_class=True,
)

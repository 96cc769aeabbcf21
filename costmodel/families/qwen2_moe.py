"""Qwen 1.5 and Qwen 2 with experts: a shared expert has a gate of its own."""

from __future__ import annotations

from costmodel.families._shared import (
    absent,
    decoder,
    experts,
    gated_mlp,
    llama_attention,
    num_layers,
    rms_norm,
    sparse_layers,
)
from costmodel.families._tables import EXPERTS_MODULES, QWEN2_DEFAULTS
from costmodel.families._windows import FULL, SLIDING
from costmodel.model.family import Family
from costmodel.model.feed_forward_spec import RouterSpec
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _windows(config: HFConfig) -> list[str] | None:
    """Read the kinds of layers; without ``layer_types``, every second one of those before
    ``max_window_layers`` has a window."""
    behind = config.whole("max_window_layers", least=0)
    if not config.flag("use_sliding_window"):
        return None
    config.whole("sliding_window")
    kinds = [SLIDING if i % 2 == 0 and i < behind else FULL for i in range(num_layers(config))]
    return config.layer_types() or kinds


def _describe(config: HFConfig) -> ModelSpec:
    takes_null = ["num_key_value_heads", *absent(config, "head_dim")]
    attention = llama_attention(config, takes_null=takes_null, qkv_bias=config.flag("qkv_bias"))
    norm = rms_norm(config)
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm)
    sparse = LayerSpec(
        attention=attention,
        experts=experts(
            config,
            count_keys=("num_experts",),
            size_key="moe_intermediate_size",
            router=RouterSpec(renormalises=config.flag("norm_topk_prob")),
            shared=gated_mlp(config, "shared_expert_intermediate_size"),
            gates_shared=True,
        ),
        norm=norm,
    )
    layers = [sparse if is_sparse else dense for is_sparse in sparse_layers(config)]
    return decoder(config, layers, windows=_windows(config))


FAMILY = Family(
    defaults={
        **QWEN2_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
        "qkv_bias": True,
    },
    describe=_describe,
    modules={
        **EXPERTS_MODULES,
        "shared_gate": ("layers.{layer}.mlp.shared_expert_gate",),
        "shared_gate_up": (
            "layers.{layer}.mlp.shared_expert.gate_proj",
            "layers.{layer}.mlp.shared_expert.up_proj",
        ),
        "shared_down": ("layers.{layer}.mlp.shared_expert.down_proj",),
    },
    tokenizer_class="Qwen2Tokenizer",
)

"""GLM-4.7 Flash: DeepSeek V3 with a list of the layers that have experts."""

from __future__ import annotations

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._shared import decoder, gated_mlp, num_layers, rms_norm
from costmodel.families.deepseek_v3 import sigmoid_experts
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

DENSE, SPARSE = "dense", "sparse"


def _describe(config: HFConfig) -> ModelSpec:
    norm = rms_norm(config)
    attention = latent_attention(config, is_interleaved=config.flag("rope_interleave"))
    layers = {
        DENSE: LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm),
        SPARSE: LayerSpec(attention=attention, experts=sigmoid_experts(config), norm=norm),
    }
    return decoder(config, [layers[kind] for kind in _kinds(config)])


def _kinds(config: HFConfig) -> list[str]:
    """Read the kind of each layer; without a list, the first one is dense."""
    found, count = config.get("mlp_layer_types"), num_layers(config)
    if found is None:
        return [DENSE, *[SPARSE] * (count - 1)]
    is_list = isinstance(found, list) and len(found) == count
    if not is_list or any(kind not in (DENSE, SPARSE) for kind in found):
        allowed = f"a list of {count}, each {DENSE} or {SPARSE}"
        raise config.refusal("mlp_layer_types", found, allowed)
    return list(found)


FAMILY = Family(
    defaults={
        **LATENT_DEFAULTS,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_interleave": True,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_layer_types": None,
    },
    describe=_describe,
    modules=latent_modules,
    # The layer of multi-token prediction follows the others.
    ignores_later_layers=True,
    fixes_tokenizer_class=True,
)

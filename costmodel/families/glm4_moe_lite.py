"""GLM-4.7 Flash: DeepSeek V3 with a list of the layers that have experts."""

from __future__ import annotations

from costmodel.families._latent import LATENT_DEFAULTS, latent_attention, latent_modules
from costmodel.families._layer_kinds import listed_sparse_layers
from costmodel.families._shared import decoder, gated_mlp, rms_norm
from costmodel.families._v3_mixture import v3_experts
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    norm = rms_norm(config)
    attention = latent_attention(config, is_interleaved=config.flag("rope_interleave"))
    dense = LayerSpec(attention=attention, mlp=gated_mlp(config), norm=norm)
    sparse = LayerSpec(attention=attention, experts=v3_experts(config), norm=norm)
    kinds = listed_sparse_layers(config, num_dense=1)
    return decoder(config, [sparse if is_sparse else dense for is_sparse in kinds])


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

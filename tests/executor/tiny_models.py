"""Tiny random checkpoints, written by transformers itself: the independent reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

VOCAB_SIZE = 173
HIDDEN_SIZE = 64

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
# With 12 of 16 elements of a head rotated.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 40,
}

# Latent attention whose parts have different sizes, and whose rows are no whole group of 64.
LATENT_KEYS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 28,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
}
LATENT_EXPERTS = {
    **LATENT_KEYS,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_shared_experts": 2,
}
# With factors of the scores and of the cosines, and prompts of tests beyond the original context.
LATENT_YARN = {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2}

# What a family's configs say beside the shapes of a plain decoder.
MORE_KEYS: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "cohere2": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 20, "query_pre_attn_scalar": 24},
    "glm": {"pad_token_id": 0},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"window_size": 20, "attention_types": [[["global", "local"], 1]]},
    "glm4": {"pad_token_id": 0},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_group": 2,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v2": {
        **LATENT_EXPERTS,
        "routed_scaling_factor": 4.0,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": LATENT_EXPERTS,
    "kimi_k2": LATENT_EXPERTS,
    "glm4_moe_lite": {k: v for k, v in LATENT_EXPERTS.items() if k != "first_k_dense_replace"},
    "youtu": LATENT_KEYS,
    "minicpm3": {**LATENT_KEYS, "scale_emb": 3, "scale_depth": 0.9, "dim_model_base": 40},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40},
    "olmo3": {"sliding_window": 20},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    # Mixtures with one tensor for all experts of a layer, and with other routers.
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 6,
    },
    "granitemoeshared": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "shared_intermediate_size": 72,
        "embedding_multiplier": 12.0,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "sliding_window": 20,
        "swiglu_limit": 0.7,
        "rope_parameters": YARN_ROPE | {"truncate": False},
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": [2, 3, 2], "intermediate_size": 40},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "intermediate_size_mlp": 72,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 20,
        "floor_scale": 8,
        "attn_scale": 0.5,
    },
    "solar_open": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "exaone_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_group": 2,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
    "afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "num_shared_experts": 2,
        "sliding_window": 20,
        "global_attn_every_n_layers": 2,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "flex_olmo": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "pad_token_id": 0,
    },
    "sarvam_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_group": 2,
        "pad_token_id": 0,
    },
    "hy_v3": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "dbrx": {
        "d_model": HIDDEN_SIZE,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 40,
            "moe_num_experts": 6,
            "moe_top_k": 2,
        },
    },
    "phimoe": {"num_local_experts": 6, "intermediate_size": 40, "router_jitter_noise": 0.3},
    "cwm": {"sliding_window": 20, "bos_token_id": 1},
    "exaone4": {"sliding_window": 20, "sliding_window_pattern": 3},
    "granite_swa": {
        "sliding_window": 20,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "granitemoe_swa": {
        "sliding_window": 20,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "hyperclovax": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 0.125,
    },
    "mellum": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "sliding_window": 20,
    },
    "ministral": {"sliding_window": 20},
    "vaultgemma": {"sliding_window": 20, "query_pre_attn_scalar": 24},
}

# Families whose classes take other keys than most: what they have beside ``shapes``.
OWN_KEYS: dict[str, dict[str, Any]] = {
    "biogpt": {"intermediate_size": 112},
    "bloom": {},
    "persimmon": {"intermediate_size": 112},
    "mpt": {"max_seq_len": 96, "n_heads": 4},
    "gpt2": {"n_inner": 112},
    "gpt_bigcode": {"n_inner": 112},
    "gpt_neo": {"intermediate_size": 112},
    "codegen": {"n_inner": 112},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
}

# How transformers attends. For Falcon with ALiBi, its plain loop adds the slopes twice.
ATTENTION = {"falcon": "sdpa"}

# Mixtures of experts as options of ``save_tiny_model``. A vocabulary of 900 makes the head larger
# than a decoder layer, so that it is cut in chunks.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "qwen2_moe": {
        "family": "qwen2_moe",
        "num_layers": 3,
        "decoder_sparse_step": 2,
        "vocab_size": 900,
    },
    "qwen3_moe": {"family": "qwen3_moe", "mlp_only_layers": [0], "num_experts_per_tok": 3},
    "olmoe": {"family": "olmoe", "tied": True},
    "gpt_oss": {"family": "gpt_oss"},
}


class KimiK2Config(DeepseekV3Config):  # type: ignore[misc]  # transformers has no types here
    """The hub's name for a model of DeepSeek V3's kind, which transformers has no class for."""

    model_type = "kimi_k2"


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):  # type: ignore[misc]  # the same
    """DeepSeek V3 under that name."""

    config_class = KimiK2Config


KimiK2RotaryEmbedding = DeepseekV3RotaryEmbedding
AutoConfig.register("kimi_k2", KimiK2Config)
AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)


class MimoConfig(Qwen2Config):  # type: ignore[misc]  # the same
    """The hub's name for Qwen 2 with layers of multi-token prediction."""

    model_type = "mimo"


class MimoForCausalLM(Qwen2ForCausalLM):  # type: ignore[misc]  # the same
    """Qwen 2 under that name."""

    config_class = MimoConfig


MimoRotaryEmbedding = Qwen2RotaryEmbedding
AutoConfig.register("mimo", MimoConfig)
AutoModelForCausalLM.register(MimoConfig, MimoForCausalLM)
register_checkpoint_conversion_mapping(
    "kimi_k2", get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)


def save_tiny_model(
    folder: Path,
    family: str,
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    tied: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Write a checkpoint folder with random weights; returns the transformers model."""
    shapes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "opt":
        shapes |= {"ffn_dim": 112, "word_embed_proj_dim": HIDDEN_SIZE}
    elif family == "falcon":
        shapes |= {"ffn_hidden_size": 112}
    elif family in ("gpt_neox", "gptj"):
        shapes |= {"intermediate_size": 112}
    elif family in OWN_KEYS:
        shapes |= OWN_KEYS[family]
    else:
        shapes |= {"intermediate_size": 112, "num_key_value_heads": num_kv_heads, "head_dim": 16}
    shapes |= MORE_KEYS.get(family, {})
    if family == "gpt_neo":
        kinds = ["global", "local"] * num_layers
        shapes["attention_types"] = [[[kind], 1] for kind in kinds[:num_layers]]
    config = AutoConfig.for_model(family, **(shapes | overrides))
    torch.manual_seed(seed)
    attention = ATTENTION.get(family, "eager")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Fresh models have zero biases and norms of one, which would hide a tensor that is misplaced.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith(".weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.15)
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model

"""The config keys of tiny models: rotations, latent attention, and what each family says."""

from __future__ import annotations

from typing import Any

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

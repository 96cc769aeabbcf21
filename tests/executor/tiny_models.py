"""Tiny random checkpoints, written by transformers itself: the independent reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    "glm4": {"pad_token_id": 0},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "n_group": 2,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
    },
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
    "cwm": {"sliding_window": 20, "bos_token_id": 1},
    "exaone4": {"sliding_window": 20, "sliding_window_pattern": 3},
    "granite_swa": {
        "sliding_window": 20,
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
}


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
    elif family == "gpt_neox_japanese":
        shapes |= {"intermediate_multiple_size": 2}
    else:
        shapes |= {"intermediate_size": 112, "num_key_value_heads": num_kv_heads, "head_dim": 16}
    shapes |= MORE_KEYS.get(family, {})
    config = AutoConfig.for_model(family, **(shapes | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Fresh models have zero biases and norms of one, which would hide a tensor that is misplaced.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith(".weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model

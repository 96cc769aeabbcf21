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

from tests.executor.tiny_keys import ATTENTION, HIDDEN_SIZE, MORE_KEYS, OWN_KEYS

VOCAB_SIZE = 173

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

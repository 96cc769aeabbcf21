"""Configs of models for images as they are published, with most keys of the decoder absent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from costmodel.families import spec_from_config
from costmodel.model.layout import model_layers

# The config, and the published count of parameters of its decoder.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
            "torch_dtype": "bfloat16",
        },
        3.884e9,
    ),
    "llava-1.5-7b": (
        {
            "model_type": "llava",
            "text_config": {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        6.739e9,
    ),
    "qwen2-vl-7b": (
        {
            "model_type": "qwen2_vl",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "vision_config": {"depth": 32, "hidden_size": 3584},
            "torch_dtype": "bfloat16",
        },
        7_615_616_512,
    ),
    "mistral-small-3.1-24b": (
        {
            "model_type": "mistral3",
            "text_config": {
                "model_type": "mistral",
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 131072,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
            },
            "torch_dtype": "bfloat16",
        },
        23_572_403_200,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_decoder_has_as_many_parameters_as_published(name: str) -> None:
    config, count = PUBLISHED[name]
    spec = spec_from_config(config, name=name)
    components = [c for layer in model_layers(spec) for c in layer.components]
    counted = sum(c.num_units * math.prod(t.shape) for c in components for t in c.tensors)
    assert counted == pytest.approx(count, rel=2e-3)
    assert spec.dtype == config["torch_dtype"]

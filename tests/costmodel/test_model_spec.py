"""Model shapes from presets and from Hugging Face configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from costmodel.families import preset_names, spec_from_config
from costmodel.model.loading import load_model_spec
from profiles import InputError
from profiles.files import to_json

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_in_any_case(name: str) -> None:
    assert load_model_spec(name.upper()) == load_model_spec(name)


def test_preset_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    spec = load_model_spec("opt-125m")
    # The defaults of OPTConfig are those of OPT-125M.
    config = transformers.OPTConfig()
    (layer,) = spec.layer_kinds
    assert layer.mlp is not None
    assert (spec.num_layers, spec.hidden_size, layer.mlp.size, spec.vocab_size) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.ffn_dim,
        config.vocab_size,
    )


def test_config_with_defaults() -> None:
    spec = spec_from_config(LLAMA, name="x")
    (layer,) = spec.layer_kinds
    attention, mlp = layer.attention, layer.mlp
    assert mlp is not None
    assert (attention.num_kv_heads, attention.head_dim, spec.head.is_tied) == (4, 16, False)
    assert (attention.qkv_bias, mlp.is_gated, spec.dtype) == (False, True, "bfloat16")
    qwen2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4}
    attention = spec_from_config(qwen2, name="x").layer(0).attention
    assert attention.qkv_bias and not attention.output_bias


def test_config_with_grouped_heads_and_own_head_size() -> None:
    changes = {"num_key_value_heads": 2, "head_dim": 32, "dtype": "float32"}
    spec = spec_from_config(LLAMA | changes, name="x")
    attention = spec.layer(0).attention
    assert (attention.group_size, attention.query_size, attention.kv_size) == (2, 128, 64)
    assert spec.dtype_bytes == 4


def test_windows_are_those_of_the_layers_that_the_config_names() -> None:
    windowed: dict[str, Any] = LLAMA | {"model_type": "mistral", "sliding_window": 32}
    windowed |= {"num_key_value_heads": 4}
    assert _windows(windowed) == [32] * 3
    assert _windows(windowed | {"sliding_window": None}) == [None] * 3
    # A window of all positions hides nothing.
    assert _windows(windowed | {"sliding_window": 128}) == [None] * 3
    # Llama reads no window, and Qwen only one that is switched on and some layer has.
    assert _windows(windowed | {"model_type": "llama"}) == [None] * 3
    qwen2 = windowed | {"model_type": "qwen2", "num_key_value_heads": 4}
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    for changes, windows in (
        ({}, [None] * 3),
        ({"use_sliding_window": False}, [None] * 3),
        ({"use_sliding_window": True}, [None] * 3),
        ({"use_sliding_window": True, "max_window_layers": 2}, [None, None, 32]),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3}, [None] * 3),
        ({"use_sliding_window": True, "layer_types": mixed}, [32, None, 32]),
    ):
        assert _windows(qwen2 | changes) == windows


def _windows(config: dict[str, Any]) -> list[int | None]:
    spec = spec_from_config(config, name="x")
    assert spec.max_positions == 128
    return [spec.layer(number).attention.window for number in range(spec.num_layers)]


def test_folder_and_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_model_spec(str(tmp_path)) == load_model_spec(str(tmp_path / "config.json"))
    assert load_model_spec(str(tmp_path)).name == tmp_path.name


@pytest.mark.parametrize("name", ["opt-125m", "llama-3.1-8b", "mistral-7b", "qwen3-8b"])
def test_a_file_of_a_spec_is_read_back(name: str, tmp_path: Path) -> None:
    spec = load_model_spec(name)
    (tmp_path / "spec.json").write_text(json.dumps(to_json(spec)))
    assert load_model_spec(str(tmp_path / "spec.json")) == spec


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"model_type": "mamba"}, "got 'mamba'"),
        ({}, "model_type"),
        (LLAMA | {"hidden_size": 0}, "hidden_size"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size"),
        (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers"),
        (LLAMA | {"vocab_size": None}, "vocab_size"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA | {"num_key_value_heads": "2"}, "num_key_value_heads"),
        (LLAMA | {"num_key_value_heads": 2.5}, "num_key_value_heads"),
        (LLAMA | {"num_attention_heads": 128}, "a multiple of the 128 heads"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (LLAMA | {"vocab_size": 10**12}, "vocab_size"),
        (LLAMA | {"tie_word_embeddings": None}, "tie_word_embeddings"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (LLAMA | {"layer_types": ["mamba"] * 3}, "layer_types"),
        (LLAMA | {"head_dim": 0}, "head_dim"),
        (LLAMA | {"head_dim": [16]}, "head_dim"),
        (LLAMA | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": "4k"}, "4k"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        (LLAMA | {"attention_bias": 1}, "attention_bias"),
        (LLAMA | {"dtype": "int8"}, "dtype"),
        (LLAMA | {"torch_dtype": 16}, "dtype"),
        (LLAMA | {"model_type": ["llama"]}, "model_type"),
        (OPT | {"word_embed_proj_dim": 0}, "word_embed_proj_dim"),
        (OPT | {"do_layer_norm_before": None}, "do_layer_norm_before"),
        (LLAMA | {"model_type": "mellum", "mlp_layer_types": [[]] * 3}, "mlp_layer_types"),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": [[]] * 47}, "mlp_layer_types"),
        ({"model_type": "mpt", "attn_config": []}, "attn_config"),
        ({"model_type": "dbrx", "ffn_config": {"ffn_act_fn": "silu"}}, "ffn_act_fn"),
    ],
)
def test_refused_configs(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_config(config, name="x")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_by_either_key(key: str) -> None:
    assert spec_from_config(LLAMA | {key: "float16"}, name="x").dtype == "float16"
    both = {"dtype": "float32", "torch_dtype": "float16"}
    assert spec_from_config(LLAMA | both, name="x").dtype == "float32"


def test_null_means_the_default_where_it_means_something() -> None:
    absent = dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "dtype"))
    assert spec_from_config(LLAMA | absent, name="x") == spec_from_config(LLAMA, name="x")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"opt-30b"):
        load_model_spec("opt-31b")

"""Every family's logits and tensor names against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from costmodel.families import family_named, family_names, spec_from_config
from costmodel.model.family import GENERIC_TOKENIZER
from costmodel.model.layout import model_layers
from costmodel.model.loading import load_model_spec
from executor.checkpoint.folder import Checkpoint
from profiles.errors import InputError
from tests.executor.model_cases import greedy
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_keys import LATENT_YARN, LLAMA3_ROPE, LONG_ROPE, YARN_ROPE
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention"]
# A family as it is, and what some of its configs say besides.
CASES: dict[str, dict[str, Any]] = {family: {"family": family} for family in family_names()} | {
    "bloom-three-heads": {"family": "bloom", "num_attention_heads": 3, "hidden_size": 48},
    "cohere-query-norms": {"family": "cohere", "use_qk_norm": True, "num_kv_heads": 1},
    "cohere-biases": {"family": "cohere", "use_qk_norm": True, "attention_bias": True},
    "stablelm-query-norms": {"family": "stablelm", "qk_layernorm": True, "num_kv_heads": 1},
    "persimmon-plain": {"family": "persimmon", "qk_layernorm": False},
    "phi-query-norms": {"family": "phi", "qk_layernorm": True},
    "opt-projected": {
        "family": "opt",
        "word_embed_proj_dim": 40,
        "do_layer_norm_before": False,
        "tied": True,
    },
    "opt-untied-projected": {"family": "opt", "word_embed_proj_dim": 80},
    "opt-sums": {"family": "opt", "do_layer_norm_before": False, "enable_bias": False},
    "opt-plain-norms": {
        "family": "opt",
        "layer_norm_elementwise_affine": False,
        "_remove_final_layer_norm": True,
    },
    "codegen-odd-heads": {"family": "codegen", "num_attention_heads": 2},
    "gpt-bigcode-plain-heads": {
        "family": "gpt_bigcode",
        "multi_query": False,
        "scale_attn_weights": False,
    },
    "mpt-clipped": {
        "family": "mpt",
        "attn_config": {"clip_qkv": 0.3, "softmax_scale": 0.3},
        "num_attention_heads": 4,
    },
    "falcon-alibi": {"family": "falcon", "alibi": True, "parallel_attn": False, "bias": True},
    "falcon-alibi-heads": {"family": "falcon", "alibi": True, "multi_query": False},
    "deepseek-v2-greedy": {
        "family": "deepseek_v2",
        "topk_method": "greedy",
        "q_lora_rank": None,
        "rope_parameters": LATENT_YARN,
    },
    "deepseek-v3-biases": {
        "family": "deepseek_v3",
        "attention_bias": True,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek-v3-halves": {"family": "deepseek_v3", "rope_interleave": False, "v_head_dim": 32},
    "deepseek-v3-yarn": {"family": "deepseek_v3", "rope_parameters": LATENT_YARN},
    "glm4-moe-lite-list": {
        "family": "glm4_moe_lite",
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    "minicpm3-long": {
        "family": "minicpm3",
        "rope_parameters": {
            **LONG_ROPE,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.0, 3.0],
        },
        "v_head_dim": None,
    },
    "falcon-new": {"family": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-plain-heads": {"family": "falcon", "multi_query": False, "bias": True},
    "falcon-sequential": {"family": "falcon", "parallel_attn": False},
    "cohere2-one-window": {"family": "cohere2", "sliding_window": 1, "layer_types": WINDOWS},
    "gemma2-all-windows": {
        "family": "gemma2",
        "sliding_window": 9,
        "layer_types": ["sliding_attention"] * 3,
        "attn_logit_softcapping": None,
    },
    "gemma3-windows": {
        "family": "gemma3_text",
        "sliding_window": 9,
        "layer_types": WINDOWS,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "glm4-moe-biases": {
        "family": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": False,
        "n_group": 1,
    },
    "dbrx-not-renormalised": {
        "family": "dbrx",
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 2},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": None,
            "ffn_act_fn": {"name": "gelu"},
        },
    },
    "exaone-moe-listed": {
        "family": "exaone_moe",
        "layer_types": WINDOWS,
        "sliding_window": 7,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "num_shared_experts": 2,
    },
    "dots1-windows": {
        "family": "dots1",
        "sliding_window": 7,
        "layer_types": WINDOWS,
        "attention_bias": True,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "ernie4-5-moe-biases": {
        "family": "ernie4_5_moe",
        "use_bias": True,
        "moe_layer_interval": 2,
        "moe_num_shared_experts": 0,
        "moe_norm_min": 0.6,
    },
    "gpt-oss-plain-rotary": {
        "family": "gpt_oss",
        "attention_bias": False,
        "layer_types": WINDOWS,
        "sliding_window": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe-biases": {"family": "granitemoe", "attention_bias": True, "tied": True},
    "granitemoeshared-none": {"family": "granitemoeshared", "shared_intermediate_size": 0},
    "hunyuan-moe-alpha": {
        "family": "hunyuan_v1_moe",
        "rope_parameters": ALPHA_ROPE,
        "moe_topk": 1,
    },
    "phimoe-long": {
        "family": "phimoe",
        "rope_parameters": LONG_ROPE
        | {
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
            "long_factor": [9.0] * 8,
            "short_mscale": 1.2,
            "long_mscale": 1.2,
        },
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "gpt-neox-sequential": {"family": "gpt_neox", "use_parallel_residual": False},
    "llama4-chunks": {
        "family": "llama4_text",
        "attention_chunk_size": 7,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 1, 0],
        "use_qk_norm": False,
        "attention_bias": True,
        "num_experts_per_tok": 1,
        "moe_layers": [0, 2],
    },
    "llama4-whole": {
        "family": "llama4_text",
        "attention_chunk_size": None,
        "attn_temperature_tuning": False,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-yarn": {"family": "llama", "rope_parameters": YARN_ROPE},
    "mistral-window": {"family": "mistral", "sliding_window": 5},
    "mixtral-window": {"family": "mixtral", "sliding_window": 16},
    "nemotron-biases": {"family": "nemotron", "attention_bias": True, "mlp_bias": True},
    "olmo-clipped": {"family": "olmo", "clip_qkv": 0.3},
    "olmo3-windows": {
        "family": "olmo3",
        "sliding_window": 7,
        "layer_types": WINDOWS,
        "rope_parameters": {"full_attention": YARN_ROPE},
    },
    "phi3-long": {"family": "phi3", "rope_parameters": LONG_ROPE},
    "phi3-short": {
        "family": "phi3",
        "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 80},
    },
    "apertus-squared": {"family": "apertus", "hidden_act": "relu2", "attention_bias": True},
    "ministral3-window": {
        "family": "ministral3",
        "sliding_window": 9,
        "rope_parameters": YARN_ROPE
        | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.7},
    },
    "cwm-window-of-one": {"family": "cwm", "sliding_window": 1, "layer_types": WINDOWS},
    "exaone4-without-windows": {
        "family": "exaone4",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
    },
    "exaone-llama3": {"family": "exaone", "rope_parameters": LLAMA3_ROPE, "mlp_bias": True},
    "gpt-neox-japanese-part": {"family": "gpt_neox_japanese", "rotary_pct": 0.5},
    "granite-swa-bases": {
        "family": "granite_swa",
        "sliding_window": 7,
        "layer_types": WINDOWS,
        "layer_rope_theta": [0, 1e4, 5e5],
        "attention_bias": True,
    },
    "granitemoe-swa-bases": {
        "family": "granitemoe_swa",
        "sliding_window": 7,
        "layer_types": WINDOWS,
        "layer_rope_theta": [0, 1e4, 5e5],
        "shared_intermediate_size": 0,
    },
    "hyperclovax-one-norm": {
        "family": "hyperclovax",
        "use_post_norm": False,
        "attention_multiplier": 0.1,
        "attention_bias": True,
    },
    "hunyuan-stretched": {
        "family": "hunyuan_v1_dense",
        "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
        "rope_theta": 1e4,
    },
    "internlm3-biases": {"family": "internlm3", "attention_bias": True, "mlp_bias": True},
    "mellum-windows": {
        "family": "mellum",
        "sliding_window": 7,
        "layer_types": WINDOWS,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {
            "full_attention": YARN_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "nanochat-biases": {
        "family": "nanochat",
        "attention_bias": True,
        "final_logit_softcapping": None,
    },
    "ministral-windows": {"family": "ministral", "sliding_window": 7, "layer_types": WINDOWS},
    "stablelm-parallel": {
        "family": "stablelm",
        "use_parallel_residual": True,
        "use_qkv_bias": True,
    },
    "granite-biases": {"family": "granite", "attention_bias": True, "mlp_bias": True},
    "llama3-rotary": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "mixtral-one-expert": {"family": "mixtral", "num_experts_per_tok": 1},
    "olmo2-biases-wide-heads": {
        "family": "olmo2",
        "attention_bias": True,
        "head_dim": 32,
        "num_kv_heads": 1,
    },
    "olmoe-renormalised": {"family": "olmoe", "norm_topk_prob": True, "num_kv_heads": 4},
    "qwen2-moe-every-other-layer": {
        "family": "qwen2_moe",
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
    },
    "qwen2-windows": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2-moe-windows": {"family": "qwen2_moe", "use_sliding_window": True, "sliding_window": 7},
    "qwen3-windows": {
        "family": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": WINDOWS,
    },
    "qwen3-moe-window": {"family": "qwen3_moe", "use_sliding_window": True, "sliding_window": 7},
    "starcoder2-window": {"family": "starcoder2", "sliding_window": 13},
    "qwen3-moe-dense-layers": {
        "family": "qwen3_moe",
        "mlp_only_layers": [0, 2],
        "norm_topk_prob": True,
        "attention_bias": True,
        "head_dim": 32,
        "tied": True,
    },
}
# In billions, as published.
PRESET_SIZES = {
    "granite-3.1-2b": 2.534,
    "granite-3.1-8b": 8.171,
    "mixtral-8x7b": 46.70,
    "mixtral-8x22b": 140.62,
    "olmo-2-1b": 1.485,
    "olmo-2-7b": 7.299,
    "olmo-2-13b": 13.716,
    "olmo-2-32b": 32.234,
    "olmoe-1b-7b": 6.919,
    "qwen1.5-moe-a2.7b": 14.316,
    "qwen2-57b-a14b": 57.41,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "qwen3-coder-480b-a35b": 480.15,
}
PROMPT = [5, 9, 170, 3, 3, 77, 12, 88, 1, 33, 41]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = save_tiny_model(tmp_path, num_layers=3, **CASES[case])
    checkpoint = Checkpoint.open(tmp_path)
    ids = torch.randint(0, VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    for cut in (0.0, 0.43):
        got = ReferenceModel(checkpoint, cut=cut).logits(ids.tolist())
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    prompts = [PROMPT, PROMPT[:2], PROMPT[3:9], PROMPT[-1:]]
    expected_ids = [greedy(theirs, prompt, 6) for prompt in prompts]
    for cut in (0.0, 0.43):
        assert ReferenceModel(checkpoint, cut=cut).generate(prompts, 6) == expected_ids


@pytest.mark.parametrize("family", family_names())
def test_bfloat16_is_as_near_to_float32_as_transformers(family: str, tmp_path: Path) -> None:
    theirs = save_tiny_model(tmp_path, family, dtype="bfloat16")
    exact = ReferenceModel(Checkpoint.open(tmp_path, "float32")).logits(PROMPT)
    got = ReferenceModel(Checkpoint.open(tmp_path)).logits(PROMPT)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0].float()
    # A token for which two experts are nearly equal may go to either, here as there.
    errors = [(logits - exact).abs().max(-1).values.median() for logits in (got, expected)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize(("name", "billions"), PRESET_SIZES.items())
def test_presets_have_as_many_elements_as_their_models(name: str, billions: float) -> None:
    components = [c for layer in model_layers(load_model_spec(name)) for c in layer.components]
    sizes = [sum(t.num_elements for t in c.tensors) * c.num_units for c in components]
    assert sum(sizes) / 1e9 == pytest.approx(billions, rel=0.003)


def test_tokenizer_classes_are_those_of_transformers() -> None:
    for name in family_names():
        family = family_named(name)
        registered = TOKENIZER_MAPPING_NAMES.get(name)
        assert family.tokenizer_class == (registered or GENERIC_TOKENIZER), name
        # What a file names is looked at where another class of its own is registered, or none.
        is_fixed = (
            registered == GENERIC_TOKENIZER or name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        )
        assert family.fixes_tokenizer_class == is_fixed, name


def test_more_experts_for_a_token_than_there_are_are_refused() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 7}
    with pytest.raises(InputError, match=r"num_experts_per_tok .*at most the 6 experts"):
        spec_from_config(config, name="tiny")


def test_more_experts_than_any_model_has_are_refused_at_once() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 2**31 - 1}
    with pytest.raises(InputError, match="model experts"):
        spec_from_config(config, name="tiny")


@pytest.mark.parametrize("layers", [3, [-1], ["0"], [True]])
def test_dense_layers_that_are_no_list_of_numbers_are_refused(layers: object) -> None:
    config = {"model_type": "qwen3_moe", "mlp_only_layers": layers}
    with pytest.raises(InputError, match=r"mlp_only_layers .*a list of whole numbers"):
        spec_from_config(config, name="tiny")


def test_layers_that_predict_further_tokens_are_left_out() -> None:
    assert family_named("mimo").may_ignore("model.mtp_layers.0.mlp.up_proj.weight", 36)
    assert not family_named("mimo").may_ignore("model.layers.40.mlp.up_proj.weight", 36)

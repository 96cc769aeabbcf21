"""Models in GGUF against transformers: logits, configs, and files that contradict themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from costmodel.families._windows import FULL, SLIDING
from costmodel.gguf.config import config_from_gguf, spec_from_gguf
from costmodel.gguf.metadata import ArchMetadata
from costmodel.gguf.model import GgufModel
from profiles.errors import InputError
from tests.executor.gguf_models import GgufSource, write_tiny_gguf
from tests.executor.reference import ReferenceModel
from tests.executor.test_families import PROMPT
from tests.executor.tiny_keys import LLAMA3_ROPE, LONG_ROPE, YARN_ROPE
from tests.executor.tiny_models import save_tiny_model

RMS: dict[str, Any] = {"attention.layer_norm_rms_epsilon": 1e-6}
# By case: the architecture, options of ``save_tiny_model``, keys, and more tensors.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, list[float]]]] = {
    "llama": ("llama", {"family": "llama", "tied": True}, RMS, {}),
    "llama with biases": (
        "llama",
        {"family": "llama", "attention_bias": True, "mlp_bias": True},
        RMS,
        {},
    ),
    "llama 3": (
        "llama",
        {"family": "llama", "rope_parameters": LLAMA3_ROPE},
        RMS,
        # Computed by llama.cpp's converter.
        {"rope_freqs.weight": [1.0, 3.2995386, *[8.0] * 6]},
    ),
    "linear": (
        "llama",
        {"family": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {**RMS, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "yarn": (
        "qwen3",
        {"family": "qwen3", "rope_parameters": YARN_ROPE},
        {
            **RMS,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 24,
        },
        {},
    ),
    "mixtral": (
        "llama",
        {"family": "mixtral"},
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e6,
            "expert_count": 6,
            "expert_used_count": 2,
        },
        {},
    ),
    "qwen2": ("qwen2", {"family": "qwen2"}, RMS, {}),
    "qwen2moe": (
        "qwen2moe",
        {"family": "qwen2_moe"},
        {
            **RMS,
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 40,
            "expert_shared_feed_forward_length": 72,
        },
        {},
    ),
    "qwen3moe": (
        "qwen3moe",
        {"family": "qwen3_moe", "norm_topk_prob": True},
        {**RMS, "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 40},
        {},
    ),
    "gemma2": (
        "gemma2",
        {"family": "gemma2", "tied": True, "query_pre_attn_scalar": 16},
        {
            **RMS,
            "attention.sliding_window": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 30.0,
        },
        {},
    ),
    "gemma3": (
        "gemma3",
        {
            "family": "gemma3_text",
            "tied": True,
            "query_pre_attn_scalar": 16,
            "num_layers": 4,
            "layer_types": [*[SLIDING] * 2, FULL, SLIDING],
        },
        {
            **RMS,
            "attention.sliding_window": 20,
            "attention.sliding_window_pattern": [True, True, False, True],
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
        },
        {},
    ),
    "phi3": (
        "phi3",
        {"family": "phi3", "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 40},
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 40,
            "rope.scaling.attn_factor": 1.1123517741823192,
        },
        {
            "rope_factors_short.weight": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
            "rope_factors_long.weight": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        },
    ),
    "smollm3": (
        "smollm3",
        {"family": "smollm3", "num_layers": 5},
        {**RMS, "rope.freq_base": 2e6},
        {},
    ),
}
# What transformers' reader of GGUF says of these keys is the same in its and in our config.
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "num_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)


def _write(case: str, folder: Path) -> tuple[Path, Any]:
    arch, options, numbers, vectors = CASES[case]
    theirs = save_tiny_model(folder, **options)
    return write_tiny_gguf(folder, arch, numbers, vectors), theirs


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    path, theirs = _write(case, tmp_path)
    model = GgufModel.open(path)
    ours = ReferenceModel(GgufSource(model, spec_from_gguf(model, "tiny")))
    ours.num_positions = len(PROMPT)
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    assert (ours.logits(PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen2moe", "qwen3moe", "gemma2", "gemma3"])
def test_config_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    path, _ = _write(case, tmp_path)
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    theirs = loader.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    ours = config_from_gguf(GgufModel.open(path), "tiny")
    shared = [key for key in CONFIG_KEYS if key in theirs and key in ours]
    assert len(shared) >= 8
    assert {k: ours[k] for k in shared} == pytest.approx({k: theirs[k] for k in shared}, rel=1e-6)


@pytest.mark.parametrize(
    ("numbers", "vectors", "message"),
    [
        ({"attention.causal": False}, {}, "llama.attention.causal of tiny: got False"),
        ({"expert_group_count": 4}, {}, "expert_group_count of tiny: got 4; allowed: 0 or 1"),
        ({"swin_norm": True}, {}, "llama.swin_norm of tiny: got True; allowed: no such key"),
        ({"attention.value_length": 8}, {}, "got 8; allowed: 16, as attention.key_length"),
        ({"rope.scaling.type": "ntk"}, {}, "rope.scaling.type of tiny: got ntk"),
        ({"rope.freq_base_swa": 5.0}, {}, "got 5.0; allowed: 10000.0, as rope.freq_base"),
        ({"expert_count": 4}, {}, "expert_used_count of tiny: got none"),
        ({}, {"blk.0.attn_q_norm.weight": [1.0]}, "got tensor blk.0.attn_q_norm.weight"),
        ({}, {"rope_freqs.weight": [1.0] * 3}, "got a shape of [3]; allowed: [8]"),
        ({}, {"rope_freqs.weight": [0.0] * 8}, "a number that divides nothing"),
        ({}, {"rope_freqs.weight": [float("nan")] * 8}, "a number that divides nothing"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope_freqs.weight": [2.0] * 8},
            "rope.scaling.type of tiny: got yarn; allowed: no other scaling beside rope_freqs",
        ),
        (
            {"rope.scaling.factor": 4.0},
            {"rope_freqs.weight": [2.0] * 8},
            "rope.scaling.factor of tiny: got 4.0; allowed: no other scaling beside rope_freqs",
        ),
        (
            {},
            {f"rope_{kind}.weight": [2.0] * 8 for kind in ("freqs", "factors_long")},
            "rope_freqs.weight of tiny: got rope_factors_long.weight beside it",
        ),
        (
            {"attention.head_count_kv": np.arange(2**14 + 1)},
            {},
            "attention.head_count_kv of tiny: got 16385 values; allowed: at most 16384",
        ),
        ({"embedding_length": 32}, {}, "output_norm.weight of llama.gguf: got a shape of [64]"),
        ({"block_count": 3}, {}, "no tensor for attention_norm.weight of layer 2"),
        ({"block_count": 1}, {}, "got tensor blk.1."),
        ({"nextn_predict_layers": 2}, {}, "nextn_predict_layers of tiny: got 2"),
    ],
)
def test_what_is_not_followed_is_refused(
    numbers: dict[str, Any], vectors: dict[str, list[float]], message: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, "llama", tied=True)
    model = GgufModel.open(write_tiny_gguf(tmp_path, "llama", RMS, vectors))
    metadata = {**model.metadata, **{f"llama.{key}": value for key, value in numbers.items()}}
    with pytest.raises(InputError) as caught:
        spec_from_gguf(GgufModel(metadata=metadata, tensors=model.tensors), "tiny")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_without_end_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gemma2", tied=True)
    model = GgufModel.open(
        write_tiny_gguf(tmp_path, "gemma2", {**RMS, "attention.sliding_window": 4})
    )
    metadata = {**model.metadata, "gemma2.block_count": 2**31 - 1}
    metadata |= {"gemma2.attention.sliding_window": 0}
    with pytest.raises(InputError, match="block_count of tiny: got 2147483647; allowed: at most"):
        spec_from_gguf(GgufModel(metadata=metadata, tensors=model.tensors), "tiny")


def test_divisors_beside_windows_with_their_own_rotation_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gemma3_text", tied=True)
    vectors = {"rope_freqs.weight": [2.0] * 8}
    model = GgufModel.open(write_tiny_gguf(tmp_path, "gemma3", RMS, vectors))
    with pytest.raises(InputError, match="a file of gemma3, whose layers with a window"):
        spec_from_gguf(model, "tiny")


@pytest.mark.parametrize(
    ("numbers", "value"),
    [
        ([3, 3, 3], 3),
        ([3, 3, 2], [3, 3, 2]),
        ([True, True], True),
        ([], []),
        ([0.1, 0.1], 0.1),
        ([float("inf")] * 2, float("inf")),
    ],
)
def test_equal_numbers_of_all_layers_are_one(numbers: list[Any], value: Any) -> None:
    kind = np.float32 if float in map(type, numbers) else None
    metadata = {"general.architecture": "llama", "llama.x": np.array(numbers, dtype=kind)}
    model = GgufModel(metadata=metadata, tensors={})
    got = ArchMetadata(model=model, name="tiny").get("x")
    assert got == value and type(got) is type(value)


def test_a_model_without_windows_has_none(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gemma3_text", tied=True)
    keys = {**RMS, "rope.freq_base": 1e6}
    model = GgufModel.open(write_tiny_gguf(tmp_path, "gemma3", keys))
    (kind,) = spec_from_gguf(model, "tiny").layer_kinds
    assert kind.attention.window is None
    assert kind.attention.rotary is not None and kind.attention.rotary.theta == 1e6


def test_an_unknown_architecture_is_told_with_those_that_are_read() -> None:
    model = GgufModel(metadata={"general.architecture": "mamba"}, tensors={})
    with pytest.raises(InputError, match=r"got 'mamba'; allowed: arcee, .*llama, "):
        spec_from_gguf(model, "tiny")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", num_layers=3)
    model = GgufModel.open(write_tiny_gguf(tmp_path, "qwen2", {**RMS, "nextn_predict_layers": 1}))
    assert spec_from_gguf(model, "tiny").num_layers == 2

"""Text alone through models for images: their decoder of text against transformers."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from costmodel.families import family_names, spec_from_config
from costmodel.families._text_parts import TEXT_KINDS, TEXT_PARTS
from costmodel.model.family import GENERIC_TOKENIZER
from costmodel.model.loading import load_model_spec
from executor.checkpoint.folder import Checkpoint
from executor.model.generation_config import GenerationConfig
from profiles.errors import InputError
from tests.executor.model_cases import greedy
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import Case, draw_policy, make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE

Config = dict[str, Any]
TEXT: Config = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
PATCHES: Config = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BLOCKS: Config = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 32,
}
CLIP = PATCHES | {"model_type": "clip_vision_model"}
NEWEST = "model.language_model."
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
HALF_SECTIONS = SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
# By outer type: what the configs of the decoder and of the vision tower say besides.
CASES: dict[str, tuple[Config, Config]] = {
    "gemma3": ({"head_dim": 16, "sliding_window": 20, "layer_types": None}, PATCHES),
    "glm4v": ({"rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0}}, BLOCKS),
    "glm4v_moe": (
        {
            "head_dim": 16,
            "rope_parameters": SECTIONS
            | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "routed_scaling_factor": 1.5,
        },
        BLOCKS,
    ),
    "idefics3": ({"model_type": "llama"}, PATCHES),
    "internvl": (
        {"model_type": "qwen3", "head_dim": 16},
        PATCHES | {"image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "llama4": (
        {"head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 4}
        | {"attention_chunk_size": 20, "interleave_moe_layer_step": 2, "floor_scale": 16},
        PATCHES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "llava": ({"model_type": "llama"}, CLIP),
    "llava_next": ({"model_type": "mistral", "head_dim": 16, "sliding_window": None}, CLIP),
    "llava_onevision": ({"model_type": "qwen2"}, PATCHES),
    "mistral3": ({"model_type": "ministral3", "head_dim": 16}, PATCHES),
    "qwen2_vl": (
        {"rope_parameters": SECTIONS, "use_sliding_window": True, "sliding_window": 9}
        | {"max_window_layers": 1},
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    ),
    "qwen2_5_vl": ({"rope_parameters": SECTIONS}, BLOCKS | {"fullatt_block_indexes": [0]}),
    "qwen3_vl": (
        {"head_dim": 16, "rope_parameters": SECTIONS},
        BLOCKS | {"deepstack_visual_indexes": [0]},
    ),
    "smolvlm": ({"model_type": "llama"}, PATCHES),
}
TIED = {"tie_word_embeddings": True}
PROMPT = [(7 * i + 3) % 170 for i in range(60)]


def save_tiny(folder: Path, kind: str, **outer: Any) -> Any:
    """Write a random checkpoint of a model for images; returns the transformers model."""
    text, vision = CASES[kind]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    text = TEXT | ends | {"model_type": TEXT_PARTS[kind].kind} | text
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **outer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith(".weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
    model.eval().save_pretrained(folder)
    # The model of Llama 4 fails in transformers 5.24 without images; its decoder does not.
    return model.language_model if kind == "llama4" else model


def check_logits(folder: Path, theirs: Any) -> None:
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([PROMPT])).logits[0]
    got = ReferenceModel(Checkpoint.open(folder)).logits(PROMPT)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_logits_of_text_are_those_of_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path, kind, tie_word_embeddings=tied)
    check_logits(tmp_path, theirs)
    assert load_model_spec(str(tmp_path)).head.is_tied == tied


def test_every_type_has_a_case() -> None:
    assert set(CASES) == set(TEXT_PARTS)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_names_of_all_ages_are_read(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = save_tiny(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    newest = {
        re.sub(r"^(model\.language_model|language_model\.model|model)\.", NEWEST, name).replace(
            "language_model.lm_head.", "lm_head."
        ): tensor
        for name, tensor in tensors.items()
        if "visual" not in name and "vision" not in name and "projector" not in name
    }
    newest["model.visual.scale"] = torch.zeros(1)
    save_file(newest, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        check_logits(tmp_path, theirs)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("executor.")]
    assert line.endswith("only the decoder of text is read; left out: visual")


def test_parts_beside_the_decoder_are_named_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llava")
    with caplog.at_level(logging.WARNING):
        Checkpoint.open(tmp_path)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("executor.")]
    assert line.endswith("left out: multi_modal_projector, vision_tower")


def test_a_tensor_of_the_decoder_that_is_not_asked_for_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma3")
    file = tmp_path / "model.safetensors"
    extra = {"language_model.model.layers.0.self_attn.sinks": torch.zeros(4)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"self_attn\.sinks, which its config does not ask for"):
        Checkpoint.open(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma3")
    file = tmp_path / "model.safetensors"
    extra = {"model.language_model.norm.weight": torch.zeros(64)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"beside another tensor for model\.norm\.weight"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_config_is_read(kind: str, tmp_path: Path) -> None:
    """Older configs have the keys of the decoder beside those of the model."""
    theirs = save_tiny(tmp_path, kind)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rotary = {"type": "mrope", "mrope_section": [4, 2, 2]}
    del text["rope_parameters"], text["model_type"]
    path.write_text(json.dumps(text | {"rope_theta": 1e4, "rope_scaling": rotary} | config))
    check_logits(tmp_path, theirs)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    config_class = type(AutoConfig.for_model(kind.removesuffix("_text")).get_text_config())
    assert config_class.model_type == kind
    theirs = {f.name: f.default for f in fields(config_class) if f.default is not MISSING}
    ours = dict(TEXT_KINDS[kind].defaults)
    share = ours.pop("partial_rotary_factor", 1.0)
    made = config_class()
    assert made.rope_parameters.get("partial_rotary_factor", 1.0) == share
    assert made.rope_parameters["rope_theta"] == ours.pop("rope_theta", 1e4)
    assert {key: theirs[key] for key in ours} == ours
    assert TEXT_KINDS[kind].family in family_names()


def test_keys_that_transformers_does_not_read_are_dropped() -> None:
    config = {
        "model_type": "qwen3_vl",
        "text_config": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    }
    spec = spec_from_config(config, name="tiny")
    assert {kind.attention.window for kind in spec.layer_kinds} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config .*got null; allowed: an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": {"model_type": "mamba2"}}, "'mamba2', which needs state-space layers"),
        ({"text_config": {"rms_norm_eps": 1}}, "rms_norm_eps"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "logits with a factor or a soft cap"),
    ],
)
def test_what_the_decoder_cannot_be_is_refused(change: Config, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_from_config({"model_type": "gemma3", "text_config": {}} | change, name="tiny")


def test_the_outer_dtype_counts() -> None:
    inner = {"torch_dtype": "float32"}
    config = {"model_type": "llava", "text_config": inner, "torch_dtype": "float16"}
    assert spec_from_config(config, name="tiny").dtype == "float16"


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({}, {}, False), ({}, TIED, True), ({"tie_word_embeddings": False}, TIED, False)],
)
def test_the_outer_config_ties_the_head_or_else_the_inner_one(
    outer: Config, inner: Config, tied: bool
) -> None:
    config = {"model_type": "mistral3", "text_config": inner} | outer
    assert spec_from_config(config, name="tiny").head.is_tied == tied


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_policies_run(kind: str, tmp_path: Path) -> None:
    theirs = save_tiny(tmp_path / "model", kind)
    prompts = [PROMPT[:length] for length in (9, 1, 14)]
    (tmp_path / "offload").mkdir()
    case = Case(
        source=Checkpoint.open(tmp_path / "model"), prompts=prompts, folder=tmp_path / "offload"
    )
    base = make_policy(case.source.spec, prompt_len=14, gen_len=4)
    rng = random.Random(kind)
    for _ in range(3):
        tokens = case.generate(draw_policy(base, rng, gpu=False), make_hardware())
        assert tokens == [greedy(theirs, prompt, 4) for prompt in prompts]


def test_end_tokens_of_the_decoder_are_read(tmp_path: Path) -> None:
    config = {"eos_token_id": None, "text_config": {"eos_token_id": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert GenerationConfig.load(tmp_path).eos_ids == {7}


def test_tokenizer_classes_are_those_of_transformers() -> None:
    for name, part in TEXT_PARTS.items():
        registered = TOKENIZER_MAPPING_NAMES.get(name)
        assert part.tokenizer_class == (registered or GENERIC_TOKENIZER), name
        is_fixed = (
            registered == GENERIC_TOKENIZER or name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        )
        assert part.fixes_tokenizer_class == is_fixed, name

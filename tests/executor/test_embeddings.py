"""Learned positions, norms and projections of embeddings in whole runs, held to transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from costmodel.families import spec_from_config
from costmodel.model.layout import model_layers
from costmodel.model.spec import EmbeddingSpec
from costmodel.plan.policy import Placement
from executor.model import layers
from profiles.errors import InputError
from tests.executor.model_cases import make_case
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.test_scores import check_blocks
from tests.executor.test_windows import GEN_LEN, LENGTHS, MACHINES
from tests.executor.tiny_machines import (
    ON_DISK,
    ExpectedCase,
    change_policy,
    draw_policy,
    make_hardware,
)

# A vocabulary of 900 makes the head larger than a decoder layer, so that it is cut in chunks.
PROJECTED = {"word_embed_proj_dim": 40, "do_layer_norm_before": False, "vocab_size": 900}
MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"family": "bloom", "vocab_size": 900},
    "gpt2": {"family": "gpt2", "tied": True},
    "gpt_bigcode": {"family": "gpt_bigcode", "tied": True},
    "gpt_neo": {"family": "gpt_neo", "window_size": 5},
    "opt": {"family": "opt", "tied": True, **PROJECTED},
    "opt-untied": {"family": "opt", **PROJECTED},
    "cohere": {"family": "cohere", "use_qk_norm": True},
}
Made = tuple[ExpectedCase, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Make each model once, with transformers' tokens for each prompt by itself."""
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_case(folder, LENGTHS, GEN_LEN, **MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_random_policies(cases: Callable[[str], Made], name: str, machine: str) -> None:
    case, _ = cases(name)
    assert case.generate(case.policy(), MACHINES[machine]) == case.tokens
    on_disk = case.policy(weights=ON_DISK)
    assert case.generate(on_disk, MACHINES[machine]) == case.tokens
    rng = random.Random(f"{name} on {machine}")
    # More of them are among those of all families.
    policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
    assert case.generate(policy, MACHINES[machine]) == case.tokens, policy


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["bloom", "gpt2", "opt", "opt-untied"])
def test_packed_weights(
    cases: Callable[[str], Made], name: str, machine: str, direct: bool
) -> None:
    case, _ = cases(name)
    compression = Compression(weight_bits=4, group_size=32)
    prompts = list(map(list, case.prompts))
    expected = ReferenceModel(case.source, compression=compression).generate(prompts, GEN_LEN)
    hardware = make_hardware(gpu=machine == "gpu", direct=direct)
    mixed = Placement(gpu=0.3, cpu=0.3, disk=0.4) if machine == "gpu" else Placement(disk=1)
    for weights in (Placement(cpu=1), mixed):
        policy = case.policy(weights=weights)
        policy = replace(policy, weight_bits=4, group_size=32)
        assert case.generate(policy, hardware) == expected, policy


@pytest.mark.parametrize("weight_bits", [None, 4])
@pytest.mark.parametrize("name", ["opt", "opt-untied", "bloom"])
def test_scores_of_prompts(
    cases: Callable[[str], Made], name: str, weight_bits: int | None
) -> None:
    """Every chunk of the head has the same input, which the first one's weights make."""
    case, theirs = cases(name)
    rng = random.Random(name)
    for gpu in (False, True):
        policy = draw_policy(case.policy(), rng, gpu=gpu)
        asked = replace(policy.workload, gen_len=1, prompt_logprobs=2)
        policy = change_policy(policy, workload=asked)
        hardware = make_hardware(gpu=gpu, direct=True)
        if weight_bits is None:
            check_blocks(case.run(policy, hardware), case, theirs, asked)
            continue
        compression = Compression(weight_bits=weight_bits, group_size=32)
        reference = ReferenceModel(case.source, compression=compression)
        policy = replace(policy, weight_bits=weight_bits, group_size=32)
        scores = {i: s for b in case.run(policy, hardware) for i, s in b.prompt_scores.items()}
        for i, prompt in enumerate(case.prompts):
            logits = reference.logits(list(prompt))[:-1].log_softmax(-1)
            wanted = [float(row[token]) for row, token in zip(logits, prompt[1:], strict=True)]
            assert list(scores[i].log_probs) == pytest.approx(wanted, abs=1e-4)


def test_projections_are_in_embedding_and_head() -> None:
    config = {"model_type": "opt", "word_embed_proj_dim": 512, "hidden_size": 1024}
    config |= {"num_attention_heads": 16, "do_layer_norm_before": False}
    layers = model_layers(spec_from_config(config, name="tiny"))
    shapes = {
        f"{component.name} {tensor.name}": tensor.shape
        for layer in (layers[0], *layers[-3:])
        for component in layer.components
        for tensor in component.tensors
    }
    assert shapes["embedding input_projection.weight"] == (1024, 512)
    assert shapes["embedding positions.weight"] == (2050, 1024)
    assert shapes["head output_projection.weight"] == (512, 1024)
    assert shapes["head head.weight"][1] == 512
    assert not any("final_norm" in name for name in shapes)


def test_context_of_bloom_is_that_of_its_training_or_named() -> None:
    bloom = {"model_type": "bloom", "n_embed": 1024, "num_attention_heads": 16}
    assert spec_from_config(bloom, name="x").max_positions == 2048
    assert spec_from_config(bloom | {"seq_length": 4096}, name="x").max_positions == 4096
    assert spec_from_config(bloom | {"hidden_size": 64}, name="x").hidden_size == 1024


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 4}, "n_embd"),
        ({"model_type": "gpt_neo", "attention_types": [[["near"], 24]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [[["local"], 10**9]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [[["local"], None]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": [[["local"], 2**70]]}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_types": 3}, "attention_types"),
        ({"model_type": "gpt_neo", "attention_layers": ["local"]}, "attention_layers"),
        ({"model_type": "bloom", "hidden_size": 2**30, "n_head": 2**30}, "num_heads"),
        ({"model_type": "falcon", "alibi": True, "num_attention_heads": 4544}, "num_heads"),
        (
            {"model_type": "stablelm", "qk_layernorm": True, "num_attention_heads": 2**20}
            | {"num_key_value_heads": 2**20, "hidden_size": 2**24},
            "num_heads",
        ),
        ({"model_type": "mpt", "attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "alibi"),
        ({"model_type": "mpt", "attn_config": [1]}, "attn_config"),
        ({"model_type": "codegen", "n_embd": 6, "n_head": 2, "rotary_dim": 2}, "n_embd"),
        ({"model_type": "bloom", "n_embed": 66}, "hidden_size"),
    ],
)
def test_refused_configs(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from_config(config, name="x")


def test_the_scale_of_gemma_is_rounded_as_in_transformers() -> None:
    table = Gemma2TextScaledWordEmbedding(50, 72, 0, embed_scale=72**0.5).to(torch.bfloat16)
    ids = torch.arange(50)
    rows = table.weight[ids].detach().clone()
    layers.scale_embedding(rows, EmbeddingSpec(scale=72**0.5, rounds_scale=True))
    assert torch.equal(rows, table(ids))

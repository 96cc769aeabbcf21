"""Quantized checkpoints of every layout: values, logits and tokens against transformers' models of
what the layouts' own formulas give."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.model.encoded_model import without_encodings
from executor.checkpoint.folder import Checkpoint
from tests.executor.model_cases import draw_prompts, greedy
from tests.executor.quantized_files import (
    Awq,
    Bnb4,
    Bnb8,
    Fp8,
    Gptq,
    Int8,
    Mxfp4,
    Packed4,
    save_quantized,
)
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import ExpectedCase, draw_policy, make_hardware

GEN_LEN = 4
LENGTHS = (23, 2, 9, 1)
MACHINES = {False: make_hardware(), True: make_hardware(gpu=True)}
LLAMA: dict[str, Any] = {"family": "llama", "intermediate_size": 128}
QWEN3_MOE: dict[str, Any] = {
    "family": "qwen3_moe",
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}
CASES: dict[str, dict[str, Any]] = {
    "gptq": {**LLAMA, "draw": Gptq()},
    "gptq-8-bits": {**LLAMA, "draw": Gptq(bits=8, group=64, is_v1=False)},
    "gptq-rows": {**LLAMA, "draw": Gptq(group=-1)},
    "gptq-act-order": {**LLAMA, "draw": Gptq(order="scattered")},
    "gptq-said-to-be-scattered": {**LLAMA, "draw": Gptq(order="as they are")},
    "awq": {**LLAMA, "draw": Awq()},
    "packed": {**LLAMA, "draw": Packed4()},
    "packed-zeros": {
        **LLAMA,
        "draw": Packed4(is_symmetric=False, dtype=torch.bfloat16, order="scattered"),
    },
    "packed-8-bits": {**LLAMA, "draw": Packed4(bits=8, group=-1, dtype=torch.float16)},
    "int8": {**LLAMA, "draw": Int8()},
    "fp8-tiles": {**LLAMA, "draw": Fp8()},
    "fp8-matrix": {**LLAMA, "draw": Fp8(tile=None)},
    "fp8-channels": {**LLAMA, "draw": Fp8(strategy="channel", dtype=torch.bfloat16)},
    "fp8-tensor": {**LLAMA, "draw": Fp8(strategy="tensor", dtype=torch.bfloat16)},
    "bnb-4-bits": {**LLAMA, "draw": Bnb4(is_nested=False)},
    "bnb-nested": {**LLAMA, "draw": Bnb4()},
    "bnb-8-bits": {**LLAMA, "draw": Bnb8()},
    "gpt-oss": {"family": "gpt_oss", "draw": Mxfp4(), "intermediate_size": 96},
    "qwen3-moe-fp8": {**QWEN3_MOE, "draw": Fp8()},
    "mixtral-act-order": {
        "family": "mixtral",
        "draw": Gptq(order="scattered"),
        "intermediate_size": 96,
    },
    "deepseek-v3-fp8": {
        "family": "deepseek_v3",
        "draw": Fp8(),
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "moe_intermediate_size": 64,
        "v_head_dim": 16,
    },
    "phi3-awq": {"family": "phi3", "draw": Awq(), "intermediate_size": 128},
    "gpt-neox-gptq": {"family": "gpt_neox", "draw": Gptq(), "intermediate_size": 128},
    "gpt2-gptq": {"family": "gpt2", "draw": Gptq(order="scattered")},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a layout of decoded matrices."""
    return replace(checkpoint, spec=without_encodings(checkpoint.spec))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(name: str, tmp_path: Path) -> None:
    options = dict(CASES[name])
    torch.manual_seed(1)
    theirs = save_quantized(tmp_path / "model", options.pop("family"), num_layers=3, **options)
    source = Checkpoint.open(tmp_path / "model")
    assert source.spec.is_encoded
    prompts = draw_prompts(LENGTHS)
    expected = theirs(input_ids=torch.tensor([prompts[0]]), use_cache=False).logits[0]
    found = ReferenceModel(_plain(source)).logits(prompts[0])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    (tmp_path / "offload").mkdir()
    case = ExpectedCase(
        source=source,
        prompts=prompts,
        folder=tmp_path / "offload",
        tokens=[greedy(theirs, prompt, GEN_LEN) for prompt in prompts],
    )
    rng = random.Random(name)
    for number in range(8):
        policy = draw_policy(case.policy(), rng, gpu=number % 2 == 1)
        policy = replace(policy)
        assert case.generate(policy, MACHINES[number % 2 == 1]) == case.tokens, policy

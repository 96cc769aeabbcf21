"""No arena holds more of anything than the cost model counted, and the total is inside the peak."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.families import spec_from_config
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Policy
from costmodel.plan.rounding import round_policy
from costmodel.pricing.memory import memory_rows, peak_bytes
from costmodel.pricing.price import estimate
from costmodel.pricing.problem import problem_of
from costmodel.pricing.shares import shares_of
from executor.checkpoint.dummy import DummyCheckpoint
from executor.run.requests import CompletionOutput
from executor.run.runner import Runner
from profiles.hardware import HardwareProfile
from tests.covering import at_most
from tests.executor.tiny_keys import MORE_KEYS
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    change_policy,
    draw_policy,
    make_hardware,
    make_policy,
    on_cuda,
)
from tests.plain_models import plain_config, plain_model

# What the arenas do not hold: it comes and goes while a layer is computed.
TEMPORARY = {"runtime", "outputs", "workspace", "head input", "attention staging", "scores"}
SHAPES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_size": 160,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 900,
    "max_positions": 128,
}
LLAMA = plain_model(**SHAPES)


def _with_experts(family: str, **changes: Any) -> ModelSpec:
    return _with_keys(family, **(MORE_KEYS[family] | changes))


def _with_keys(family: str, **changes: Any) -> ModelSpec:
    config = plain_config(**(SHAPES | {"family": family})) | changes
    return spec_from_config(config, name=family)


MODELS = {
    "llama": LLAMA,
    "llama-tied": plain_model(**(SHAPES | {"tied": True, "num_kv_heads": 1, "dtype": "bfloat16"})),
    "opt": plain_model(**(SHAPES | {"family": "opt", "num_kv_heads": 4, "tied": True})),
    "wide cache": plain_model(**(SHAPES | {"num_kv_heads": 4, "head_dim": 160})),
    "mixtral": _with_experts("mixtral"),
    "windows": _with_keys(
        "qwen3",
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2_moe": _with_experts("qwen2_moe", decoder_sparse_step=2),
}


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("name", MODELS)
def test_random_policies_stay_inside_every_term(name: str, machine: str, tmp_path: Path) -> None:
    hardware = make_hardware(gpu=machine == "gpu")
    rng = random.Random(f"{name} {machine}")
    base = make_policy(MODELS[name], prompt_len=11, gen_len=5)
    for _ in range(at_most(4, 12)):
        workload = replace(
            base.workload,
            prompt_len=rng.randint(1, 40),
            gen_len=rng.randint(1, 9),
            prompt_logprobs=rng.choice([None, 2]),
        )
        policy = draw_policy(replace(base, workload=workload), rng, gpu=machine == "gpu")
        check_terms(policy, hardware, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_corners_stay_inside_every_term(name: str, tmp_path: Path) -> None:
    base = make_policy(MODELS[name], prompt_len=11, gen_len=5)
    for home in (ON_CPU, ON_DISK, ON_GPU):
        for cpu_attention in (0.0, 1.0):
            policy = change_policy(
                base, weights=home, cache=home, activations=home, cpu_attention=cpu_attention
            )
            check_terms(policy, make_hardware(gpu=True), tmp_path)
            if home is not ON_GPU:
                check_terms(replace(policy, cpu_attention=1.0), make_hardware(), tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_corners_of_experts_stay_inside_every_term(name: str, tmp_path: Path) -> None:
    base = make_policy(MODELS[name], prompt_len=11, gen_len=5)
    for home in (ON_CPU, ON_DISK):
        for activations in (ON_GPU, ON_CPU):
            for on_demand, cpu_experts in ((True, 0.0), (False, 1.0), (True, 0.5)):
                policy = change_policy(
                    base,
                    weights=home,
                    activations=activations,
                    loads_on_demand=on_demand,
                    cpu_experts=cpu_experts,
                )
                check_terms(policy, make_hardware(gpu=True), tmp_path)
        policy = change_policy(base, weights=home, loads_on_demand=True)
        check_terms(policy, make_hardware(), tmp_path)


def check_terms(policy: Policy, hardware: HardwareProfile, folder: Path) -> None:
    """Hold every arena of an open runner against the terms of its tier."""
    rounded = round_policy(policy, has_gpu=hardware.has_gpu)
    problem, shares = problem_of(rounded, hardware), shares_of(rounded)
    peaks = peak_bytes(problem, shares)
    with Runner(policy, hardware, DummyCheckpoint(spec=policy.model), folder) as runner:
        used = {
            tier: dict(arena.used_bytes) for tier, arena in runner.weights.machine.arenas.items()
        }
        disk_bytes = runner.disk_bytes
    for tier, rows in memory_rows(problem, shares).items():
        if tier == "disk":
            assert disk_bytes <= peaks["disk"], policy
            continue
        for name, count in used[tier].items():
            # Bytes are whole, shares are floats.
            counted = max(terms[name] for terms in rows.values()) / shares.per_block + 0.5
            assert count <= counted, (tier, name, policy)
        temporary = min(
            sum(value for name, value in terms.items() if name in TEMPORARY)
            for terms in rows.values()
        )
        kept = peaks[tier] - temporary / shares.per_block
        assert sum(used[tier].values()) <= kept + 1, (tier, policy)


def test_what_a_job_has_generated_is_counted() -> None:
    count, gen_len = 500, 32
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    rows = torch.randint(10_000, (count, gen_len)).tolist()
    kept = [
        CompletionOutput(text="".join(map(str, row)), token_ids=list(row), finish_reason="length")
        for row in rows
    ]
    del rows
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    peaks = [
        estimate(
            make_policy(LLAMA, prompt_len=11, gen_len=gen_len, num_prompts=num), make_hardware()
        ).peak_bytes["cpu"]
        for num in (None, count)
    ]
    assert len(kept) == count
    assert held < peaks[1] - peaks[0] < 2 * held


@pytest.mark.gpu
def test_cuda_peak_is_inside_the_prediction(tmp_path: Path) -> None:
    hardware = on_cuda(make_hardware(gpu=True))
    wide = {"hidden_size": 512, "ffn_size": 1536, "num_heads": 8, "head_dim": 64}
    model = plain_model(**(SHAPES | wide))
    base = make_policy(model, prompt_len=60, gen_len=6)
    rng = random.Random(0)
    for _ in range(5):
        policy = draw_policy(base, rng, gpu=True)
        rounded = round_policy(policy, has_gpu=True)
        peaks = peak_bytes(problem_of(rounded, hardware), shares_of(rounded))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with Runner(policy, hardware, DummyCheckpoint(spec=model), tmp_path) as runner:
            list(runner.run([[1] * 60] * policy.block_size))
        assert torch.cuda.max_memory_allocated() - before <= peaks["gpu"], policy

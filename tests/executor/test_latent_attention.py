"""Latent attention: whole runs against transformers, its parts by brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from executor.checkpoint.folder import Checkpoint
from executor.model import latent_attention
from tests.executor.model_cases import make_case
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.tiny_machines import ExpectedCase, draw_policy, make_hardware
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (17, 2, 9, 1, 12)
GEN_LEN = 5
MACHINES = {"cpu": make_hardware(), "gpu": make_hardware(gpu=True)}
DIRECT = {"cpu": make_hardware(direct=True), "gpu": make_hardware(gpu=True, direct=True)}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"family": "deepseek_v3"},
    "whole-queries": {"family": "deepseek_v3", "q_lora_rank": None},
}


@pytest.fixture(autouse=True)
def _few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads are then two tiles, of which one is not full."""
    monkeypatch.setattr(latent_attention, "LATENT_HEADS_AT_ONCE", 3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExpectedCase]:
    """Make each model once, with transformers' tokens for each prompt by itself."""
    made: dict[str, ExpectedCase] = {}

    def make(name: str) -> ExpectedCase:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name], _ = make_case(folder, LENGTHS, GEN_LEN, **MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_random_policies(cases: Callable[[str], ExpectedCase], name: str, machine: str) -> None:
    case = cases(name)
    assert case.generate(case.policy(), MACHINES[machine]) == case.tokens
    rng = random.Random(f"{name} on {machine}")
    # More of them are among those of all families.
    for _ in range(2):
        policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
        assert case.generate(policy, MACHINES[machine]) == case.tokens, policy


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("weight_bits", "cache_bits", "sparsity"),
    [(4, None, 1.0), (None, 4, 1.0), (4, 8, 0.4), (None, None, 0.4), (4, 4, 0.4)],
)
def test_packed_and_sparse(
    cases: Callable[[str], ExpectedCase],
    machine: str,
    weight_bits: int | None,
    cache_bits: int | None,
    sparsity: float,
) -> None:
    case = cases("deepseek_v3")
    compression = Compression(
        weight_bits=weight_bits, cache_bits=cache_bits, group_size=32, sparsity=sparsity
    )
    model = ReferenceModel(case.source, compression=compression)
    expected = model.generate(list(map(list, case.prompts)), GEN_LEN)
    rng = random.Random(f"{compression} on {machine}")
    for machines in (MACHINES, DIRECT) if weight_bits else (MACHINES,):
        policy = replace(
            draw_policy(case.policy(), rng, gpu=machine == "gpu"),
            weight_bits=weight_bits or 32,
            cache_bits=cache_bits or 32,
            group_size=32,
            attention_sparsity=sparsity,
        )
        assert case.generate(policy, machines[machine]) == expected, policy


@pytest.mark.parametrize("cache_bits", [None, 4])
def test_the_twins_serve_too(
    cases: Callable[[str], ExpectedCase], cache_bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, as on a GPU."""
    case = cases("deepseek_v3")
    model = ReferenceModel(case.source, compression=Compression(cache_bits=cache_bits))
    expected = model.generate(list(map(list, case.prompts)), GEN_LEN)
    monkeypatch.setattr("profiles.kernels.call.load_library", lambda: None)
    policy = case.policy(cache_bits=cache_bits or 32)
    assert case.generate(policy, MACHINES["cpu"]) == expected


def test_a_token_takes_one_row_of_the_cache(cases: Callable[[str], ExpectedCase]) -> None:
    """Of all heads together: the latent, and the part with the position."""
    case = cases("deepseek_v3")
    latent = case.source.spec.layer(0).attention.latent
    assert latent is not None and (latent.rank, latent.rope_dim) == (28, 8)
    assert case.source.spec.layer(0).attention.cached_size == 36


def test_bfloat16_does_not_depend_on_the_placement(tmp_path: Path) -> None:
    """Of prompts of one length, so that no batch pads them otherwise, and without routers, for
    which two experts may be equal in 16 bits."""
    options: dict[str, Any] = {"family": "deepseek_v3", "first_k_dense_replace": 3}
    save_tiny_model(tmp_path / "model", num_layers=3, seed=3, dtype="bfloat16", **options)
    (tmp_path / "offload").mkdir()
    rng = random.Random(7)
    case = ExpectedCase(
        source=Checkpoint.open(tmp_path / "model"),
        prompts=[[rng.randrange(VOCAB_SIZE) for _ in range(12)] for _ in LENGTHS],
        folder=tmp_path / "offload",
        tokens=[[0] * GEN_LEN],
    )
    expected = case.generate(case.policy(), MACHINES["cpu"])
    for machine, hardware in MACHINES.items():
        for _ in range(3):
            policy = draw_policy(case.policy(), rng, gpu=machine == "gpu")
            assert case.generate(policy, hardware) == expected, policy

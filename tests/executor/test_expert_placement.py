"""Mixtures of experts choose the same tokens at 16 and at 4 bits, wherever their bytes live."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.plan.policy import Placement
from executor.checkpoint.folder import Checkpoint
from executor.model.experts import add_routed
from profiles import kernels
from profiles.hardware import Contention
from tests.covering import at_most, covering
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.tiny_machines import (
    ON_CPU,
    ON_DISK,
    ON_GPU,
    ExpectedCase,
    draw_policy,
    make_hardware,
)
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE, save_tiny_model

GEN_LEN = 4
LENGTHS = (9, 1, 12, 5, 2)
# Prompts of each length, of which the one with the clearest choices is taken.
NUM_CANDIDATES = 24
# How far each chosen token must lead, in standard deviations of the logits.
CLEAR_LEAD = 0.1
THIRDS = Placement(gpu=0.3, cpu=0.3, disk=0.4)
# The other mixtures run under eight policies of their families, too.
FIRST = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
Cases = Callable[[str, int], ExpectedCase]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Make each model once for each number of weight bits."""
    made: dict[tuple[str, int], ExpectedCase] = {}

    def make(name: str, bits: int) -> ExpectedCase:
        if (name, bits) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{bits}")
            made[name, bits] = {16: _half_precision, 4: _packed}[bits](name, folder)
        return made[name, bits]

    return make


def _half_precision(name: str, folder: Path) -> ExpectedCase:
    """Make a bfloat16 case with the tokens of transformers, in float32 arithmetic.

    Batches round differently, so only prompts count whose every choice is clear.
    """
    model = save_tiny_model(folder, seed=3, dtype="bfloat16", **MIXTURES[name]).float()
    rng = random.Random(5)
    prompts, tokens = [], []
    for length in LENGTHS:
        rows = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for _ in range(NUM_CANDIDATES)]
        continued, leads = _greedy(model, torch.tensor(rows))
        assert leads.max() > CLEAR_LEAD
        ids = continued[leads.argmax()].tolist()
        prompts.append(ids[:length])
        tokens.append(ids[length:])
    return ExpectedCase(
        source=Checkpoint.open(folder), prompts=prompts, folder=folder, tokens=tokens
    )


@torch.inference_mode()
def _greedy(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue prompts of one length; returns also the least lead of each one's choices."""
    leads = torch.full((len(ids),), torch.inf)
    for _ in range(GEN_LEN):
        logits = model(ids).logits[:, -1]
        first, second = logits.topk(2).values.unbind(-1)
        leads = leads.minimum((first - second) / logits.std(-1))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], -1)
    # The same token again and again could come of a wrong cache too.
    varied = (ids[:, -GEN_LEN:] != ids[:, -1:]).any(-1)
    return ids, leads * varied


def _packed(name: str, folder: Path) -> ExpectedCase:
    """Make a float32 case with the plain loop's tokens from weights that were packed."""
    save_tiny_model(folder, seed=3, **MIXTURES[name])
    source = Checkpoint.open(folder)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    model = ReferenceModel(source, compression=Compression(weight_bits=4))
    tokens = model.generate(prompts, GEN_LEN)
    assert tokens != ReferenceModel(source).generate(prompts, GEN_LEN)
    return ExpectedCase(source=source, prompts=prompts, folder=folder, tokens=tokens)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_references_say_something(cases: Cases, name: str, bits: int) -> None:
    tokens = cases(name, bits).tokens
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert len({token for row in tokens for token in row}) >= 8


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_random_policies(cases: Cases, name: str, bits: int, machine: str) -> None:
    case = cases(name, bits)
    rng = random.Random(f"{name} in {bits} bits on {machine}")
    for number in range(at_most(4, 13 if name in FIRST else 4)):
        policy = draw_policy(case.policy(weight_bits=bits), rng, gpu=machine == "gpu")
        # On every second machine, few rows are multiplied with packed weights as they lie.
        hardware = make_hardware(gpu=machine == "gpu", direct=number % 2 == 1)
        assert case.generate(policy, hardware) == case.tokens, policy


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_groups_on_a_gpu(cases: Cases, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows of a GPU's experts are multiplied packed, whatever else is unpacked."""
    case = cases(name, 4)
    monkeypatch.setattr(kernels, "groups_packed", lambda x, num_groups: len(x) < 3 * num_groups)
    rng = random.Random(name)
    for _ in range(3):
        policy = draw_policy(case.policy(weight_bits=4), rng, gpu=True)
        assert case.generate(policy, make_hardware(gpu=True)) == case.tokens, policy


CORNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpu: all there": ("gpu", {"weights": ON_GPU}),
    "gpu: all in memory": ("gpu", {"weights": ON_CPU}),
    "gpu: all on disk": ("gpu", {"weights": ON_DISK}),
    "gpu: all in place": ("gpu", {"weights": ON_CPU, "cpu_experts": 1.0}),
    "gpu: some in place": ("gpu", {"weights": THIRDS, "cpu_experts": 0.5}),
    "all in memory": ("cpu", {"weights": ON_CPU}),
    "all on disk": ("cpu", {"weights": ON_DISK}),
}


@covering(
    {
        "name": list(MIXTURES),
        "bits": [16, 4],
        "on_demand": [False, True],
        "activations": [ON_GPU, ON_DISK],
        "corner": list(CORNERS),
    }
)
def test_corners(
    cases: Cases, name: str, bits: int, on_demand: bool, activations: Placement, corner: str
) -> None:
    case = cases(name, bits)
    machine, changes = CORNERS[corner]
    changes = changes | {"loads_on_demand": on_demand, "gpu_batch_size": 3}
    if machine == "gpu":
        changes["activations"] = activations
    policy = case.policy(weight_bits=bits, **changes)
    assert case.generate(policy, make_hardware(gpu=machine == "gpu")) == case.tokens


@pytest.mark.parametrize(("kept", "num_threads"), [(0.5, 1), (0.9, 2)])
def test_an_emulated_gpu_and_experts_in_place_share_cores(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, kept: float, num_threads: int
) -> None:
    """They take turns in one thread, unless the profile says that each has cores of its own."""
    threads = set()

    def note_thread(*values: Any) -> None:
        threads.add(threading.get_ident())
        add_routed(*values)

    monkeypatch.setattr("executor.run.expert_steps.add_routed", note_thread)
    case, hardware = cases("mixtral", 16), make_hardware(gpu=True)
    cores = Contention(
        first="gpu_compute", second="cpu_compute", first_keeps=kept, second_keeps=kept
    )
    policy = case.policy(weights=THIRDS, cache=ON_GPU, activations=ON_GPU, cpu_experts=0.5)
    assert case.generate(policy, replace(hardware, contention=(cores,))) == case.tokens
    assert len(threads) == num_threads

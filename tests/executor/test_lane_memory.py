"""The memory of lanes: what each store allocates is counted, and the cache to the byte."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.families import spec_from_config
from costmodel.model.spec import ModelSpec
from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE
from costmodel.plan.policy import LanePolicy, Placement, Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import peak_buffers, policy_peaks
from executor.checkpoint.dummy import DummyCheckpoint
from executor.run.runner import Runner
from tests.executor.test_memory import MODELS, SHAPES, check_terms
from tests.executor.tiny_keys import MORE_KEYS
from tests.executor.tiny_machines import ON_CPU, ON_DISK, make_hardware, make_policy
from tests.plain_models import plain_config

MACHINE = make_hardware()
HALVES = Placement(cpu=0.5, disk=0.5)


def _latent() -> ModelSpec:
    keys = MORE_KEYS["deepseek_v3"]
    return spec_from_config(plain_config(**SHAPES, family="deepseek_v3") | keys, name="latent")


def _work(rng: random.Random, **changes: Any) -> Workload:
    """Draw the lengths of a job."""
    prompts = [rng.randint(1, 70) for _ in range(9)]
    limits = [rng.randint(1, 20) for _ in range(9)]
    lengths = Lengths(prompts, limits)
    return Workload(
        prompt_len=max(prompts),
        gen_len=max(limits),
        num_prompts=len(prompts),
        lengths=lengths.sketch(),
        **changes,
    )


def _draw(
    model: ModelSpec, rng: random.Random, *, cache: Placement = ON_CPU, **changes: Any
) -> Policy:
    """Draw lanes, with weights anywhere."""
    work = _work(rng, prompt_logprobs=rng.choice([None, 2]), logprobs=rng.choice([None, 3]))
    base = make_policy(model, prompt_len=work.prompt_len, gen_len=work.gen_len)
    batch, rows = rng.randint(1, 4), rng.randint(1, 40)
    lanes = LanePolicy(
        pool_tokens=rng.randint(1, 300),
        pass_rows=work.prompt_len + 12 + rows,
        chunk_rows=rng.choice([1, 16, 512]),
    )
    return replace(
        base,
        workload=work,
        gpu_batch_size=batch,
        num_gpu_batches=rng.randint(1, 3),
        prefill_batch_size=1,
        weights=dict.fromkeys(base.weights, rng.choice([ON_CPU, ON_DISK])),
        cache=cache,
        activations=ON_CPU,
        lanes=lanes,
        **changes,
    )


@pytest.mark.parametrize("name", [*MODELS, "latent"])
def test_lanes_stay_inside_every_term(name: str, tmp_path: Path) -> None:
    model, rng = MODELS.get(name) or _latent(), random.Random(name)
    for bits, cache in (
        (model.full_bits, ON_CPU),
        (model.full_bits, ON_DISK),
        (8, HALVES),
        (4, rng.choice([ON_CPU, ON_DISK])),
    ):
        sparsity = rng.choice([1.0, 0.25])
        packed = {"cache_bits": bits, "group_size": 32, "attention_sparsity": sparsity}
        weight_bits = rng.choice([model.full_bits, 8, 4])
        policy = _draw(model, rng, cache=cache, weight_bits=weight_bits, **packed)
        check_terms(policy, MACHINE, tmp_path)
        with Runner(policy, MACHINE, DummyCheckpoint(spec=model), tmp_path) as runner:
            used = runner.weights.machine.arenas["cpu"].used_bytes
            counted = peak_buffers(policy, MACHINE)["cpu"]
            for name in ("cache", "cache staging"):
                assert used.get(name, 0) == round(counted[name])
            assert used["hidden states"] == round(counted["hidden states"])


def test_pages_and_rows_are_what_lanes_add() -> None:
    rng = random.Random(0)
    policy = _draw(MODELS["llama"], rng)
    assert policy.lanes is not None
    lanes = replace(policy.lanes, pool_tokens=10 * PAGE)
    policy = replace(policy, lanes=lanes)
    buffers = peak_buffers(policy, MACHINE)["cpu"]
    # 3 layers, keys and values of 2 heads of 16 elements of 4 bytes.
    assert buffers["cache"] == pytest.approx(3 * 2 * 2 * 16 * 4 * 10 * PAGE)
    assert buffers["hidden states"] == pytest.approx(lanes.pass_rows * 64 * 4)
    more = replace(policy, lanes=replace(lanes, pool_tokens=11 * PAGE))
    grown = policy_peaks(more, MACHINE)["cpu"] - policy_peaks(policy, MACHINE)["cpu"]
    assert 3 * 2 * 2 * 16 * 4 * PAGE <= grown <= 1.2 * 3 * 2 * 2 * 16 * 4 * PAGE + 48 * PAGE

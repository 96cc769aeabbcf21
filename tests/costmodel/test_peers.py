"""In the model, no policy that another system would use is faster than the one found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.optimum import DEFAULT_MARGIN, search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities, with_capacities
from costmodel.pricing.price import estimate
from profiles import HardwareProfile, recorded_profile
from tests.costmodel import peers
from tests.costmodel.mixtures import mixture

# A policy may lose this to rounding and to what the search takes for equally fast.
TOLERANCE = 0.01
WORKLOADS = {
    "paper": Workload(prompt_len=512, gen_len=32),
    "chat": Workload(prompt_len=100, gen_len=100, num_prompts=1),
    "batch": Workload(prompt_len=256, gen_len=64, num_prompts=64),
}
CASES = [
    ("t4-flexgen", "opt-6.7b", "paper"),
    ("t4-flexgen", "opt-30b", "paper"),
    ("t4-flexgen", "opt-175b", "paper"),
    ("t4-flexgen", "llama-2-13b", "chat"),
    ("rtx3090-pc", "llama-3.1-8b", "batch"),
    ("rtx3090-pc", "qwen3-32b", "chat"),
    ("rtx4090-pc", "qwen2.5-14b", "batch"),
    ("rtx4090-pc", "llama-3.1-70b", "batch"),
    ("a100-80gb", "llama-3.1-70b", "paper"),
    ("a100-80gb", "llama-3.1-405b", "batch"),
]


def _machine(name: str) -> HardwareProfile:
    """A recorded machine that unpacks groups at a tenth of its memory's rate."""
    machine = recorded_profile(name)
    gpu, cpu = machine.gpu, machine.cpu
    assert gpu is not None

    def known(rate: float) -> dict[str, float]:
        return {"unpack_bytes_per_s": rate / 10}

    return replace(
        machine,
        gpu=replace(gpu, compute=replace(gpu.compute, **known(gpu.memory_bytes_per_s))),  # type: ignore[arg-type]
        cpu=replace(cpu, compute=replace(cpu.compute, **known(cpu.memory_bytes_per_s))),  # type: ignore[arg-type]
    )


def _peers(
    machine: HardwareProfile, model: ModelSpec, workload: Workload, bits: int | None
) -> Iterator[tuple[str, Policy]]:
    # Peers keep no margin of their own; ours is theirs here, so that memory is the same.
    if bits is None:
        for policy in peers.accelerate(machine, model, workload, margin=DEFAULT_MARGIN):
            yield "accelerate", policy
    for make in (peers.llama_cpp, peers.zero_inference):
        for policy in make(machine, model, workload, bits=bits, margin=DEFAULT_MARGIN):
            yield make.__name__, policy


@pytest.mark.parametrize(
    ("name", "preset", "work", "bits"),
    [(*case, None) for case in CASES] + [(*case, 4) for case in CASES[3:8]],
)
def test_no_peer_is_faster(name: str, preset: str, work: str, bits: int | None) -> None:
    machine, model, workload = _machine(name), load_model_spec(preset), WORKLOADS[work]
    permitted = Permitted(weight_bits=(16,) if bits is None else (16, bits))
    found = search(machine, model, workload, permitted=permitted)
    tried = 0
    for peer, policy in _peers(machine, model, workload, bits):
        tried += 1
        rate = job_throughput(policy, machine)
        assert rate <= found.job_tok_per_s * (1 + TOLERANCE), f"{peer}: {policy}"
    assert tried >= 2


@pytest.mark.parametrize(
    ("name", "preset", "work"),
    [
        ("rtx3090-pc", "mixtral-8x7b", "chat"),
        ("rtx4090-pc", "qwen3-30b-a3b", "batch"),
        ("t4-flexgen", "qwen3-30b-a3b", "chat"),
        ("rtx4090-pc", "mixtral-8x7b", "batch"),
    ],
)
def test_no_peer_is_faster_with_a_mixture(name: str, preset: str, work: str) -> None:
    """Experts multiplied in CPU memory; whole layers by number; all streamed."""
    # With room for all experts in CPU memory, as those systems take for granted.
    machine = with_capacities(_machine(name), {"cpu": 128 * 10**9})
    model, workload = mixture(preset), WORKLOADS[work]
    found = search(machine, model, workload)
    tried = dict.fromkeys(("experts on the CPU", "llama_cpp", "accelerate", "zero_inference"), 0)
    beside = peers.experts_on_cpu(machine, model, workload, margin=DEFAULT_MARGIN)
    shapes = (
        *(("experts on the CPU", policy) for policy in beside),
        *_peers(machine, model, workload, None),
    )
    for peer, policy in shapes:
        tried[peer] += 1
        rate = job_throughput(policy, machine)
        assert rate <= found.job_tok_per_s * (1 + TOLERANCE), f"{peer}: {policy}"
    assert min(tried.values()) >= 1


@pytest.mark.parametrize("row", range(12))
def test_no_published_policy_of_flexgen_is_faster(row: int) -> None:
    """All rows of the paper, held to memory that their own policies need."""
    policy, _ = list(peers.flexgen_published())[row]
    machine = _machine("t4-flexgen")
    # Some of them count on memory that its authors freed by hand: grant them what they need.
    peaks = estimate(policy, machine).peak_bytes
    needed = {tier: round(peak / (1 - DEFAULT_MARGIN)) + 1 for tier, peak in peaks.items()}
    limits = capacities(machine)
    machine = with_capacities(machine, {t: max(limits[t], needed[t]) for t in limits})
    assert peers.fits(policy, machine, margin=DEFAULT_MARGIN)
    permitted = Permitted(
        weight_bits=tuple({16, policy.weight_bits}), cache_bits=tuple({16, policy.cache_bits})
    )
    found = search(machine, policy.model, policy.workload, permitted=permitted)
    rate = estimate(policy, machine).throughput_tok_per_s
    assert rate <= found.job_tok_per_s * (1 + TOLERANCE)

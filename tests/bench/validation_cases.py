"""The cases of the validation: models, workloads, tiers and precisions, drawn once and for all."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from drawn_policies import draw_placement, first_layers

from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy, Prediction, placed_alike
from costmodel.plan.rounding import overall_weights, round_policy
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from costmodel.pricing.problem import Problem
from profiles.emulate import EmulatedGpu
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_profile
from profiles.units import MIB

# From 0.25 to 6.4 GB; a key head for every query head, and for three to seven of them.
MODELS = ("opt-125m", "qwen2.5-0.5b", "llama-3.2-1b", "opt-1.3b", "llama-3.2-3b")
# Cut to a few layers, of which each takes 0.6 to 2.9 GB: many small experts, with shared ones, and
# few large ones.
MIXTURES = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "mixtral-8x7b")
MIXTURE_LAYERS = (2, 6)
TIERS = ("cpu", "disk", "gpu")
LINKS_BYTES_PER_S = (0.5e9, 2e9, 8e9)
BITS = (16, 16, 8, 4)
# What is drawn, and thereby what is kept, must not depend on today's profile.
DRAWN_FOR = "cpu-2core"
SHORTEST_S, LONGEST_S = 2.0, 25.0
MOST_BYTES, MOST_GPU_BYTES, MOST_DISK_BYTES = 9 * 10**9, 6 * 10**9, 16 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One policy to predict and to run, the tier that it leans on and how it came about.

    ``is_held_out`` says whether it judges predictions or may help to calibrate them.
    """

    seed: int
    number: int
    tier: str
    kind: str
    policy: Policy
    emulated: EmulatedGpu | None
    is_held_out: bool


def draw_cases(seed: int, count: int, *, mixtures: bool = False) -> list[Case]:
    """Draw cases of dense models, or of mixtures of experts; a longer list begins with the shorter
    one."""
    rng = random.Random(seed)
    cases: list[Case] = []
    for number in range(count):
        tier = TIERS[number % len(TIERS)]
        # Of two rounds over the tiers one is searched; of two such pairs one is held out.
        kind = ("searched", "by hand")[number // len(TIERS) % 2]
        policy, emulated = _draw(rng, tier, kind, mixtures=mixtures)
        held_out = number // (2 * len(TIERS)) % 2 == 1
        cases.append(
            Case(
                seed=seed,
                number=number,
                tier=tier,
                kind=kind,
                policy=policy,
                emulated=emulated,
                is_held_out=held_out,
            )
        )
    return cases


def _draw(
    rng: random.Random, tier: str, kind: str, *, mixtures: bool
) -> tuple[Policy, EmulatedGpu | None]:
    draw = _search if kind == "searched" else _draw_by_hand
    while True:
        emulated = None
        if tier == "gpu":
            link = rng.choice(LINKS_BYTES_PER_S)
            emulated = EmulatedGpu(memory_bytes=MOST_GPU_BYTES, link_bytes_per_s=link)
        policy = draw(rng, _draw_model(rng, mixtures=mixtures), tier, emulated)
        if policy is None or not _is_wanted(policy, tier, emulated):
            continue
        if emulated is not None:
            peak = _predict(policy, emulated).peak_bytes["gpu"]
            emulated = replace(emulated, memory_bytes=peak)
        return policy, emulated


def _draw_model(rng: random.Random, *, mixtures: bool) -> ModelSpec:
    if not mixtures:
        return load_model_spec(rng.choice(MODELS)).with_dtype("bfloat16")
    name, count = rng.choice(MIXTURES), rng.randint(*MIXTURE_LAYERS)
    spec = first_layers(load_model_spec(name).with_dtype("bfloat16"), count)
    return replace(spec, name=f"{name}, {count} layers")


def _has_experts(spec: ModelSpec) -> bool:
    return "experts" in spec.component_names


def _draw_sizes(rng: random.Random, spec: ModelSpec) -> dict[str, int]:
    """Draw lengths and sequences, every order of magnitude as likely."""
    bounds = {"prompt_len": (16, 1024), "gen_len": (8, 256), "sequences": (4, 300)}
    if _has_experts(spec):
        # With one sequence, few experts are needed.
        bounds["sequences"] = (1, 300)
    return {
        name: round(least * (most / least) ** rng.random())
        for name, (least, most) in bounds.items()
    }


def _search(
    rng: random.Random, spec: ModelSpec, tier: str, emulated: EmulatedGpu | None
) -> Policy | None:
    """Search where weights and cache do not all fit on the tier above the one leaned on."""
    sizes = _draw_sizes(rng, spec)
    work = Workload(
        prompt_len=sizes["prompt_len"], gen_len=sizes["gen_len"], num_prompts=sizes["sequences"]
    )
    permitted = Permitted(weight_bits=(rng.choice(BITS),), cache_bits=(rng.choice(BITS),))
    machine, share = recorded_profile(DRAWN_FOR), rng.uniform(0.2, 0.95)
    part_bytes = round(share * _need_bytes(spec, work, permitted)) + 300 * MIB
    budget = machine.with_budget(cpu_memory=MOST_BYTES)
    if tier == "disk":
        budget = machine.with_budget(cpu_memory=machine.cpu.runtime_bytes + part_bytes)
    elif emulated is not None:
        gpu_bytes = min(part_bytes, MOST_GPU_BYTES)
        budget = replace(emulated, memory_bytes=gpu_bytes).beside(machine)
        budget = budget.with_budget(cpu_memory=MOST_BYTES - gpu_bytes)
    try:
        policy = search(budget, spec, work, permitted=permitted).policy
    except InfeasibleError:
        return None
    # One block, and as full as its policy allows: that is what is predicted.
    return replace(policy, workload=replace(work, num_prompts=None), hardware=None, predicted=None)


def _need_bytes(spec: ModelSpec, work: Workload, permitted: Permitted) -> int:
    """Bytes of weights and cache."""
    problem = Problem(
        hardware=recorded_profile(DRAWN_FOR),
        model=spec,
        workload=work,
        gpu_batch_size=1,
        prefill_batch_size=1,
        weight_bits=permitted.weight_bits[0],
        cache_bits=permitted.cache_bits[0],
    )
    assert work.num_prompts is not None
    return problem.sizes.weight_bytes + work.num_prompts * problem.cache_sequence_bytes


def _draw_by_hand(
    rng: random.Random, spec: ModelSpec, tier: str, emulated: EmulatedGpu | None
) -> Policy:
    sizes = _draw_sizes(rng, spec)
    num_batches = rng.randint(1, 4)
    batch = max(1, sizes["sequences"] // num_batches)
    work = Workload(prompt_len=sizes["prompt_len"], gen_len=sizes["gen_len"])
    has_disk = tier == "disk" or (tier == "gpu" and rng.random() < 0.5)
    weights, cache, activations = (
        draw_placement(rng, has_gpu=tier == "gpu", has_disk=has_disk) for _ in range(3)
    )
    policy = Policy(
        model=spec,
        workload=work,
        gpu_batch_size=batch,
        num_gpu_batches=num_batches,
        prefill_batch_size=max(1, min(batch, 2048 // work.prompt_len)),
        weights=placed_alike(spec, weights),
        cache=cache,
        activations=activations,
        cpu_attention=rng.choice((0.0, 0.5, 1.0)) if tier == "gpu" else 1.0,
        weight_bits=rng.choice(BITS),
        cache_bits=rng.choice(BITS),
    )
    if _has_experts(spec):
        policy = _with_experts(rng, policy, tier, has_disk=has_disk)
    return round_policy(policy, has_gpu=emulated is not None)


def _with_experts(rng: random.Random, policy: Policy, tier: str, *, has_disk: bool) -> Policy:
    """Draw a placement for each component, and who loads and multiplies experts."""
    has_gpu = tier == "gpu"
    return replace(
        policy,
        weights={
            name: draw_placement(rng, has_gpu=has_gpu, has_disk=has_disk)
            for name in policy.model.component_names
        },
        cpu_experts=rng.choice((0.0, 0.5, 1.0)) if has_gpu else 0.0,
        loads_on_demand=rng.random() < 0.5,
    )


def _is_wanted(policy: Policy, tier: str, emulated: EmulatedGpu | None) -> bool:
    """Whether the policy leans on its tier, fits a small machine and takes neither too long nor too
    little."""
    total = policy.workload.prompt_len + policy.workload.gen_len
    if total > policy.model.max_positions:
        return False
    weights = overall_weights(policy)
    on_disk = max(weights.disk, policy.cache.disk) > 0.05
    if tier == "disk" and not on_disk:
        return False
    if tier == "cpu" and weights.cpu + policy.cache.cpu < 2:
        return False
    if tier == "gpu" and min(weights.gpu, policy.cache.gpu) == 1:
        return False
    predicted = _predict(policy, emulated)
    held = predicted.peak_bytes["cpu"] + predicted.peak_bytes.get("gpu", 0)
    fits = held <= MOST_BYTES and predicted.peak_bytes["disk"] <= MOST_DISK_BYTES
    return fits and SHORTEST_S <= predicted.latency_s <= LONGEST_S


def _predict(policy: Policy, emulated: EmulatedGpu | None) -> Prediction:
    machine = recorded_profile(DRAWN_FOR)
    return estimate(policy, emulated.beside(machine) if emulated else machine)


def machine_of(case: Case, hardware: HardwareProfile) -> HardwareProfile:
    """Return today's machine, with the case's GPU tier."""
    return case.emulated.beside(hardware) if case.emulated else hardware

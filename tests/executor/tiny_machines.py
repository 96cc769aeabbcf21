"""Profiles whose rates never matter, random policies for them, and one call that runs both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from executor.checkpoint.folder import WeightSource
from executor.model.sampling import Chooser
from executor.run.results import BlockResult
from executor.run.runner import Runner
from profiles import ComputeRates, Cpu, Disk, HardwareProfile, RateCurve, with_emulated_gpu
from profiles.units import GIB

DTYPES = ("float32", "bfloat16")
ON_GPU, ON_CPU, ON_DISK = Placement(gpu=1), Placement(cpu=1), Placement(disk=1)


def make_hardware(
    *, gpu: bool = False, disk_bytes: int = GIB, direct: bool = False
) -> HardwareProfile:
    """Make a profile with ample memory; with ``gpu``, an emulated one behind fast links. With
    ``direct``, few rows are multiplied with packed weights as they lie."""
    rates = ComputeRates(
        matmul={dtype: RateCurve.constant(1e11) for dtype in DTYPES},
        attention_prefill=dict.fromkeys(DTYPES, 1e11),
        attention_decode=dict.fromkeys(DTYPES, 1e10),
        unpack_bytes_per_s=1e10,
        packed_matmul={dtype: RateCurve.constant(1e11) for dtype in DTYPES if direct},
    )
    rate = RateCurve.constant(1e9)
    cpu = Cpu(
        name="cpu",
        num_cores=2,
        memory_bytes=4 * GIB,
        memory_bytes_per_s=1e10,
        runtime_bytes=0,
        compute=rates,
    )
    profile = HardwareProfile(
        name="tiny",
        source="tests",
        date="2026-01-01",
        cpu=cpu,
        disk=Disk(free_bytes=disk_bytes, read=rate, write=rate),
    )
    if not gpu:
        return profile
    return with_emulated_gpu(profile, memory_bytes=GIB, link_bytes_per_s=1e10)


def on_cuda(emulated: HardwareProfile) -> HardwareProfile:
    """Return the machine with its emulated GPU taken for a real one."""
    assert emulated.gpu is not None
    return replace(emulated, gpu=replace(emulated.gpu, name="cuda", emulated=False))


def make_policy(
    model: ModelSpec,
    *,
    prompt_len: int,
    gen_len: int,
    num_prompts: int | None = None,
    weights: Placement = ON_CPU,
) -> Policy:
    """Make a policy with everything in CPU memory, or weights elsewhere: two batches of two."""
    return Policy(
        model=model,
        workload=Workload(prompt_len=prompt_len, gen_len=gen_len, num_prompts=num_prompts),
        gpu_batch_size=2,
        num_gpu_batches=2,
        prefill_batch_size=2,
        weights=placed_alike(model, weights),
        cache=ON_CPU,
        activations=ON_CPU,
        weight_bits=8 * model.dtype_bytes,
        cache_bits=8 * model.dtype_bytes,
    )


def change_policy(policy: Policy, **changes: Any) -> Policy:
    """Change a policy; one placement for ``weights`` is that of all components."""
    weights = changes.get("weights")
    if isinstance(weights, Placement):
        changes["weights"] = placed_alike(policy.model, weights)
    return replace(policy, **changes)


def draw_policy(base: Policy, rng: random.Random, *, gpu: bool) -> Policy:
    """Draw batch sizes, a placement for each component, and who attends and runs experts."""
    gpu_batch_size = rng.randint(1, 4)
    policy = replace(
        base,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=rng.randint(1, 3),
        prefill_batch_size=rng.randint(1, gpu_batch_size),
        weights={name: _draw_placement(rng, gpu=gpu) for name in base.model.component_names},
        cache=_draw_placement(rng, gpu=gpu),
        activations=_draw_placement(rng, gpu=gpu),
        cpu_attention=rng.choice([0.0, 0.3, 0.5, 1.0]) if gpu else 1.0,
    )
    if "experts" not in base.model.component_names:
        return policy
    if rng.random() < 0.5:
        # Tokens of several batches pass through experts together then.
        policy = replace(policy, activations=ON_GPU if gpu else ON_CPU)
    return replace(
        policy,
        loads_on_demand=rng.random() < 0.5,
        cpu_experts=rng.choice([0.0, 0.4, 1.0]) if gpu else 0.0,
    )


def _draw_placement(rng: random.Random, *, gpu: bool) -> Placement:
    # Every second share is zero, so that tiers which hold nothing are common.
    weights = [rng.random() * rng.randint(0, 1) for _ in range(3)]
    weights[0] *= gpu
    total = sum(weights)
    if total == 0:
        return ON_CPU
    first, last = weights[0] / total, weights[2] / total
    return Placement(gpu=first, cpu=max(0.0, 1 - first - last), disk=last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, prompts for it, and an offload folder."""

    source: WeightSource
    prompts: Sequence[Sequence[int]]
    folder: Path

    def generate(
        self,
        policy: Policy,
        hardware: HardwareProfile,
        *,
        sampler: Chooser | None = None,
        eos_ids: frozenset[int] = frozenset(),
    ) -> list[list[int]]:
        """Return the tokens of every prompt, in order."""
        blocks = self.run(policy, hardware, sampler=sampler, eos_ids=eos_ids)
        ids = {index: row for block in blocks for index, row in block.output_ids.items()}
        return [list(ids[index]) for index in range(len(self.prompts))]

    def run(
        self,
        policy: Policy,
        hardware: HardwareProfile,
        *,
        sampler: Chooser | None = None,
        eos_ids: frozenset[int] = frozenset(),
    ) -> list[BlockResult]:
        """Run all blocks."""
        with Runner(
            policy, hardware, self.source, self.folder, sampler=sampler, eos_ids=eos_ids
        ) as runner:
            return list(runner.run(self.prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedCase(Case):
    """A case with the tokens that a reference makes of it."""

    tokens: list[list[int]]

    def policy(self, **changes: Any) -> Policy:
        """Change the policy that keeps everything in CPU memory."""
        prompt_len = max(len(prompt) for prompt in self.prompts)
        base = make_policy(self.source.spec, prompt_len=prompt_len, gen_len=len(self.tokens[0]))
        return change_policy(base, **changes)

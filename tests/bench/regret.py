"""What the search's choice loses against the best of many policies around it, all of them run.

For each model, workload and budget: the searched policy, policies in which some of its numbers are
changed, and the shapes that other systems have. Each runs once; the fastest, and the searched one,
run again in turns, and their medians count: else the luckiest of twenty would be the best. Regret
is the share of the best one's token/s that the searched one lacks. Progress goes to stderr, one
JSON line to stdout; with ``--work-dir`` every run is kept there, and not repeated.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from drawn_policies import first_layers
from workload_run import BenchParser, circumstances, keep_result, profile_in, run_module, say

from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.job_throughput import job_throughput
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.rounding import round_policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities
from costmodel.pricing.price import estimate
from costmodel.schedule.prediction import slowdown
from profiles.command import run
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError, RunError
from profiles.files import read_json, to_json, write_json
from profiles.hardware import HardwareProfile

# Run again: so many of the fastest, so often.
FINALISTS, FINALS = 2, 3
# What is predicted to take so much longer is not worth its run.
PATIENCE = 1.6
ATTEMPTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Triple:
    """A model, cut to its first ``num_layers`` if that is not 0, a workload and a budget."""

    model: str
    num_prompts: int
    prompt_len: int
    gen_len: int
    cpu_memory: int
    emulated: EmulatedGpu | None = None
    num_layers: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The model, in 16 bits."""
        spec = load_model_spec(self.model).with_dtype("bfloat16")
        return first_layers(spec, self.num_layers) if self.num_layers else spec

    def machine(self, hardware: HardwareProfile) -> HardwareProfile:
        """Return the machine with the budget."""
        if self.emulated is None:
            return hardware.with_budget(cpu_memory=self.cpu_memory)
        total = self.cpu_memory + self.emulated.memory_bytes
        return self.emulated.beside(hardware.with_budget(cpu_memory=total))


GB = 10**9
TRIPLES = {
    "all in memory": Triple(
        model="qwen2.5-0.5b", num_prompts=24, prompt_len=48, gen_len=16, cpu_memory=3 * GB
    ),
    "weights on disk": Triple(
        model="qwen2.5-0.5b", num_prompts=24, prompt_len=48, gen_len=12, cpu_memory=900 * 10**6
    ),
    "few sequences on disk": Triple(
        model="opt-1.3b", num_prompts=4, prompt_len=24, gen_len=8, cpu_memory=1800 * 10**6
    ),
    "cache on disk": Triple(
        model="opt-125m", num_prompts=48, prompt_len=256, gen_len=12, cpu_memory=700 * 10**6
    ),
    "long prompts": Triple(
        model="opt-125m", num_prompts=8, prompt_len=768, gen_len=32, cpu_memory=2 * GB
    ),
    "emulated GPU": Triple(
        model="qwen2.5-0.5b",
        num_prompts=16,
        prompt_len=48,
        gen_len=12,
        cpu_memory=3 * GB,
        emulated=EmulatedGpu(memory_bytes=500 * 10**6, link_bytes_per_s=2e9),
    ),
}


def main(arguments: list[str]) -> None:
    """Run every triple, print the line."""
    parser = BenchParser(
        "regret.py",
        description=(__doc__ or "").strip(),
        example="--work-dir validation --result tests/bench/results/regret.json",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps profile and runs")
    add("--policies", type=int, default=20, help="to try around the searched one (20)")
    add("--only", action="append", choices=list(TRIPLES), help="may be repeated")
    flags = parser.parse_args(arguments)
    if flags.policies < 1:
        raise InputError("--policies", got=flags.policies, allowed="1 or more")
    folder = flags.work_dir.resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    hardware = profile_in(folder)
    cases = [
        measure(name, TRIPLES[name], hardware, folder, partial(_others, count=flags.policies))
        for name in flags.only or TRIPLES
    ]
    regrets = [case["regret"] for case in cases]
    result = {
        "benchmark": "regret of the searched policy",
        "mean_regret": statistics.mean(regrets),
        "worst_regret": max(regrets),
        "cases": cases,
        **circumstances("regret.py", arguments, "torch"),
    }
    keep_result(flags, result)


# The searched policy and its machine; what else is to be run.
Others = Callable[[Policy, HardwareProfile, random.Random], Sequence[Policy]]


def measure(
    name: str,
    triple: Triple,
    hardware: HardwareProfile,
    folder: Path,
    others: Others,
    chosen: Callable[[Sequence[Policy], Sequence[float]], Collection[int]] = lambda *_: (),
) -> dict[str, Any]:
    """Run the policies of one triple, the best of them again.

    ``chosen`` gives the numbers of others that are run again, by the policies and their predicted
    rates.
    """
    machine = replace(triple.machine(hardware), measurements=())
    spec = triple.spec
    work = Workload(
        prompt_len=triple.prompt_len, gen_len=triple.gen_len, num_prompts=triple.num_prompts
    )
    searched = replace(search(machine, spec, work).policy, hardware=None, predicted=None)
    policies = [searched, *others(searched, machine, random.Random(name))]
    predicted = [_predicted(policy, machine) for policy in policies]
    runner = _Runner(machine=machine, folder=folder)
    rates = [[runner.tok_per_s(policy, 0)] for policy in policies]
    order = sorted(range(len(policies)), key=lambda i: -rates[i][0])
    finalists = sorted({0, *order[:FINALISTS], *chosen(policies, predicted)})
    for turn in range(1, FINALS + 1):
        for i in finalists:
            rates[i].append(runner.tok_per_s(policies[i], turn))
    # Of those that won the first round by luck, the later ones alone count.
    medians = {i: statistics.median(rates[i][1:]) for i in finalists}
    best = max(medians, key=lambda i: medians[i])
    if not medians[0]:
        raise RunError(f"{name}: the searched policy did not run")
    regret = 1 - medians[0] / medians[best]
    say(
        f"{name}: {medians[0]:.4g} token/s, best of {len(policies)} {medians[best]:.4g}"
        f" (regret {regret:.1%})"
    )
    return {
        "case": name,
        **to_json(triple),
        "regret": regret,
        "searched_tok_per_s": medians[0],
        "searched_spread": (max(rates[0]) - min(rates[0])) / 2 / medians[0],
        "best_tok_per_s": medians[best],
        "best": best,
        "policies": [
            {
                "policy": to_json(replace(policy, model=spec)) | {"model": spec.name},
                "predicted_tok_per_s": rate,
                "tok_per_s": found,
            }
            for policy, rate, found in zip(policies, predicted, rates, strict=True)
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runner:
    """Runs policies on one machine; what ran once in a turn is kept."""

    machine: HardwareProfile
    folder: Path

    def tok_per_s(self, policy: Policy, turn: int) -> float:
        name = hashlib.sha256(
            json.dumps([to_json(policy), to_json(self.machine), turn], sort_keys=True).encode()
        ).hexdigest()[:16]
        kept = self.folder / "runs" / f"{name}.json"
        if not kept.exists():
            policy.save(self.folder / "policy.json")
            self.machine.save(self.folder / "machine.json")
            words = [
                "executor.bench",
                "--policy",
                str(self.folder / "policy.json"),
                "--hardware",
                str(self.folder / "machine.json"),
                "--dummy-weights",
                "--num-prompts",
                str(policy.workload.num_prompts),
                "--offload-dir",
                str(self.folder),
            ]
            try:
                report = json.loads(run_module(words, self.folder / "run.log"))
            except RunError as error:
                say(f"  {error}")
                return 0.0
            write_json(kept, report)
        rate = float(read_json(kept, "run")["measured_tok_per_s"])
        say(f"  {rate:8.2f} token/s, predicted {_predicted(policy, self.machine):8.2f}")
        return rate


def _others(
    searched: Policy, machine: HardwareProfile, rng: random.Random, *, count: int
) -> list[Policy]:
    """Return policies that fit: shapes of other systems, and the searched one with changes."""
    best = job_throughput(searched, machine)
    found: list[Policy] = []
    drawn = (_changed(searched, rng, has_gpu=machine.has_gpu) for _ in range(ATTEMPTS))
    for policy in (*_shapes(searched, machine), *drawn):
        if len(found) == count:
            break
        rounded = round_policy(policy, has_gpu=machine.has_gpu)
        if rounded in (searched, *found) or not fits(rounded, machine):
            continue
        if job_throughput(rounded, machine) * PATIENCE >= best:
            found.append(rounded)
    return found


def fits(policy: Policy, machine: HardwareProfile) -> bool:
    """Whether a policy keeps to the machine's budgets."""
    peaks = estimate(policy, machine).peak_bytes
    return all(peaks[tier] <= limit for tier, limit in capacities(machine).items())


def _shapes(searched: Policy, machine: HardwareProfile) -> Iterator[Policy]:
    """Yield what accelerate and llama.cpp do: all sequences at once, as much of the weights above
    the disk as there is room for; and FlexGen's fractions of whole tenths."""
    num_prompts = searched.workload.num_prompts or searched.block_size
    top = "gpu" if machine.has_gpu else "cpu"
    home = Placement(gpu=1) if machine.has_gpu else Placement(cpu=1)
    for size in (num_prompts, max(1, num_prompts // 2), max(1, num_prompts // 4)):
        for tenths in range(10, -1, -1):
            below = "cpu" if machine.has_gpu else "disk"
            weights = Placement(**{top: tenths / 10, below: 1 - tenths / 10})
            policy = replace(
                searched,
                gpu_batch_size=size,
                num_gpu_batches=1,
                prefill_batch_size=size,
                weights=placed_alike(searched.model, weights),
                cache=home,
                activations=home,
                cpu_attention=1.0,
            )
            if fits(round_policy(policy, has_gpu=machine.has_gpu), machine):
                yield policy
                break


def _changed(policy: Policy, rng: random.Random, *, has_gpu: bool) -> Policy:
    """Change one to three of a policy's numbers by a step."""
    for name in rng.sample(("batch", "batches", "prefill", "weights", "cache", "hidden"), 3):
        if rng.random() < 1 / 3:
            continue
        size, count = policy.gpu_batch_size, policy.num_gpu_batches
        if name == "batch":
            size = max(1, round(size * rng.choice((0.5, 0.75, 1.5, 2))))
            prefill = min(policy.prefill_batch_size, size)
            policy = replace(policy, gpu_batch_size=size, prefill_batch_size=prefill)
        elif name == "batches":
            policy = replace(policy, num_gpu_batches=max(1, count + rng.choice((-1, 1, 2))))
        elif name == "prefill":
            prefill = round(policy.prefill_batch_size * rng.choice((0.25, 0.5, 2, 4)))
            policy = replace(policy, prefill_batch_size=min(max(1, prefill), size))
        elif name == "weights":
            part = rng.choice(tuple(policy.weights))
            moved = _moved(policy.weights[part], rng, has_gpu=has_gpu)
            policy = replace(policy, weights={**policy.weights, part: moved})
        elif name == "cache":
            policy = replace(policy, cache=_moved(policy.cache, rng, has_gpu=has_gpu))
            if has_gpu:
                policy = replace(policy, cpu_attention=rng.choice((0.0, 0.5, 1.0)))
        else:
            policy = replace(policy, activations=_moved(policy.activations, rng, has_gpu=has_gpu))
    return policy


def _moved(placement: Placement, rng: random.Random, *, has_gpu: bool) -> Placement:
    """Move some of what lies on one tier to another."""
    tiers = ("gpu", "cpu", "disk") if has_gpu else ("cpu", "disk")
    source, target = rng.sample(tiers, 2)
    held = {tier: getattr(placement, tier) for tier in tiers}
    step = min(held[source], rng.choice((0.05, 0.1, 0.2, 0.4)))
    held[source], held[target] = held[source] - step, held[target] + step
    return Placement(**held)


def _predicted(policy: Policy, machine: HardwareProfile) -> float:
    """Return token/s over the whole job, with the waits of a block."""
    return job_throughput(policy, machine) / slowdown(policy, machine)


if __name__ == "__main__":
    run(main)

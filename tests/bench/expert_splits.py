"""Where experts are computed beside an emulated GPU: the searched split against 20 others, all run.

A mixture's experts are resident in GPU memory, sent there for each pass, or multiplied by the CPU
where they are stored. For links of 2 and 8 GB/s, and for many and few prompts, the searched policy
runs beside the shapes of other systems and a grid of such splits. The fastest, the searched one,
and the best by prediction among mixes and among others run again in turns, and their medians count.

The emulated GPU is a part of the CPU memory. On ``shared`` cores it takes turns with the CPU, so
that a mix saves transfers alone. With its ``own`` core, it and the CPU have a core each (the
machine needs two), and a mix uses both at once. Rates of one core are measured on one core, and so
is how much two slow each other down. Progress goes to stderr, one JSON line to stdout; every run is
kept in the work folder, and not repeated.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from regret import Triple, fits, measure
from workload_run import BenchParser, circumstances, keep_result, profile_in, say

from costmodel.plan.policy import Placement, Policy
from costmodel.plan.rounding import round_policy
from profiles import compute_plan
from profiles.command import run
from profiles.compute import matrix_product
from profiles.contention import BackgroundWork, rates_together
from profiles.emulate import EmulatedGpu
from profiles.errors import InputError
from profiles.files import read_json, write_json
from profiles.hardware import Contention, HardwareProfile

GB = 10**9
CORES, LINKS, COUNTS = ("shared", "own"), (2, 8), (64, 8)
COMPUTING = ("gpu_compute", "cpu_compute")
# A mix multiplies at least this share of the experts off the GPU on each side.
LEAST_SHARE = 0.05
# A mix that is predicted to gain as much has to gain.
CLEAR_GAIN = 0.1
# Rows of an expert in the blocks below, and the seconds for which both cores are busy.
ROWS, WINDOW_S = 8, 1.0
TRIPLES = {
    (link, count): Triple(
        model="granite-3.0-1b-a400m",
        num_layers=12,
        num_prompts=count,
        prompt_len=32,
        gen_len=32,
        cpu_memory=2 * GB,
        emulated=EmulatedGpu(memory_bytes=600 * 10**6, link_bytes_per_s=link * 1e9),
    )
    for link in LINKS
    for count in COUNTS
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCore(Triple):
    """A triple whose emulated GPU has a core of its own; ``keeps`` is the share of its rate that
    each of the two cores keeps beside the other."""

    keeps: float

    def machine(self, hardware: HardwareProfile) -> HardwareProfile:
        """Return the machine with the budget, and the two cores instead of shared ones."""
        machine = Triple.machine(self, hardware)
        first, second = COMPUTING
        others = [p for p in machine.contention if {p.first, p.second} != set(COMPUTING)]
        pair = Contention(
            first=first, second=second, first_keeps=self.keeps, second_keeps=self.keeps
        )
        return replace(machine, contention=(*others, pair))


def main(arguments: list[str]) -> None:
    """Run every case, judge, print the line."""
    parser = BenchParser(
        "expert_splits.py",
        description=(__doc__ or "").strip(),
        example="--work-dir splits --result tests/bench/results/expert-splits.json",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps profiles and runs")
    add("--policies", type=int, default=20, help="to run beside the searched one (20)")
    add("--cores", choices=CORES, action="append", help="of the emulated GPU; default: both")
    add("--link", type=int, choices=LINKS, action="append", help="GB/s; default: both")
    add("--prompts", type=int, choices=COUNTS, action="append", help="default: both")
    flags = parser.parse_args(arguments)
    if flags.policies < 1:
        raise InputError("--policies", got=flags.policies, allowed="1 or more")
    cases = []
    # Shared cores first: for the others, the environment is changed.
    for cores in [name for name in CORES if name in (flags.cores or CORES)]:
        folder = flags.work_dir.resolve() / cores
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        hardware = profile_in(flags.work_dir.resolve())
        keeps = None
        if cores == "own":
            hardware, keeps = _one_core(hardware, folder)
        for (link, count), triple in TRIPLES.items():
            if link in (flags.link or LINKS) and count in (flags.prompts or COUNTS):
                case = _with_core(triple, keeps) if keeps else triple
                name = f"{cores} cores, {link} GB/s, {count} prompts"
                cases.append(_judge(name, case, hardware, folder, flags.policies))
    result = {
        "benchmark": "the searched split of experts against others",
        "worst_regret": max(case["regret"] for case in cases),
        "mixes_that_should_win": sum(case["predicted_gain"] >= CLEAR_GAIN for case in cases),
        "mixes_that_did_not": [
            case["case"]
            for case in cases
            if case["predicted_gain"] >= CLEAR_GAIN and case["measured_gain"] <= 0
        ],
        "cases": cases,
        **circumstances("expert_splits.py", arguments, "torch"),
    }
    keep_result(flags, result)


def _with_core(triple: Triple, keeps: float) -> OwnCore:
    return OwnCore(**{f.name: getattr(triple, f.name) for f in fields(triple)}, keeps=keeps)


def _judge(
    name: str, triple: Triple, hardware: HardwareProfile, folder: Path, count: int
) -> dict[str, Any]:
    """Run one case; tell whether a mix wins where it is predicted to."""

    def others(searched: Policy, machine: HardwareProfile, rng: random.Random) -> list[Policy]:
        found: list[Policy] = []
        for policy in splits(searched, machine):
            rounded = round_policy(policy, has_gpu=True)
            if len(found) < count and rounded not in (searched, *found) and fits(rounded, machine):
                found.append(rounded)
        return found

    case = measure(name, triple, hardware, folder, others, _best_of_both)
    policies = [_Kept(**kept) for kept in case["policies"]]
    mixes = [kept for kept in policies if kept.is_mix]
    pure = [kept for kept in policies if not kept.is_mix]
    gains = {"predicted_gain": 0.0, "measured_gain": 0.0}
    if mixes and pure:
        mix, other = (
            max(both, key=lambda kept: kept.predicted_tok_per_s) for both in (mixes, pure)
        )
        gains = {
            "predicted_gain": mix.predicted_tok_per_s / other.predicted_tok_per_s - 1,
            "measured_gain": mix.median / other.median - 1,
        }
    say(
        f"{name}: a mix is predicted to gain {gains['predicted_gain']:+.1%}, and gains"
        f" {gains['measured_gain']:+.1%}"
    )
    return case | gains


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A policy as ``measure`` tells it."""

    policy: dict[str, Any]
    predicted_tok_per_s: float
    tok_per_s: list[float]

    @property
    def is_mix(self) -> bool:
        return is_mix(self.policy["cpu_experts"], self.policy["weights"]["experts"]["gpu"])

    @property
    def median(self) -> float:
        return statistics.median(self.tok_per_s[1:] or self.tok_per_s)


def is_mix(cpu_experts: float, resident: float) -> bool:
    """Whether some experts are sent, and some multiplied in place."""
    return resident < 1 and LEAST_SHARE <= cpu_experts <= 1 - LEAST_SHARE


def _best_of_both(policies: Sequence[Policy], predicted: Sequence[float]) -> list[int]:
    """Return the best mix by prediction, and the best other policy."""
    found = {}
    for number in sorted(range(len(policies)), key=lambda i: predicted[i]):
        policy = policies[number]
        found[is_mix(policy.cpu_experts, policy.weights["experts"].gpu)] = number
    return list(found.values())


def splits(searched: Policy, machine: HardwareProfile) -> Iterator[Policy]:
    """Yield the shapes of other systems, then a grid of shares that are resident and in place."""
    most = _most_resident(searched, machine)
    one = replace(
        searched,
        gpu_batch_size=searched.block_size,
        num_gpu_batches=1,
        prefill_batch_size=searched.prefill_batch_size,
        cache=Placement(gpu=1),
        activations=Placement(gpu=1),
        cpu_attention=1.0,
    )
    # FlexGen and MoE-Lightning send all experts; the CPU attends in the latter, by batches.
    yield _split(replace(searched, cache=Placement(gpu=1)), 0, 0)
    yield _split(replace(searched, cache=Placement(cpu=1), cpu_attention=1.0), 0, 0)
    # llama.cpp and KTransformers multiply all experts off the GPU in place; all tokens at once.
    for policy in (one, searched):
        yield _split(policy, most, 1)
        yield _split(policy, 0, 1)
        yield _split(policy, most, 0)
    # Fiddler and others send what the router has chosen.
    yield replace(_split(one, most, 0), loads_on_demand=True)
    yield replace(_split(one, most, 0.5), loads_on_demand=True)
    for in_place in (0.5, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875):
        for resident in (most, 0, most / 2):
            yield _split(searched, resident, in_place)


def _split(policy: Policy, resident: float, in_place: float) -> Policy:
    """Place experts in memory; ``in_place`` is a share of those off the GPU."""
    experts = Placement(gpu=resident, cpu=1 - resident)
    return replace(
        policy, weights={**policy.weights, "experts": experts}, cpu_experts=float(in_place)
    )


def _most_resident(policy: Policy, machine: HardwareProfile) -> float:
    """Return the largest share of experts, in hundredths, that fits into GPU memory."""
    for hundredths in range(100, 0, -1):
        if fits(round_policy(_split(policy, hundredths / 100, 1), has_gpu=True), machine):
            return hundredths / 100
    return 0.0


def _one_core(hardware: HardwareProfile, folder: Path) -> tuple[HardwareProfile, float]:
    """Return the machine as one core sees it, and what a core keeps of its rate beside the other.

    From here on, every process that is started computes with one thread in each channel.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        raise InputError("--cores", got="own", allowed="shared, on a machine with one core")
    os.sched_setaffinity(0, {min(cores)})
    try:
        one = profile_in(folder)
    finally:
        os.sched_setaffinity(0, cores)
    # Memory is read by both.
    memory = hardware.cpu.memory_bytes_per_s
    kept = folder / "keeps.json"
    if not kept.exists():
        write_json(kept, {"keeps": _share_kept()})
    keeps = float(read_json(kept, "share")["keeps"])
    return replace(one, cpu=replace(one.cpu, memory_bytes_per_s=memory)), keeps


def _share_kept() -> float:
    """Measure products of few rows on two cores at once, against one alone."""
    torch.set_num_threads(1)
    works = []
    for channel in COMPUTING:
        multiply, flop = matrix_product("cpu", "bfloat16", ROWS, compute_plan.FULL_PLAN)
        works.append(BackgroundWork(channel=channel, unit="flop_per_s", amount=flop, call=multiply))
    shares = []
    for _ in range(5):
        (alone,) = rates_together(works[:1], WINDOW_S)
        shares.append(min(rates_together(works, WINDOW_S)) / alone)
    return min(1.0, statistics.median(shares))


if __name__ == "__main__":
    run(main)

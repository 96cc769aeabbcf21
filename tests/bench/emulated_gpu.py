"""A block's time held against its busiest channel's, on an emulated GPU behind throttled links.

Four policies, each bound by another channel: the link to the GPU, the disk, attention on the CPU,
the GPU's arithmetic. No block can end before its busiest channel has done its work; what it takes
longer is waiting that schedule and engine have not hidden. Both phases count whole: prefill too,
where the CPU has nothing to attend, and the first loads, which nothing can hide.

The emulated GPU computes on the CPU's cores, so that channels slow each other down: a channel's
busy seconds are those that it took in that very run. Models are small, their weights random, the
weight file in a temporary folder. Progress goes to stderr, one JSON line with every figure to
stdout.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from workload_run import BenchParser, circumstances, keep_result, say

from costmodel.families import spec_from_config
from costmodel.plan.policy import TIERS, Placement, Policy, placed_alike
from costmodel.plan.rounding import overall_weights
from costmodel.plan.workload import Workload
from costmodel.schedule.timeline import simulate
from executor.checkpoint.dummy import DummyCheckpoint
from executor.run.runner import Runner
from profiles.command import run
from profiles.emulate import with_emulated_gpu
from profiles.errors import InputError, RunError
from profiles.hardware import CHANNELS, HardwareProfile
from profiles.recorded import recorded_profile
from profiles.units import GIB

MACHINE = "cpu-2core"
GPU_BYTES = 2 * GIB
ON_GPU, ON_CPU = Placement(gpu=1), Placement(cpu=1)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
}
# Narrow beside its heads, so that attention outweighs the products as it does in long contexts.
NARROW: dict[str, Any] = CONFIG | {
    "num_hidden_layers": 10,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 2048,
}
MODEL = spec_from_config(CONFIG, name="llama-340m")
NARROW_MODEL = spec_from_config(NARROW, name="llama-narrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A policy, the rate of the links in bytes/s, and the channel that bounds the block then."""

    bound_by: str
    link_bytes_per_s: float
    policy: Policy

    @property
    def hardware(self) -> HardwareProfile:
        """The machine with its emulated GPU."""
        return with_emulated_gpu(
            recorded_profile(MACHINE),
            memory_bytes=GPU_BYTES,
            link_bytes_per_s=self.link_bytes_per_s,
        )


def main(arguments: list[str]) -> None:
    """Run every case, print the table and the line."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 3:
        raise InputError("--rounds", got=flags.rounds, allowed="3 or more")
    chosen = [case for case in CASES if not flags.only or case.bound_by in flags.only]
    cases = [measure(case, flags.rounds) for case in chosen]
    result = {
        "benchmark": "time of a block over its busiest channel's",
        "rounds": flags.rounds,
        "cases": cases,
        **circumstances("emulated_gpu.py", arguments, "torch"),
    }
    keep_result(flags, result)
    for case in cases:
        if case["busiest"] != case["bound_by"]:
            raise RunError(
                f"the case of {case['bound_by']} was bound by {case['busiest']} on this machine"
            )


def _parser() -> BenchParser:
    parser = BenchParser(
        "emulated_gpu.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/emulated-gpu.json",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="of which the median counts (3)")
    names = [case.bound_by for case in CASES]
    add("--only", action="append", choices=names, help="leave others out; may be repeated")
    return parser


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Run one block a few times; seconds are medians of the rounds."""
    with tempfile.TemporaryDirectory(prefix="zigzag-bench-") as name:
        runs = [run_block(case, Path(name)) for _ in range(rounds)]
    busy_s = {name: statistics.median(each["busy_s"][name] for each in runs) for name in CHANNELS}
    busiest = max(busy_s, key=busy_s.__getitem__)
    simulated = simulate(case.policy, case.hardware)
    measured = {
        "bound_by": case.bound_by,
        "busiest": busiest,
        **{
            key: statistics.median(each[key] for each in runs)
            for key in ("ratio", "latency_s", "prefill_s", "decode_s")
        },
        "busy_s": busy_s,
        "simulated_ratio": simulated.latency_s / max(simulated.busy_s().values()),
        "policy": describe(case.policy),
        "link_bytes_per_s": case.link_bytes_per_s,
        "runs": runs,
    }
    channels = ", ".join(f"{name} {seconds:.2f}" for name, seconds in busy_s.items() if seconds)
    say(
        f"{case.bound_by:<11} {measured['ratio']:.3f} x {busiest}"
        f" (simulated {measured['simulated_ratio']:.3f}); {measured['latency_s']:.2f} s: {channels}"
    )
    return measured


def run_block(case: Case, folder: Path) -> dict[str, Any]:
    """Run one block; its seconds, those of each channel, and the ratio."""
    policy = case.policy
    prompts = np.random.default_rng(0).integers(
        policy.model.vocab_size, size=(policy.block_size, policy.workload.prompt_len)
    )
    source = DummyCheckpoint(spec=policy.model)
    with Runner(policy, case.hardware, source, folder) as runner:
        (block,) = runner.run(prompts.tolist())
        phases = runner.trace.busy_s.values()
    busy_s = {name: sum(phase[name] for phase in phases) for name in CHANNELS}
    latency_s = block.prefill_s + block.decode_s
    return {
        "ratio": latency_s / max(busy_s.values()),
        "latency_s": latency_s,
        "prefill_s": block.prefill_s,
        "decode_s": block.decode_s,
        "busy_s": busy_s,
    }


def describe(policy: Policy) -> dict[str, Any]:
    """Return a policy in short."""
    placements = {
        "weights": overall_weights(policy),
        "cache": policy.cache,
        "activations": policy.activations,
    }
    places = {
        name: {tier: share for tier in TIERS if (share := getattr(placement, tier))}
        for name, placement in placements.items()
    }
    return {
        "model": policy.model.name,
        "prompt_len": policy.workload.prompt_len,
        "gen_len": policy.workload.gen_len,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        **places,
        "cpu_attention": policy.cpu_attention,
    }


H2D = Policy(
    model=MODEL,
    workload=Workload(prompt_len=32, gen_len=16),
    gpu_batch_size=8,
    num_gpu_batches=4,
    prefill_batch_size=8,
    weights=placed_alike(MODEL, ON_CPU),
    cache=ON_CPU,
    activations=ON_GPU,
    cpu_attention=0,
)
DISK = Policy(
    model=MODEL,
    workload=Workload(prompt_len=32, gen_len=40),
    gpu_batch_size=2,
    num_gpu_batches=2,
    prefill_batch_size=2,
    weights=placed_alike(MODEL, Placement(disk=1)),
    cache=ON_GPU,
    activations=ON_CPU,
)
ATTENTION = Policy(
    model=NARROW_MODEL,
    workload=Workload(prompt_len=128, gen_len=448),
    gpu_batch_size=20,
    num_gpu_batches=4,
    prefill_batch_size=20,
    weights=placed_alike(NARROW_MODEL, ON_GPU),
    cache=ON_CPU,
    activations=ON_GPU,
)
COMPUTE = Policy(
    model=MODEL,
    workload=Workload(prompt_len=256, gen_len=16),
    gpu_batch_size=8,
    num_gpu_batches=4,
    prefill_batch_size=8,
    weights=placed_alike(MODEL, Placement(gpu=0.5, cpu=0.5)),
    cache=ON_GPU,
    activations=ON_GPU,
)
CASES = (
    Case(bound_by="h2d", link_bytes_per_s=0.5e9, policy=H2D),
    Case(bound_by="disk_read", link_bytes_per_s=4e9, policy=DISK),
    Case(bound_by="cpu_compute", link_bytes_per_s=4e9, policy=ATTENTION),
    Case(bound_by="gpu_compute", link_bytes_per_s=4e9, policy=COMPUTE),
)


if __name__ == "__main__":
    run(main)

"""Whether the search picks the right precisions: its choice beside every other, measured.

For each workload, the best policy of every pair of precisions (weights and cache in 16 or 4 bits)
runs once a round with random weights; what the search chooses where all are permitted is held
against the fastest of them, by medians of the rounds. Progress goes to stderr, one JSON line with
every figure to stdout.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_cgroup import last_line
from workload_run import BenchParser, circumstances, keep_result, say

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.workload import Workload
from profiles.command import run
from profiles.errors import InfeasibleError, RunError
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile

BITS = (16, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a workload and the memory that a run may take."""

    model: str
    num_prompts: int
    prompt_len: int
    gen_len: int
    memory_gb: float


CASES = {
    "weights on disk": Case(
        model="llama-3.2-1b", num_prompts=32, prompt_len=64, gen_len=16, memory_gb=1.6
    ),
    "few sequences": Case(
        model="llama-3.2-1b", num_prompts=4, prompt_len=64, gen_len=32, memory_gb=6
    ),
    "many sequences": Case(
        model="llama-3.2-1b", num_prompts=128, prompt_len=64, gen_len=16, memory_gb=6
    ),
    "long prompts": Case(
        model="qwen2.5-0.5b", num_prompts=16, prompt_len=768, gen_len=32, memory_gb=4
    ),
    "cache on disk": Case(
        model="opt-125m", num_prompts=64, prompt_len=512, gen_len=16, memory_gb=1.2
    ),
}


def main(arguments: list[str]) -> None:
    """Run every case, print the line."""
    parser = BenchParser(
        "precisions.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--hardware profile.json --result tests/bench/results/precisions.json",
    )
    parser.add_argument("--hardware", required=True, help="this machine's profile")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--only", action="append", choices=list(CASES), help="may be repeated")
    flags = parser.parse_args(arguments)
    hardware = find_profile(flags.hardware)
    with tempfile.TemporaryDirectory(prefix="zigzag-precisions-") as folder:
        cases = [
            measure(name, CASES[name], hardware, flags.rounds, Path(folder))
            for name in flags.only or CASES
        ]
    result = {
        "benchmark": "the search's choice of precisions",
        "rounds": flags.rounds,
        "cases": cases,
        **circumstances("precisions.py", arguments, "torch"),
    }
    keep_result(flags, result)


def measure(
    name: str, case: Case, hardware: HardwareProfile, rounds: int, folder: Path
) -> dict[str, Any]:
    """Run the best policy of every pair of precisions, and hold the search's choice to them."""
    machine = hardware.with_budget(cpu_memory=int(case.memory_gb * 10**9))
    spec = load_model_spec(case.model).with_dtype("bfloat16")
    work = Workload(prompt_len=case.prompt_len, gen_len=case.gen_len, num_prompts=case.num_prompts)
    files: dict[tuple[int, int], Path] = {}
    predicted: dict[tuple[int, int], float] = {}
    for pair in itertools.product(BITS, BITS):
        permitted = Permitted(weight_bits=pair[:1], cache_bits=pair[1:])
        try:
            found = search(machine, spec, work, permitted=permitted)
        except InfeasibleError:
            say(f"{name}: {pair} does not fit")
            continue
        files[pair] = folder / f"{pair[0]}-{pair[1]}.json"
        found.policy.save(files[pair])
        predicted[pair] = found.job_tok_per_s
    both = search(machine, spec, work, permitted=Permitted(weight_bits=BITS, cache_bits=BITS))
    chosen = (both.policy.weight_bits, both.policy.cache_bits)
    rates: dict[tuple[int, int], list[float]] = {pair: [] for pair in files}
    for _ in range(rounds):
        for pair, path in files.items():
            rates[pair].append(_run(path, folder))
    medians = {pair: statistics.median(found) for pair, found in rates.items()}
    share = medians[chosen] / max(medians.values())
    for pair, rate in medians.items():
        mark = " <- chosen" if pair == chosen else ""
        say(
            f"{name}: {pair[0]} and {pair[1]} bits {rate:.4g} token/s"
            f" (predicted {predicted[pair]:.4g}){mark}"
        )
    return {
        "case": name,
        "model": case.model,
        "num_prompts": case.num_prompts,
        "prompt_len": case.prompt_len,
        "gen_len": case.gen_len,
        "memory_gb": case.memory_gb,
        "chosen": list(chosen),
        "of_fastest": share,
        "precisions": [
            {
                "weight_bits": pair[0],
                "cache_bits": pair[1],
                "predicted_tok_per_s": predicted[pair],
                "tok_per_s": medians[pair],
                "rounds": rates[pair],
            }
            for pair in files
        ],
    }


def _run(policy: Path, folder: Path) -> float:
    """Return the token/s of one run."""
    log = policy.with_suffix(".err")
    words = [
        sys.executable,
        "-m",
        "executor.bench",
        "--policy",
        str(policy),
        "--dummy-weights",
        "--offload-dir",
        str(folder),
    ]
    with log.open("wb") as err:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=err, check=False)
    if done.returncode:
        raise RunError(f"a run ended with status {done.returncode}: {last_line(log)}")
    return float(json.loads(done.stdout)["measured_tok_per_s"])


if __name__ == "__main__":
    run(main)

"""Whether runs stay inside the memory that was predicted for them: policies drawn at random.

Run as root. Half of the policies are found by the search under budgets that leave little free, half
are drawn by hand; some have an emulated GPU. Each runs on dummy weights under a memory control
group whose limit is the predicted peak and 3 %, swap denied. Nothing is added for the interpreter:
the prediction's ``runtime`` term is the peak of an empty process that has imported and used every
library, measured at the start, and so is part of it already.

Two figures are told of each run. The resident peak counts everything that the process maps, files
of libraries too. The group's peak counts page cache, page tables and other kernel memory, and
libraries only where no other process had them in memory before. A run is good that ended, was not
killed, and whose resident peak is at most 3 % over the prediction. Progress goes to stderr, one
JSON line with every figure to stdout.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drawn_policies import DENSE, MIXTURES, Drawn, draw_policies
from memory_cgroup import Ended, MemoryCgroup, last_line
from workload_run import ROOT, BenchParser, circumstances, keep_result, say

from executor.machine.memory_watch import TOLERANCE
from profiles import kernels
from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import to_json
from profiles.recorded import recorded_profile
from profiles.runtime import measure_runtime_bytes
from profiles.units import format_bytes

# Rates decide what the search likes, and nothing about bytes: any recorded machine will do.
MACHINE = "cpu-2core"
TIMEOUT_S = 300.0


def main(arguments: list[str]) -> None:
    """Draw, run, print, complain."""
    flags = _parser().parse_args(arguments)
    if flags.runs < 1:
        raise InputError("--runs", got=flags.runs, allowed="1 or more")
    machine = recorded_profile(MACHINE)
    # Else the first run would hold a compiler too.
    kernels.load_library()
    runtime_bytes = measure_runtime_bytes()
    hardware = replace(machine, cpu=replace(machine.cpu, runtime_bytes=runtime_bytes))
    say(f"an empty process holds {format_bytes(runtime_bytes)}")
    shapes = MIXTURES if flags.mixtures else DENSE
    if flags.encoded:
        shapes = replace(shapes, is_encoded=True)
    policies = draw_policies(random.Random(flags.seed), hardware, shapes)
    cases = []
    for number in range(1, flags.runs + 1):
        cases.append(run_policy(next(policies), flags.seed))
        say(f"{number:>3} of {flags.runs}: {_describe(cases[-1])}")
    ratios = [case["ratio"] for case in cases if case["ratio"] is not None]
    result = {
        "benchmark": "memory kept",
        "tolerance": TOLERANCE,
        "runtime_bytes": runtime_bytes,
        "killed": sum(case["killed"] for case in cases),
        "ratio_median": statistics.median(ratios) if ratios else None,
        "ratio_max": max(ratios, default=None),
        "ratio_min": min(ratios, default=None),
        "cases": cases,
        **circumstances("memory_kept.py", arguments, "torch"),
    }
    keep_result(flags, result)
    wrong = [f"run {i}: {_describe(c)}" for i, c in enumerate(cases, 1) if not _is_good(c)]
    if wrong:
        raise RunError("; ".join(wrong))


def _parser() -> BenchParser:
    parser = BenchParser(
        "memory_kept.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/memory-kept.json",
    )
    add = parser.add_argument
    add("--runs", type=int, default=20, help="policies to draw and run (20)")
    add("--mixtures", action="store_true", help="draw mixtures of experts instead of dense models")
    add("--encoded", action="store_true", help="draw encodings of the weights, as files have them")
    add("--seed", type=int, default=0, help="of the policies and the prompts (0)")
    return parser


def run_policy(drawn: Drawn, seed: int) -> dict[str, Any]:
    """Run a policy under its limit and return its figures."""
    limit_bytes = round(drawn.predicted_bytes * (1 + TOLERANCE))
    with tempfile.TemporaryDirectory(prefix="zigzag-bench-") as name:
        folder = Path(name)
        drawn.policy.save(folder / "policy.json")
        log = folder / "run.log"
        command = [
            sys.executable,
            "-m",
            "executor.bench",
            "--policy",
            str(folder / "policy.json"),
            "--dummy-weights",
            "--offload-dir",
            name,
            "--seed",
            str(seed),
        ]
        with MemoryCgroup(limit_bytes) as group:
            ended = group.run(
                command, env=_environment(), folder=ROOT, log=log, timeout_s=TIMEOUT_S
            )
        return _figures(drawn, ended, log, limit_bytes)


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


def _figures(drawn: Drawn, ended: Ended, log: Path, limit_bytes: int) -> dict[str, Any]:
    policy, predicted_bytes = drawn.policy, drawn.predicted_bytes
    resident = None
    if ended.is_good:
        peaks = json.loads(last_line(log))["peak_bytes"]
        resident = peaks["cpu + gpu" if "cpu + gpu" in peaks else "cpu"]
    return {
        "kind": drawn.kind,
        "model": policy.model.name,
        "num_layers": policy.model.num_layers,
        "dtype": policy.model.dtype,
        "prompt_len": policy.workload.prompt_len,
        "gen_len": policy.workload.gen_len,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "prefill_batch_size": policy.prefill_batch_size,
        "weights": to_json(policy.weights),
        "cache": to_json(policy.cache),
        "activations": to_json(policy.activations),
        "cpu_attention": policy.cpu_attention,
        "cpu_experts": policy.cpu_experts,
        "loads_on_demand": policy.loads_on_demand,
        "predicted_bytes": predicted_bytes,
        "resident_bytes": resident,
        "ratio": resident / predicted_bytes if resident else None,
        "limit_bytes": limit_bytes,
        "cgroup_peak_bytes": ended.peak_bytes,
        "killed": ended.was_killed_for_memory,
        "error": None if ended.is_good else ended.last_words,
        "process_s": ended.wall_s,
    }


def _is_good(case: Mapping[str, Any]) -> bool:
    return not case["killed"] and case["ratio"] is not None and case["ratio"] <= 1 + TOLERANCE


def _describe(case: Mapping[str, Any]) -> str:
    words = (
        f"{case['kind']}, {case['model']} of {case['num_layers']} layers,"
        f" {case['gpu_batch_size']} x {case['num_gpu_batches']} sequences:"
        f" predicted {format_bytes(case['predicted_bytes'])}"
    )
    if case["killed"]:
        return f"{words}, killed"
    if case["ratio"] is None:
        return f"{words}, {case['error']}"
    return f"{words}, held {format_bytes(case['resident_bytes'])} ({case['ratio']:.3f})"


if __name__ == "__main__":
    run(main)

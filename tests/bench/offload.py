"""Ours against accelerate's disk offload: one model, one workload, one limit of memory.

Run as root, from an environment with the extra ``bench`` (``make bench``). Progress goes to
stderr, and one JSON line with every figure to stdout. Both run without a GPU, on the same number
of threads, one after the other, each with the model's files dropped from the page cache before.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_cgroup import Ended, MemoryCgroup, last_line
from workload_run import ROOT, TIMEOUT_S, Bench, Runs, say

from costmodel.model_spec import load_model_spec
from profiles.command import Parser, run
from profiles.errors import RunError
from profiles.files import read_json, write_json
from profiles.units import format_bytes

# The peer's weights in memory, as shares of the limit; it is given its best.
PEER_SHARES = (0.0, 0.25, 0.5, 0.75)
PATIENCE = 1.5


def main(arguments: list[str]) -> None:
    """Make, run, compare, print."""
    flags = _parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if flags.work_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zigzag-bench-")))
        else:
            folder = flags.work_dir.resolve()
            folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            model=load_model_spec(flags.preset), num_prompts=flags.num_prompts,
            prompt_len=flags.prompt_len, gen_len=flags.gen_len, limit_bytes=flags.memory,
            seed=flags.seed, folder=folder,
        )  # fmt: skip
        # Say that the limit cannot be set before the minutes that the model takes.
        with MemoryCgroup(bench.limit_bytes):
            pass
        bench.make_inputs()
        result = compare(Runs(bench), flags)
    if flags.result is not None:
        flags.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(flags.result, result)
    print(json.dumps(result))


def _parser() -> Parser:
    parser = Parser(
        prog="tests.bench.offload",
        description=(__doc__ or "").partition("\n")[0],
        example="python tests/bench/offload.py --work-dir /tmp/bench"
        " --result tests/bench/results/offload.json",
    )
    parser.prog = "python tests/bench/offload.py"
    add = parser.add_argument
    add("--preset", default="llama-3.2-3b", help="model whose shape is made (llama-3.2-3b)")
    parser.add_bytes("--memory", default=4 * 10**9, help="limit for each run (4GB)")
    add("--num-prompts", type=int, default=64, help="(64)")
    add("--prompt-len", type=int, default=128, help="(128)")
    add("--gen-len", type=int, default=8, help="(8)")
    add("--work-dir", type=Path, metavar="DIR", help="keeps the model; default: a temporary one")
    add("--only", choices=("ours", "accelerate"), help="run one of the two")
    parser.add_bytes("--peer-memory", help="accelerate's max_memory; default: its best of several")
    add("--seed", type=int, default=0, help="of weights and prompts (0)")
    add("--result", type=Path, metavar="FILE", help="keep the JSON here too")
    return parser


def compare(runs: Runs, flags: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for and put the figures side by side."""
    bench = runs.bench
    sides: dict[str, dict[str, Any]] = {}
    if flags.only != "accelerate":
        sides["ours"] = run_ours(runs)
    if flags.only != "ours":
        sides["accelerate"] = run_accelerate(runs, flags.peer_memory)
    tokens = [side.pop("output_ids") for side in sides.values()]
    result: dict[str, Any] = {
        "benchmark": "disk offload under a memory limit",
        "workload": {
            "model": bench.model.name,
            "num_prompts": bench.num_prompts,
            "prompt_len": bench.prompt_len,
            "gen_len": bench.gen_len,
            "seed": bench.seed,
        },
        "limit_bytes": bench.limit_bytes,
        **sides,
    }
    if len(sides) == 2:
        for name in ("tok_per_s", "tok_per_s_with_loading"):
            ratio = sides["ours"][name] / sides["accelerate"][name]
            result[name.replace("tok_per_s", "ratio")] = ratio
        # Random weights leave the likeliest tokens close together, so rounding parts some.
        same = sum(a[0] == b[0] for a, b in zip(*tokens, strict=True))
        result["same_first_token"] = same / bench.num_prompts
    return result | {
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tests/bench/offload.py", *sys.argv[1:]]),
    }


def run_ours(runs: Runs) -> dict[str, Any]:
    """Measure and search outside the limit, generate under it."""
    bench = runs.bench
    profile, policy = bench.folder / "profile.json", bench.folder / "policy.json"
    outputs = bench.folder / "outputs.jsonl"
    with bench.offload_folder() as offload:
        say("measuring the machine")
        runs.free(
            "measure", "-m", "profiles.measure", "--quick",
            "--offload-dir", str(offload), "--output", str(profile),
        )  # fmt: skip
        say("searching")
        runs.free(
            "search", "-m", "costmodel.search", "--hardware", str(profile),
            "--model", str(bench.checkpoint), "--num-prompts", str(bench.num_prompts),
            "--prompt-len", str(bench.prompt_len), "--gen-len", str(bench.gen_len),
            "--cpu-memory", str(bench.budget_bytes), "--output", str(policy),
        )  # fmt: skip
        say(f"running ours in {format_bytes(bench.limit_bytes)}")
        ended = runs.limited(
            "ours", "-m", "executor.generate", "--policy", str(policy),
            "--model", str(bench.checkpoint), "--prompts", str(bench.prompts),
            "--output", str(outputs), "--offload-dir", str(offload), "--ignore-eos", "--json",
        )  # fmt: skip
    if not ended.is_good:
        raise RunError(f"ours {_outcome(ended)}")
    report = json.loads(last_line(bench.folder / "ours.log"))
    estimated, resident = report["predicted_peak_bytes"]["cpu"], report["peak_bytes"]["cpu"]
    lines = outputs.read_text(encoding="utf-8").splitlines()
    chosen = read_json(policy, "policy")
    return {
        **_rates(bench, ended, report["prefill_s"], report["decode_s"]),
        "predicted_tok_per_s": report["predicted_tok_per_s"],
        "predicted_prefill_s": report["predicted_prefill_s"],
        "predicted_decode_s": report["predicted_decode_s"],
        "lower_bound_s": report["lower_bound_s"],
        "bottleneck": report["bottleneck"],
        "budget_bytes": bench.budget_bytes,
        "estimated_peak_bytes": estimated,
        "resident_peak_bytes": resident,
        "is_within_estimate": resident <= estimated,
        "cgroup_peak_bytes": ended.peak_bytes,
        "disk_bytes": report["peak_bytes"]["disk"],
        "policy": {
            key: chosen[key]
            for key in (
                "gpu_batch_size", "num_gpu_batches", "prefill_batch_size",
                "weights", "cache", "activations",
            )
        },
        "output_ids": [json.loads(line)["output_ids"] for line in lines],
    }  # fmt: skip


def run_accelerate(runs: Runs, max_memory: int | None) -> dict[str, Any]:
    """Run the peer with several amounts of weights in memory; return its fastest run.

    The most that it survives is often not its best: memory that holds weights is missing where
    files are mapped, and the files are then read again and again.
    """
    bench = runs.bench
    # The cache lies in memory too, so that more weights than this cannot be had.
    highest = max(0, bench.limit_bytes - bench.cache_bytes)
    wanted = [int(share * bench.limit_bytes) for share in PEER_SHARES]
    tries = [size for size in wanted if size <= highest] if max_memory is None else [max_memory]
    best: dict[str, Any] = {}
    tried = []
    for size in tries:
        say(f"running accelerate with max_memory {format_bytes(size)}")
        # What takes much longer than the best so far is not the best.
        timeout_s = PATIENCE * best["process_s"] if best else TIMEOUT_S
        ended, figures = _try_accelerate(runs, size, timeout_s)
        rate = figures.get("tok_per_s")
        tried.append({"max_memory_bytes": size, "outcome": _outcome(ended), "tok_per_s": rate})
        if figures and (not best or figures["tok_per_s"] > best["tok_per_s"]):
            best = figures
    if not best:
        outcomes = "; ".join(f"{t['max_memory_bytes']}: {t['outcome']}" for t in tried)
        raise RunError(
            f"accelerate ends under {format_bytes(bench.limit_bytes)} with no max_memory"
            f" ({outcomes}); try: more --memory, fewer --num-prompts, or --only ours"
        )
    return best | {"tried": tried}


def _try_accelerate(runs: Runs, max_memory: int, timeout_s: float) -> tuple[Ended, dict[str, Any]]:
    """Run the peer once; the figures are empty where it did not reach its end."""
    bench = runs.bench
    output = bench.folder / "accelerate.json"
    output.unlink(missing_ok=True)
    with bench.offload_folder() as offload:
        ended = runs.limited(
            "accelerate", str(ROOT / "tests/bench/accelerate_offload.py"),
            "--model", str(bench.checkpoint), "--prompts", str(bench.prompts),
            "--gen-len", str(bench.gen_len), "--max-memory", str(max_memory),
            "--offload-dir", str(offload), "--output", str(output), timeout_s=timeout_s,
        )  # fmt: skip
    if not ended.is_good:
        return ended, {}
    found = read_json(output, "figures")
    return ended, {
        **_rates(bench, ended, found["prefill_s"], found["decode_s"]),
        "max_memory_bytes": max_memory,
        "cgroup_peak_bytes": ended.peak_bytes,
        **{
            key: found[key]
            for key in (
                "load_s", "generate_s", "modules_on_disk", "modules", "resident_peak_bytes",
                "output_ids",
            )
        },
    }  # fmt: skip


def _rates(bench: Bench, ended: Ended, prefill_s: float, decode_s: float) -> dict[str, float]:
    """Count token/s the same way for both: the two phases alone, and the whole process."""
    return {
        "tok_per_s": bench.num_tokens / (prefill_s + decode_s),
        "tok_per_s_with_loading": bench.num_tokens / ended.wall_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "process_s": ended.wall_s,
    }


def _outcome(ended: Ended) -> str:
    if ended.is_good:
        return "ended"
    if ended.status is None:
        return "took too long"
    if ended.was_killed_for_memory:
        return "was killed for memory"
    return f"ended with status {ended.status}: {ended.last_words}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


if __name__ == "__main__":
    run(main)

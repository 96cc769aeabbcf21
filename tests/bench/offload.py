"""Ours against what a user would run instead: one model, one workload, one limit of memory.

Run as root, from an environment with the extra ``bench``. In every round all systems run one
after the other: ours, plain transformers, accelerate's disk offload, llama.cpp. Each has the same
threads, no GPU, and its files dropped from the page cache before; a memory control group that
counts the page cache holds it to the limit (libraries that other processes have mapped already
are charged to none). The first round finds the best setting of each peer.

token/s are generated tokens over prefill and decode: the first token of a prompt is prefill's.
Loading is in ``process_s`` only. One JSON line with the medians and every single figure goes to
stdout, progress to stderr. The work folder takes three times the model's size and the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contest import Contender, System, speedups
from llama_cpp import LlamaCpp
from memory_cgroup import MemoryCgroup
from ours import Ours
from transformers_peers import Accelerate, Transformers
from workload_run import Bench, BenchParser, Runs, circumstances, open_bench, say

from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import write_json

# Those that run unless others are asked for, and those in fewer bits.
NAMES = ("ours", "transformers", "accelerate", "llama.cpp")
IN_FOUR_BITS = ("ours-4bit", "llama.cpp-q4k", "ours-q4k")
SPEEDUPS = {
    "speedup_of_medians": "ours",
    "speedup_of_medians_in_four_bits": "ours-4bit",
    "speedup_of_medians_on_one_file": "ours-q4k",
}
VERSIONED = ("torch", "transformers", "accelerate", "numpy")


def main(arguments: list[str]) -> None:
    """Make, run, compare, print."""
    flags = _parser().parse_args(arguments)
    _check(flags)
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(open_bench(flags))
        # Say that the limit cannot be set before the minutes that the model takes.
        with MemoryCgroup(bench.limit_bytes):
            pass
        bench.make_inputs()
        for name in SPEEDUPS.values():
            stack.callback(shutil.rmtree, bench.folder / f"offload-{name}", ignore_errors=True)
        contenders = [Contender(system=system) for system in _systems(Runs(bench), flags)]
        for contender in contenders:
            contender.prepare()
        for number in range(1, flags.rounds + 1):
            say(f"round {number} of {flags.rounds}")
            for contender in contenders:
                contender.run_round()
            result = _result(bench, contenders, number, arguments)
            # After every round, so that hours survive what goes wrong in the last one.
            if flags.result is not None:
                write_json(flags.result, result)
    print(json.dumps(result))
    _complain(contenders)


def _parser() -> BenchParser:
    parser = BenchParser(
        "offload.py",
        description=(__doc__ or "").strip(),
        example="--gen-len 32 --work-dir bench --result tests/bench/results/offload.json",
    )
    add = parser.add_argument
    parser.add_model(default="llama-3.2-3b")
    parser.add_bytes("--memory", default=4 * 10**9, help="limit for each run (4GB)")
    add("--num-prompts", type=int, default=64, help="(64)")
    add("--prompt-len", type=int, default=128, help="(128)")
    add("--gen-len", type=int, default=32, help="tokens for each prompt, the first included (32)")
    skewed = "Zipf's exponent of how often random routers choose each expert (0: all alike)"
    add("--router-skew", type=float, default=0.0, metavar="EXPONENT", help=skewed)
    add("--rounds", type=int, default=3, help="how often each system runs (3)")
    chosen = f"leave others out; may be repeated (all but {', '.join(IN_FOUR_BITS)})"
    add("--only", action="append", choices=NAMES + IN_FOUR_BITS, help=chosen)
    keeps = "keeps the model and the tool for the next command; default: a temporary one"
    add("--work-dir", type=Path, metavar="DIR", help=keeps)
    parser.add_bytes("--peer-memory", help="accelerate's max_memory; default: its best of several")
    batched = "tokens of one pass of llama.cpp, each sequence with its own cache; default: its best"
    add("--llama-ubatch", type=int, metavar="N", help=batched)
    parts = "parts of the prompts that llama.cpp runs one after another; default: its best"
    add("--llama-parts", type=int, choices=(1, 2, 4), help=parts)
    in_order = "only settings of llama.cpp that keep weights in the order of the file"
    add("--llama-no-repack", action="store_true", help=in_order)
    built = "llama.cpp's tool; default: built in the work folder, in some minutes"
    add("--llama-batched-bench", type=Path, metavar="PATH", help=built)
    add("--quick-profile", action="store_true", help="measure ours with --quick: for rehearsals")
    add("--seed", type=int, default=0, help="of weights and prompts (0)")
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Refuse what can be refused before the minutes that the model takes."""
    if flags.rounds < 1:
        raise InputError("--rounds", got=flags.rounds, allowed="1 or more")
    tool = flags.llama_batched_bench
    if tool is not None:
        if not os.access(tool, os.X_OK) or tool.is_dir():
            raise InputError("--llama-batched-bench", got=tool, allowed="a program that can be run")
        flags.llama_batched_bench = tool.resolve()
    if flags.result is not None:
        flags.result.parent.mkdir(parents=True, exist_ok=True)


def _systems(runs: Runs, flags: argparse.Namespace) -> Sequence[System]:
    quantized = LlamaCpp(
        runs=runs,
        tool=flags.llama_batched_bench,
        ubatch=flags.llama_ubatch,
        parts=flags.llama_parts,
        may_repack=not flags.llama_no_repack,
        quantization="Q4_K_M",
        name="llama.cpp-q4k",
    )
    systems: list[System] = [
        Ours(runs=runs, quick_profile=flags.quick_profile),
        Transformers(runs=runs),
        Accelerate(runs=runs, max_memory=flags.peer_memory),
        LlamaCpp(
            runs=runs,
            tool=flags.llama_batched_bench,
            ubatch=flags.llama_ubatch,
            parts=flags.llama_parts,
            may_repack=not flags.llama_no_repack,
        ),
        Ours(runs=runs, quick_profile=flags.quick_profile, weight_bits=4, name="ours-4bit"),
        quantized,
        # The file that the last one has made.
        Ours(runs=runs, quick_profile=flags.quick_profile, model=quantized.model, name="ours-q4k"),
    ]
    return [system for system in systems if system.name in (flags.only or NAMES)]


def _result(
    bench: Bench, contenders: Sequence[Contender], rounds: int, arguments: Sequence[str]
) -> dict[str, Any]:
    medians = {each.system.name: each.medians for each in contenders if each.medians}
    result = {
        "benchmark": "offload under a memory limit",
        "workload": {
            "model": bench.model.name,
            "dtype": bench.model.dtype,
            "num_prompts": bench.num_prompts,
            "prompt_len": bench.prompt_len,
            "gen_len": bench.gen_len,
            "seed": bench.seed,
            "router_skew": bench.router_skew,
        },
        "limit_bytes": bench.limit_bytes,
        "budget_of_ours_bytes": bench.budget_bytes,
        "rounds": rounds,
        "systems": {each.system.name: each.as_json() for each in contenders},
        **{
            key: {n: speedups(medians[ours], m) for n, m in medians.items() if n != ours}
            for key, ours in SPEEDUPS.items()
            if ours in medians
        },
        **circumstances("offload.py", arguments, *VERSIONED),
    }
    named: dict[str, Any] = _without(str(bench.folder), result)
    return named


def _without(folder: str, value: Any) -> Any:
    """Take the work folder out of every message."""
    if isinstance(value, dict):
        return {name: _without(folder, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without(folder, item) for item in value]
    return value.replace(folder, Path(folder).name) if isinstance(value, str) else value


def _complain(contenders: Sequence[Contender]) -> None:
    """End with an error where ours did not run, or a system did only in some rounds."""
    wrong = [f"{each.system.name} {what}" for each in contenders for what in each.failures]
    wrong += [
        f"{each.system.name} {each.skipped}"
        for each in contenders
        if each.skipped and each.system.name in SPEEDUPS.values()
    ]
    if wrong:
        raise RunError("; ".join(wrong))


if __name__ == "__main__":
    run(main)

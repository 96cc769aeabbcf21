"""How much throughput is left beside busy processes of low priority: ours and llama.cpp's.

Run as root, from an environment with the extra ``bench``. In every round each system runs alone,
then beside one and two processes of nice 10 that compute without a pause. All have the same
threads and the same memory limit, which holds the whole model unless ``--memory`` says otherwise.

One JSON line goes to stdout, progress to stderr. ``kept`` is the share of its own quiet throughput
that a system keeps: the median over the rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Attempt, Contender, System
from llama_cpp import LlamaCpp
from ours import Ours
from workload_run import (
    Bench,
    BenchParser,
    Runs,
    circumstances,
    keep_result,
    open_bench,
    say,
)

from profiles.command import run

NAMES = ("ours", "llama.cpp", "ours-4bit", "llama.cpp-q4k")
NICENESS = 10
SPIN = f"import os\nos.nice({NICENESS})\nwhile True: pass"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` processes of low priority computing while the body runs."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            stack.callback(process.kill)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A system that runs beside so many busy processes."""

    system: System
    num_busy: int

    @property
    def name(self) -> str:
        """The system's name and what it runs beside."""
        return f"{self.system.name} beside {self.num_busy}"

    def why_not(self) -> str | None:
        """As the system says."""
        return self.system.why_not()

    def prepare(self) -> None:
        """Prepare the system once, for all numbers of processes."""
        if self.num_busy == 0:
            self.system.prepare()

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Take those of the system."""
        return self.system.settings()

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run the system while the processes compute."""
        with busy_processes(self.num_busy):
            return self.system.run(setting, timeout_s)

    def version(self) -> str:
        """As the system says."""
        return self.system.version()


def main(arguments: list[str]) -> None:
    """Make, run, compare, print."""
    flags = _parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(open_bench(flags))
        bench.make_inputs()
        groups = [
            [Contender(system=Beside(system=system, num_busy=n)) for n in range(flags.most + 1)]
            for system in _systems(Runs(bench), flags)
        ]
        for contender in (each for group in groups for each in group):
            contender.prepare()
        for number in range(1, flags.rounds + 1):
            say(f"round {number} of {flags.rounds}")
            for contender in (each for group in groups for each in group):
                contender.run_round()
        keep_result(flags, _result(bench, groups, flags.rounds, arguments))


def _parser() -> BenchParser:
    parser = BenchParser(
        "busy_machine.py",
        description=(__doc__ or "").strip(),
        example="--work-dir bench --result tests/bench/results/busy-machine.json",
    )
    add = parser.add_argument
    parser.add_model(default="llama-3.2-1b")
    parser.add_bytes("--memory", default=8 * 10**9, help="limit for each run (8GB)")
    add("--num-prompts", type=int, default=64, help="(64)")
    add("--prompt-len", type=int, default=32, help="(32)")
    add("--gen-len", type=int, default=32, help="tokens for each prompt, the first included (32)")
    add("--rounds", type=int, default=3, help="how often each system runs (3)")
    add("--most", type=int, default=2, metavar="N", help="run beside 0 to N processes (2)")
    add("--only", action="append", choices=NAMES, help="leave others out; may be repeated")
    add("--work-dir", type=Path, metavar="DIR", help="keeps the model and the tool; default: none")
    add("--llama-ubatch", type=int, default=512, metavar="N", help="tokens of one pass (512)")
    built = "llama.cpp's tool; default: built in the work folder, in some minutes"
    add("--llama-batched-bench", type=Path, metavar="PATH", help=built)
    add("--seed", type=int, default=0, help="of weights and prompts (0)")
    return parser


def _systems(runs: Runs, flags: argparse.Namespace) -> Sequence[System]:
    tool = flags.llama_batched_bench and flags.llama_batched_bench.resolve()
    systems: list[System] = [
        Ours(runs=runs, quick_profile=True, measures_once=True),
        LlamaCpp(runs=runs, tool=tool, ubatch=flags.llama_ubatch, parts=1),
        Ours(runs=runs, quick_profile=True, measures_once=True, weight_bits=4, name="ours-4bit"),
        LlamaCpp(
            runs=runs,
            tool=tool,
            ubatch=flags.llama_ubatch,
            parts=1,
            quantization="Q4_K",
            name="llama.cpp-q4k",
        ),
    ]
    return [system for system in systems if system.name in (flags.only or NAMES)]


def _result(
    bench: Bench, groups: Sequence[Sequence[Contender]], rounds: int, arguments: Sequence[str]
) -> dict[str, Any]:
    return {
        "benchmark": "throughput beside busy processes of nice 10",
        "workload": {
            "model": bench.model.name,
            "dtype": bench.model.dtype,
            "num_prompts": bench.num_prompts,
            "prompt_len": bench.prompt_len,
            "gen_len": bench.gen_len,
            "seed": bench.seed,
        },
        "limit_bytes": bench.limit_bytes,
        "rounds": rounds,
        "kept": {group[0].system.name.removesuffix(" beside 0"): _kept(group) for group in groups},
        "systems": {each.system.name: each.as_json() for group in groups for each in group},
        **circumstances("busy_machine.py", arguments, "torch", "numpy"),
    }


def _kept(group: Sequence[Contender]) -> list[float]:
    """Return the share of quiet throughput that is kept beside 1, 2, ... processes."""
    quiet = [each["tok_per_s"] for each in group[0].rounds]
    return [
        statistics.median(
            each["tok_per_s"] / alone for each, alone in zip(busy.rounds, quiet, strict=True)
        )
        for busy in group[1:]
    ]


if __name__ == "__main__":
    run(main)

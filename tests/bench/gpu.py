"""On a GPU whose memory is limited, models that are larger: ours beside FlexGen and accelerate.

All of it in one command of some minutes: the tests for a GPU, the machine's profile, then the cases
in order of worth, each beside its peers under the same limit, with random weights. Each step is
appended to ``--result`` as it ends. Steps that are there are not repeated, so that a second command
goes on with the rest. Steps that would not end within ``--budget`` are left out and named. The last
line says how the goals are met. Without a GPU, ``--rehearse`` takes the same way with small models
on an emulated one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_cases import CASES, REHEARSALS
from gpu_children import Children, OutOfTimeError
from gpu_steps import GpuSteps, Step
from gpu_summary import goals_of, table_of
from workload_run import BenchParser, circumstances, say

from profiles.command import run
from profiles.errors import InputError, ZigzagError
from profiles.files import to_json

BUDGET_S = 530.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


def main(arguments: list[str]) -> None:
    """Do the steps that are asked for and not yet done, and judge all results."""
    start = time.monotonic()
    flags = _parser().parse_args(arguments)
    if not flags.rehearse and not torch.cuda.is_available():
        raise InputError("GPU", got="none", allowed="CUDA", hint="--rehearse")
    folder = flags.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = flags.result or folder / "results.jsonl"
    bench = GpuSteps(
        children=Children(folder=folder, deadline_s=start + flags.budget),
        cases=REHEARSALS if flags.rehearse else CASES,
        rehearses=flags.rehearse,
    )
    steps = [*bench.steps()]
    known = {name for step in steps for name in (step.name, step.case)}
    if unknown := [name for name in (*flags.skip, *(flags.only or ())) if name not in known]:
        allowed = ", ".join(sorted(known))
        raise InputError("--only and --skip", got=unknown[0], allowed=allowed)
    done = read_results(path)
    bench.restore_profile(done)
    left_out = []
    for step in (step for step in steps if _is_wanted(step, flags)):
        if "error" not in done.get(step.name, {"error": "missing"}):
            say(f"{step.name}: done before")
        elif bench.children.left_s < step.seconds:
            left_out.append(step.name)
        elif result := _result_of(step, bench.children):
            line = {"step": step.name, **result, **circumstances("gpu.py", arguments, "torch")}
            line["boot"] = BOOT.read_text("ascii").strip()
            append(path, line)
            done[step.name] = line
        else:
            left_out.append(step.name)
    print(json.dumps(_judged(bench, done, left_out)))


def _parser() -> BenchParser:
    parser = BenchParser(
        "gpu.py",
        description=(__doc__ or "").strip(),
        example="--work-dir gpu-work --result results.jsonl",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps profile, logs and runs")
    text = f"seconds for everything ({BUDGET_S:g})"
    add("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help=text)
    text = "a step or a case, such as tests; may be repeated"
    add("--only", action="append", metavar="STEP", help=f"do {text}")
    add("--skip", action="append", default=[], metavar="STEP", help=f"leave out {text}")
    add("--rehearse", action="store_true", help="small models on an emulated GPU")
    return parser


def _is_wanted(step: Step, flags: argparse.Namespace) -> bool:
    names = {step.name, step.case}
    return not names & set(flags.skip) and (flags.only is None or bool(names & set(flags.only)))


def _result_of(step: Step, children: Children) -> dict[str, Any] | None:
    """Do a step; ``None`` where the time was over before its end."""
    say(f"{step.name}: {step.seconds:.0f} s expected")
    start = time.monotonic()
    children.begin_step(step.seconds)
    try:
        result = step.do()
    except OutOfTimeError as error:
        say(str(error))
        return None
    except ZigzagError as error:
        say(f"{step.name}: {error}")
        result = {"error": str(error)}
    return result | {"step_s": round(time.monotonic() - start, 1)}


def _judged(
    bench: GpuSteps, done: Mapping[str, Mapping[str, Any]], left_out: list[str]
) -> dict[str, Any]:
    """Tell people how the goals are met, and return the same for the last line."""
    goals = goals_of(done, bench.cases)
    say("\n" + table_of(done))
    words = {None: "not known", True: "holds", False: "does not hold"}
    for goal in goals:
        say(f"{goal.text}: {words[goal.holds]}; {json.dumps(goal.figures)}")
    if left_out:
        say(f"left out, for want of time: {', '.join(left_out)}")
    return {"goals": [to_json(goal) for goal in goals], "left_out": left_out}


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each step, by name."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return {line["step"]: line for line in lines}


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a result to the file."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run(main)

"""Predictions proved: policies drawn at random, predicted, run, and held against each other.

Half of the cases may calibrate the profile, half are held out and judge it. Every case that ends
is kept in the work folder, so that the command resumes where it stopped; the policies are drawn
for a recorded machine and are the same everywhere. All are predicted with one profile, measured
at the start unless it is there. With ``--again`` it is measured a second time after the last case.

Before each case two rates are sampled for a moment. Where they are far from the profile's, the
machine is busy with something else: the case waits, at most a minute, and is marked. Progress goes
to stderr, one JSON line to stdout; ``--table`` keeps the cases as CSV, which
``costmodel.calibrate --runs`` reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine_pulse import Pulse, measure_pulse
from memory_cgroup import last_line
from validation_cases import Case, draw_cases, machine_of
from validation_report import Outcome, summarize, table_of
from workload_run import ROOT, BenchParser, circumstances, keep_result, say

from costmodel.measured_runs import write_rows
from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import read_json, to_json, write_json
from profiles.hardware import HardwareProfile

TIMEOUT_S = 300.0
WAIT_S, MOST_WAITS = 10.0, 6


def main(arguments: list[str]) -> None:
    """Measure, run what has not run yet, judge, print."""
    flags = _parser().parse_args(arguments)
    if flags.cases < 1:
        raise InputError("--cases", got=flags.cases, allowed="1 or more")
    folder: Path = flags.work_dir
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    hardware = profile_in(folder, "profile")
    outcomes = []
    for case in draw_cases(flags.seed, flags.cases):
        path = folder / "cases" / f"{flags.seed}-{case.number:03}.json"
        if not path.exists():
            write_json(path, run_case(case, hardware, folder))
        outcomes.append(Outcome(case=case, figures=read_json(path, "case")))
        say(f"{case.number + 1:>3} of {flags.cases}: {outcomes[-1].describe(hardware)}")
    again = profile_in(folder, "profile-again") if flags.again else None
    result = {
        "benchmark": "predicted against measured",
        "cases": len(outcomes),
        "seed": flags.seed,
        **summarize(outcomes, hardware, again),
        **circumstances("validate.py", arguments, "torch"),
    }
    if flags.table is not None:
        write_rows(flags.table, table_of(outcomes, hardware))
    keep_result(flags, result)
    if failed := [outcome.case.number for outcome in outcomes if not outcome.has_ended]:
        raise RunError(f"cases {', '.join(map(str, failed))} did not end; see {folder}/cases")


def _parser() -> BenchParser:
    parser = BenchParser(
        "validate.py",
        description=(__doc__ or "").strip(),
        example="--work-dir validation --table tests/bench/results/validation.csv",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps profile and cases")
    add("--cases", type=int, default=48, help="policies to draw (48)")
    add("--seed", type=int, default=0, help="of the policies (0)")
    add("--table", type=Path, metavar="FILE", help="keep the cases as CSV")
    add("--again", action="store_true", help="predict with a second profile, too")
    return parser


def profile_in(folder: Path, name: str) -> HardwareProfile:
    """Return the profile that is kept under a name, measured now if there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        say("measuring the machine")
        words = ["profiles.measure", "--offload-dir", str(folder), "--output", str(path)]
        run_module(words, folder / f"{name}.log")
    return HardwareProfile.load(path)


def run_case(case: Case, hardware: HardwareProfile, folder: Path) -> dict[str, Any]:
    """Run one case, and return its report or why there is none, beside the pulse before it."""
    pulse = _wait_for_calm(hardware)
    policy, machine = folder / "policy.json", folder / "machine.json"
    case.policy.save(policy)
    machine_of(case, hardware).save(machine)
    words = [
        "executor.bench", "--policy", str(policy), "--hardware", str(machine), "--dummy-weights",
        "--offload-dir", str(folder),
    ]  # fmt: skip
    log = folder / "run.log"
    kept: dict[str, Any] = {"pulse": to_json(pulse), "disturbed": not pulse.is_calm(hardware)}
    try:
        kept["report"] = json.loads(run_module(words, log))
    except RunError as error:
        kept["error"] = str(error)
    return kept


def _wait_for_calm(hardware: HardwareProfile) -> Pulse:
    pulse = measure_pulse()
    for _ in range(MOST_WAITS):
        if pulse.is_calm(hardware):
            break
        time.sleep(WAIT_S)
        pulse = measure_pulse()
    return pulse


def run_module(words: list[str], log: Path) -> str:
    """Run one of our commands and return its last line."""
    with log.open("wb") as err:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=_environment(), stdout=subprocess.PIPE,
            stderr=err, check=False, timeout=TIMEOUT_S, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RunError(f"{words[0]} ended with status {done.returncode}: {last_line(log)}")
    return done.stdout.splitlines()[-1]


def _environment() -> Mapping[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    run(main)

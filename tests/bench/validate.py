"""Predictions proved: policies drawn at random, predicted, run, and held against each other.

Half of the cases may calibrate the profile, half are held out and judge it. Every case that ends
is kept in the work folder, so that the command resumes where it stopped; the policies are drawn
for a recorded machine and are the same everywhere. All are predicted with one profile, measured
at the start unless it is there; with ``--again`` by a second one as well, measured at the end
unless that is there.

Before and after each case matrix products are sampled for a moment. Where they are far slower than
in the profile, the machine is busy with something else: the case waits, at most a minute, and is
marked. Marked cases do not calibrate; errors are told with and without them. Progress goes to
stderr, one JSON line to stdout; ``--table`` keeps the cases as CSV for
``costmodel.calibrate --runs``.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from machine_pulse import Pulse, measure_pulse
from validation_cases import Case, draw_cases, machine_of
from validation_report import Outcome, fit_to, summarize, table_of
from workload_run import BenchParser, circumstances, keep_result, profile_in, run_module, say

from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import read_json, to_json, write_json
from profiles.hardware import HardwareProfile
from profiles.output_checks import checked_outputs
from profiles.outputs import write_output

TIMEOUT_S = 300.0
# Below, a tier may have nothing that is held out.
LEAST_CASES = 12
WAIT_S, MOST_WAITS = 10.0, 6


def main(arguments: list[str]) -> None:
    """Measure, run what has not run yet, judge, print."""
    flags = _parser().parse_args(arguments)
    if flags.cases < LEAST_CASES:
        raise InputError("--cases", got=flags.cases, allowed=f"{LEAST_CASES} or more")
    with checked_outputs({"--table": flags.table, "--result": flags.result}, {}):
        pass
    folder = flags.work_dir.resolve()
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    hardware = profile_in(folder)
    outcomes = []
    for case in draw_cases(flags.seed, flags.cases, mixtures=flags.mixtures):
        outcomes.append(Outcome(case=case, figures=_figures(case, hardware, folder)))
        say(f"{case.number + 1:>3} of {flags.cases}: {outcomes[-1].describe(hardware)}")
    again = profile_in(folder, "profile-again") if flags.again else None
    fit = fit_to(outcomes, hardware)
    result = {
        "benchmark": "predicted against measured",
        "cases": len(outcomes),
        "seed": flags.seed,
        **summarize(outcomes, hardware, fit),
        **({"again": summarize(outcomes, again, fit_to(outcomes, again))} if again else {}),
        **circumstances("validate.py", arguments, "torch"),
    }
    if flags.table is not None:
        _write_table(flags.table, table_of(outcomes, hardware, fit))
    keep_result(flags, result)
    if failed := [outcome.case.number for outcome in outcomes if not outcome.has_ended]:
        raise RunError(f"cases {', '.join(map(str, failed))} did not end; see {folder}/cases")


def _write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    def render(handle: IO[str]) -> None:
        writer = csv.DictWriter(handle, rows[0] if rows else (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    write_output(path, render)


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
    add("--mixtures", action="store_true", help="draw mixtures of experts instead of dense models")
    add("--table", type=Path, metavar="FILE", help="keep the cases as CSV")
    add("--again", action="store_true", help="predict with a second profile, too")
    return parser


def _figures(case: Case, hardware: HardwareProfile, folder: Path) -> dict[str, Any]:
    """Return what is kept of a case; run it where nothing is, or it did not end, or its policy was
    another, because what draws them has changed; or its tokens were chosen otherwise."""
    what = "mixture-" if "experts" in case.policy.model.component_names else ""
    path = folder / "cases" / f"{what}{case.seed}-{case.number:03}.json"
    drawn = {
        "policy": to_json(case.policy),
        "emulated": to_json(case.emulated),
        "temperature": temperature_of(case),
    }
    figures = read_json(path, "case") if path.exists() else {}
    if "report" not in figures or figures["drawn"] != drawn:
        figures = {"drawn": drawn} | run_case(case, hardware, folder)
        write_json(path, figures)
    pulses = (Pulse(**pulse) for pulse in figures["pulses"])
    return figures | {"disturbed": any(pulse.is_busy(hardware) for pulse in pulses)}


def temperature_of(case: Case) -> int:
    """Return 1 for mixtures, else 0: the likeliest tokens of random weights repeat, and so would
    the experts that they choose."""
    return int("experts" in case.policy.model.component_names)


def run_case(case: Case, hardware: HardwareProfile, folder: Path) -> dict[str, Any]:
    """Run one case; return its report or why there is none, and the machine's pulse around it."""
    policy, machine = folder / "policy.json", folder / "machine.json"
    case.policy.save(policy)
    machine_of(case, hardware).save(machine)
    words = [
        "executor.bench",
        "--policy",
        str(policy),
        "--hardware",
        str(machine),
        "--dummy-weights",
        "--offload-dir",
        str(folder),
        "--temperature",
        str(temperature_of(case)),
    ]
    kept: dict[str, Any] = {}
    before = _wait_while_busy(hardware)
    try:
        kept["report"] = json.loads(run_module(words, folder / "run.log", TIMEOUT_S))
    except RunError as error:
        kept["error"] = str(error)
    after = measure_pulse()
    return kept | {"pulses": to_json((before, after))}


def _wait_while_busy(hardware: HardwareProfile) -> Pulse:
    pulse = measure_pulse()
    for _ in range(MOST_WAITS):
        if not pulse.is_busy(hardware):
            break
        time.sleep(WAIT_S)
        pulse = measure_pulse()
    return pulse


if __name__ == "__main__":
    run(main)

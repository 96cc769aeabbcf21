"""Compare predictions of jobs over lanes with measurements, over jobs drawn at random.

Lengths are lognormal, as in chat logs, with medians of their own for each job. Half of the policies
are made for answers that are half or twice as long as those that the job gets. Policies are
searched for a recorded machine under a budget of its own, so that they are the same everywhere.
Every second job calibrates the profile, the others are held out and judge it. Weights are random.
Every case that ends is kept in the work folder, so that the command resumes where it stopped.
Progress goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from drawn_policies import DENSE
from validation_cases import BITS, DRAWN_FOR
from workload_run import BenchParser, circumstances, keep_result, profile_in, run_module, say

from costmodel.calibration.factors import calibrate, errors_of, mean_error
from costmodel.calibration.measured_runs import read_runs
from costmodel.cli.work_flags import workload_of
from costmodel.model.loading import load_model_spec
from costmodel.optimizer.choices import Permitted
from costmodel.optimizer.optimum import search
from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.problem import Problem
from profiles.command import run
from profiles.errors import InfeasibleError, InputError, RunError
from profiles.files import read_json, write_json
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_profile
from profiles.units import MIB

# On the recorded machine.
SHORTEST_S, LONGEST_S = 8.0, 60.0
SPREADS = (0.4, 1.4)
MOST_TOKENS = 900
TIMEOUT_S = 300.0
LEAST_CASES = 4
# Of each case: its policy, its lengths, its row for calibration.
FILES = (".policy.json", ".lengths.csv", ".runs.csv")
GUESSES = (0.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCase:
    """A policy over lanes, and the lengths that it is run with.

    ``outputs`` are expected, ``limits`` are generated. ``guess`` is expected over real lengths.
    """

    policy: Policy
    lengths: Lengths
    guess: float


def main(arguments: list[str]) -> None:
    """Measure, run what has not run yet, judge, print."""
    parser = BenchParser(
        "validate_jobs.py",
        description=(__doc__ or "").strip(),
        example="--work-dir validation --result tests/bench/results/validation-jobs-2core.json",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, metavar="DIR", help="keeps profile and cases")
    add("--cases", type=int, default=24, help="jobs to draw (24)")
    add("--seed", type=int, default=0, help="of the jobs (0)")
    flags = parser.parse_args(arguments)
    if flags.cases < LEAST_CASES:
        raise InputError("--cases", got=flags.cases, allowed=f"{LEAST_CASES} or more")
    folder = flags.work_dir.resolve()
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    hardware = profile_in(folder)
    outcomes = []
    draw = draw_jobs(random.Random(flags.seed))
    for number in range(flags.cases):
        outcomes.append(_outcome(next(draw), folder, f"{flags.seed}-{number:03}"))
        say(f"{number + 1:>3} of {flags.cases}: {_describe(outcomes[-1])}")
    failed = [number for number, each in enumerate(outcomes) if "error" in each]
    result = {
        "benchmark": "jobs: predicted against measured",
        "cases": len(outcomes),
        "seed": flags.seed,
        **_judge(outcomes, hardware, folder),
        **circumstances("validate_jobs.py", arguments, "torch"),
    }
    keep_result(flags, result)
    if failed:
        raise RunError(f"jobs {', '.join(map(str, failed))} did not end; see {folder}/jobs")


def draw_jobs(rng: random.Random) -> Iterator[JobCase]:
    """Draw jobs without end that search runs over lanes and that take neither too long nor too
    little."""
    while True:
        spec = load_model_spec(rng.choice(DENSE.models)).with_dtype("bfloat16")
        count = round(_between(rng, 12, 200))
        seed = np.random.default_rng(rng.randrange(2**32))
        prompts, answers = (_lognormal(rng, seed, count) for _ in range(2))
        guess = rng.choice((1.0, rng.choice(GUESSES)))
        expected = np.maximum(1, (answers * guess).astype(np.int64))
        told = Lengths(prompts, expected, np.maximum(answers, expected))
        bits = Permitted(weight_bits=(rng.choice(BITS),))
        machine, share = recorded_profile(DRAWN_FOR), rng.uniform(0.2, 1.5)
        room = round(share * _weight_bytes(spec.name, bits.weight_bits[0])) + 250 * MIB
        machine = machine.with_budget(cpu_memory=machine.cpu.runtime_bytes + room)
        try:
            found = search(machine, spec, workload_of(told), permitted=bits)
        except InfeasibleError:
            continue
        seconds = float(answers.sum()) / found.job_tok_per_s
        if found.policy.lanes is not None and SHORTEST_S <= seconds <= LONGEST_S:
            lengths = Lengths(prompts, np.minimum(expected, answers), answers)
            yield JobCase(policy=found.policy, lengths=lengths, guess=guess)


def _between(rng: random.Random, least: float, most: float) -> float:
    """Draw a number; every order of magnitude is as likely."""
    return float(least * (most / least) ** rng.random())


def _lognormal(rng: random.Random, seed: np.random.Generator, count: int) -> IntArray:
    median, spread = _between(rng, 10, 200), rng.uniform(*SPREADS)
    return np.clip(seed.lognormal(np.log(median), spread, count), 2, MOST_TOKENS).astype(np.int64)


def _weight_bytes(name: str, weight_bits: int) -> int:
    problem = Problem(
        hardware=recorded_profile(DRAWN_FOR),
        model=load_model_spec(name).with_dtype("bfloat16"),
        workload=Workload(prompt_len=1, gen_len=1),
        gpu_batch_size=1,
        prefill_batch_size=1,
        weight_bits=weight_bits,
    )
    return problem.sizes.weight_bytes


def _outcome(case: JobCase, folder: Path, name: str) -> dict[str, Any]:
    """Return what is kept of a case; run it where nothing is or it did not end."""
    path = folder / "jobs" / f"{name}.json"
    kept = read_json(path, "case") if path.exists() else {}
    if "report" in kept:
        return kept
    policy, lengths, runs = (folder / "jobs" / f"{name}{end}" for end in FILES)
    case.policy.save(policy)
    columns = (case.lengths.prompts, case.lengths.outputs, case.lengths.limits)
    lines = [",".join(map(str, row)) for row in zip(*columns, strict=True)]
    lengths.write_text("\n".join(["prompt_len,gen_len,max_tokens", *lines, ""]))
    runs.unlink(missing_ok=True)
    words = ["executor.bench", "--dummy-weights", "--policy", str(policy)]
    words += ["--lengths", str(lengths), "--hardware", str(folder / "profile.json")]
    words += ["--offload-dir", str(folder), "--runs", str(runs)]
    kept = {"name": name, "model": case.policy.model.name, "guess": case.guess}
    try:
        kept["report"] = json.loads(run_module(words, folder / "run.log", TIMEOUT_S))
    except RunError as error:
        kept["error"] = str(error)
    write_json(path, kept)
    return kept


def _describe(outcome: Mapping[str, Any]) -> str:
    if "error" in outcome:
        return str(outcome["error"])
    report = outcome["report"]
    error = report["predicted_tok_per_s"] / report["measured_tok_per_s"] - 1
    lanes = report["lanes"]
    return (
        f"{outcome['model']}, {report['num_prompts']} prompts, {lanes['mean_lanes']:.1f} lanes,"
        f" {report['measured_tok_per_s']:.0f} token/s: {error:+.1%},"
        f" memory {_memory_error(report):+.1%}, guessed {outcome['guess']:g} times"
    )


def _memory_error(report: Mapping[str, Any]) -> float:
    return float(report["predicted_peak_bytes"]["cpu"] / report["peak_bytes"]["cpu"] - 1)


def _judge(
    outcomes: Sequence[Mapping[str, Any]], hardware: HardwareProfile, folder: Path
) -> dict[str, Any]:
    """Fit the profile to every second job, and judge the others with it."""
    ended = [each for each in outcomes if "report" in each]
    runs = [
        run for each in ended for run in read_runs(folder / "jobs" / f"{each['name']}{FILES[2]}")
    ]
    fit = calibrate(hardware, runs[::2], source="validation")
    held_out = runs[1::2]
    memory = [_memory_error(each["report"]) for each in ended]
    lanes = [each["report"]["lanes"] for each in ended]
    return {
        "factors": dict(fit.factors),
        "measured": _errors(errors_of(hardware, held_out)),
        "calibrated": _errors(errors_of(fit.hardware, held_out)),
        "all_measured": _errors(errors_of(hardware, runs)),
        "memory_most_under": min(memory),
        "memory_mean_absolute_error": mean_error(memory),
        "guess_cost_shares": {
            each["name"]: lane["guess_cost_s"] / lane["run_s"]
            for each, lane in zip(ended, lanes, strict=True)
            if each["guess"] != 1
        },
    }


def _errors(errors: Sequence[float]) -> dict[str, Any]:
    sizes = np.abs(errors)
    return {
        "throughput_mean_absolute_error": float(sizes.mean()),
        "throughput_p90_absolute_error": float(np.quantile(sizes, 0.9)),
        "errors": list(errors),
    }


if __name__ == "__main__":
    run(main)

"""The command ``python -m costmodel.simulate``: the schedule run with predicted seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from costmodel.cli.flags import check_outputs
from costmodel.cli.lane_simulation import SimulatedJob
from costmodel.plan.lengths_table import read_lengths
from costmodel.plan.policy import Policy
from costmodel.pricing.problem import problem_of
from costmodel.schedule.chrome_trace import write_trace
from costmodel.schedule.prediction import predicted_seconds
from costmodel.schedule.tasks import Task
from costmodel.schedule.timeline import Timeline, simulate
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.output_checks import output_path
from profiles.recorded import find_profile
from profiles.units import format_seconds


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="costmodel.simulate",
        description="Simulate the schedule of a policy in predicted seconds: task by task, or with"
        " lanes a whole job, pass by pass.",
        example="python -m costmodel.simulate --hardware profile.json --policy policy.json"
        " --output timeline.json",
    )
    add = parser.add_argument
    add("--hardware", required=True, help="profile file, or the name of a recorded machine")
    add("--policy", required=True, type=Path, help="policy file")
    add(
        "--passes",
        type=int,
        help="passes over the model to simulate, prefill included (default: all)",
    )
    add(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="CSV table of the job of a policy with lanes: prompt_len, gen_len, and perhaps"
        " max_tokens and count (default: the lengths in the policy)",
    )
    add(
        "--output",
        type=output_path,
        help="timeline to write, for chrome://tracing or ui.perfetto.dev",
    )
    add("--json", action="store_true", help="print the result as one line of JSON at the end")
    return parser


def main(arguments: list[str]) -> None:
    """Simulate, print, write."""
    flags = parser().parse_args(arguments)
    if flags.passes is not None and flags.passes < 1:
        raise InputError("--passes", got=flags.passes, allowed="1 or more")
    with check_outputs(flags, "output"):
        _tell(flags)


def _tell(flags: argparse.Namespace) -> None:
    policy, hardware = Policy.load(flags.policy), find_profile(flags.hardware)
    if policy.lanes is not None:
        _tell_job(policy, hardware, flags)
        return
    if flags.lengths is not None:
        raise InputError("--lengths", got="a policy without lanes", allowed="one with lanes")
    num_passes = min(flags.passes or policy.workload.gen_len, policy.workload.gen_len)
    timeline = _simulate(policy, hardware, num_passes)
    predicted_s = predicted_seconds(policy, hardware, num_passes)
    print(_format(timeline, predicted_s))
    if flags.output is not None:
        write_trace(flags.output, timeline.tasks, label=f"{policy.model.name}, predicted")
        print(f"\ntimeline written to {flags.output}")
    if flags.json:
        figures = {
            "simulated_s": timeline.latency_s,
            "simulated_prefill_s": timeline.prefill_s,
            "predicted_s": predicted_s,
            "passes": num_passes,
            "busy_s": dict(timeline.busy_s()),
        }
        print(json.dumps(figures))


def _tell_job(policy: Policy, hardware: HardwareProfile, flags: argparse.Namespace) -> None:
    if flags.passes is not None:
        raise InputError(
            "--passes", got="a policy with lanes", allowed="without: a whole job is simulated"
        )
    planned = policy.workload.sketch(policy.block_size).lengths()
    lengths = read_lengths(flags.lengths) if flags.lengths else planned
    job = SimulatedJob.run(policy, hardware, lengths)
    print(job.describe())
    if flags.output is not None:
        job.write(flags.output)
        print(f"\ntimeline written to {flags.output}")
    if flags.json:
        print(json.dumps(job.as_json()))


def _simulate(policy: Policy, hardware: HardwareProfile, num_passes: int) -> Timeline:
    num_layers = len(problem_of(policy, hardware).sizes.layers)
    last = {"compute", "finish"}
    total = num_layers * policy.num_gpu_batches * num_passes
    with tqdm(total=total, desc="simulating", unit=" layers", leave=False, disable=None) as bar:

        def show(task: Task) -> None:
            bar.update(task.kind in last)

        return simulate(policy, hardware, num_passes=num_passes, progress=show)


def _format(timeline: Timeline, predicted_s: float) -> str:
    lines = [
        f"simulated  {format_seconds(timeline.latency_s)}"
        f" (prefill {format_seconds(timeline.prefill_s)}), task by task",
        f"predicted  {format_seconds(predicted_s)}, by the program:"
        f" the simulation takes {timeline.latency_s / predicted_s - 1:+.1%}",
    ]
    busy = sorted(timeline.busy_s().items(), key=lambda item: -item[1])
    lines += [
        f"  {channel:<15}{format_seconds(seconds):>12}  {seconds / timeline.latency_s:4.0%} busy"
        for channel, seconds in busy
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)

"""The command ``python -m executor.report``: a run or a policy as a page."""

from __future__ import annotations

from pathlib import Path

from costmodel.plan.policy import Policy
from costmodel.report.trace_file import read_run
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.files import read_json
from profiles.output_checks import checked_outputs, output_path
from profiles.recorded import find_profile


def main(arguments: list[str]) -> None:
    """Read a file, make its page, write it."""
    flags = parser().parse_args(arguments)
    with checked_outputs({"--output": flags.output}, {"FILE": [flags.file]}):
        _write(flags.file, flags.hardware, flags.output)
    print(f"report written to {flags.output}")


def parser() -> Parser:
    """Return the parser of the command's flags."""
    made = Parser(
        prog="executor.report",
        description="Write a report of a run or a policy: memory, timeline, limits, what to buy.",
        example="python -m executor.report timeline.json --output report.html",
    )
    add = made.add_argument
    add(
        "file",
        type=Path,
        metavar="FILE",
        help="timeline of a run (from generate --trace), or a policy",
    )
    add("--hardware", help="profile to price a policy with (default: the profile in the policy)")
    default = Path("report.html")
    add(
        "-o",
        "--output",
        type=output_path,
        default=default,
        help=f"report to write (default: {default})",
    )
    return made


def _write(file: Path, hardware: str | None, output: Path) -> None:
    # Only those who ask wait for the import of what draws: the input is read first.
    raw = read_json(file, "run or policy")
    if "traceEvents" not in raw:
        policy = Policy.load(file)
        profile = find_profile(hardware) if hardware else policy.hardware
        if profile is None:
            raise InputError(
                "--hardware",
                got="nothing, and a policy without a machine",
                allowed="a profile, or the name of a recorded machine",
            )
        from costmodel.report.page import write_policy_page

        write_policy_page(output, policy, profile)
        return
    if hardware is not None:
        raise InputError(
            "--hardware", got=f"{hardware} beside a run", allowed="the machine that ran it"
        )
    record, sample = read_run(raw, f"run {file}")
    from costmodel.report.page import write_run_page

    write_run_page(output, record, sample)


if __name__ == "__main__":
    run(main)

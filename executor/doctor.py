"""The command ``python -m executor.doctor``: what this machine has and lacks for a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from executor.machine.findings import Finding, State, check_libraries, check_system
from profiles.command import Parser, run
from profiles.errors import RunError
from profiles.files import to_json


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.doctor",
        description="List what this machine has and lacks for a run, and what follows.\n"
        "Status 0: it can run models. Status 1: something that a run needs is missing.",
        example="python -m executor.doctor --offload-dir /mnt/nvme",
    )
    parser.add_argument(
        "--offload-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for data that a policy stores on disk (default: the current folder)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the findings as one line of JSON at the end"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Check, print, and end with status 1 where something that a run needs is missing."""
    flags = parser().parse_args(arguments)
    findings = []
    for finding in all_findings(flags.offload_dir):
        # At once: torch takes seconds to import, and a compiler to answer.
        print(format_finding(finding), flush=True)
        findings.append(finding)
    lacking = [finding.what for finding in findings if finding.state is State.FAIL]
    if flags.json:
        print(json.dumps({"can_run": not lacking, "findings": to_json(findings)}))
    if lacking:
        raise RunError(f"this machine cannot run models yet: {', '.join(lacking)}")


def all_findings(offload_dir: Path) -> Iterator[Finding]:
    """Yield every finding; where torch cannot be imported, those that do not need it."""
    yield check_system()
    libraries = list(check_libraries())
    yield from libraries
    if libraries[-1].state is State.FAIL:
        return
    from executor.machine import checks

    yield checks.check_cores()
    yield from checks.check_memory()
    yield from checks.check_kernels()
    yield from checks.check_gpu()
    yield from checks.check_offload_dir(offload_dir)
    yield checks.check_profile(offload_dir)


def format_finding(finding: Finding) -> str:
    """Lay out a finding: its state, the thing, what was found, what follows."""
    follows = f" -> {finding.follows}" if finding.follows else ""
    return f"{finding.state:<6}{finding.what:<16}{finding.found}{follows}"


if __name__ == "__main__":
    run(main)

"""The console script ``zigzag``: the commands of all three packages under one name.

A command's module is imported when it is called, so that ``zigzag search`` never waits for torch.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

from profiles.command import Parser, run
from profiles.errors import InputError, RunError, one_line
from profiles.start import told_exhaustion
from profiles.version import VERSION

EXAMPLE = """\
zigzag measure --output profile.json
  zigzag search --hardware profile.json --model DIR --cpu-memory 8GiB --output policy.json
  zigzag generate --policy policy.json --model DIR --prompts prompts.jsonl"""
# Below this likeness a wrong name is no slip of the fingers.
LEAST_LIKENESS = 0.5


@dataclass(frozen=True, slots=True)
class Command:
    """A module with ``parser()`` and ``main(arguments)``, whose last name is the command's."""

    module: str
    summary: str

    @property
    def name(self) -> str:
        """Return what follows ``zigzag``."""
        return self.module.rpartition(".")[2]

    def load(self) -> ModuleType:
        """Import the module; raises ``RunError`` where a library that it needs cannot be loaded."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            told = told_exhaustion(error) or f"{one_line(str(error))}; try: zigzag doctor"
            raise RunError(told) from error


COMMANDS = {
    command.name: command
    for command in (
        Command("executor.demo", "run a small model in too little memory"),
        Command("executor.doctor", "list what this machine has and lacks"),
        Command("profiles.measure", "measure this machine and write its hardware profile"),
        Command("costmodel.search", "find the policy with the highest throughput"),
        Command("executor.generate", "continue every prompt of a file under a policy"),
        Command(
            "executor.evaluate",
            "compare the loss of a text under a policy with that of the exact model",
        ),
        Command("executor.bench", "run random prompts and print figures"),
        Command("executor.lm_eval", "run tasks of lm-evaluation-harness"),
        Command("executor.cluster", "run a job on the machines of a Ray cluster"),
        Command("executor.report", "write a report of a run or of a policy"),
        Command("costmodel.estimate", "predict the time and memory of any policy"),
        Command("costmodel.simulate", "simulate the schedule of a policy, task by task"),
        Command("costmodel.frontier", "plot throughput over the latency of a block"),
        Command("costmodel.calibrate", "fit the rates of a profile to measured runs"),
        Command("profiles.completion", "print the completion script of a shell"),
    )
}


def parser() -> Parser:
    """Return the parser of what stands before a command's name."""
    names = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
    made = Parser(
        prog="profiles.zigzag",
        description="Run language models that do not fit the memory of the machine.\n\n"
        f"commands, each with --help:\n{names}",
        example=EXAMPLE,
    )
    made.prog, made.usage = "zigzag", "zigzag [-h] [--version] COMMAND ..."
    made.add_argument(
        "--version",
        action="version",
        version=f"zigzag {VERSION}",
        help="print the version and exit",
    )
    return made


def main(arguments: list[str]) -> None:
    """Call the command that is named first."""
    if not arguments or arguments[0].startswith("-"):
        parser().parse_args(arguments or ["--help"])
        return
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=LEAST_LIKENESS)
        hint = f"zigzag {near[0]}" if near else "zigzag --help"
        raise InputError("zigzag", got=repr(name), allowed=", ".join(COMMANDS), hint=hint)
    COMMANDS[name].load().main(rest)


def start() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    start()

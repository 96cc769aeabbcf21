"""The command ``zigzag completion``: a script that completes commands and flags in a shell.

The script is static, so that a shell never waits for Python. A new version wants a new script.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import shtab

from profiles.command import Parser, run
from profiles.output_checks import output_path
from profiles.zigzag import COMMANDS
from profiles.zigzag import parser as zigzag_parser

# Flags that take a file or a name.
NAMES_OR_FILES = ("hardware", "model")
FOLDERS = ("offload_dir", "folder")


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="profiles.completion",
        description="Print a script that completes zigzag's commands and flags in a shell.",
        example="python -m profiles.completion bash"
        " > ~/.local/share/bash-completion/completions/zigzag",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that reads it")
    return parser


def main(arguments: list[str]) -> None:
    """Print the script."""
    print(completion_script(parser().parse_args(arguments).shell))


def completion_script(shell: str) -> str:
    """Return the completion script of a shell."""
    top = zigzag_parser()
    made = iter([command.load().parser() for command in COMMANDS.values()])
    # argparse hands over a program's name and more, which a command's parser knows by itself.
    maker = cast(type[Parser], lambda **_: next(made))
    commands = top.add_subparsers(parser_class=maker)
    for name, command in COMMANDS.items():
        _complete_files(commands.add_parser(name, help=command.summary))
    script: str = shtab.complete(top, shell=shell)
    return script


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete the arguments of flags that take files and folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _complete_files(each)
            continue
        if action.dest in FOLDERS:
            completed = shtab.DIRECTORY
        elif action.dest in NAMES_OR_FILES or action.type in (Path, output_path):
            completed = shtab.FILE
        else:
            continue
        # The attribute that shtab reads.
        action.complete = completed  # type: ignore[attr-defined]


if __name__ == "__main__":
    run(main)

"""The pages of the reference that are made from the code: commands, flags, public names."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from collections.abc import Callable, Iterator
from unittest.mock import patch

from costmodel.families import preset_names
from profiles.command import Parser

# By their names as ``zigzag NAME``.
COMMANDS = {
    "measure": "profiles.measure",
    "search": "costmodel.search",
    "estimate": "costmodel.estimate",
    "simulate": "costmodel.simulate",
    "calibrate": "costmodel.calibrate",
    "frontier": "costmodel.frontier",
    "generate": "executor.generate",
    "evaluate": "executor.evaluate",
    "bench": "executor.bench",
    "demo": "executor.demo",
}
# In the order of the flow from a user's side.
PACKAGES = ("executor", "costmodel", "profiles")
FOLDER = "reference/commands"


class _Found(Exception):
    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def parser_of(main: Callable[[list[str]], object]) -> Parser:
    """Return the parser that a command's ``main`` makes, without running the command."""

    def stop(parser: Parser, *arguments: object) -> None:
        raise _Found(parser)

    with patch.object(Parser, "parse_args", stop):
        try:
            main([])
        except _Found as found:
            return found.parser
    raise AssertionError(f"{main.__module__} parses no flags")


def parsers() -> dict[str, Parser]:
    """Return every command's parser by its name."""
    return {
        name: parser_of(importlib.import_module(module).main) for name, module in COMMANDS.items()
    }


def command_pages() -> dict[str, str]:
    """Return the page of every command by its path."""
    return {f"{FOLDER}/{name}.md": _page(name, parser) for name, parser in parsers().items()}


def command_table() -> str:
    """Return a table of all commands with what they do."""
    rows = [
        f"| [`zigzag {name}`](commands/{name}.md) | `{parser.prog}` | {parser.description} |"
        for name, parser in parsers().items()
    ]
    return "\n".join(["| command | module | |", "|---|---|---|", *rows])


def preset_list() -> str:
    """Return the names of all presets, sorted."""
    return ", ".join(f"`{name}`" for name in preset_names()) + "."


def public_names() -> Iterator[tuple[str, str, object]]:
    """Yield every public name: its package, the name, and the object."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            yield package, name, getattr(module, name)


def python_names(package: str) -> str:
    """Return the ``mkdocstrings`` blocks of a package's public names."""
    return "\n\n".join(
        f"::: {item.__module__}.{name}" for of, name, item in public_names() if of == package
    )


def wrapped(command: str) -> str:
    """Return a command line on as many lines as it needs."""
    return textwrap.fill(
        command,
        width=78,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\n", " \\\n")


def _page(name: str, parser: Parser) -> str:
    example = (parser.epilog or "").removeprefix("example:\n").strip()
    example = example.replace(parser.prog, f"zigzag {name}")
    blocks = [
        f"# zigzag {name}",
        f"{parser.description}",
        f"As a module: `{parser.prog}`.",
        f"```sh\n{wrapped(example)}\n```",
        "## Flags",
        "\n".join(["| flag | default | |", "|---|---|---|", *map(_row, _shown(parser))]),
    ]
    return "\n\n".join(blocks) + "\n"


def _shown(parser: Parser) -> list[argparse.Action]:
    hidden = argparse.SUPPRESS, "show this help message and exit"
    return [action for action in parser._actions if action.help not in hidden]


def _row(action: argparse.Action) -> str:
    takes = ""
    if action.nargs != 0:
        takes = " " + str(action.metavar or action.dest.upper())
    flags = ", ".join(f"`{flag}{takes}`" for flag in action.option_strings) or f"`{action.dest}`"
    default = "required" if action.required else _default(action)
    return f"| {flags} | {default} | {_escaped(action.help or '')} |"


def _default(action: argparse.Action) -> str:
    if action.default in (None, False, argparse.SUPPRESS):
        return ""
    return f"`{action.default}`"


def _escaped(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")

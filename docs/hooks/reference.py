"""The pages of the reference that are made from the code: commands, flags, public names."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from collections.abc import Iterator

from costmodel.families import family_named, family_names, preset_names
from costmodel.families._text_parts import TEXT_PARTS
from costmodel.gguf.archs import ARCHS
from profiles import zigzag
from profiles.command import Parser

# By their names as ``zigzag NAME``.
COMMANDS = {name: command.module for name, command in zigzag.COMMANDS.items()}
# In the order of the flow from a user's side.
PACKAGES = ("executor", "costmodel", "profiles")
FOLDER = "reference/commands"


def parsers() -> dict[str, Parser]:
    """Return every command's parser by its name."""
    return {name: command.load().parser() for name, command in zigzag.COMMANDS.items()}


def with_actions(parser: Parser) -> list[Parser]:
    """Return a command's parser, and those of its actions, where it has any."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def command_pages() -> dict[str, str]:
    """Return the page of every command by its path."""
    return {f"{FOLDER}/{name}.md": _page(name, parser) for name, parser in parsers().items()}


def command_table() -> str:
    """Return a table of all commands with what they do."""
    rows = [
        f"| [`zigzag {name}`](commands/{name}.md) | `python -m {COMMANDS[name]}` |"
        f" {_one_line(parser.description)} |"
        for name, parser in parsers().items()
    ]
    return "\n".join(["| command | module | |", "|---|---|---|", *rows])


def family_list() -> str:
    """Return the names of all families, dense ones and mixtures of experts."""
    names = family_names()
    mixed = [name for name in names if "num_experts_per_tok" in family_named(name).defaults]
    lines = [
        f"{kind}: {', '.join(f'`{name}`' for name in found)}."
        for kind, found in (
            ("Dense", [name for name in names if name not in mixed]),
            ("Mixtures of experts", mixed),
        )
    ]
    outer = ", ".join(f"`{name}`" for name in sorted(TEXT_PARTS))
    return "\n\n".join([*lines, f"The decoder of text in models for images: {outer}."])


def arch_list() -> str:
    """Return the architectures of GGUF, sorted."""
    return ", ".join(f"`{name}`" for name in sorted(ARCHS)) + "."


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
    module_form = f"python -m {COMMANDS[name]}"
    lines = (parser.epilog or "").removeprefix("example:").replace(module_form, f"zigzag {name}")
    examples = "\n".join(wrapped(line) for line in lines.strip().splitlines())
    blocks = [
        f"# zigzag {name}",
        _one_line(parser.description),
        f"As a module: `{module_form}`.",
        f"```sh\n{examples}\n```",
    ]
    command, *actions = with_actions(parser)
    for action in actions:
        blocks += [f"## {action.prog.split()[-1]}", _one_line(action.description), _table(action)]
    if not actions:
        blocks += ["## Flags", _table(command)]
    return "\n\n".join(blocks) + "\n"


def _table(parser: Parser) -> str:
    rows = [
        _row(action)
        for action in parser._actions
        if action.help != argparse.SUPPRESS and "--help" not in action.option_strings
    ]
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])


def _row(action: argparse.Action) -> str:
    default = "required" if action.required else _default(action)
    told = _one_line(action.help)
    if action.choices is not None:
        told += f": {', '.join(map(str, action.choices))}"
    return f"| {_usage(action)} | {default} | {_escaped(told)} |"


def _usage(action: argparse.Action) -> str:
    takes = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    return ", ".join(f"`{flag} {takes}`".replace(" `", "`") for flag in action.option_strings) or (
        f"`{takes}`"
    )


def _default(action: argparse.Action) -> str:
    if action.default in (None, False, argparse.SUPPRESS):
        return ""
    return f"`{action.default}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _escaped(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")

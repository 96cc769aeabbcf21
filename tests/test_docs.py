"""The reference names everything there is, and no page points to nothing."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from costmodel.calibration.measured_runs import COLUMNS, read_runs
from costmodel.plan.policy import Policy
from docs.hooks import notebooks, pictures, reference
from profiles.command import Parser
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(DOCS.rglob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A command in a block of code, with the lines that it goes on in.
COMMAND = re.compile(r"^(?: {4})?zigzag ([a-z_]+)((?:.*\\\n)*.*)$", re.MULTILINE)
COLUMN = re.compile(r"^    - ``(\w+)``(?:(?:,| and) ``(\w+)``)?", re.MULTILINE)
WORDS = [
    "attainment",
    "batch",
    "block",
    "channel",
    "component",
    "copy",
    "cut",
    "lane",
    "latent",
    "lower bound",
    "node",
    "pass",
    "placement",
    "policy",
    "profile",
    "regret",
    "ring",
    "round",
    "sink",
    "slot",
    "stage",
    "staging",
    "team",
    "tier",
    "window",
]


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    return reference.parsers()


@pytest.mark.parametrize(("name", "most"), [("README.md", 7000), ("ARCHITECTURE.md", 12_000)])
def test_it_is_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_bytes()) <= most


def test_every_command_is_in_the_reference() -> None:
    """A command is a module that runs ``main``."""
    found = {
        f"{package}.{path.stem}"
        for package in reference.PACKAGES
        for path in (ROOT / package).glob("*.py")
        if '\nif __name__ == "__main__":\n    run(main)\n' in path.read_text(encoding="utf-8")
    }
    assert found == set(reference.COMMANDS.values())
    assert "<!-- made: commands -->" in _page("reference/commands.md")
    table = reference.command_table()
    for name, module in reference.COMMANDS.items():
        assert f"[`zigzag {name}`](commands/{name}.md) | `python -m {module}`" in table


def test_every_flag_is_in_the_reference(parsers: dict[str, Parser]) -> None:
    pages = reference.command_pages()
    for name, parser in parsers.items():
        page = pages[f"reference/commands/{name}.md"]
        told = "".join(each.format_help() for each in reference.with_actions(parser))
        flags = {flag for flag in FLAG.findall(told) if flag in _flags(parser)}
        assert flags == _flags(parser)
        for flag in flags - {"--help"}:
            assert re.search(rf"^\|[^|]*`{flag}[ `]", page, re.MULTILINE), f"{flag} of {name}"


def test_every_public_name_is_in_the_reference() -> None:
    page = _page("reference/python.md")
    for package, name, _ in reference.public_names():
        assert f"<!-- made: names of {package} -->" in page
        assert re.search(rf"^::: \S+\.{name}$", reference.python_names(package), re.MULTILINE)


@pytest.mark.parametrize(("page", "root"), [("profile", HardwareProfile), ("policy", Policy)])
def test_every_field_is_in_the_reference(page: str, root: type) -> None:
    sections = re.split(r"^## ", _page(f"reference/{page}.md"), flags=re.MULTILINE)
    told = {section.partition("\n")[0]: section for section in sections[1:]}
    if page == "policy":
        told |= {"HardwareProfile": _page("reference/profile.md")}
    for kind in _dataclasses_of(root):
        if page == "policy" and kind.__module__.startswith("profiles."):
            continue
        # Two small ones are told in the row of what holds them.
        section = told.get(kind.__name__, told.get("ModelSpec", ""))
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in section, f"{kind.__name__}.{field.name}"


def test_every_column_of_runs_is_in_the_reference() -> None:
    page = _page("reference/files.md")
    optional = [name for pair in COLUMN.findall(read_runs.__doc__ or "") for name in pair if name]
    assert "emulated_link_bytes_per_s" in optional and "unpacks_per_batch" in optional
    for name in (*COLUMNS, *optional):
        assert f"`{name}`" in page, name


def test_every_machine_is_in_the_reference() -> None:
    page = _page("reference/models.md")
    for name in recorded_names():
        assert f"`{name}`" in page


def test_the_glossary_has_every_word() -> None:
    terms = re.findall(r"^(\S.*)\n:   ", _page("glossary.md"), re.MULTILINE)
    assert terms == WORDS


def test_commands_in_pages_have_these_flags(parsers: dict[str, Parser]) -> None:
    num_found = 0
    for path in PAGES:
        for name, rest in COMMAND.findall(path.read_text(encoding="utf-8")):
            assert name in parsers, f"{path}: zigzag {name}"
            assert set(FLAG.findall(rest)) <= _flags(parsers[name]), f"{path}: zigzag {name}{rest}"
            num_found += 1
    assert num_found > 10


def test_links_lead_somewhere() -> None:
    made = {DOCS / path for path in reference.command_pages()}
    made |= {DOCS / notebooks.page_of(path) for path in notebooks.notebooks()}
    made |= {DOCS / pictures.FOLDER / f"{name}.svg" for name in pictures.DRAWN}
    for path in PAGES:
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            target, _, anchor = link.partition("#")
            if "://" in target:
                continue
            there = (path.parent / target).resolve() if target else path
            assert there.exists() or there in made, f"{path}: {link}"
            if anchor:
                assert anchor in _anchors(there), f"{path}: {link}"


def _page(path: str) -> str:
    return (DOCS / path).read_text(encoding="utf-8")


def _flags(parser: Parser) -> set[str]:
    return {
        flag
        for each in reference.with_actions(parser)
        for action in each._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }


def _dataclasses_of(root: type) -> Iterator[type]:
    """Yield a dataclass and all that its fields hold."""
    yield root
    for hint in typing.get_type_hints(root).values():
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                yield from _dataclasses_of(kind)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_the_worked_example_of_a_family_is_the_family() -> None:
    page = (ROOT / "docs" / "explanation" / "adding-a-family.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    family = ROOT / "costmodel" / "families" / "helium.py"
    assert shown == family.read_text(encoding="utf-8")

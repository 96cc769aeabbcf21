"""The hooks of ``mkdocs.yml``: pages and pictures that are made at build time.

In a page, a line ``<!-- made: NAME -->`` stands for text of ``PARTS``, and a line
``<!-- output of: COMMAND FLAGS -->`` for what that command prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.hooks import notebooks, pictures, reference

PARTS: dict[str, Callable[[], str]] = {
    "commands": reference.command_table,
    "families": reference.family_list,
    "presets": reference.preset_list,
    "architectures": reference.arch_list,
    "searched": lambda: pictures.SEARCHED,
    **{f"names of {name}": partial(reference.python_names, name) for name in reference.PACKAGES},
}
MADE = re.compile(r"<!-- made: (.+?) -->")
OUTPUT = re.compile(r"^<!-- output of: (.+) -->$", re.MULTILINE)
# What a browser would load from elsewhere.
FETCHED = re.compile(r"""<(?:script|img|link|iframe)[^>]*(?:src|href)=["']?(https?:|//)[^>]*>""")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the navigation whose pages are made."""
    commands = [f"{reference.FOLDER}/{name}.md" for name in reference.COMMANDS]
    filled = {
        "Commands": ["reference/commands.md", *commands],
        "Notebooks": [notebooks.page_of(path) for path in notebooks.notebooks()],
    }
    assert config.nav is not None
    config.nav = _filled(config.nav, filled)
    return config


def _filled(nav: Any, filled: dict[str, list[str]]) -> Any:
    if isinstance(nav, list):
        return [_filled(item, filled) for item in nav]
    if isinstance(nav, dict):
        return {name: filled.get(name) or _filled(item, filled) for name, item in nav.items()}
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made to the files of ``docs``."""
    made = [*reference.command_pages().items(), *notebooks.pages(), *pictures.pictures()]
    for path, content in made:
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is made for this page."""
    markdown = MADE.sub(lambda found: PARTS[found[1]](), markdown)
    return OUTPUT.sub(lambda found: _output_of(found[1]), markdown)


def _output_of(line: str) -> str:
    """Run a command in an empty folder and return its line and what it printed."""
    name, *flags = shlex.split(line)
    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
    ):
        importlib.import_module(reference.COMMANDS[name]).main(flags)
    command = reference.wrapped(f"zigzag {line}")
    return f"```sh\n{command}\n```\n\n```text\n{printed.getvalue().rstrip()}\n```"


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that needs a network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := FETCHED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} would fetch {found[0]}")

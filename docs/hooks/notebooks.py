"""The notebooks, executed and turned into pages; kept until something that they read changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
FOLDER = "notebooks"
CACHE = ROOT / ".docs-cache"
# What the notebooks read.
SOURCES = ("profiles", "costmodel", "notebooks", "tests/bench/results")
SUFFIXES = (".py", ".json", ".csv", ".ipynb")
SECONDS = 600


def notebooks() -> list[Path]:
    """Return the notebooks in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def page_of(path: Path) -> str:
    """Return the path of a notebook's page."""
    return f"{FOLDER}/{path.stem}.md"


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Execute the notebooks; yields their pages and pictures by path."""
    digest = _digest()
    for path in notebooks():
        kept = CACHE / f"{path.stem}-{digest}.json"
        if not kept.exists():
            CACHE.mkdir(exist_ok=True)
            for old in CACHE.glob(f"{path.stem}-*"):
                old.unlink()
            kept.write_text(json.dumps(_execute(path)), encoding="utf-8")
        page = json.loads(kept.read_text(encoding="utf-8"))
        yield page_of(path), page["text"]
        for name, content in page["pictures"].items():
            yield f"{FOLDER}/{name}", bytes.fromhex(content)


def _digest() -> str:
    """Digest all that the notebooks read."""
    digest = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _execute(path: Path) -> dict[str, object]:
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place).execute()
    exporter = MarkdownExporter()
    # A figure's text stands for nothing beside its picture.
    exporter.register_filter("indent", _fenced)
    text, found = exporter.from_notebook_node(notebook, resources={"unique_key": path.stem})
    pictures = {name: content.hex() for name, content in found["outputs"].items()}
    # Tables of pandas get the looks of all others.
    text = text.replace('<table border="1" class="dataframe">', "<table>")
    return {"text": f"{text}\n", "pictures": pictures}


def _fenced(text: str, *_: object) -> str:
    """Return printed text as a block of code."""
    return f"```text\n{text.strip()}\n```"

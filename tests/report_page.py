"""A page as its readers find it: sections, tables, bars and links, taken from the HTML."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

SECTIONS = ["placement", "memory", "timeline", "phases", "limits", "buying", "policy"]


@dataclass
class Page:
    """What a page holds: tables as ``{section: {row: cells}}``, bars by picture."""

    sections: list[str] = field(default_factory=list)
    headers: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    policy: str = ""
    links: list[str] = field(default_factory=list)

    def bars(self, picture: str) -> list[dict[str, Any]]:
        """Return the bars of a picture: ``row``, ``left``, ``right``, ``color``, ``text``."""
        (columns, *_) = _sources(self.pictures[picture])
        arrays = {name: _decoded(column) for name, column in columns}
        return [
            dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)
        ]


def read_page(path: Path) -> Page:
    """Parse a page."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader.page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._open: list[str] = []
        self._picture: str | None = None
        self._row: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.page.links += [v for k, v in given.items() if k in ("src", "href", "data") and v]
        if tag in ("meta", "link", "br"):
            return
        self._open.append(tag)
        if tag == "section" and given["id"]:
            self.page.sections.append(given["id"])
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._row.append("")
        self._picture = given.get("data-for") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._picture = None
        if tag == "tr":
            name = self.page.sections[-1]
            if "thead" in self._open:
                self.page.headers[name] = self._row
            else:
                self.page.tables.setdefault(name, {})[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        if self._picture is not None:
            self.page.pictures[self._picture] = json.loads(data)
        elif self._open and self._open[-1] in ("td", "th"):
            self._row[-1] += data
        elif "pre" in self._open:
            self.page.policy += data
        elif not {"script", "style"} & set(self._open):
            self.page.text += data


def _sources(value: Any) -> Iterator[list[Any]]:
    """Yield the columns of every data source of a picture."""
    if isinstance(value, dict):
        if value.get("name") == "ColumnDataSource":
            yield value["attributes"]["data"]["entries"]
        for item in value.values():
            yield from _sources(item)
    elif isinstance(value, list):
        for item in value:
            yield from _sources(item)


def _decoded(column: Any) -> list[Any]:
    if isinstance(column, dict):
        data = gzip.decompress(base64.b64decode(column["array"]["data"]))
        values: list[Any] = np.frombuffer(data, dtype=column["dtype"]).tolist()
        return values
    assert isinstance(column, list)
    return column

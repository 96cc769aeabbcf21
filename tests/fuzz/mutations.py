"""Broken copies of sound documents: JSON that is changed in places, and bytes that are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

# What readers stumble over: wrong kinds, limits of integers and floats, text that is no text.
NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    10**18,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    -1.5,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "0",
    "1e400",
    "nan",
    "auto",
    "null",
    "\ud800",
    "\0",
    "a" * 300,
    "../../x",
    "bfloat16",
    "F8_E4M3",
    [],
    {},
    [[]],
    [0],
    [None],
    {"": 0},
    [1, 2, 3],
    {"a": {"b": {}}},
)
NASTY_BYTES = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b"{",
    b"[",
    b'"',
    b",",
    b"\\u0000",
    b"\xed\xa0\x80",
    b"1e400",
    b"9" * 5000,
    b"[" * 3000,
    b"\xff" * 8,
    b"\x7f" + b"\0" * 7,
)

Path = tuple[str | int, ...]


def json_documents(sources: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Draw one of the documents with up to four places changed, as UTF-8 bytes."""
    changed = st.builds(
        _change_all, st.sampled_from(sources), st.lists(_changes(), min_size=1, max_size=4)
    )
    return changed.map(as_bytes)


def byte_strings(sources: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Draw one of the byte strings with up to three places cut, doubled or overwritten."""
    edit = st.tuples(
        st.floats(0, 1), st.integers(0, 40), st.sampled_from(NASTY_BYTES) | st.binary(max_size=9)
    )
    return st.builds(_edit_all, st.sampled_from(sources), st.lists(edit, min_size=1, max_size=3))


def as_bytes(document: Any) -> bytes:
    """Write a document as JSON; halves of surrogate pairs stay as they are."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _changes() -> st.SearchStrategy[tuple[str, int, int, Any]]:
    """Draw what is done, to which place, with which other place, and a value."""
    place = st.integers(0, 10**6)
    kind = st.sampled_from(("replace", "replace", "replace", "delete", "rename", "copy", "scale"))
    return st.tuples(kind, place, place, st.sampled_from(NASTY))


def _change_all(source: Any, changes: Sequence[tuple[str, int, int, Any]]) -> Any:
    document = copy.deepcopy(source)
    for kind, place, other, value in changes:
        paths = list(_paths(document))
        if not paths:
            return value
        document = _change(
            document, kind, paths[place % len(paths)], paths[other % len(paths)], value
        )
    return document


def _change(document: Any, kind: str, path: Path, other: Path, value: Any) -> Any:
    *above, key = path
    parent = _at(document, tuple(above))
    if kind == "replace":
        parent[key] = copy.deepcopy(value)
    elif kind == "delete":
        del parent[key]
    elif kind == "copy":
        parent[key] = copy.deepcopy(_at(document, other))
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(other[-1])] = parent.pop(key)
    elif kind == "scale" and isinstance(parent[key], int | float):
        parent[key] = parent[key] * -1 if value is None else parent[key] * 1000 + 1
    return document


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of everything inside a document."""
    items: Sequence[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _edit_all(source: bytes, edits: Sequence[tuple[float, int, bytes]]) -> bytes:
    for place, length, inserted in edits:
        start = round(place * len(source))
        source = source[:start] + inserted + source[start + length :]
    return source

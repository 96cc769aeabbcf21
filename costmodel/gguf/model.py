"""A model in GGUF: one file, or the parts of one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from costmodel.gguf.header import GgufHeader, read_header
from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import InputError

# File systems count the time of a change in steps: within one, a file may change unnoticed.
SETTLED_S = 2.0
# What tells a file from one with other contents: device, number, bytes, time of its change.
Stamp = tuple[int, int, int, int]
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """The metadata of the first part, and the tensors of all.

    ``TensorEntry.dtype`` is the name of an encoding of ``profiles.encodings``. The last dimension
    of a shape is that of a row.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Read the headers of a file and, where it is a part of a model, of all other parts.

        The last model is kept, because its description, weights, tokenizer and chat
        template are each loaded by path. It is read again where a file has changed, or has been
        written in the last ``SETTLED_S`` seconds.

        Raises
        ------
        InputError
            Where a file is invalid, or a part is missing, doubled or of another model.
        """
        stamps = _stamps(path)
        return _read(path) if stamps is None else _kept(path, stamps)


def _stamps(path: Path) -> tuple[Stamp, ...] | None:
    """Return the stamps of all parts; ``None`` where one is missing or has just been written."""
    named = _PART.fullmatch(path.name)
    names = _part_names(named[1], int(named[3])) if named else [path.name]
    stamps = []
    try:
        for name in names:
            found = path.with_name(name).stat()
            if time.time() - found.st_mtime < SETTLED_S:
                return None
            stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    except OSError:
        return None
    return tuple(stamps)


def _part_names(prefix: str, count: int) -> Iterator[str]:
    return (f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count))


@lru_cache(maxsize=1)
def _kept(path: Path, stamps: tuple[Stamp, ...]) -> GgufModel:
    return _read(path)


def _read(path: Path) -> GgufModel:
    header = read_header(path)
    count = _whole(header, path, "split.count", 1)
    if count <= 1:
        return GgufModel(metadata=header.metadata, tensors=header.tensors)
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise InputError(
            f"GGUF file {path.name}",
            got=f"the name of a part of {count}",
            allowed=f"NAME-00001-of-{count:05d}.gguf, as the tool that splits names them",
        )
    return _join(path, named[1], count)


def _join(path: Path, prefix: str, count: int) -> GgufModel:
    tensors: dict[str, TensorEntry] = {}
    metadata: Mapping[str, Any] = {}
    for number, name in enumerate(_part_names(prefix, count)):
        part = path.with_name(name)
        header = read_header(part)
        found = _whole(header, part, "split.no", None), _whole(header, part, "split.count", None)
        if found != (number, count):
            raise InputError(
                f"GGUF file {part.name}",
                got=f"part {found[0]} of {found[1]}, counted from 0",
                allowed=f"part {number} of {count}",
                hint="download the part again",
            )
        doubled = next((name for name in header.tensors if name in tensors), None)
        if doubled is not None:
            raise InputError(
                f"GGUF file {part.name}",
                got=f"tensor {doubled}, which {tensors[doubled].path.name} has",
                allowed="each tensor in one part",
            )
        tensors |= header.tensors
        metadata = metadata or header.metadata
        promised = _whole(header, part, "split.tensors.count", None)
        if number == count - 1 and promised not in (None, len(tensors)):
            raise InputError(
                f"the parts of {prefix}",
                got=f"{len(tensors)} tensors",
                allowed=f"{promised}, as the last part says",
                hint="download all parts of one release",
            )
    return GgufModel(metadata=metadata, tensors=tensors)


def _whole(header: GgufHeader, path: Path, key: str, default: int | None) -> Any:
    value = header.metadata.get(key, default)
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f"{key} of {path.name}", got=value, allowed="a whole number")
    return value

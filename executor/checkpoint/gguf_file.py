"""A model in GGUF: one file, or the parts of one, and its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint.gguf_header import GgufHeader, read_header
from executor.checkpoint.safetensors_file import TensorEntry, read_into
from profiles.encodings import BLOCK_ENCODINGS, Encoding, Kind
from profiles.errors import InputError

# All ones in the exponent of a float16.
_NO_NUMBER = 0x7C00
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

        Raises
        ------
        InputError
            Where a file is invalid, or a part is missing, doubled or of another model.
        """
        header = read_header(path)
        count = _whole(header, path, "split.count", 1)
        if count <= 1:
            return cls(metadata=header.metadata, tensors=header.tensors)
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
    for number in range(count):
        part = path.with_name(f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf")
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


def read_rows(entry: TensorEntry, first: int, rows: torch.Tensor) -> None:
    """Fill uint8 [count, row_bytes] with the rows of a tensor from ``first`` on.

    Raises
    ------
    InputError
        Where a scale is infinite or no number.
    """
    encoding = BLOCK_ENCODINGS[entry.dtype]
    assert rows.is_contiguous() and rows.shape[1] == encoding.row_bytes(entry.shape[-1])
    offset = entry.offset_bytes + first * rows.shape[1]
    read_into(entry.path, offset, rows.flatten().numpy().data)
    if not _has_numbers(rows, encoding):
        raise InputError(
            f"tensor {entry.name} of {entry.path.name}",
            got="a scale that is infinite or no number",
            allowed="numbers",
            hint="download the file again",
        )


def rotary_order(num_rows: int, num_heads: int) -> torch.Tensor:
    """Return int64 [num_rows]: the row of a file for each row of a projection in transformers.

    Files of some families (``llama`` and its kin) have the rows of queries and keys in the order of
    interleaved rotary positions: neighbours are rotated together. In transformers the two halves of
    a head are.
    """
    rows = torch.arange(num_rows).view(num_heads, -1, 2)
    return rows.transpose(1, 2).flatten()


def _has_numbers(rows: torch.Tensor, encoding: Encoding) -> bool:
    blocks = rows.view(-1, encoding.block_bytes)
    if encoding.kind is Kind.MXFP4:
        return not bool((blocks[:, 0] == 255).any())
    for at in encoding.halves_at:
        halves = blocks[:, at : at + 2].contiguous().view(torch.int16)
        if bool(((halves & _NO_NUMBER) == _NO_NUMBER).any()):
            return False
    return True

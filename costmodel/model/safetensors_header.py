"""The header of one safetensors file, checked against the file. No torch.

The header is parsed here and not by a library, so that every entry can be checked against the file.
Format: 8 bytes of little-endian length, that many bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import InputError

# The limit of the format's reference reader.
MAX_HEADER_BYTES = 100 * 10**6
LENGTH_BYTES = 8
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def open_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Read and check a file's header; raises ``InputError`` where it does not match the file."""
    label = f"shard {path.name}"
    try:
        with path.open("rb", buffering=0) as handle:
            file_bytes = os.fstat(handle.fileno()).st_size
            header = _read_header(handle.fileno(), file_bytes, label)
    except OSError as error:
        raise InputError(label, got=error.strerror, allowed="a readable file") from error
    data_offset = LENGTH_BYTES + len(header)
    tensors = _parse_entries(header, path, data_offset, label)
    _check_coverage(tensors, data_offset, file_bytes, label)
    return tensors


def _read_header(descriptor: int, file_bytes: int, label: str) -> bytes:
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    allowed = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
    if file_bytes < LENGTH_BYTES or not 2 <= length <= allowed:
        raise InputError(
            label,
            got=f"{file_bytes} bytes that begin with a header length of {length}",
            allowed="a safetensors file that contains its whole header",
            hint="download the file again",
        )
    return os.pread(descriptor, length, LENGTH_BYTES)


def _parse_entries(
    header: bytes, path: Path, data_offset: int, label: str
) -> dict[str, TensorEntry]:
    try:
        parsed = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            label, got=f"a header that is not JSON ({error})", allowed="a JSON header"
        ) from None
    if not isinstance(parsed, dict):
        raise InputError(label, got=f"a {type(parsed).__name__} as header", allowed="an object")
    texts = parsed.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"__metadata__ of {label}", got=texts, allowed="an object of texts")
    return {
        name: _parse_entry(name, value, path, data_offset, label) for name, value in parsed.items()
    }


def _parse_entry(name: str, value: Any, path: Path, data_offset: int, label: str) -> TensorEntry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise InputError(f"dtype of {name} in {label}", got=repr(dtype), allowed="a dtype's name")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(
            f"{name} in {label}",
            got=f"shape {shape}, data_offsets {offsets}",
            allowed="whole numbers, two of them offsets",
        )
    num_bytes = offsets[1] - offsets[0]
    # A tensor with an unknown dtype may not be needed, so any size is accepted.
    wanted = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else max(0, num_bytes)
    if num_bytes != wanted:
        raise InputError(
            f"{name} in {label}",
            got=f"{num_bytes} bytes",
            allowed=f"{wanted} for {dtype} {list(shape)}",
        )
    return TensorEntry(
        path=path,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset_bytes=data_offset + offsets[0],
        num_bytes=num_bytes,
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_coverage(
    tensors: Mapping[str, TensorEntry], data_offset: int, file_bytes: int, label: str
) -> None:
    end = data_offset
    for entry in sorted(tensors.values(), key=lambda e: (e.offset_bytes, e.num_bytes)):
        if entry.offset_bytes != end:
            raise InputError(
                f"{entry.name} in {label}",
                got=f"offset {entry.offset_bytes - data_offset}",
                allowed=f"{end - data_offset}, where the tensor before it ends",
            )
        end += entry.num_bytes
    if end != file_bytes:
        raise InputError(
            label,
            got=f"{file_bytes} bytes",
            allowed=f"{end} as its header says",
            hint="download the file again",
        )

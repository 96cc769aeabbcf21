"""GGUF files for tests, written field by field, so that each can be wrong."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from profiles.encodings import BLOCK_ENCODINGS

U32, U64, F32, TEXT, ARRAY = 4, 10, 6, 8, 9
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "MXFP4": 39}


def text(value: str | bytes) -> bytes:
    """Return a text with its length."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def metadatum(key: str, kind: int, value: bytes) -> bytes:
    """Return a key with its type and value."""
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    """Return a metadatum that is a number."""
    return metadatum(key, U32, struct.pack("<I", value))


def texts(key: str, values: Sequence[str | bytes]) -> bytes:
    """Return a metadatum that is an array of texts."""
    head = struct.pack("<IQ", TEXT, len(values))
    return metadatum(key, ARRAY, head + b"".join(map(text, values)))


def tensor_info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """Return a row of the table of tensors."""
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(
    metadata: Sequence[bytes],
    infos: Sequence[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_metadata: int | None = None,
) -> bytes:
    """Return a header; the numbers are those of what is given, unless told otherwise."""
    tensors = len(infos) if num_tensors is None else num_tensors
    keys = len(metadata) if num_metadata is None else num_metadata
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join([*metadata, *infos])


def gguf_bytes(
    metadata: Sequence[bytes], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> bytes:
    """Return a whole file; byte i of the data is i modulo 251."""
    infos, end = [], 0
    for name, (encoding, shape) in tensors.items():
        infos.append(tensor_info(name, shape, TYPES[encoding], end))
        size = math.prod(shape[:-1]) * BLOCK_ENCODINGS[encoding].row_bytes(shape[-1])
        end += -(-size // 32) * 32
    head = header(metadata, infos)
    return head + bytes(-len(head) % 32) + bytes(i % 251 for i in range(end))

"""The header of one GGUF file: metadata and the table of tensors, read within bounds.

The header is parsed here, and not by the package ``gguf``. Its reader trusts counts and lengths: a
file of a few bytes that tells of 2^60 tensors keeps it busy until memory ends. Here nothing is
allocated, and no loop is begun, for more than the file can hold.

Format, all in little-endian order: ``GGUF``, a version, the numbers of tensors and of metadata;
each metadatum as a key, a type and a value; each tensor as a name, its dimensions (the fastest
first), a type and an offset into the data. The data begin at the next multiple of the alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.gguf.header_bytes import HeaderBytes
from costmodel.gguf.types import TYPES, UNREAD_TYPES
from costmodel.model.tensor_entry import TensorEntry
from profiles.encodings import BLOCK_ENCODINGS
from profiles.errors import InputError
from profiles.units import MIB

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Each takes ten times the memory that it takes of the file: far more than any model has.
MAX_TENSORS, MAX_METADATA, MAX_TEXTS = 2**18, 2**16, 2**22
MAX_KEY_BYTES = 2**16
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
# The least bytes of a metadatum (an empty key, a type, a byte) and of a tensor.
LEAST_METADATUM_BYTES = 8 + 4 + 1
LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_TEXT, _ARRAY, _BOOL = 8, 9, 7
# Scalars, and what arrays of them are.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a file says of itself.

    Parameters
    ----------
    metadata
        Values by their keys: numbers, texts, tuples of texts, or numpy arrays of numbers.
    tensors
        Tensors by name. ``dtype`` is the name of an encoding; the last dimension of ``shape`` is
        that of a row.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> GgufHeader:
    """Read and check a file's header.

    Raises
    ------
    InputError
        Where the file is no GGUF file, is cut off, contradicts itself, or has an encoding that is
        not read.
    """
    try:
        with path.open("rb") as file:
            return _Header(HeaderBytes(file, path), path).read()
    except OSError as error:
        label = f"GGUF file {path.name}"
        raise InputError(label, got=error.strerror, allowed="a readable file") from error


class _Header:
    """Reads a header from its start to its end."""

    def __init__(self, source: HeaderBytes, path: Path) -> None:
        self._source = source
        self._path = path
        self._number = source.number
        self._error = source.error

    def read(self) -> GgufHeader:
        num_tensors, num_metadata = self._read_start()
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._name("key")
            if key in metadata:
                raise self._error(f"key {key} twice", "each key once")
            metadata[key] = self._value(key)
        infos = [self._tensor() for _ in range(num_tensors)]
        return GgufHeader(metadata=metadata, tensors=self._placed(infos, _alignment(metadata)))

    def _read_start(self) -> tuple[int, int]:
        magic = self._source.take(min(len(MAGIC), self._source.file_bytes))
        if magic != MAGIC:
            raise self._error(
                f"a file that begins with {magic!r}" if magic else "an empty file",
                f"one that begins with {MAGIC!r}",
            )
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            told = f"version {version}" if swapped > 9 else "numbers in big-endian order"
            raise self._error(told, "version 2 or 3 in little-endian order")
        num_tensors, num_metadata = self._number("Q"), self._number("Q")
        least = num_tensors * LEAST_TENSOR_BYTES + num_metadata * LEAST_METADATUM_BYTES
        is_many = num_tensors > MAX_TENSORS or num_metadata > MAX_METADATA
        if is_many or least > self._source.left():
            raise self._error(
                f"{num_tensors} tensors and {num_metadata} keys in {self._source.file_bytes} bytes",
                f"at most {MAX_TENSORS} and {MAX_METADATA}, and no more than the file has room for",
                "download the file again",
            )
        return num_tensors, num_metadata

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == _TEXT:
            return self._source.texts(1)[0]
        if kind != _ARRAY:
            return self._numbers(key, kind, 1)[0].item()
        item, count = self._number("I"), self._number("Q")
        if item != _TEXT:
            return self._numbers(key, item, count)
        if count > min(MAX_TEXTS, self._source.left() // 8):
            raise self._error(
                f"{count} texts in {key}", f"at most {MAX_TEXTS}, and all in the file"
            )
        return self._source.texts(count)

    def _numbers(self, key: str, kind: int, count: int) -> Any:
        """Read an array; an array of arrays has no meaning in any known file."""
        if kind not in _NUMBERS:
            raise self._error(f"type {kind} of {key}", "a number, a text or an array of these")
        dtype = np.dtype(_NUMBERS[kind])
        numbers = np.frombuffer(self._source.take(count * dtype.itemsize), dtype=dtype)
        if kind != _BOOL:
            return numbers
        if (numbers > 1).any():
            raise self._error(f"{numbers.max()} in {key}", "0 for false or 1 for true")
        return numbers.astype(bool)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's name, shape, type and offset."""
        name = self._name("tensor")
        rank = self._number("I")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise self._error(f"{rank} dimensions of {name}", f"1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        if not all(shape):
            raise self._error(f"{name} of shape {list(shape)}", "dimensions of 1 or more")
        return name, shape, self._number("I"), self._number("Q")

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, TensorEntry]:
        """Check that tensors are within the file and apart from each other."""
        start = -(-self._source.position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        end, last = start, "the header"
        for name, shape, number, offset in sorted(infos, key=lambda info: info[3]):
            encoding, num_bytes = self._sized(name, shape, number)
            if name in tensors:
                raise self._error(f"tensor {name} twice", "each tensor once")
            if offset % alignment or start + offset < end:
                raise self._error(
                    f"offset {offset} of {name}",
                    f"a multiple of {alignment} from {end - start} on, where {last} ends",
                )
            end, last = start + offset + num_bytes, name
            if end > self._source.file_bytes:
                raise self._error(
                    f"{name} up to byte {end} of {self._source.file_bytes}",
                    "tensors within the file",
                    "download the file again",
                )
            tensors[name] = TensorEntry(
                path=self._path,
                name=name,
                dtype=encoding,
                shape=shape,
                offset_bytes=start + offset,
                num_bytes=num_bytes,
            )
        return tensors

    def _sized(self, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
        """Return the name of a tensor's encoding and its bytes."""
        if number not in TYPES:
            told = UNREAD_TYPES.get(number, f"unknown type {number}")
            raise self._error(f"{told} for {name}", ", ".join(TYPES.values()))
        encoding = BLOCK_ENCODINGS[TYPES[number]]
        if not encoding.fits(shape[-1]):
            raise self._error(
                f"{name} with rows of {shape[-1]} elements in {encoding.name}",
                f"a multiple of {encoding.block_elements}",
            )
        return encoding.name, math.prod(shape[:-1]) * encoding.row_bytes(shape[-1])

    def _name(self, what: str) -> str:
        data = self._source.text(MAX_KEY_BYTES)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} {data[:40]!r}", "UTF-8") from None


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MIB or alignment & (alignment - 1):
        raise InputError(ALIGNMENT_KEY, got=alignment, allowed=f"a power of two up to {MIB}")
    return alignment

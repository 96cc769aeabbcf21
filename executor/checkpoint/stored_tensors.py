"""The tensors of a checkpoint folder, in one file or in shards: finding, reading, fingerprinting.

As in transformers 5, all shards in an index are opened. The headers of the shards say which tensors
they have, not the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from costmodel.model.stacked import Strides
from executor.checkpoint.safetensors_file import (
    READ_BYTES,
    TensorEntry,
    open_safetensors,
    read_into,
    read_rows,
)
from profiles.errors import InputError, RunError
from profiles.files import read_json

# Most bytes of a file's name on common file systems.
LONGEST_NAME = 255
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SOURCE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes of each sample of a tensor for its fingerprint, from its start, its middle and its end.
SAMPLE_BYTES = 4096
SAMPLING_THREADS = 8


def stored_names(name: str, base_prefix: str) -> tuple[str, ...]:
    """Return the names under which transformers finds a tensor of its causal model in a file.

    They are its own name, and the names with one prefix of the base model more or less.
    """
    return tuple(dict.fromkeys((name, base_prefix + name, name.removeprefix(base_prefix))))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensors:
    """The tensors in a folder's files.

    Parameters
    ----------
    entries
        Tensors by their names in the files.
    promised
        The name of the shard of each tensor in an index.
    faults
        The error of each tensor whose shard could not be opened. It is raised only where the tensor
        is needed.
    base_prefix
        The path of the base model in transformers' causal model (see ``Family.base_prefix``).
    index_dtype
        The dtype of the model in the index, if it has one.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    promised: Mapping[str, str]
    faults: Mapping[str, InputError]
    base_prefix: str
    index_dtype: object = None

    @classmethod
    def open(cls, folder: Path, base_prefix: str) -> StoredTensors:
        """Read the headers of a folder's files; raises ``InputError`` for invalid ones."""
        if (folder / SINGLE_NAME).exists():
            entries = open_safetensors(folder / SINGLE_NAME)
            return cls(
                folder=folder, entries=entries, promised={}, faults={}, base_prefix=base_prefix
            )
        if (folder / INDEX_NAME).exists():
            return _open_indexed(folder, base_prefix)
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        raise InputError(
            f"checkpoint {folder}",
            got=f"only {pickled[0]}, which is never loaded" if pickled else f"no {SINGLE_NAME}",
            allowed=f"{SINGLE_NAME}, or {INDEX_NAME} and its shards",
            hint="saving the model with safe_serialization=True" if pickled else "",
        )

    @property
    def dtype(self) -> str | None:
        """The compute dtype of transformers where the config names none.

        It is the dtype of the index, or else that of the first floating-point tensor, by name, in
        the first shard.
        """
        if isinstance(self.index_dtype, str):
            return self.index_dtype
        if self.index_dtype is not None:
            raise InputError(
                f"dtype of metadata in {INDEX_NAME}", got=self.index_dtype, allowed="a dtype's name"
            )
        first = min((entry.path for entry in self.entries.values()), default=None)
        for _, entry in sorted(self.entries.items()):
            if entry.path == first and entry.dtype in FLOATS:
                return FLOATS[entry.dtype]
        return None

    def find(self, name: str) -> TensorEntry | None:
        """Find a tensor by its name in transformers' causal model.

        Raises
        ------
        InputError
            Where its shard is missing, or where two names of the tensor are stored.
        """
        names = stored_names(name, self.base_prefix)
        for stored in names:
            if stored in self.faults:
                raise self.faults[stored]
        found = [self.entries[stored] for stored in names if stored in self.entries]
        if len(found) > 1:
            raise InputError(
                f"checkpoint {self.folder.name}",
                got=f"{found[0].name} and {found[1].name}",
                allowed="one tensor for each name of the model",
            )
        return found[0] if found else None

    def missing(self, names: list[str], count: int) -> InputError:
        """Make the error for missing tensors; ``count`` tensors are needed."""
        for stored in stored_names(names[0], self.base_prefix):
            if stored in self.promised:
                return InputError(
                    f"shard {self.promised[stored]}",
                    got=f"no tensor {stored}",
                    allowed=f"the tensors that {INDEX_NAME} says it holds",
                )
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return InputError(
            f"checkpoint {self.folder.name}",
            got=f"no tensor {names[0]}{more}",
            allowed=f"all {count} tensors that its config asks for",
        )


def _open_indexed(folder: Path, base_prefix: str) -> StoredTensors:
    index = read_json(folder / INDEX_NAME, "weight index")
    promised, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(promised, dict) or not promised:
        raise InputError(
            f"weight_map in {INDEX_NAME}",
            got=f"a {type(promised).__name__} without names",
            allowed="an object of tensor names and shards",
        )
    entries: dict[str, TensorEntry] = {}
    faults: dict[str, InputError] = {}
    shards = {name for name in promised.values() if _is_shard_name(name)}
    lacking = {name for name in shards if not (folder / name).exists()}
    for tensor, shard in promised.items():
        if not _is_shard_name(shard):
            faults[tensor] = InputError(
                f"shard of {tensor} in {INDEX_NAME}",
                got=repr(shard),
                allowed="the name of a .safetensors file in the checkpoint's own folder",
            )
        elif shard in lacking:
            faults[tensor] = InputError(
                f"shard {shard}",
                got=f"no such file in {folder}",
                allowed="a file of the checkpoint",
                hint="download the checkpoint again",
            )
    for shard in sorted(shards - lacking):
        entries |= open_safetensors(folder / shard)
    return StoredTensors(
        folder=folder,
        entries=entries,
        promised=promised,
        faults=faults,
        base_prefix=base_prefix,
        index_dtype=metadata.get("dtype") if isinstance(metadata, dict) else None,
    )


def _is_shard_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and len(name.encode("utf-8", "surrogatepass")) <= LONGEST_NAME
        and not any(mark in name for mark in ("/", "\\", "\0", ":"))
    )


def read_elements(entry: TensorEntry, first: int, target: torch.Tensor) -> None:
    """Fill ``target``, one-dimensional, with elements from ``first`` on, converted to its dtype.

    Scratch is at most 16 MiB.
    """
    source = SOURCE_DTYPES[entry.dtype]
    offset = entry.offset_bytes + first * source.itemsize
    if source is target.dtype:
        read_into(entry.path, offset, target.view(torch.uint8).numpy().data)
        return
    step = min(READ_BYTES // source.itemsize, target.numel())
    scratch = torch.empty(step, dtype=source)
    for start in range(0, target.numel(), step):
        piece = scratch[: min(step, target.numel() - start)]
        read_into(
            entry.path, offset + start * source.itemsize, piece.view(torch.uint8).numpy().data
        )
        _convert(entry, piece, target[start : start + piece.numel()])


def _convert(entry: TensorEntry, piece: torch.Tensor, target: torch.Tensor) -> None:
    """Convert part of a tensor to the dtype of ``target``, in the same shape."""
    converted = target.copy_(piece)
    if target.dtype is torch.float16 and _overflows(piece, converted):
        raise InputError(
            f"tensor {entry.name} of {entry.path.parent.name}",
            got="a value that float16 cannot hold",
            allowed="values within 65504",
            hint="computing in bfloat16 or float32",
        )


def read_strided(entry: TensorEntry, strides: Strides, first: int, target: torch.Tensor) -> None:
    """Fill ``target``, one-dimensional, with elements from ``first`` on of a matrix whose columns
    are stored as rows, converted to its dtype.

    Scratch is at most 16 MiB, or one stored row. Pages of the file stay in the page cache until the
    matrix is complete, because every part of it needs most of them.
    """
    done = 0
    while done < len(target):
        row, column = divmod(first + done, strides.columns)
        whole = 0 if column else (len(target) - done) // strides.columns
        count = min(strides.columns - column, len(target) - done)
        part = target[done : done + max(1, whole) * count].view(-1, count)
        _read_rectangle(entry, strides, row, column, part)
        done += part.numel()


def _read_rectangle(
    entry: TensorEntry, strides: Strides, row: int, column: int, target: torch.Tensor
) -> None:
    """Fill ``target`` [rows, columns] with our elements from ``row`` and ``column`` on."""
    source = SOURCE_DTYPES[entry.dtype]
    length = (len(target) - 1) * strides.row_step + 1
    step = max(1, READ_BYTES // (length * source.itemsize))
    scratch = torch.empty(min(step, target.shape[1]), length, dtype=source)
    begin = strides.first + row * strides.row_step + column * strides.column_step
    for left in range(0, target.shape[1], step):
        piece = scratch[: min(step, target.shape[1] - left)]
        read_rows(
            entry.path,
            entry.offset_bytes + (begin + left * strides.column_step) * source.itemsize,
            strides.column_step * source.itemsize,
            piece.view(torch.uint8).numpy(),
        )
        wanted = piece[:, :: strides.row_step].t()
        _convert(entry, wanted, target[:, left : left + len(piece)])


def _overflows(piece: torch.Tensor, converted: torch.Tensor) -> bool:
    if converted.abs().max().isfinite():
        return False
    # Infinities and NaN in the source are accepted.
    return bool((converted.isinf() & piece.isfinite()).any())


def are_equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape have equal values; reads up to the first difference."""
    count = one.num_bytes // SOURCE_DTYPES[one.dtype].itemsize
    # float32 has all values of the other dtypes.
    step = READ_BYTES // torch.float32.itemsize
    for first in range(0, count, step):
        pieces = [torch.empty(min(step, count - first)) for _ in range(2)]
        for entry, piece in zip((one, other), pieces, strict=True):
            read_elements(entry, first, piece)
        if not torch.equal(*pieces):
            return False
    return True


def contents_digest(entries: Mapping[str, TensorEntry]) -> str:
    """Return a hash that changes with the tensors, without reading all of them.

    It covers the names, dtypes, shapes and samples of all tensors, and the sizes and times of their
    files. No program can set the time of the last change (ctime) back, unlike that of the last
    modification. Some file systems have no real times (reproducible images, FUSE); there, samples
    distinguish two models. Inode and device are not included, because many file systems change them
    at every mount.
    """
    paths = sorted({entry.path for entry in entries.values()})
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        try:
            files = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths}
            for descriptor in files.values():
                stack.callback(os.close, descriptor)
                # Turns readahead off, so that a sample does not read the next pages as well.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                status = os.fstat(descriptor)
                times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
                digest.update(times.encode())
            names = sorted(entries)
            with ThreadPoolExecutor(SAMPLING_THREADS) as pool:
                samples = pool.map(lambda n: _sample(files[entries[n].path], entries[n]), names)
                for name, sample in zip(names, samples, strict=True):
                    entry = entries[name]
                    digest.update(f"{name} {entry.dtype} {entry.shape} ".encode() + sample)
        except OSError as error:
            raise RunError(f"checkpoint {paths[0].parent}: {error.strerror}") from error
    return digest.hexdigest()


def _sample(descriptor: int, entry: TensorEntry) -> bytes:
    last = max(0, entry.num_bytes - SAMPLE_BYTES)
    digest = hashlib.sha256()
    for start in sorted({0, last // 2, last}):
        count = min(SAMPLE_BYTES, entry.num_bytes - start)
        digest.update(os.pread(descriptor, count, entry.offset_bytes + start))
    return digest.digest()

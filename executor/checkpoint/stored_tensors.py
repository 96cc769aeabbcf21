"""The tensors of a checkpoint folder, in one file or in shards: finding and fingerprinting.

As in transformers 5, all shards in an index are opened. The headers of the shards say which tensors
they have, not the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from costmodel.model.safetensors_header import open_safetensors
from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import InputError, RunError
from profiles.files import read_json

# Most bytes of a file's name on common file systems.
LONGEST_NAME = 255
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes of each sample of a tensor for its fingerprint, from its start, its middle and its end.
SAMPLE_BYTES = 4096


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
            # All of them are asked for at once: a disk or a network works on many reads together.
            for entry in map(entries.__getitem__, names):
                for start, count in _samples(entry):
                    os.posix_fadvise(files[entry.path], start, count, os.POSIX_FADV_WILLNEED)
            for name in names:
                entry = entries[name]
                sample = _sample(files[entry.path], entry)
                digest.update(f"{name} {entry.dtype} {entry.shape} ".encode() + sample)
        except OSError as error:
            raise RunError(f"checkpoint {paths[0].parent}: {error.strerror}") from error
    return digest.hexdigest()


def _sample(descriptor: int, entry: TensorEntry) -> bytes:
    digest = hashlib.sha256()
    for start, count in _samples(entry):
        digest.update(os.pread(descriptor, count, start))
    return digest.digest()


def _samples(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """Yield the place in the file and the bytes of each sample of a tensor."""
    last = max(0, entry.num_bytes - SAMPLE_BYTES)
    # An empty range would stand for the rest of the file.
    for start in sorted({0, last // 2, last}) if entry.num_bytes else ():
        yield entry.offset_bytes + start, min(SAMPLE_BYTES, entry.num_bytes - start)

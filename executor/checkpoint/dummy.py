"""Random weights for any model: made in memory, or written as a checkpoint.

Both have the same weights for the same seed, so that a run on random weights can be repeated on the
files. Every tensor repeats one random pattern, from an offset that depends on its name: values are
drawn once, for models of any size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from costmodel.families import spec_from_config
from costmodel.model.layout import ComponentLayout, model_layers
from costmodel.model.safetensors_header import LENGTH_BYTES
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import Strides
from executor.checkpoint.dummy_routers import router_scales
from executor.checkpoint.dummy_rows import dummy_rows
from executor.checkpoint.row_reader import fill_component
from executor.checkpoint.stored_tensors import INDEX_NAME
from executor.checkpoint.tensor_parts import TensorPart, component_parts, overlaps
from profiles.compute_plan import DTYPES
from profiles.errors import InputError
from profiles.files import write_json
from profiles.units import GIB

# A prime, so that no two rows of a matrix have the same part of the pattern.
PATTERN_LENGTH = 2_097_143
STANDARD_DEVIATION = 0.02
# Elements whose places are computed at once, where they are apart.
NUMBERED_AT_ONCE = 1 << 16
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyCheckpoint:
    """A ``WeightSource`` of random weights.

    ``router_skew`` is the exponent of Zipf's law that routing follows (see ``router_scales``).
    """

    spec: ModelSpec
    seed: int = 0
    router_skew: float = 0.0

    @property
    def fingerprint(self) -> str:
        """A hash of the shapes, the seed and the skew."""
        skew = f" {self.router_skew}" if self.router_skew else ""
        return hashlib.sha256(f"dummy {self.spec} {self.seed}{skew}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Do nothing: there are no files."""

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Make part of one component (see ``WeightSource.read_range``)."""
        names = {t.name for t in layout.tensors if t.encoding is not None}
        encoded = tuple(t for t in layout.tensors if t.matrix_name in names)
        fill_component(
            replace(layout, tensors=encoded),
            start,
            out,
            partial(dummy_rows, layout, f"{index}.{layout.first_row}", self._fill_bytes),
            DTYPES[self.spec.dtype],
        )
        plain = replace(layout, tensors=tuple(t for t in layout.tensors if t not in encoded))
        scales = router_scales(self.spec, self.seed, self.router_skew)
        for part, first, target in overlaps(self.spec, index, plain, start, out):
            _fill(target, part, self.seed, first, scales.get(part.name))

    def _fill_bytes(self, name: str, first: int, target: torch.Tensor) -> None:
        """Fill uint8 ``target`` with the bytes of a tensor's pattern from ``first`` on."""
        pattern = _pattern(self.seed, torch.float32).view(torch.uint8)
        _repeat(target, pattern, _place_of(self.seed, name) + first)


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    router_skew: float = 0.0,
    shard_bytes: int = GIB,
) -> None:
    """Write a checkpoint of random weights for a ``config.json``, in shards of at most
    ``shard_bytes`` where possible.

    ``router_skew`` is that of ``DummyCheckpoint``. Only one piece of a tensor is in memory, so the
    model may be larger than memory. Written pages are dropped from the page cache, so the next read
    is a read of the disk.
    """
    spec = spec_from_config(config, name=folder.name)
    if spec.is_encoded:
        raise InputError(
            "random checkpoint", got="a quantization_config", allowed="a config without one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    shards = list(_shards(spec, shard_bytes))
    scales = router_scales(spec, seed, router_skew)
    weight_map: dict[str, str] = {}
    for number, parts in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, parts, seed, scales)
        weight_map |= {part.name: name for part in parts}
    total = sum(p.num_elements * p.dtype.itemsize for parts in shards for p in parts)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(spec: ModelSpec, shard_bytes: int) -> Iterator[list[TensorPart]]:
    shard: list[TensorPart] = []
    size = 0
    for part in _all_parts(spec):
        num_bytes = part.num_elements * part.dtype.itemsize
        if shard and size + num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += num_bytes
    yield shard


def _all_parts(spec: ModelSpec) -> Iterator[TensorPart]:
    """Yield every tensor of the checkpoint once and whole, the head included."""
    seen: set[str] = set()
    components = (
        (index, layout)
        for index, layer in enumerate(model_layers(spec))
        for layout in layer.components
    )
    for index, layout in components:
        for part in component_parts(spec, index, layout):
            if part.name not in seen:
                seen.add(part.name)
                # In the order of the file, transposed or not.
                yield TensorPart(
                    name=part.name,
                    shape=part.shape,
                    first_row=0,
                    num_elements=math.prod(part.shape),
                    offset_bytes=0,
                    dtype=part.dtype,
                )


def _write_shard(
    path: Path, parts: list[TensorPart], seed: int, scales: Mapping[str, torch.Tensor]
) -> None:
    header, offset = {}, 0
    for part in parts:
        end = offset + part.num_elements * part.dtype.itemsize
        header[part.name] = {
            "dtype": SAFETENSORS_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for part in parts:
            for first in range(0, part.num_elements, PATTERN_LENGTH):
                count = min(PATTERN_LENGTH, part.num_elements - first)
                values = torch.empty(count, dtype=part.dtype)
                _fill(values, part, seed, first, scales.get(part.name))
                handle.write(values.view(torch.uint8).numpy().data)
        handle.flush()
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(
    target: torch.Tensor,
    part: TensorPart,
    seed: int,
    first_element: int = 0,
    scales: torch.Tensor | None = None,
) -> None:
    """Fill ``target`` with the elements of a part from ``first_element`` on.

    ``scales`` are factors of the rows of the stored tensor.
    """
    if len(part.shape) == 1 and part.name.endswith(".weight"):
        target.fill_(1.0)
        return
    pattern = _pattern(seed, target.dtype)
    place = _place_of(seed, part.name) + part.first_element
    if part.strides is not None and not part.strides.is_contiguous:
        _fill_strided(target, pattern, place, part.strides, first_element)
        return
    _repeat(target, pattern, place + first_element)
    if scales is not None:
        first = part.first_element + first_element
        rows = torch.arange(first, first + len(target)) // part.shape[1]
        target *= scales[rows].to(target.dtype)


def _place_of(seed: int, name: str) -> int:
    """Return where the pattern of a tensor begins."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % PATTERN_LENGTH


def _repeat(target: torch.Tensor, pattern: torch.Tensor, place: int) -> None:
    """Fill ``target`` with a pattern from ``place`` on, which begins again at its end."""
    done = 0
    while done < target.numel():
        start = (place + done) % len(pattern)
        piece = pattern[start : start + target.numel() - done]
        target[done : done + piece.numel()] = piece
        done += piece.numel()


def _fill_strided(
    target: torch.Tensor, pattern: torch.Tensor, place: int, strides: Strides, first: int
) -> None:
    """Fill ``target`` with elements of the pattern that are as far apart as in a stored tensor.

    ``place`` is that of the first element of the part.
    """
    for start in range(0, target.numel(), NUMBERED_AT_ONCE):
        piece = target[start : start + NUMBERED_AT_ONCE]
        numbers = torch.arange(first + start, first + start + piece.numel())
        rows, columns = numbers // strides.columns, numbers % strides.columns
        numbers = place + rows * strides.row_step + columns * strides.column_step
        torch.index_select(pattern, 0, numbers % PATTERN_LENGTH, out=piece)


@lru_cache(maxsize=4)
def _pattern(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PATTERN_LENGTH, generator=generator).mul_(STANDARD_DEVIATION).to(dtype)

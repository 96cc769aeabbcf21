"""Hugging Face checkpoints: everything checked when opened, one layer read at a time.

Only ``*.safetensors`` is ever read; nothing pickled is loaded and no code of a checkpoint runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from costmodel.layout import LayerLayout, TensorLayout, model_layers
from costmodel.model_spec import ModelSpec, spec_from_config
from executor.families import PREFIXES, DecoderConfig, decoder_config, name_parts, part_rows
from executor.safetensors_file import (
    READ_BYTES,
    SafetensorsFile,
    TensorEntry,
    open_safetensors,
    read_into,
)
from profiles.compute_plan import DTYPES
from profiles.errors import InputError
from profiles.files import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SOURCE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightSource(Protocol):
    """Where the weights of a model come from, layer by layer."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and compute dtype."""

    @property
    def config(self) -> DecoderConfig:
        """The numbers that the decoder computes with."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the weights do."""

    def read_range(self, index: int, layout: LayerLayout, start: int, out: torch.Tensor) -> None:
        """Fill ``out`` with bytes of layer ``index`` of ``model_layers(spec)``, from ``start`` on.

        ``out`` is one-dimensional uint8 in CPU memory; both ends of the range are whole elements.
        The tensors come to lie at their offsets in the dtype of ``spec``, the padding between
        them is zero.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """Rows of one of our tensors, and the tensor of the checkpoint that they are.

    ``shape`` is what the whole checkpoint tensor must have; ``first_row`` is where our rows
    begin in it (above zero for later chunks of the head); ``offset_bytes`` is where they go.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    num_elements: int
    offset_bytes: int


def layer_parts(
    spec: ModelSpec, index: int, layout: LayerLayout, prefix: str
) -> Iterator[TensorPart]:
    """Yield what layer ``index`` of ``model_layers(spec)`` is made of, in order of offset."""
    for tensor in layout.tensors:
        yield from _tensor_parts(spec, index, layout, tensor, prefix)


def _tensor_parts(
    spec: ModelSpec, index: int, layout: LayerLayout, tensor: TensorLayout, prefix: str
) -> Iterator[TensorPart]:
    names = name_parts(spec, tensor.name, index - 1, prefix)
    offset = tensor.offset_bytes
    tail = tensor.shape[1:]
    width = tail[0] if tail else 1
    for name, rows in zip(names, part_rows(spec, tensor.name, tensor.shape[0]), strict=True):
        is_head = tensor.name == "head.weight"
        yield TensorPart(
            name=name,
            shape=(spec.vocab_size if is_head else rows, *tail),
            first_row=layout.first_row if is_head else 0,
            num_elements=rows * width,
            offset_bytes=offset,
        )
        offset += rows * width * spec.dtype_bytes


def overlaps(
    parts: Iterable[TensorPart], start: int, out: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[TensorPart, int, torch.Tensor]]:
    """Yield each part that a range of a layer touches, with the first of its elements that the
    range holds and the elements' place in ``out`` (uint8, the range's bytes)."""
    for part in parts:
        low = max(part.offset_bytes, start)
        high = min(part.offset_bytes + part.num_elements * dtype.itemsize, start + len(out))
        if low < high:
            target = out[low - start : high - start].view(dtype)
            yield part, (low - part.offset_bytes) // dtype.itemsize, target


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder that holds every tensor its config asks for, in the right shape."""

    folder: Path
    spec: ModelSpec
    config: DecoderConfig
    fingerprint: str
    prefix: str
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path, dtype: str | None = None) -> Checkpoint:
        """Check a folder from end to end, without reading a single weight.

        Parameters
        ----------
        dtype
            The dtype to compute in; ``None`` means the one that the config names.

        Raises
        ------
        InputError
            Naming the file or tensor, what was found and what would be right.
        """
        folder = Path(folder)
        raw = read_json(folder / "config.json", "model config")
        spec = spec_from_config(raw, name=folder.resolve().name)
        if dtype is not None:
            spec = spec.with_dtype(dtype)
        config = decoder_config(raw, spec)
        tensors, shards = _open_shards(folder)
        prefix = _find_prefix(spec, tensors, folder)
        _check_tensors(spec, tensors, prefix, folder)
        digest = hashlib.sha256((folder / "config.json").read_bytes() + spec.dtype.encode())
        for shard in shards:
            digest.update(len(shard.identity).to_bytes(8, "little") + shard.identity)
        return cls(
            folder=folder, spec=spec, config=config, fingerprint=digest.hexdigest(),
            prefix=prefix, tensors=tensors,
        )  # fmt: skip

    def read_range(self, index: int, layout: LayerLayout, start: int, out: torch.Tensor) -> None:
        """Read part of one layer (see ``WeightSource.read_range``); scratch is at most 16 MiB."""
        # The padding between tensors, so that a layer's bytes depend on its weights only.
        out.zero_()
        parts = layer_parts(self.spec, index, layout, self.prefix)
        for part, first, target in overlaps(parts, start, out, DTYPES[self.spec.dtype]):
            self._read_part(part, first, target)

    def _read_part(self, part: TensorPart, first_element: int, target: torch.Tensor) -> None:
        entry = self.tensors[part.name]
        row_items = part.shape[1] if len(part.shape) == 2 else 1
        skipped = part.first_row * row_items + first_element
        offset = entry.offset_bytes + skipped * entry.item_bytes
        source = SOURCE_DTYPES[entry.dtype]
        if source is target.dtype:
            read_into(entry.path, offset, target.view(torch.uint8).numpy().data)
            return
        step = min(READ_BYTES // entry.item_bytes, target.numel())
        scratch = torch.empty(step, dtype=source)
        for first in range(0, target.numel(), step):
            piece = scratch[: min(step, target.numel() - first)]
            read_into(
                entry.path,
                offset + first * entry.item_bytes,
                piece.view(torch.uint8).numpy().data,
            )
            converted = target[first : first + piece.numel()].copy_(piece)
            if target.dtype is torch.float16 and not converted.abs().max().isfinite():
                raise InputError(
                    f"tensor {part.name} of {self.folder.name}",
                    got="a value that float16 cannot hold",
                    allowed="values within 65504",
                    hint="computing in bfloat16 or float32",
                )


def _open_shards(folder: Path) -> tuple[dict[str, TensorEntry], list[SafetensorsFile]]:
    if (folder / SINGLE_NAME).exists():
        shard = open_safetensors(folder / SINGLE_NAME)
        return dict(shard.tensors), [shard]
    if (folder / INDEX_NAME).exists():
        return _open_indexed(folder)
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    raise InputError(
        f"checkpoint {folder}",
        got=f"only {pickled[0]}, which is never loaded" if pickled else f"no {SINGLE_NAME}",
        allowed=f"{SINGLE_NAME}, or {INDEX_NAME} and its shards",
        hint="saving the model with safe_serialization=True" if pickled else "",
    )


def _open_indexed(folder: Path) -> tuple[dict[str, TensorEntry], list[SafetensorsFile]]:
    weight_map = read_json(folder / INDEX_NAME, "weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"weight_map in {INDEX_NAME}", got=f"a {type(weight_map).__name__} without names",
            allowed="an object of tensor names and shards",
        )  # fmt: skip
    for tensor, shard_name in weight_map.items():
        if not _is_shard_name(shard_name):
            raise InputError(
                f"shard of {tensor} in {INDEX_NAME}",
                got=repr(shard_name),
                allowed="the name of a .safetensors file in the checkpoint's own folder",
            )
    shards = {n: open_safetensors(folder / n) for n in sorted(set(weight_map.values()))}
    tensors = {}
    for tensor, shard_name in weight_map.items():
        entry = shards[shard_name].tensors.get(tensor)
        if entry is None:
            raise InputError(
                f"shard {shard_name}", got=f"no tensor {tensor}",
                allowed=f"the tensors that {INDEX_NAME} says it holds",
            )  # fmt: skip
        tensors[tensor] = entry
    return tensors, list(shards.values())


def _is_shard_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(mark in name for mark in ("/", "\\", "\0", ":"))
    )


def _find_prefix(spec: ModelSpec, tensors: Mapping[str, TensorEntry], folder: Path) -> str:
    for prefix in PREFIXES[spec.family]:
        if all(name in tensors for name in name_parts(spec, "tokens.weight", 0, prefix)):
            return prefix
    wanted = [name_parts(spec, "tokens.weight", 0, p)[0] for p in PREFIXES[spec.family]]
    raise InputError(
        f"checkpoint {folder.name}", got=f"no tensor {wanted[0]}", allowed=" or ".join(wanted)
    )


def _check_tensors(
    spec: ModelSpec, tensors: Mapping[str, TensorEntry], prefix: str, folder: Path
) -> None:
    label = f"checkpoint {folder.name}"
    parts = {
        part.name: part
        for index, layout in enumerate(model_layers(spec))
        for part in layer_parts(spec, index, layout, prefix)
    }
    missing = [name for name in parts if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            label, got=f"no tensor {missing[0]}{more}",
            allowed=f"all {len(parts)} tensors that its config asks for",
        )  # fmt: skip
    for name, part in parts.items():
        entry = tensors[name]
        if entry.shape != part.shape:
            raise InputError(
                f"tensor {name} of {label}",
                got=f"shape {list(entry.shape)}",
                allowed=f"{list(part.shape)} as its config says",
            )
        if entry.dtype not in SOURCE_DTYPES:
            raise InputError(
                f"tensor {name} of {label}", got=f"dtype {entry.dtype}",
                allowed=", ".join(SOURCE_DTYPES),
            )  # fmt: skip

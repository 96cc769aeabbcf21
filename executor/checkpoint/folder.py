"""Hugging Face checkpoints: checked when they are opened, and read one layer at a time.

Only ``*.safetensors`` files are read. Pickled files are never loaded, and no code of a checkpoint
runs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from costmodel.families import CHECKPOINT_FOLDER, family_named, is_text_part, spec_from_config
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import ComponentLayout, TensorLayout, decoder_numbers, model_layers
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor, Strides
from executor.checkpoint.language_part import language_part
from executor.checkpoint.safetensors_file import TensorEntry, drop_pages
from executor.checkpoint.stored_tensors import (
    SOURCE_DTYPES,
    StoredTensors,
    are_equal,
    contents_digest,
    read_elements,
    read_strided,
)
from profiles.compute_plan import DTYPES
from profiles.errors import InputError, RunError
from profiles.files import read_json

ADAPTER_NAME = "adapter_config.json"
logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """A source of a model's weights, layer by layer."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and compute dtype."""

    @property
    def fingerprint(self) -> str:
        """A hash of the weights."""

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the weights have changed since the fingerprint was taken."""

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Fill ``out`` with the bytes of a component of layer ``index`` of ``model_layers(spec)``,
        from ``start`` on.

        ``out`` is one-dimensional uint8 in CPU memory; both ends of the range are whole elements.
        The tensors are at the offsets of the layout, in the dtype of ``spec``. Padding is zero.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """Rows of one of our tensors, and the checkpoint's tensor that has them.

    ``shape`` is the shape of the whole tensor in the checkpoint. ``first_row`` is the first of our
    rows in it, above zero for later chunks of the head, and where a checkpoint has rows in another
    order. ``offset_bytes`` is the offset of our rows in their component, in which they have
    ``dtype``. With ``strides`` our elements are where these say instead.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    num_elements: int
    offset_bytes: int
    dtype: torch.dtype
    strides: Strides | None = None

    @property
    def first_element(self) -> int:
        """The first of our elements in the stored tensor."""
        if self.strides is not None:
            return self.strides.first
        return self.first_row * (self.shape[1] if len(self.shape) == 2 else 1)


def component_parts(
    spec: ModelSpec, index: int, layout: ComponentLayout, units: range | None = None
) -> Iterator[TensorPart]:
    """Yield the parts of a component of layer ``index`` of ``model_layers(spec)``, by offset.

    ``units`` limits them to some experts.
    """
    for unit in range(layout.num_units) if units is None else units:
        for tensor in layout.tensors:
            yield from _tensor_parts(spec, index, layout, tensor, unit)


def _part_rows(layer: LayerSpec, tensor: TensorLayout, num_parts: int) -> tuple[int, ...]:
    """Return the number of rows of each part of a tensor that is stacked of several."""
    if tensor.name.startswith("qkv."):
        return layer.attention.qkv_parts
    return (tensor.shape[0] // num_parts,) * num_parts


def _tensor_parts(
    spec: ModelSpec, index: int, layout: ComponentLayout, tensor: TensorLayout, unit: int
) -> Iterator[TensorPart]:
    # A layer of the head has no number, and needs none.
    numbers = decoder_numbers(spec)
    number = numbers[index] if index < len(numbers) else -1
    family = family_named(spec.family)
    names = family.tensor_names(spec, tensor.name, number, unit)
    offset = unit * layout.unit_bytes + tensor.offset_bytes
    dtype = torch.float32 if tensor.is_float32 else DTYPES[spec.dtype]
    tail = tensor.shape[1:]
    width = tail[0] if tail else 1
    if (stacked := family.stacked.get(tensor.name)) is not None:
        counts = (
            _part_rows(spec.layer(number), tensor, len(names))
            if len(names) > 1
            else tensor.shape[:1]
        )
        yield from _stacked_parts(stacked, names, counts, layout, tensor, unit, dtype)
        return
    # Each with the rows of the whole stored tensor, and the first of ours in it.
    if tensor.name.startswith("head."):
        blocks = [(names[0], spec.vocab_size, layout.first_row, tensor.shape[0])]
    elif len(names) > 1:
        rows = _part_rows(spec.layer(number), tensor, len(names))
        blocks = [(name, count, 0, count) for name, count in zip(names, rows, strict=True)]
    elif (arranged := family.row_blocks.get(tensor.name.rpartition(".")[0])) is not None:
        found = arranged(spec.layer(number))
        blocks = [(names[0], tensor.shape[0], first, count) for first, count in found]
    else:
        blocks = [(names[0], tensor.shape[0], 0, tensor.shape[0])]
    module = tensor.name.rpartition(".")[0]
    is_transposed = len(tail) == 1 and module in family.transposed
    if module in family.by_head:
        tail = (spec.layer(number).attention.head_dim,)
        blocks = [(name, rows // tail[0], first, count) for name, rows, first, count in blocks]
    for name, stored_rows, first_row, count in blocks:
        yield TensorPart(
            name=name,
            shape=(*tail, stored_rows) if is_transposed else (stored_rows, *tail),
            first_row=first_row,
            num_elements=count * width,
            offset_bytes=offset,
            dtype=dtype,
            strides=_transposed(first_row, stored_rows, width) if is_transposed else None,
        )
        offset += count * width * dtype.itemsize


def _transposed(first_row: int, num_rows: int, num_columns: int) -> Strides:
    """Return the places of our rows from ``first_row`` on where they are columns in the file."""
    return Strides(first=first_row, row_step=1, column_step=num_rows, columns=num_columns)


def _stacked_parts(
    stacked: StackedTensor,
    names: Sequence[str],
    counts: Sequence[int],
    layout: ComponentLayout,
    tensor: TensorLayout,
    unit: int,
    dtype: torch.dtype,
) -> Iterator[TensorPart]:
    """Yield the parts of one expert's tensor, each with ``counts`` rows of the tensor ``names``."""
    offset = unit * layout.unit_bytes + tensor.offset_bytes
    columns = tensor.shape[1] if len(tensor.shape) == 2 else None
    for name, rows in zip(names, counts, strict=True):
        for strides, count in stacked.parts(unit, rows, columns or 1):
            yield TensorPart(
                name=name,
                shape=stacked.shape(layout.num_units, rows, columns),
                first_row=0,
                num_elements=count * strides.columns,
                offset_bytes=offset,
                dtype=dtype,
                strides=strides,
            )
            offset += count * strides.columns * dtype.itemsize


def overlaps(
    spec: ModelSpec, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
) -> Iterator[tuple[TensorPart, int, torch.Tensor]]:
    """Yield each part of a component that overlaps a range of its bytes.

    Each comes with its first element in the range, and with the place of the elements in ``out``,
    the uint8 bytes of the range from ``start`` on.
    """
    units = layout.units_between(start, start + len(out))
    for part in component_parts(spec, index, layout, units):
        low = max(part.offset_bytes, start)
        item_bytes = part.dtype.itemsize
        high = min(part.offset_bytes + part.num_elements * item_bytes, start + len(out))
        if low < high:
            target = out[low - start : high - start].view(part.dtype)
            yield part, (low - part.offset_bytes) // item_bytes, target


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder with every tensor of its config in the right shape.

    Parameters
    ----------
    tensors
        The needed tensors, by their names in transformers' causal model.
    contents
        The digest of the tensors when the folder was opened.
    """

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorEntry]
    contents: str

    @classmethod
    def open(cls, folder: Path, dtype: str | None = None) -> Checkpoint:
        """Open a folder and check it completely.

        Of the weights, only samples are read. Where the config ties the head to the embedding and
        both are stored, the two are compared.

        Parameters
        ----------
        dtype
            The compute dtype; ``None`` stands for the config's dtype, or else for the dtype of the
            stored weights.

        Raises
        ------
        InputError
            Naming the file or tensor, the value found and the allowed ones.
        """
        folder = Path(folder)
        if not folder.is_dir():
            got = "a GGUF file" if folder.suffix == ".gguf" else "no such folder"
            raise InputError(f"model {folder}", got=got, allowed=CHECKPOINT_FOLDER)
        raw = read_json(folder / "config.json", "model config")
        if (folder / ADAPTER_NAME).exists():
            raise InputError(
                f"checkpoint {folder}",
                got=f"{ADAPTER_NAME}, an adapter that is not applied",
                allowed="a folder of whole weights",
                hint="merging the adapter, or removing that file where the weights hold it already",
            )
        spec = spec_from_config(raw, name=folder.resolve().name)
        stored = StoredTensors.open(folder, family_named(spec.family).base_prefix)
        if dtype is None and raw.get("dtype") is None and raw.get("torch_dtype") is None:
            dtype = stored.dtype
        if is_text_part(raw):
            stored = language_part(stored)
        if dtype is not None:
            spec = spec.with_dtype(dtype)
        spec, tensors = _find_tensors(stored, spec)
        contents = contents_digest(tensors)
        return cls(folder=folder, spec=spec, tensors=tensors, contents=contents)

    def in_dtype(self, dtype: str) -> Checkpoint:
        """Return the same weights with another compute dtype."""
        return replace(self, spec=self.spec.with_dtype(dtype))

    @property
    def fingerprint(self) -> str:
        """A hash of the compute dtype, and of the weights when the folder was opened."""
        return hashlib.sha256(f"{self.spec.dtype} {self.contents}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the files have changed since the folder was opened."""
        if contents_digest(self.tensors) != self.contents:
            raise RunError(
                f"checkpoint {self.folder}: it changed while it was read; try: run again"
            )

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Read part of one component (see ``WeightSource.read_range``); scratch is at most
        16 MiB."""
        # For the padding between tensors: a component's bytes depend on its weights only.
        out.zero_()
        for part, first, target in overlaps(self.spec, index, layout, start, out):
            entry = self.tensors[part.name]
            if part.strides is None or part.strides.is_contiguous:
                read_elements(entry, part.first_element + first, target)
            else:
                read_strided(entry, part.strides, first, target)
                if part.strides.is_last and first + len(target) == part.num_elements:
                    drop_pages(entry)


def _needed_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a model needs."""
    return {
        part.name: part.shape
        for index, layer in enumerate(model_layers(spec))
        for layout in layer.components
        for part in component_parts(spec, index, layout)
    }


def _find_tensors(
    stored: StoredTensors, spec: ModelSpec
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """Find all tensors that a model needs.

    In the returned model, the head is not tied where it differs from the embedding.
    """
    shapes = _needed_shapes(spec)
    tensors = {name: entry for name in shapes if (entry := stored.find(name))}
    head_name = f"{family_named(spec.family).head}.weight"
    head = stored.find(head_name) if spec.head.is_tied else None
    if head is not None:
        (table_name,) = family_named(spec.family).tensor_names(spec, "head.weight", 0)
        shape = shapes[table_name]
        table = tensors.setdefault(table_name, head)
        for name, entry in ((head_name, head), (table_name, table)):
            _check_tensor(name, entry, shape, spec)
        if table is not head and not are_equal(head, table):
            logger.warning(
                "%s: tie_word_embeddings is true, but %s differs from %s; both are used",
                stored.folder / "config.json",
                head_name,
                table_name,
            )
            spec = replace(spec, head=replace(spec.head, is_tied=False))
            shapes[head_name], tensors[head_name] = shape, head
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise stored.missing(missing, len(shapes))
    for name, shape in shapes.items():
        _check_tensor(name, tensors[name], shape, spec)
    # A head that is equal to the table counts as read, although only the table is used.
    read = {entry.name for entry in (*tensors.values(), *([head] if head else []))}
    _refuse_unread(stored, spec, read)
    return spec, tensors


def _refuse_unread(stored: StoredTensors, spec: ModelSpec, read: Set[str]) -> None:
    """Refuse tensors that nothing reads: without them, the results would be wrong."""
    family = family_named(spec.family)
    unread = [
        n
        for n, entry in sorted(stored.entries.items())
        if entry.name not in read and not family.may_ignore(n, spec.num_layers)
    ]
    if unread:
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise InputError(
            f"checkpoint {spec.name}",
            got=f"tensor {unread[0]}{more}, which its config does not ask for",
            allowed="tensors of the layers and parts that its config describes",
            hint="another config.json, or saving the model again without them",
        )


def _check_tensor(name: str, entry: TensorEntry, shape: tuple[int, ...], spec: ModelSpec) -> None:
    label = f"tensor {name} of checkpoint {spec.name}"
    if entry.shape != shape:
        raise InputError(
            label, got=f"shape {list(entry.shape)}", allowed=f"{list(shape)} as its config says"
        )
    if entry.dtype not in SOURCE_DTYPES:
        raise InputError(label, got=f"dtype {entry.dtype}", allowed=", ".join(SOURCE_DTYPES))

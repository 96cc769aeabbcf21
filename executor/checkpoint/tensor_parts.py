"""Where a checkpoint stores the parts of our tensors: names, shapes, rows and strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from costmodel.families import family_named
from costmodel.model.encoded_model import without_encodings
from costmodel.model.layout import ComponentLayout, decoder_numbers, model_layers
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor, Strides, stacked_rows
from costmodel.model.tensor_layout import TensorLayout
from profiles.compute_plan import DTYPES


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
    # A layer of the head has no number, and needs none.
    numbers = decoder_numbers(spec)
    number = numbers[index] if index < len(numbers) else -1
    for unit in range(layout.num_units) if units is None else units:
        for tensor in layout.tensors:
            yield from _tensor_parts(spec, number, layout, tensor, unit)


def _tensor_parts(
    spec: ModelSpec, number: int, layout: ComponentLayout, tensor: TensorLayout, unit: int
) -> Iterator[TensorPart]:
    family = family_named(spec.family)
    names = family.tensor_names(spec, tensor.name, number, unit)
    offset = unit * layout.unit_bytes + tensor.offset_bytes
    dtype = DTYPES[tensor.dtype] if tensor.dtype else DTYPES[spec.dtype]
    width = math.prod(tensor.shape[1:])
    if (stacked := family.stacked.get(tensor.name)) is not None:
        counts = tensor.shape[:1]
        if len(names) > 1:
            counts = stacked_rows(spec.layer(number), tensor.name, tensor.shape[0], len(names))
        yield from _stacked_parts(stacked, names, counts, layout, tensor, unit, dtype)
        return
    # Each with the rows of the whole stored tensor, and the first of ours in it.
    if tensor.name.startswith("head."):
        blocks = [(names[0], spec.vocab_size, layout.first_row, tensor.shape[0])]
    elif len(names) > 1:
        rows = stacked_rows(spec.layer(number), tensor.name, tensor.shape[0], len(names))
        blocks = [(name, count, 0, count) for name, count in zip(names, rows, strict=True)]
    elif (arranged := family.row_blocks.get(tensor.name.rpartition(".")[0])) is not None:
        found = arranged(spec.layer(number))
        blocks = [(names[0], tensor.shape[0], first, count) for first, count in found]
    else:
        blocks = [(names[0], tensor.shape[0], 0, tensor.shape[0])]
    module = tensor.name.rpartition(".")[0]
    is_transposed = len(tensor.shape) == 2 and module in family.transposed
    shape_of = partial(_stored_shape, spec, number, module, tensor.shape[1:])
    for name, stored_rows, first_row, count in blocks:
        yield TensorPart(
            name=name,
            shape=shape_of(stored_rows),
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


def _stored_shape(
    spec: ModelSpec, number: int, module: str, tail: tuple[int, ...], rows: int
) -> tuple[int, ...]:
    """Return the shape in which a checkpoint stores ``rows`` of a module, [rows, *tail] here."""
    family = family_named(spec.family)
    if module in family.by_head:
        head_dim = spec.layer(number).attention.head_dim
        return (rows // head_dim, head_dim)
    return (*tail, rows) if module in family.transposed else (rows, *tail)


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


def needed_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a model needs, were it plain."""
    return {
        part.name: part.shape
        for index, layer in enumerate(model_layers(without_encodings(spec)))
        for layout in layer.components
        for part in component_parts(spec, index, layout)
    }

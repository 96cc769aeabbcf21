"""The tensors of a layer where they are stored: views of bytes, plain or compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch

from costmodel.model.layout import ComponentLayout
from costmodel.model.tensor_layout import TensorLayout
from executor.model.matrices import CompressedMatrix, Matrix, PackedRows
from profiles.kernels import EncodedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorView:
    """One tensor of a layer's layout, with its chunks; of experts one matrix for each.

    ``is_expert`` says whether it is a matrix of experts.
    """

    layout: TensorLayout
    chunks: Sequence[Matrix]
    is_expert: bool

    @property
    def name(self) -> str:
        """The tensor's name in ``LayerWeights``."""
        first = self.layout.first_row
        return f"{self.layout.name}.{first}" if self.is_expert and first else self.layout.name

    @property
    def compressed(self) -> Sequence[CompressedMatrix]:
        """The chunks, all of which are compressed."""
        return cast("Sequence[CompressedMatrix]", self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRuns:
    """The two runs of a component's bytes: the resident one up to ``border``, then the staged.

    They have ``num_units`` units. ``places`` are those of the experts among them, by number.
    """

    layout: ComponentLayout
    border: int
    resident: torch.Tensor
    staged: torch.Tensor
    num_units: int
    places: Sequence[int]


def tensor_views(runs: ComponentRuns, dtype: torch.dtype) -> Iterator[TensorView]:
    """Yield the tensors of a component; ``dtype`` is the model's."""
    layout = runs.layout
    for tensor in layout.tensors:
        chunks: Sequence[Matrix] = tuple(
            chunk for unit in range(runs.num_units) for chunk in _chunks(runs, tensor, unit, dtype)
        )
        if layout.is_experts:
            chunks = ByNumber(chunks, runs.places)
        yield TensorView(layout=tensor, chunks=chunks, is_expert=layout.is_experts)


def _chunks(
    runs: ComponentRuns, tensor: TensorLayout, unit: int, dtype: torch.dtype
) -> list[Matrix]:
    """Return the rows of a tensor before the border, and those behind it."""
    border, layout = runs.border, runs.layout
    start = unit * layout.unit_bytes + tensor.offset_bytes
    end = start + tensor.num_bytes
    middle = min(max(border, start), end)
    before = runs.resident[start:middle]
    behind = runs.staged[max(0, middle - border) : max(0, end - border)]
    beside = {
        other.name: _chunks(runs, other, unit, dtype)[0]
        for other in layout.tensors
        if tensor.encoding and other.name in (tensor.table_name, tensor.order_name)
    }
    rows = 0, (middle - start) // tensor.row_bytes
    return [
        matrix_view(tensor, run, dtype, beside, row)
        for run, row in zip((before, behind), rows, strict=True)
        if len(run)
    ]


def matrix_view(
    tensor: TensorLayout,
    raw: torch.Tensor,
    dtype: torch.dtype,
    beside: Mapping[str, Matrix] = MappingProxyType({}),
    first_row: int = 0,
) -> Matrix:
    """Return adjacent rows of a tensor, or a vector, whose bytes are ``raw`` (uint8).

    Parameters
    ----------
    dtype
        The model's dtype.
    beside
        The vectors beside encoded rows, by name.
    first_row
        The first of the rows in the tensor.
    """
    if tensor.packing is not None:
        return PackedRows(raw.view(-1, tensor.row_bytes), tensor.packing)
    if tensor.encoding is None:
        dtype = getattr(torch, tensor.dtype) if tensor.dtype else dtype
        return raw.view(dtype).view(-1, *tensor.shape[1:])
    table, order = (beside.get(name) for name in (tensor.table_name, tensor.order_name))
    assert not isinstance(table, CompressedMatrix) and not isinstance(order, CompressedMatrix)
    return EncodedMatrix(
        rows=raw.view(-1, tensor.row_bytes),
        encoding=tensor.encoding,
        num_elements=tensor.shape[1],
        table=table,
        first_row=first_row,
        columns=order,
    )


class ByNumber(Sequence[Matrix]):
    """Matrices of experts by the number of the expert, which are stored by place.

    The places may change. An expert that is nowhere in memory has none.
    """

    def __init__(self, stored: Sequence[Matrix], places: Sequence[int]) -> None:
        self._stored = stored
        self._places = places

    def __getitem__(self, expert: int) -> Matrix:  # type: ignore[override]  # no slices
        return self._stored[self._places[expert]]

    def __len__(self) -> int:
        return len(self._places)


class CpuExperts(Sequence[Matrix]):
    """One matrix of each expert in CPU memory, by the number of the expert; compressed ones stay
    so.

    Parameters
    ----------
    home
        The bytes of adjacent experts of ``unit_bytes`` each, from byte ``first_byte`` of all on.
    tensors
        All tensors of an expert: the matrix may need a vector beside it.
    """

    def __init__(
        self,
        home: torch.Tensor,
        dtype: torch.dtype,
        tensor: TensorLayout,
        tensors: Mapping[str, TensorLayout],
        *,
        first_byte: int,
        unit_bytes: int,
    ) -> None:
        self._home = home
        self._dtype = dtype
        self._tensor = tensor
        self._tensors = tensors
        self._first_byte = first_byte
        self._unit_bytes = unit_bytes

    def __getitem__(self, expert: int) -> Matrix:  # type: ignore[override]  # no slices
        start = expert * self._unit_bytes - self._first_byte

        def raw_of(tensor: TensorLayout) -> torch.Tensor:
            return self._home[start + tensor.offset_bytes : start + tensor.end_bytes]

        beside = {
            name: matrix_view(self._tensors[name], raw_of(self._tensors[name]), self._dtype)
            for name in (self._tensor.table_name, self._tensor.order_name)
            if name in self._tensors
        }
        return matrix_view(self._tensor, raw_of(self._tensor), self._dtype, beside)

    def __len__(self) -> int:
        return (self._first_byte + len(self._home)) // self._unit_bytes

"""The decoded matrices of the current layer, where stored weights are compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from costmodel.model.layout import LayerLayout
from costmodel.model.tensor_layout import TensorLayout
from executor.machine.arena import Arena
from executor.model.matrices import CompressedMatrix, Matrix, OneByOne, PackedRows, decode
from profiles.kernels import EncodedMatrix


class UnpackedMatrices:
    """One buffer with the size of the largest layer; each matrix of a layer has a place in it.

    A matrix is unpacked on access, unless its place already has it. So it is unpacked once in a
    pass over the model for all batches of a block. Matrices before and after attention have
    different places, because they may belong to different layers at a time. (Where a GPU computes
    the head for one batch while the CPU attends for another, their matrices replace each other
    once.) All experts of a layer share one place for each of their matrices.

    Parameters
    ----------
    layers
        Layouts of all layers.
    dtype
        The dtype to compute in.
    arena
        The arena of the compute device.
    """

    def __init__(self, layers: Sequence[LayerLayout], dtype: torch.dtype, arena: Arena) -> None:
        size = max(
            sum(component.unit_elements for component in layer.components)
            for layer in layers
            if layer.kind != "embed"
        )
        buffer = arena.allocate("unpacked weights", size * dtype.itemsize)
        self._buffer = buffer.view(dtype)
        # Range of elements -> layer and unit of the matrix that is there.
        self._held: dict[tuple[int, int], tuple[int, int]] = {}

    def unpack(
        self,
        owner: tuple[int, int],
        tensor: TensorLayout,
        start: int,
        chunks: Sequence[CompressedMatrix],
    ) -> torch.Tensor:
        """Return the matrix whose place begins at element ``start``; unpack it if necessary.

        ``owner`` is the number of its layer and of its unit.
        """
        end = start + tensor.num_elements
        matrix = self._buffer[start:end].view(tensor.shape)
        if self._held.get((start, end)) == owner:
            return matrix
        self._held = {
            (low, high): held
            for (low, high), held in self._held.items()
            if high <= start or low >= end
        }
        first = 0
        for chunk in chunks:
            decode(chunk, matrix[first : first + chunk.shape[0]])
            first += chunk.shape[0]
        self._held[start, end] = owner
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a layer's layout, with its chunks; of experts one matrix for each.

    ``is_expert`` says whether it is a matrix of experts.
    """

    layout: TensorLayout
    chunks: tuple[Matrix, ...]
    is_expert: bool

    @property
    def name(self) -> str:
        """The tensor's name in ``LayerWeights``."""
        first = self.layout.first_row
        return f"{self.layout.name}.{first}" if self.is_expert and first else self.layout.name

    @property
    def compressed(self) -> list[CompressedMatrix]:
        """The chunks, all of which are compressed."""
        return [chunk for chunk in self.chunks if not isinstance(chunk, torch.Tensor)]


class UnpackedLayer(Mapping[str, Sequence[Matrix]]):
    """The tensors of one layer. Compressed matrices are unpacked on access."""

    def __init__(
        self, tensors: Sequence[StoredTensor], matrices: UnpackedMatrices, index: int
    ) -> None:
        self._matrices = matrices
        self._index = index
        # Each tensor with its place in the buffer, by name: rows of a matrix may be several.
        self._tensors: dict[str, list[tuple[StoredTensor, int]]] = {}
        start = 0
        for tensor in tensors:
            self._tensors.setdefault(tensor.name, []).append((tensor, start))
            if tensor.layout.is_compressed:
                start += tensor.layout.num_elements

    def __getitem__(self, name: str) -> Sequence[Matrix]:
        found: list[Matrix] = []
        for tensor, start in self._tensors[name]:
            if not tensor.layout.is_compressed:
                found += tensor.chunks
            elif tensor.is_expert:
                return UnpackedExperts(self._matrices, self._index, tensor, start)
            else:
                owner = self._index, 0
                found.append(self._matrices.unpack(owner, tensor.layout, start, tensor.compressed))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class UnpackedExperts(OneByOne):
    """One matrix of each expert, unpacked on access; it is valid until the next access."""

    def __init__(
        self, matrices: UnpackedMatrices, layer: int, tensor: StoredTensor, start: int
    ) -> None:
        self._matrices = matrices
        self._layer = layer
        self._tensor = tensor.layout
        self._start = start
        self._compressed = tensor.compressed

    def __getitem__(self, expert: int) -> torch.Tensor:  # type: ignore[override]  # no slices
        chunk = self._compressed[expert]
        return self._matrices.unpack((self._layer, expert), self._tensor, self._start, [chunk])

    def __len__(self) -> int:
        return len(self._compressed)

    @property
    def packed(self) -> Sequence[PackedRows] | None:
        """The same matrices packed, all of which are valid; ``None`` for encoded ones."""
        return [chunk for chunk in self._compressed if isinstance(chunk, PackedRows)] or None


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
            name: stored_matrix(self._tensors[name], raw_of(self._tensors[name]), self._dtype)
            for name in (self._tensor.table_name, self._tensor.order_name)
            if name in self._tensors
        }
        return stored_matrix(self._tensor, raw_of(self._tensor), self._dtype, beside)

    def __len__(self) -> int:
        return (self._first_byte + len(self._home)) // self._unit_bytes


def stored_matrix(
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

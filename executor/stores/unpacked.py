"""The unpacked matrices of the current layer, where stored weights are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from costmodel.model.layout import LayerLayout
from costmodel.model.tensor_layout import TensorLayout
from executor.machine.arena import Arena
from executor.model.matrices import Matrix, OneByOne, PackedRows
from profiles.kernels import unpack_rows


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
        chunks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the matrix whose place begins at element ``start``; unpack it if necessary.

        ``owner`` is the number of its layer and of its unit.
        """
        assert tensor.packing is not None
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
            unpack_rows(chunk[None], tensor.packing, matrix[None, first : first + len(chunk)])
            first += len(chunk)
        self._held[start, end] = owner
        return matrix


class PackedLayer(Mapping[str, Sequence[Matrix]]):
    """The tensors of one layer. Matrices are unpacked on access, or with ``is_direct`` returned
    packed for kernels that multiply them directly."""

    def __init__(
        self,
        layout: LayerLayout,
        packed: Mapping[str, Sequence[torch.Tensor]],
        matrices: UnpackedMatrices,
        index: int,
        *,
        is_direct: bool,
    ) -> None:
        self._packed = packed
        self._matrices = matrices
        self._index = index
        self._is_direct = is_direct
        # Packed tensor -> its layout, its place in the buffer, and whether each expert has one.
        self._places: dict[str, tuple[TensorLayout, int, bool]] = {}
        start = 0
        for component in layout.components:
            for tensor in component.tensors:
                if tensor.packing is not None:
                    self._places[tensor.name] = tensor, start, component.is_experts
                    start += tensor.num_elements

    def __getitem__(self, name: str) -> Sequence[Matrix]:
        if name not in self._places:
            return self._packed[name]
        tensor, start, is_experts = self._places[name]
        if self._is_direct:
            assert tensor.packing is not None
            return [PackedRows(chunk, tensor.packing) for chunk in self._packed[name]]
        if is_experts:
            return UnpackedExperts(self._matrices, self._index, tensor, start, self._packed[name])
        return [self._matrices.unpack((self._index, 0), tensor, start, self._packed[name])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class UnpackedExperts(OneByOne):
    """One matrix of each expert, unpacked on access; it is valid until the next access."""

    def __init__(
        self,
        matrices: UnpackedMatrices,
        layer: int,
        tensor: TensorLayout,
        start: int,
        packed: Sequence[torch.Tensor],
    ) -> None:
        self._matrices = matrices
        self._layer = layer
        self._tensor = tensor
        self._start = start
        self._packed = packed

    def __getitem__(self, expert: int) -> torch.Tensor:  # type: ignore[override]  # no slices
        chunk = self._packed[expert]
        return self._matrices.unpack((self._layer, expert), self._tensor, self._start, [chunk])

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def packed(self) -> Sequence[PackedRows]:
        """The same matrices packed, all of which are valid."""
        assert self._tensor.packing is not None
        return [PackedRows(rows, self._tensor.packing) for rows in self._packed]


class CpuExperts(Sequence[Matrix]):
    """One matrix of each expert in CPU memory, by the number of the expert; packed ones stay
    packed."""

    def __init__(
        self,
        home: torch.Tensor,
        dtype: torch.dtype,
        tensor: TensorLayout,
        *,
        first_byte: int,
        unit_bytes: int,
    ) -> None:
        self._home = home
        self._dtype = dtype
        self._tensor = tensor
        self._first_byte = first_byte
        self._unit_bytes = unit_bytes

    def __getitem__(self, expert: int) -> Matrix:  # type: ignore[override]  # no slices
        tensor = self._tensor
        start = expert * self._unit_bytes + tensor.offset_bytes - self._first_byte
        raw = self._home[start : start + tensor.num_bytes]
        if tensor.packing is not None:
            return PackedRows(raw.view(-1, tensor.row_bytes), tensor.packing)
        return raw.view(self._dtype).view(tensor.shape)

    def __len__(self) -> int:
        return (self._first_byte + len(self._home)) // self._unit_bytes

"""The matrices of the layer that is computed, unpacked where weights are packed at rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from costmodel.model.layout import LayerLayout, TensorLayout
from executor.machine.arena import Arena
from executor.model.layers import Matrix, PackedRows
from profiles.kernels import unpack_rows


class UnpackedMatrices:
    """One buffer as large as the largest layer; each matrix of a layer has its place in it.

    A matrix is unpacked when it is asked for and its place holds another layer's, so once in a pass
    over the model for all batches of a block: what comes before attention and what comes behind
    it hold different places, and may belong to different layers. (Where a GPU computes the head for
    one batch while the CPU attends for another, they take the place from each other once.)

    Parameters
    ----------
    layers
        Layouts of all layers.
    dtype
        The dtype to compute in.
    arena
        Of the device that computes.
    """

    def __init__(self, layers: Sequence[LayerLayout], dtype: torch.dtype, arena: Arena) -> None:
        size = max(c.num_matrix_elements for c in layers if c.kind != "embed")
        buffer = arena.allocate("unpacked weights", size * dtype.itemsize)
        self._buffer = buffer.view(dtype)
        # Which layer's matrix lies from where to where.
        self._held: dict[tuple[int, int], int] = {}

    def unpack(self, layer: int, tensor: TensorLayout, start: int, chunks: Sequence[torch.Tensor]
    ) -> torch.Tensor:  # fmt: skip
        """Return a matrix whose place begins at element ``start``, unpacked now if need be."""
        assert tensor.packing is not None
        end = start + tensor.num_elements
        matrix = self._buffer[start:end].view(tensor.shape)
        if self._held.get((start, end)) == layer:
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
        self._held[start, end] = layer
        return matrix


class PackedLayer(Mapping[str, Sequence[Matrix]]):
    """The tensors of one layer: matrices are unpacked as they are asked for, or with ``is_direct``
    left as they lie, to be multiplied so."""

    def __init__(
        self,
        layout: LayerLayout,
        packed: Mapping[str, Sequence[torch.Tensor]],
        matrices: UnpackedMatrices,
        index: int,
        *,
        is_direct: bool,
    ) -> None:
        self._layout = layout
        self._packed = packed
        self._matrices = matrices
        self._index = index
        self._is_direct = is_direct

    def __getitem__(self, name: str) -> Sequence[Matrix]:
        start = 0
        for tensor in self._layout.tensors:
            if tensor.name == name and tensor.packing is not None:
                if self._is_direct:
                    return [PackedRows(chunk, tensor.packing) for chunk in self._packed[name]]
                return [self._matrices.unpack(self._index, tensor, start, self._packed[name])]
            start += tensor.num_elements if tensor.packing else 0
        return self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

"""The decoded matrices of the current layer, where stored weights are compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from costmodel.model.layout import LayerLayout
from costmodel.model.tensor_layout import TensorLayout
from executor.machine.arena import Arena
from executor.model.matrices import CompressedMatrix, Matrix, OneByOne, decode
from executor.stores.tensor_views import TensorView


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


class UnpackedLayer(Mapping[str, Sequence[Matrix]]):
    """The tensors of one layer. Compressed matrices are unpacked on access."""

    def __init__(
        self, tensors: Sequence[TensorView], matrices: UnpackedMatrices, index: int
    ) -> None:
        self._matrices = matrices
        self._index = index
        # Each tensor with its place in the buffer, by name: rows of a matrix may be several.
        self._tensors: dict[str, list[tuple[TensorView, int]]] = {}
        start = 0
        for tensor in tensors:
            self._tensors.setdefault(tensor.name, []).append((tensor, start))
            if not tensor.layout.is_plain:
                start += tensor.layout.num_elements

    def __getitem__(self, name: str) -> Sequence[Matrix]:
        found: list[Matrix] = []
        for tensor, start in self._tensors[name]:
            if tensor.layout.is_plain and tensor.is_expert:
                # Some may not be loaded, so that they are not listed.
                return tensor.chunks
            if tensor.layout.is_plain:
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
        self, matrices: UnpackedMatrices, layer: int, tensor: TensorView, start: int
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
    def compressed(self) -> Sequence[CompressedMatrix] | None:
        """The same matrices compressed, all of which are valid; ``None`` for sorted inputs."""
        return None if self._tensor.is_sorted else self._compressed

"""Products with matrices in row chunks: a placement may cut a matrix between two rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from profiles import kernels
from profiles.kernels import EncodedMatrix
from profiles.packing import Packing


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of a packed matrix that is multiplied without unpacking it: uint8 [rows, row_bytes]."""

    rows: torch.Tensor
    packing: Packing

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and elements of the matrix."""
        return len(self.rows), self.packing.num_elements

    def __getitem__(self, part: slice) -> PackedRows:
        """Return some of the rows, as a view."""
        return PackedRows(self.rows[part], self.packing)

    def clone(self) -> PackedRows:
        """Return a copy in memory of its own."""
        return PackedRows(self.rows.clone(), self.packing)


# Quantized by us, or encoded as the checkpoint has it.
CompressedMatrix = PackedRows | EncodedMatrix
Matrix = torch.Tensor | CompressedMatrix
# Tensor name -> the row chunks of the tensor, in order; a vector has one. Tensors of experts have
# one whole matrix for each expert instead, and rows that are stored in another way than the first
# have a name of their own (see ``row_parts``).
LayerWeights = Mapping[str, Sequence[Matrix]]


def linear(
    x: torch.Tensor, chunks: Sequence[Matrix], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply ``x`` [..., in] by a matrix [out, in] in row chunks; returns [..., out].

    Allocates the result only: every chunk's product is written to its columns directly.
    """
    if len(chunks) == 1 and isinstance(chunks[0], torch.Tensor):
        rows = x.reshape(-1, x.shape[-1])
        return kernels.linear(rows, chunks[0], bias).view(*x.shape[:-1], chunks[0].shape[0])
    out = x.new_empty(*x.shape[:-1], sum(chunk.shape[0] for chunk in chunks))
    _multiply_chunks(x, chunks, bias, out, adds=False)
    return out


def add_linear(
    x: torch.Tensor, chunks: Sequence[Matrix], bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Add ``linear(x, chunks, bias)``, rounded, to ``out`` [..., out] in place."""
    _multiply_chunks(x, chunks, bias, out, adds=True)


def _multiply_chunks(
    x: torch.Tensor,
    chunks: Sequence[Matrix],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    adds: bool,
) -> None:
    rows, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    first = 0
    for chunk in chunks:
        columns = slice(first, first + chunk.shape[0])
        own_bias = None if bias is None else bias[columns]
        multiply(rows, chunk, out[:, columns], own_bias, adds=adds)
        first += chunk.shape[0]


def multiply(
    x: torch.Tensor,
    matrix: Matrix,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """Multiply ``x`` [rows, in] by one matrix and write the product to ``out`` [rows, out], or add
    it; both are dense in their last dimension."""
    if isinstance(matrix, PackedRows):
        kernels.multiply_rows(x, matrix.rows, matrix.packing, out, bias, adds=adds)
    elif isinstance(matrix, EncodedMatrix):
        kernels.multiply_encoded(x, matrix, out, bias, adds=adds)
    else:
        kernels.linear(x, matrix, bias, out, adds=adds)


def multiply_groups(
    x: torch.Tensor,
    matrices: Sequence[Matrix],
    groups: Sequence[tuple[int, slice]],
    out: torch.Tensor,
    biases: Sequence[Matrix] | None = None,
    part: slice = slice(None),  # immutable
) -> None:
    """Fill rows of ``out`` [rows, out] with those of ``x`` [rows, in] times their group's matrix.

    Parameters
    ----------
    matrices
        Matrices that are unpacked one at a time (``OneByOne``) are multiplied one by one, unless
        kernels multiply the packed ones.
    groups
        The number of each group's matrix and its rows; groups are adjacent and in order.
    biases
        Vectors that are added, by the number of the matrix.
    part
        The elements of these vectors that belong to the matrices' rows.
    """
    own = {number: _vector_of(biases, number)[part] for number, _ in groups} if biases else {}
    if isinstance(matrices, OneByOne) and kernels.groups_packed(x, len(groups)):
        matrices = matrices.compressed or matrices
    if isinstance(matrices, OneByOne) or not groups:
        for number, part in groups:
            multiply(x[part], matrices[number], out[part], own.get(number))
        return
    chosen = [matrices[number] for number, _ in groups]
    counts = [part.stop - part.start for _, part in groups]
    added = list(own.values()) or None
    packed = [matrix for matrix in chosen if isinstance(matrix, PackedRows)]
    encoded = [matrix for matrix in chosen if isinstance(matrix, EncodedMatrix)]
    plain = [matrix for matrix in chosen if isinstance(matrix, torch.Tensor)]
    if encoded:
        kernels.grouped_encoded(x, counts, encoded, out, biases=added)
    elif packed:
        rows = [matrix.rows for matrix in packed]
        kernels.grouped_linear(x, counts, rows, out, packing=packed[0].packing, biases=added)
    else:
        kernels.grouped_linear(x, counts, plain, out, biases=added)


def _vector_of(vectors: Sequence[Matrix], number: int) -> torch.Tensor:
    found = vectors[number]
    assert isinstance(found, torch.Tensor)
    return found


class OneByOne(Sequence[Matrix]):
    """Matrices of which one is unpacked at a time: it is valid until the next one is accessed."""

    @property
    @abstractmethod
    def compressed(self) -> Sequence[CompressedMatrix] | None:
        """The same matrices compressed, all of which are valid; ``None`` where no kernel reads
        them."""


def decode(matrix: CompressedMatrix, out: torch.Tensor) -> None:
    """Fill ``out`` [rows, in], dense in its last dimension, with the elements of a matrix."""
    if isinstance(matrix, PackedRows):
        kernels.unpack_rows(matrix.rows[None], matrix.packing, out[None])
    else:
        kernels.unpack_encoded(matrix, out)


def row_parts(
    weights: LayerWeights, name: str, num_rows: int
) -> Iterator[tuple[slice, Sequence[Matrix]]]:
    """Yield the rows of experts' matrices that are stored alike, and the matrices of these rows.

    Rows behind the first ones have the name of the tensor and the number of their first row.
    """
    numbers = (key.removeprefix(f"{name}.") for key in weights if key.startswith(f"{name}."))
    starts = [0, *sorted(int(number) for number in numbers if number.isdecimal()), num_rows]
    for first, past in pairwise(starts):
        yield slice(first, past), weights[f"{name}.{first}" if first else name]


def split_rows(chunks: Sequence[Matrix], row: int) -> tuple[list[Matrix], list[Matrix]]:
    """Cut a matrix in row chunks into the rows before ``row`` and the rest, as views."""
    before: list[Matrix] = []
    behind: list[Matrix] = []
    for chunk in chunks:
        kept = min(max(row, 0), chunk.shape[0])
        if kept:
            before.append(chunk[:kept])
        if kept < chunk.shape[0]:
            behind.append(chunk[kept:])
        row -= chunk.shape[0]
    return before, behind


def vector(weights: LayerWeights, name: str) -> torch.Tensor:
    """Return a vector, which is never cut or packed."""
    (found,) = weights[name]
    assert isinstance(found, torch.Tensor)
    return found


def bias_of(weights: LayerWeights, name: str) -> torch.Tensor | None:
    """Return the bias of a projection, or ``None``."""
    return vector(weights, f"{name}.bias") if f"{name}.bias" in weights else None

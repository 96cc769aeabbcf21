"""Random rows of matrices that are encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from costmodel.model.layout import ComponentLayout
from costmodel.model.tensor_layout import TensorLayout
from executor.checkpoint.row_reader import RowRange
from profiles.encodings import BLOCK_ENCODINGS, Encoding, Kind

# As scales, in any float, such bytes are small and neither infinite nor subnormal, which would be
# slow; as codes, they are of all sizes.
LEAST_BYTE, BYTE_MASK = 0x10, 0x1F
# Of MXFP4, the exponent of 2^-7.
EXPONENT = 120
TABLE_VALUE = 0.01

# For a name, the uint8 elements of its pattern from one on.
FillBytes = Callable[[str, int, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class DummyRows:
    """The rows of one tensor of a layout (see ``RowReader``)."""

    tensor: TensorLayout
    name: str
    fill: FillBytes

    @property
    def encoding(self) -> Encoding:
        """That of the layout; of rows that are not encoded, one that can be decoded."""
        return self.tensor.encoding or BLOCK_ENCODINGS["BF16"]

    @property
    def num_rows(self) -> int:
        """Rows of the tensor."""
        return self.tensor.num_rows

    @property
    def num_elements(self) -> int:
        """Elements of a row."""
        return self.tensor.shape[-1]

    def read(self, first: int, rows: torch.Tensor) -> None:
        """Fill uint8 [count, row_bytes] with random rows."""
        self.fill(self.name, first * rows.shape[1], rows.view(-1))
        rows.bitwise_and_(BYTE_MASK).add_(LEAST_BYTE)
        if self.encoding.kind is Kind.MXFP4:
            rows.view(len(rows), -1, self.encoding.block_bytes)[..., 0] = EXPONENT

    def table(self) -> torch.Tensor | None:
        """Return small scales."""
        count = self.encoding.table_elements(self.num_rows, self.num_elements)
        return torch.full((count,), TABLE_VALUE) if count else None

    def order(self) -> torch.Tensor:
        """Return the inputs in order."""
        return torch.arange(self.num_elements)


def dummy_rows(
    layout: ComponentLayout, label: str, fill: FillBytes, name: str, unit: int
) -> Sequence[RowRange]:
    """Return all rows of a matrix of a layout that has encoded ones.

    ``label`` names the matrix in the model.
    """
    return [
        RowRange(
            reader=DummyRows(tensor, f"{label}.{unit}.{name}.{tensor.first_row}", fill),
            first_row=0,
            num_rows=tensor.num_rows,
        )
        for tensor in layout.tensors
        if tensor.name == name
    ]

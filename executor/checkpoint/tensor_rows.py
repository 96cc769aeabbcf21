"""Rows of tensors whose bytes are those of our encodings: all of GGUF files, and plain floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint.row_reader import RowReader
from executor.checkpoint.safetensors_file import read_into
from profiles.encodings import BLOCK_ENCODINGS, Encoding, Kind
from profiles.errors import InputError

# All ones in the exponent of a float16.
_NO_NUMBER = 0x7C00


@dataclass(frozen=True, slots=True)
class TensorRows(RowReader):
    """The rows of one tensor (see ``RowReader``), those of all experts."""

    entry: TensorEntry

    @property
    def name(self) -> str:
        """The tensor, and its file."""
        return f"tensor {self.entry.name} of {self.entry.path.name}"

    @property
    def encoding(self) -> Encoding:
        """That of the file."""
        return BLOCK_ENCODINGS[self.entry.dtype]

    @property
    def num_rows(self) -> int:
        """Rows, those of all experts."""
        return self.entry.num_bytes // self.encoding.row_bytes(self.num_elements)

    @property
    def num_elements(self) -> int:
        """Elements of a row."""
        return self.entry.shape[-1]

    def read(self, first: int, rows: torch.Tensor) -> None:
        """Fill uint8 [count, row_bytes] with the rows from ``first`` on.

        Raises
        ------
        InputError
            Where a scale is infinite or no number.
        """
        assert rows.is_contiguous() and rows.shape[1] == self.encoding.row_bytes(self.num_elements)
        offset = self.entry.offset_bytes + first * rows.shape[1]
        read_into(self.entry.path, offset, rows.flatten().numpy().data)
        if not _has_numbers(rows, self.encoding):
            raise InputError(
                self.name,
                got="a scale that is infinite or no number",
                allowed="numbers",
                hint="download the file again",
            )


def _has_numbers(rows: torch.Tensor, encoding: Encoding) -> bool:
    blocks = rows.view(-1, encoding.block_bytes)
    if encoding.kind is Kind.MXFP4:
        return not bool((blocks[:, 0] == 255).any())
    for at in encoding.halves_at:
        halves = blocks[:, at : at + 2].contiguous().view(torch.int16)
        if bool(((halves & _NO_NUMBER) == _NO_NUMBER).any()):
            return False
    return True

"""Rows of quantized matrices in safetensors files, whose tensors are read and repacked by parts.

A reader is made of the tensors of one module, whose shapes have been checked (see
``quantized_tensors``). It reads those parts that have the wanted rows, and nothing is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from costmodel.model.tensor_entry import TensorEntry
from profiles.encodings import Encoding
from profiles.errors import InputError
from profiles.units import MIB

# A word of int32 has zero points, or codes, of so many outputs.
WORD_ROWS = 8
# Rows that are repacked at once; temporaries are some ten times as large.
PIECE_BYTES = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows(ABC):
    """The rows of one quantized matrix (see ``RowReader``).

    Parameters
    ----------
    name
        The module, as errors name it.
    stored
        Its tensors, by the ends of their names.
    """

    name: str
    stored: Mapping[str, TensorEntry]
    encoding: Encoding
    num_rows: int
    num_elements: int
    is_sorted: bool = False

    def read(self, first: int, rows: torch.Tensor) -> None:
        """Fill uint8 [count, row_bytes] with the rows from ``first`` on."""
        step = max(1, PIECE_BYTES // rows.shape[1] // WORD_ROWS) * WORD_ROWS
        past, begin = first + len(rows), first // WORD_ROWS * WORD_ROWS
        while begin < past:
            # A piece ends with a word, because the next one begins with one.
            end = min(begin + step, -(-past // WORD_ROWS) * WORD_ROWS, self.num_rows)
            low, high = max(first, begin), min(past, end)
            made = self._named(begin, end)
            rows[low - first : high - first] = made[low - begin : high - begin]
            begin = end

    def table(self) -> torch.Tensor | None:
        """Return the table of the whole matrix; most layouts have none."""
        return None

    def order(self) -> torch.Tensor | None:
        """Return the input of each element of a row, where inputs are sorted."""
        return None

    @abstractmethod
    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Return rows of the encoding, uint8 [past - first, row_bytes]; ``first`` begins a word."""

    def _named(self, first: int, past: int) -> torch.Tensor:
        try:
            return self.repacked(first, past)
        except InputError as error:
            raise error.inside(self.name) from None

    def _finite(self, table: torch.Tensor) -> torch.Tensor:
        if not table.isfinite().all():
            raise InputError(f"scales of {self.name}", got="NaN or infinity", allowed="numbers")
        return table

    def _group_size(self) -> int:
        return self.encoding.group_elements or -1

    def _bits(self) -> int:
        return 8 * self.encoding.block_bytes // self.encoding.block_elements

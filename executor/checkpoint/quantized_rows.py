"""Rows of quantized matrices in safetensors files, each layout's tensors read and repacked by
parts.

A reader is made of the tensors of one module, whose shapes have been checked (see
``quantized_tensors``). It reads those parts that have the wanted rows, and nothing is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint import repacking
from executor.checkpoint.stored_blocks import read_columns, read_rows, read_whole
from profiles.encodings import NESTED_VALUES, Encoding
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix
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


class _GroupedRows(QuantizedRows):
    """Integers whose groups may be scattered over the inputs."""

    __slots__ = ()
    order_name = ""

    def order(self) -> torch.Tensor | None:
        """Return the input of each element of a row, where inputs are sorted."""
        g_idx = self._g_idx()
        columns = None
        if g_idx is not None:
            try:
                columns = repacking.sorted_inputs(g_idx, self.num_elements, self._group_size())
            except InputError as error:
                raise error.inside(self.name) from None
        if self.is_sorted:
            return torch.arange(self.num_elements) if columns is None else columns
        if columns is not None:
            raise InputError(
                f"{self.order_name} of {self.name}",
                got="groups that are scattered over the inputs",
                allowed="adjacent groups, as quantization_config says",
            )
        return None

    def _g_idx(self) -> torch.Tensor | None:
        entry = self.stored.get(self.order_name)
        return None if entry is None else read_whole(entry)

    def _ordered(self, matrix: EncodedMatrix) -> torch.Tensor:
        if matrix.columns is not None and not self.is_sorted:
            self.order()
        return matrix.rows


class GptqRows(_GroupedRows):
    """Rows of GPTQ, which are columns of its tensors."""

    __slots__ = ()
    order_name = "g_idx"
    zeros_add = 1

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        per = 32 // self._bits()
        matrix = repacking.from_gptq(
            read_columns(self.stored["qweight"], first, past),
            read_columns(self.stored["qzeros"], first // per, -(-past // per)),
            read_columns(self.stored["scales"], first, past),
            self._g_idx(),
            bits=self._bits(),
            group_size=self._group_size(),
            is_v1=self.zeros_add == 1,
        )
        return self._ordered(matrix)


class GptqV2Rows(GptqRows):
    """Rows of GPTQ whose zero points are stored as they are."""

    __slots__ = ()
    zeros_add = 0


class AwqRows(QuantizedRows):
    """Rows of AWQ, which are parts of words of its tensors."""

    __slots__ = ()

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        words = first // WORD_ROWS, -(-past // WORD_ROWS)
        matrix = repacking.from_awq(
            read_columns(self.stored["qweight"], *words),
            read_columns(self.stored["qzeros"], *words),
            read_columns(self.stored["scales"], first, past),
            group_size=self._group_size(),
        )
        return matrix.rows


class PackedIntegerRows(_GroupedRows):
    """Rows of compressed-tensors in its format ``pack-quantized``."""

    __slots__ = ()
    order_name = "weight_g_idx"

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        self._check_shape()
        per, zeros = 32 // self._bits(), self.stored.get("weight_zero_point")
        matrix = repacking.from_compressed(
            read_rows(self.stored["weight_packed"], first, past),
            read_rows(self.stored["weight_scale"], first, past),
            None if zeros is None else read_rows(zeros, first // per, -(-past // per)),
            self._g_idx(),
            bits=self._bits(),
            group_size=self._group_size(),
            num_inputs=self.num_elements,
        )
        return self._ordered(matrix)

    def _check_shape(self) -> None:
        entry = self.stored.get("weight_shape")
        wanted = [self.num_rows, self.num_elements]
        if entry is not None and (found := read_whole(entry).tolist()) != wanted:
            raise InputError(f"weight_shape of {self.name}", got=found, allowed=f"{wanted}")


class Int8Rows(QuantizedRows):
    """Rows of compressed-tensors in its format ``int-quantized``."""

    __slots__ = ()

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        scales = read_rows(self.stored["weight_scale"], first, past)
        return repacking.from_int8(read_rows(self.stored["weight"], first, past), scales).rows


class Fp8Rows(QuantizedRows):
    """Rows of 8-bit floats: those of the file, and a table of the scales of tiles."""

    __slots__ = ()
    scale_name = "weight_scale_inv"

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Return some rows."""
        return read_rows(self.stored["weight"], first, past)

    def table(self) -> torch.Tensor:
        """Return the scales, float32. The one of a whole matrix is repeated for each row, where the
        encoding has one a row."""
        scales = read_whole(self.stored[self.scale_name])
        if scales.dtype == torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        table = self._finite(scales.float().flatten())
        # The only tile of a small matrix has one scale, too, and no other.
        has_row_scales = (self.encoding.tile_rows, self.encoding.tile_columns) == (1, 0)
        return table.repeat(self.num_rows) if has_row_scales and len(table) == 1 else table


class CompressedFp8Rows(Fp8Rows):
    """8-bit floats of compressed-tensors, ``float-quantized``."""

    __slots__ = ()
    scale_name = "weight_scale"


class Bnb8Rows(QuantizedRows):
    """Rows of bitsandbytes in 8 bits."""

    __slots__ = ()

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        largest = read_rows(self.stored["SCB"], first, past)
        return repacking.from_bnb8(read_rows(self.stored["weight"], first, past), largest).rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Bnb4Rows(QuantizedRows):
    """Rows of bitsandbytes in 4 bits.

    Parameters
    ----------
    offset
        That of nested scales; ``None`` where scales are floats.
    """

    offset: float | None = None

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        size = self.encoding.group_elements
        codes, blocks = self.num_elements // 2, self.num_elements // size
        return repacking.from_bnb4(
            read_whole(self.stored["weight"], first * codes, past * codes),
            read_whole(self.stored["weight.absmax"], first * blocks, past * blocks),
            shape=(past - first, self.num_elements),
            block_size=size,
        )

    def table(self) -> torch.Tensor:
        """Return what codes mean, and the scales of the scales."""
        parts = [read_whole(self.stored["weight.quant_map"])]
        if self.offset is not None:
            meanings = read_whole(self.stored["weight.nested_quant_map"])
            assert len(meanings) == NESTED_VALUES
            parts += [meanings, torch.tensor([self.offset])]
            parts.append(read_whole(self.stored["weight.nested_absmax"]))
        return self._finite(torch.cat([part.float() for part in parts]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Rows(QuantizedRows):
    """Rows of one expert of gpt-oss: every ``step``-th one of its tensors from ``begin`` on."""

    begin: int = 0
    step: int = 1

    def of_expert(self, expert: int, part: int, num_parts: int) -> Mxfp4Rows:
        """Return the rows of one expert's matrix, or of one of the parts that take turns in it."""
        begin = expert * self.num_rows + part
        rows = self.num_rows // num_parts
        return Mxfp4Rows(
            name=self.name,
            stored=self.stored,
            encoding=self.encoding,
            num_rows=rows,
            num_elements=self.num_elements,
            begin=begin,
            step=num_parts,
        )

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        low = self.begin + first * self.step
        high = self.begin + (past - 1) * self.step + 1
        blocks, scales = (
            read_rows(self.stored[part], low, high, flat=True)[:: self.step]
            for part in ("_blocks", "_scales")
        )
        return repacking.from_mxfp4(blocks.unflatten(1, (scales.shape[1], -1)), scales)

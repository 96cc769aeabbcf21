"""Rows of quantized integers in safetensors files, each layout in a class of its own."""

from __future__ import annotations

import torch

from executor.checkpoint import repacking
from executor.checkpoint.quantized_rows import WORD_ROWS, QuantizedRows
from executor.checkpoint.stored_blocks import read_columns, read_rows, read_whole
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix


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


class Bnb8Rows(QuantizedRows):
    """Rows of bitsandbytes in 8 bits."""

    __slots__ = ()

    def repacked(self, first: int, past: int) -> torch.Tensor:
        """Repack some rows."""
        largest = read_rows(self.stored["SCB"], first, past)
        return repacking.from_bnb8(read_rows(self.stored["weight"], first, past), largest).rows

"""Rows of quantized floats in safetensors files: 8 bits with scales, and 4 bits with a meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor.checkpoint import repacking
from executor.checkpoint.quantized_rows import QuantizedRows
from executor.checkpoint.stored_blocks import read_rows, read_whole
from profiles.encodings import NESTED_VALUES


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

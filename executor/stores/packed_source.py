"""A source of weights that packs matrices when they are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from costmodel.model.layout import ComponentLayout, unpacked_layout
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_layout import TensorLayout
from executor.checkpoint.folder import WeightSource
from profiles.compute_plan import DTYPES
from profiles.errors import InputError
from profiles.kernels import pack_rows
from profiles.units import MIB

# Bytes of elements in the model's own dtype that are packed at once.
PIECE_BYTES = 2 * MIB
# Tables of which a prompt needs only some rows.
GATHERED = ("tokens.weight", "positions.weight")
# NaN in bfloat16, low byte first. A row with it as scale and minimum unpacks to NaN.
NAN_BYTES = (0xC0, 0x7F)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """Packs the matrices of another source, in pieces, as a packed layout says."""

    source: WeightSource

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes and compute dtype."""
        return self.source.spec

    @property
    def fingerprint(self) -> str:
        """A hash of the unpacked weights and the fact that they are packed."""
        return hashlib.sha256(f"packed {self.source.fingerprint}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the unpacked weights have changed."""
        self.source.check_unchanged()

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Pack part of one component (see ``WeightSource.read_range``).

        Raises
        ------
        InputError
            Naming the tensor with a value that is not finite. Rows of embedding tables may have
            one: such a row unpacks to NaN, and only its own token uses it.
        """
        out.zero_()
        plain = unpacked_layout(layout, self.spec)
        for unit in layout.units_between(start, start + len(out)):
            for tensor, unpacked in zip(layout.tensors, plain.tensors, strict=True):
                offset = unit * layout.unit_bytes + tensor.offset_bytes
                plain_offset = unit * plain.unit_bytes + unpacked.offset_bytes
                low = max(offset, start)
                high = min(offset + tensor.num_bytes, start + len(out))
                if low >= high:
                    continue
                target, first = out[low - start : high - start], low - offset
                if tensor.packing is None:
                    self.source.read_range(index, plain, plain_offset + first, target)
                else:
                    self._pack(index, plain, (tensor, unpacked, plain_offset), first, target)

    def _pack(
        self,
        index: int,
        plain: ComponentLayout,
        tensors: tuple[TensorLayout, TensorLayout, int],
        first: int,
        target: torch.Tensor,
    ) -> None:
        """Fill ``target`` with the packed bytes of a tensor from ``first`` on."""
        tensor, unpacked, plain_offset = tensors
        assert tensor.packing is not None
        size, end = tensor.row_bytes, first + len(target)
        end_row, step = -(-end // size), max(1, PIECE_BYTES // unpacked.row_bytes)
        for row in range(first // size, end_row, step):
            count = min(step, end_row - row)
            values = torch.empty(count * unpacked.row_bytes, dtype=torch.uint8)
            position = plain_offset + row * unpacked.row_bytes
            self.source.read_range(index, plain, position, values)
            packed = torch.empty(1, count, size, dtype=torch.uint8)
            elements = values.view(DTYPES[self.spec.dtype]).view(1, count, -1)
            is_bad = torch.zeros(count, dtype=torch.bool)
            if tensor.name in GATHERED:
                is_bad = ~elements[0].isfinite().all(dim=-1)
                elements[0, is_bad] = 0
            if not pack_rows(elements, tensor.packing, packed):
                raise InputError(
                    f"tensor {tensor.name} of {plain.name} of layer {index} of {self.spec.name}",
                    got="a value that is not finite",
                    allowed="numbers, which alone can be quantized",
                )
            shared = packed[0, :, tensor.packing.code_bytes :]
            shared[is_bad] = torch.tensor(NAN_BYTES, dtype=torch.uint8).repeat(shared.shape[1] // 2)
            low, high = max(first, row * size), min(end, (row + count) * size)
            target[low - first : high - first] = packed.flatten()[low - row * size :][: high - low]

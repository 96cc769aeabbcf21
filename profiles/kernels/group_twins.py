"""Packing in plain torch: a reference for the kernels, and a fallback where they are missing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from profiles.packing import Packing

# Elements that are packed or unpacked at once; temporaries are some ten times as large.
PIECE_ELEMENTS = 2**19


def pack_rows_twin(x: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """See ``profiles.kernels.pack_rows``."""
    for elements, packed in _pieces(x, out):
        _pack(elements, packing, packed)


def unpack_rows_twin(packed: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    """See ``profiles.kernels.unpack_rows``."""
    for elements, piece in _pieces(out, packed):
        _unpack(piece, packing, elements)


def _pieces(
    elements: torch.Tensor, packed: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield equal parts of elements and packed rows, of about ``PIECE_ELEMENTS`` each."""
    if len(elements) == 1:
        elements, packed = elements.transpose(0, 1), packed.transpose(0, 1)
    step = max(1, PIECE_ELEMENTS // max(1, elements[:1].numel()))
    yield from zip(elements.split(step), packed.split(step), strict=True)


def _pack(x: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    out[..., _used_bytes(packing) : packing.code_bytes] = 0
    for groups, codes, part in _parts(x.float(), out, packing):
        shared = out[..., packing.code_bytes :].unflatten(-1, (packing.num_groups, 4))
        _pack_groups(groups, packing.bits, codes, shared[..., part, :])


def _unpack(packed: torch.Tensor, packing: Packing, out: torch.Tensor) -> None:
    shared = packed[..., packing.code_bytes :].contiguous().view(torch.bfloat16).float()
    scale, minimum = shared.unflatten(-1, (packing.num_groups, 2)).unbind(-1)
    for groups, codes, part in _parts(out, packed, packing):
        values = codes
        if packing.bits == 4:
            values = torch.cat([codes & 15, codes >> 4], dim=-1)[..., : groups.shape[-1]]
        # Halved in between, because a group may span more than the largest float.
        half, base = (x[..., part, None] * 0.5 for x in (scale, minimum))
        groups.copy_(torch.addcmul(base, values.float(), half) * 2)


def _parts(
    rows: torch.Tensor, packed: torch.Tensor, packing: Packing
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Yield the whole groups, then the short one, where there are any: elements
    [..., groups, size], codes [..., groups, bytes] and the slice of groups."""
    size = packing.group_size
    whole = packing.num_elements // size
    end, end_bytes = whole * size, whole * size * packing.bits // 8
    if whole:
        elements = rows[..., :end].unflatten(-1, (whole, size))
        yield elements, packed[..., :end_bytes].unflatten(-1, (whole, -1)), slice(whole)
    if whole < packing.num_groups:
        codes = packed[..., end_bytes : _used_bytes(packing)]
        yield rows[..., None, end:], codes[..., None, :], slice(whole, None)


def _used_bytes(packing: Packing) -> int:
    return -(-packing.num_elements * packing.bits // 8)


def _pack_groups(x: torch.Tensor, bits: int, codes: torch.Tensor, shared: torch.Tensor) -> None:
    top = 2**bits - 1
    least, most = x.amin(-1), x.amax(-1)
    minimum = torch.where(least < 0, _rounded_out(least), _rounded_in(least))
    # Where the range itself is beyond float32, everything is halved.
    half = torch.where((most - minimum).isfinite(), 1.0, 0.5)
    scale = _rounded_out((most * half - minimum * half) / top / half)
    half = half[..., None]
    pairs = torch.stack([scale, minimum], -1).to(torch.bfloat16)
    shared.copy_(pairs.view(torch.uint8))
    base, step = minimum[..., None] * half, scale[..., None] * half
    steps = torch.where(step > 0, (x * half - base) / step, 0.0)
    code = (steps + 0.5).to(torch.int32).clamp(max=top).to(torch.uint8)
    if bits == 4:
        low, high = code[..., : codes.shape[-1]], code[..., codes.shape[-1] :]
        code = low.clone()
        code[..., : high.shape[-1]] |= high << 4
    codes.copy_(code)


def _rounded_out(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16 away from zero."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _rounded_in(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16 towards zero."""
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)

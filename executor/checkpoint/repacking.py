"""Tensors of quantized checkpoints as encoded rows, without loss.

Files of safetensors keep codes, scales and zero points in tensors of their own, in orders that suit
one library. Here they become the rows of ``profiles.encodings``: once, when weights are loaded. No
value changes, and no byte is added but to fill the last one of a row's zero points.

Matrices are [outputs, inputs]. Temporaries are some four times as large as the codes, so that large
matrices are repacked by parts of their outputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from executor.checkpoint.packed_codes import (
    LOW_HALVES,
    as_bytes,
    in_pairs,
    in_runs,
    words_as_codes,
)
from profiles.encodings import BNB_INT8, NIBBLE_RUN, Encoding, integers
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix

# Where a word of AWQ has the codes of its eight outputs: places in low halves of bytes come first.
_AWQ_PLACES = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    is_v1: bool,
) -> EncodedMatrix:
    """Repack a matrix of GPTQ, whose words hold codes of adjacent inputs, the first lowest.

    Parameters
    ----------
    qweight
        int32 [inputs * bits / 32, outputs].
    qzeros
        int32 [groups, outputs * bits / 32]. The first version of the format stores each zero point
        less one.
    scales
        float [groups, outputs].
    g_idx
        int32 [inputs], the group of each input. Where groups are not adjacent ("act-order"), inputs
        are sorted by them: see ``EncodedMatrix.columns``.
    group_size
        -1 for one group.
    """
    codes = words_as_codes(qweight.t(), bits)
    zeros = words_as_codes(qzeros, bits)
    if is_v1:
        zeros = (zeros + 1) & (2**bits - 1)
    columns = sorted_inputs(g_idx, codes.shape[1], group_size)
    inputs = codes.shape[1]
    codes = _stored(codes, bits, columns)
    return _grouped(codes, inputs, scales.t(), zeros.t(), bits, group_size, columns)


def from_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, group_size: int
) -> EncodedMatrix:
    """Repack a matrix of AWQ in its ``gemm`` layout: 4 bits, words of eight adjacent outputs.

    Parameters
    ----------
    qweight
        int32 [inputs, outputs / 8].
    qzeros
        int32 [groups, outputs / 8].
    scales
        float [groups, outputs].
    """

    inputs = len(qweight)
    padded = F.pad(qweight, (0, 0, 0, -inputs % NIBBLE_RUN))
    # Words have one input each, so that a run of inputs is packed before outputs are told apart.
    low, high = padded.unflatten(0, (-1, 2, NIBBLE_RUN // 2)).unbind(1)
    lows = low & LOW_HALVES | (high & LOW_HALVES) << 4
    highs = (low >> 4) & LOW_HALVES | ((high >> 4) & LOW_HALVES) << 4
    codes = _awq_outputs(lows.flatten(0, 1), highs.flatten(0, 1))
    zeros = _awq_outputs(qzeros & LOW_HALVES, (qzeros >> 4) & LOW_HALVES)
    return _grouped(codes, inputs, scales.t(), zeros, 4, group_size, None)


def _awq_outputs(lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """Return uint8 [outputs, n] of the bytes of words [n, outputs / 8]."""
    if lows.dtype != torch.int32:
        raise InputError("packed codes", got=lows.dtype, allowed="int32")
    places = torch.stack([lows, highs], dim=-1).flatten(1).view(torch.uint8).t().contiguous()
    own = torch.arange(len(places)).unflatten(0, (-1, 8))[:, _AWQ_PLACES]
    return places.index_select(0, own.flatten())


def from_compressed(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    num_inputs: int,
) -> EncodedMatrix:
    """Repack a matrix of compressed-tensors (``pack-quantized``).

    Parameters
    ----------
    packed
        int32 [outputs, ceil(inputs * bits / 32)], of signed codes plus half of their range.
    scale
        float [outputs, groups].
    zero_point
        int32 [ceil(outputs * bits / 32), groups], packed along the outputs; without it codes are
        symmetric.
    group_size
        -1 for one scale an output.
    """
    codes = words_as_codes(packed, bits)[:, :num_inputs]
    zeros = None
    if zero_point is not None:
        zeros = words_as_codes(zero_point.t(), bits)[:, : len(codes)].t()
    columns = sorted_inputs(g_idx, num_inputs, group_size)
    codes = _stored(codes, bits, columns)
    return _grouped(codes, num_inputs, scale, zeros, bits, group_size, columns)


def from_int8(weight: torch.Tensor, scale: torch.Tensor) -> EncodedMatrix:
    """Repack int8 [outputs, inputs] with one scale an output (``int-quantized``)."""
    codes = weight.view(torch.uint8) ^ 128
    return _grouped(codes, codes.shape[1], scale.reshape(-1, 1), None, 8, -1, None)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the rows of GGUF's MXFP4 for those of gpt-oss.

    Parameters
    ----------
    blocks
        uint8 [..., outputs, groups, 16]: adjacent elements share a byte, the first in its low half.
    scales
        uint8 [..., outputs, groups]: exponents of two, plus 127.

    Returns
    -------
    torch.Tensor
        uint8 [..., outputs, groups * 17].
    """
    if blocks.shape != (*scales.shape, NIBBLE_RUN // 2):
        raise InputError(
            "MXFP4 blocks", got=list(blocks.shape), allowed=f"{[*scales.shape, NIBBLE_RUN // 2]}"
        )
    if (scales == 255).any():
        raise InputError("MXFP4 scales", got="255, which is no number", allowed="0 to 254")
    words = blocks.contiguous().view(torch.int32)
    codes = in_runs(words_as_codes(words, 4))
    return torch.cat([scales[..., None], codes], dim=-1).flatten(-2)


def from_bnb4(
    weight: torch.Tensor, absmax: torch.Tensor, *, shape: tuple[int, int], block_size: int
) -> torch.Tensor:
    """Repack rows of 4-bit floats (NF4, FP4) of bitsandbytes, without the table of the matrix.

    Parameters
    ----------
    weight
        uint8, two adjacent elements a byte, the first in its high half.
    absmax
        The scale of each block of ``block_size`` elements: float32, or uint8 where scales are
        codes.

    Returns
    -------
    torch.Tensor
        uint8 [outputs, row_bytes].
    """
    outputs, inputs = shape
    if inputs % block_size or absmax.numel() * block_size != outputs * inputs:
        raise InputError(
            "blocks of bitsandbytes",
            got=f"{absmax.numel()} of {block_size} elements for {outputs} x {inputs}",
            allowed="blocks that end with each row",
        )
    _check_finite(absmax)
    words = weight.reshape(outputs, -1).view(torch.int32)
    # As everywhere else, the first one in the low half.
    words = (words & LOW_HALVES) << 4 | (words >> 4) & LOW_HALVES
    codes = words_as_codes(words, 4)
    return torch.cat([in_runs(codes), as_bytes(absmax.reshape(outputs, -1))], dim=1)


def from_bnb8(weight: torch.Tensor, largest: torch.Tensor) -> EncodedMatrix:
    """Repack int8 [outputs, inputs] of bitsandbytes with the largest value of each output (SCB)."""
    scales = largest.float().reshape(-1, 1)
    _check_finite(scales)
    rows = torch.cat([as_bytes(weight), as_bytes(scales)], dim=1)
    return EncodedMatrix(rows=rows, encoding=BNB_INT8, num_elements=weight.shape[1])


def _stored(codes: torch.Tensor, bits: int, columns: torch.Tensor | None) -> torch.Tensor:
    """Return codes as rows have them, in another order of inputs if one is given."""
    if columns is not None:
        # Several times as fast as an index.
        codes = codes.gather(1, columns.expand(len(codes), -1))
    return in_runs(codes) if bits == 4 else codes


def _grouped(
    codes: torch.Tensor,
    inputs: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    columns: torch.Tensor | None,
) -> EncodedMatrix:
    """Join the codes of rows with scales and zero points, [outputs, groups]."""
    outputs = len(codes)
    # One group may be told as its size.
    group = 0 if group_size < 0 or group_size >= inputs else group_size
    encoding = integers(bits, group, _NAMES[scales.dtype], has_zeros=zeros is not None)
    _check_groups(encoding, scales, zeros, outputs, inputs)
    _check_finite(scales)
    parts = [codes, as_bytes(scales)]
    if zeros is not None:
        parts.append(in_pairs(zeros) if bits == 4 else zeros)
    rows = torch.cat(parts, dim=1)
    return EncodedMatrix(rows=rows, encoding=encoding, num_elements=inputs, columns=columns)


def _check_groups(
    encoding: Encoding, scales: torch.Tensor, zeros: torch.Tensor | None, outputs: int, inputs: int
) -> None:
    wanted = (outputs, encoding.num_groups(inputs))
    for what, found in (("scales", scales), ("zero points", zeros)):
        if found is not None and found.shape != wanted:
            raise InputError(
                f"{what} of {outputs} x {inputs} in groups of {encoding.group_elements or inputs}",
                got=list(found.shape),
                allowed=f"{list(wanted)}",
            )


def _check_finite(*scales: torch.Tensor) -> None:
    for values in scales:
        if values.is_floating_point() and not values.isfinite().all():
            raise InputError(
                "scales of a quantized matrix", got="NaN or infinity", allowed="numbers"
            )


def sorted_inputs(
    g_idx: torch.Tensor | None, num_inputs: int, group_size: int
) -> torch.Tensor | None:
    """Return the order of inputs in which groups are adjacent; ``None`` where they are."""
    # -1 stands for no order.
    if g_idx is None or group_size < 0 or bool((g_idx < 0).all()):
        return None
    expected = torch.arange(num_inputs, dtype=g_idx.dtype) // group_size
    if torch.equal(g_idx, expected):
        return None
    columns = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[columns], expected):
        raise InputError(
            "g_idx of a quantized matrix",
            got="groups of other sizes",
            allowed=f"{group_size} inputs in each group",
        )
    return columns

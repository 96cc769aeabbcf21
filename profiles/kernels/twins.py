"""The kernels in plain torch: a reference for the others, and a fallback where they are missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from profiles.kernels.groups import unpack_rows
from profiles.packing import UNPACKED_AT_ONCE_BYTES, Packing


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    lengths: torch.Tensor | None,
    prompt_len: int,
    packing: Packing | None,
    sparsity: float,
) -> None:
    """See ``profiles.kernels.decode_attention``."""
    tokens, _, rows, _ = context.shape
    group, head_dim = out.shape[1:]
    queries = q.reshape(-1, group, head_dim)[first_row : first_row + rows]
    seen = None
    if lengths is not None:
        slots = torch.arange(tokens, device=q.device)
        valid = (slots < lengths[:, None]) | (slots >= prompt_len)
        kv_heads = q.shape[1] // group
        seen = valid.repeat_interleave(kv_heads, dim=0)[first_row : first_row + rows]
    step = _rows_at_once(out, tokens, packing, sparsity)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        _attend_part(
            queries[part],
            context[:, :, part],
            None if seen is None else seen[part],
            packing,
            sparsity,
            out[part],
        )


def _rows_at_once(out: torch.Tensor, tokens: int, packing: Packing | None, sparsity: float) -> int:
    """Return the number of rows that are computed at once, which bounds the temporaries."""
    rows, group, head_dim = out.shape
    row_bytes = 2 * tokens * head_dim * out.element_size() if packing else 0
    if sparsity < 1:
        # Keys and values in float32, one after the other, and three tensors of scores.
        row_bytes += 4 * tokens * (head_dim + 3 * group)
    return max(1, UNPACKED_AT_ONCE_BYTES // row_bytes) if row_bytes else rows


def _attend_part(
    queries: torch.Tensor,
    context: torch.Tensor,
    seen: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
    out: torch.Tensor,
) -> None:
    """Attend to some rows. A function of its own, so that their temporaries are freed."""
    context = _unpacked(context, packing, queries.dtype)
    if sparsity < 1:
        out.copy_(_attend_sparsely(queries, context, seen, sparsity))
    else:
        out.copy_(_attend(queries, context, seen))


def _unpacked(context: torch.Tensor, packing: Packing | None, dtype: torch.dtype) -> torch.Tensor:
    if packing is None:
        return context
    tokens, _, rows, _ = context.shape
    whole = torch.empty(tokens * 2, rows, packing.num_elements, dtype=dtype, device=context.device)
    unpack_rows(context.flatten(0, 1), packing, whole)
    return whole.view(tokens, 2, rows, -1)


def _attend(
    queries: torch.Tensor, context: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """Attend with [rows, group, head_dim] to [tokens, 2, rows, head_dim]."""
    keys, values = context[:, 0].transpose(0, 1), context[:, 1].transpose(0, 1)
    mask = None if seen is None else seen[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        queries[:, None], keys[:, None], values[:, None], attn_mask=mask
    )
    return attended[:, 0]


def _attend_sparsely(
    queries: torch.Tensor, context: torch.Tensor, seen: torch.Tensor | None, sparsity: float
) -> torch.Tensor:
    keys, values = context[:, 0].transpose(0, 1), context[:, 1].transpose(0, 1)
    scores = queries.float() @ keys.float().transpose(1, 2) * queries.shape[-1] ** -0.5
    counts = torch.tensor([scores.shape[-1]], device=scores.device)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        counts = seen.sum(-1)
    # Rounded up, but not because of the product's rounding error.
    kept = (counts.double() * sparsity - 1e-9).ceil().long().clamp(min=1)
    largest = scores.topk(int(kept.max()), dim=-1).values
    least = largest.gather(2, (kept - 1)[:, None, None].expand(*scores.shape[:2], 1))
    whole = scores.softmax(-1)
    shares = whole.masked_fill(scores < least, 0)
    # The shares of dropped values go to the mean of all visible values.
    spread = (1 - shares.sum(-1, keepdim=True)) / counts.view(-1, 1, 1)
    shares += spread if seen is None else spread * seen[:, None]
    attended: torch.Tensor = shares @ values.float()
    return attended.to(queries.dtype)


def grouped_linear(
    x: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    packing: Packing | None,
    out: torch.Tensor,
) -> None:
    """See ``profiles.kernels.grouped_linear``."""
    for rows, weight, part in zip(
        x.split(list(counts)), weights, out.split(list(counts)), strict=True
    ):
        if len(rows):
            matrix = unpacked(weight, packing, x.dtype) if packing else weight
            torch.mm(rows, matrix.t(), out=part)


def unpacked(packed: torch.Tensor, packing: Packing, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a matrix, uint8 [outputs, row_bytes]."""
    matrix = packed.new_empty(1, len(packed), packing.num_elements, dtype=dtype)
    unpack_rows(packed[None], packing, matrix)
    return matrix[0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See ``profiles.kernels.rms_norm``."""
    wide = x.float()
    # The norm, unlike the mean of squares, needs no second float32 tensor.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled = wide * scale if wide is x else wide.mul_(scale)
    torch.mul(scaled.to(x.dtype), weight, out=out)


def rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, interleaved: bool = False
) -> None:
    """See ``profiles.kernels.rotate``."""
    rotated = heads[..., : 2 * cosines.shape[1]]
    cosines, sines = cosines[:, None], sines[:, None]
    # In two parts, because each part is copied.
    for part in rotated.unflatten(0, (-1, len(cosines))).chunk(2, dim=2):
        left, right = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
        right_part, left_part = right * sines, left * sines
        left.mul_(cosines).sub_(right_part)
        right.mul_(cosines).add_(left_part)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> None:
    """See ``profiles.kernels.swiglu``."""
    F.silu(gate, inplace=True).mul_(up)

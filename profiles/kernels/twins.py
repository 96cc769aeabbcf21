"""The kernels in plain torch: a reference for the others, and a fallback where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from profiles.kernels.groups import unpack_rows
from profiles.packing import UNPACKED_AT_ONCE_BYTES, Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Softmax:
    """What attention does between scores and shares (see ``profiles.kernels.decode_attention``)."""

    scale: float
    soft_cap: float | None
    sparsity: float

    def is_plain(self, sinks: torch.Tensor | None) -> bool:
        """Whether torch's own attention does the same."""
        return self.soft_cap is None and self.sparsity == 1 and sinks is None


def decode_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    void_slots: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
) -> None:
    """See ``profiles.kernels.decode_attention``."""
    tokens, _, rows, _ = context.shape
    group, head_dim = out.shape[1], q.shape[2]
    kv_heads, here = q.shape[1] // group, slice(first_row, first_row + rows)
    queries = q.reshape(-1, group, head_dim)[here]
    seen = None
    if void_slots is not None:
        slots = torch.arange(tokens, device=q.device)
        valid = (slots < void_slots[:, :1]) | (slots >= void_slots[:, 1:])
        seen = valid.repeat_interleave(kv_heads, dim=0)[here]
    if sinks is not None:
        sinks = sinks.view(kv_heads, group).repeat(len(q), 1)[here]
    softmax = _Softmax(scale=scale, soft_cap=soft_cap, sparsity=sparsity)
    # torch may make all scores of the many queries of a latent row at once.
    is_plain = softmax.is_plain(sinks) and context.shape[1] == 2
    step = _rows_at_once(queries, tokens, packing, is_plain=is_plain)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        _attend_part(
            queries[part],
            _unpacked(context[:, :, part], packing, q.dtype),
            None if seen is None else seen[part],
            None if sinks is None else sinks[part],
            softmax,
            out[part],
        )


def _rows_at_once(
    queries: torch.Tensor, tokens: int, packing: Packing | None, *, is_plain: bool
) -> int:
    """Return the number of rows that are computed at once, which bounds the temporaries."""
    rows, group, head_dim = queries.shape
    row_bytes = 2 * tokens * head_dim * queries.element_size() if packing else 0
    if not is_plain:
        # Keys and values in float32, one after the other, and three tensors of scores.
        row_bytes += 4 * tokens * (head_dim + 3 * group)
    return max(1, UNPACKED_AT_ONCE_BYTES // row_bytes) if row_bytes else rows


def _attend_part(
    queries: torch.Tensor,
    context: torch.Tensor,
    seen: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softmax: _Softmax,
    out: torch.Tensor,
) -> None:
    """Attend to some rows. A function of its own, so that their temporaries are freed."""
    # Of latent attention, keys and values are one.
    keys, values = context[:, 0].transpose(0, 1), context[:, -1].transpose(0, 1)
    values = values[..., : out.shape[2]]
    if softmax.is_plain(sinks):
        out.copy_(_attend(queries, keys, values, seen, softmax.scale))
    else:
        out.copy_(_attend_in_float32(queries, keys, values, seen, sinks, softmax))


def _unpacked(context: torch.Tensor, packing: Packing | None, dtype: torch.dtype) -> torch.Tensor:
    if packing is None:
        return context
    tokens, vectors, rows, _ = context.shape
    shape = tokens * vectors, rows, packing.num_elements
    whole = torch.empty(shape, dtype=dtype, device=context.device)
    unpack_rows(context.flatten(0, 1), packing, whole)
    return whole.view(tokens, vectors, rows, -1)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attend with [rows, group, head_dim] to [rows, tokens, head_dim], and to values that may be
    shorter."""
    mask = None if seen is None else seen[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        queries[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=scale
    )
    return attended[:, 0]


def _attend_in_float32(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softmax: _Softmax,
) -> torch.Tensor:
    """Do the same with any softmax; ``sinks`` are [rows, group]."""
    scores = queries.float() @ keys.float().transpose(1, 2) * softmax.scale
    if softmax.soft_cap is not None:
        scores.div_(softmax.soft_cap).tanh_().mul_(softmax.soft_cap)
    if seen is not None:
        scores.masked_fill_(~seen[:, None], -torch.inf)
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        shares = torch.cat([scores, sinks[..., None]], dim=-1).softmax(-1)[..., :-1]
    if softmax.sparsity < 1:
        shares = _without_small(shares, scores, seen, softmax.sparsity)
    attended: torch.Tensor = shares @ values.float()
    return attended.to(queries.dtype)


def _without_small(
    shares: torch.Tensor, scores: torch.Tensor, seen: torch.Tensor | None, sparsity: float
) -> torch.Tensor:
    """Give the shares of small scores to all visible slots alike."""
    counts = torch.tensor([scores.shape[-1]], device=scores.device)
    if seen is not None:
        counts = seen.sum(-1)
    # Rounded up, but not because of the product's rounding error.
    kept = (counts.double() * sparsity - 1e-9).ceil().long().clamp(min=1)
    largest = scores.topk(int(kept.max()), dim=-1).values
    least = largest.gather(2, (kept - 1)[:, None, None].expand(*scores.shape[:2], 1))
    large = shares.masked_fill(scores < least, 0)
    spread = (shares.sum(-1, keepdim=True) - large.sum(-1, keepdim=True)) / counts.view(-1, 1, 1)
    return large.add_(spread if seen is None else spread * seen[:, None])


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

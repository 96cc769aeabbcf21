"""The kernels in plain torch: a reference for the others, and a fallback where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from profiles.kernels.groups import unpack_rows
from profiles.packing import UNPACKED_AT_ONCE_BYTES, Packing

# Rows whose gates are computed at once, where that takes temporaries.
GATED_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Softmax:
    """What attention does between scores and shares (see ``profiles.kernels.decode_attention``)."""

    scale: float
    soft_cap: float | None
    has_sinks: bool
    has_slopes: bool
    sparsity: float

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention does the same."""
        return self.soft_cap is None and self.sparsity == 1 and not self.has_sinks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What belongs to each row.

    Queries are [rows, group, head_dim]. For each slot, [rows, tokens], ``seen`` is whether it is
    visible, and ``places`` the tokens from the last one back. Sinks and slopes are [rows, group].
    """

    queries: torch.Tensor
    seen: torch.Tensor | None = None
    places: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    def part(self, rows: slice) -> _Rows:
        """Return some of the rows."""

        def cut(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[rows]

        return _Rows(
            queries=self.queries[rows],
            seen=cut(self.seen),
            places=cut(self.places),
            sinks=cut(self.sinks),
            slopes=cut(self.slopes),
        )


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
    slopes: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
) -> None:
    """See ``profiles.kernels.decode_attention``."""
    tokens, _, rows, _ = context.shape
    group, head_dim = out.shape[1], q.shape[2]
    kv_heads, here = q.shape[1] // group, slice(first_row, first_row + rows)
    slots = torch.arange(tokens, device=q.device)
    seen, places = None, slots.expand(len(q), -1) - (tokens - 1)
    if void_slots is not None:
        is_before, is_behind = slots < void_slots[:, :1], slots >= void_slots[:, 1:]
        wraps = void_slots[:, :1] > void_slots[:, 1:]
        seen = torch.where(wraps, is_before & is_behind, is_before | is_behind)
        places = places + is_before * void_slots.diff(dim=1)

    def by_row(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.repeat_interleave(kv_heads, dim=0)[here]

    def of_heads(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.view(kv_heads, group).repeat(len(q), 1)[here]

    whole = _Rows(
        queries=q.reshape(-1, group, head_dim)[here],
        seen=by_row(seen),
        places=None if slopes is None else by_row(places),
        sinks=of_heads(sinks),
        slopes=of_heads(slopes),
    )
    softmax = _Softmax(
        scale=scale,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        has_slopes=slopes is not None,
        sparsity=sparsity,
    )
    is_latent = context.shape[1] == 1
    step = _rows_at_once(whole.queries, tokens, packing, softmax, is_latent=is_latent)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        unpacked_part = _unpacked(context[:, :, part], packing, q.dtype)
        _attend_part(whole.part(part), unpacked_part, softmax, out[part])


def _rows_at_once(
    queries: torch.Tensor,
    tokens: int,
    packing: Packing | None,
    softmax: _Softmax,
    *,
    is_latent: bool,
) -> int:
    """Return the number of rows that are computed at once, which bounds the temporaries."""
    rows, group, head_dim = queries.shape
    row_bytes = 2 * tokens * head_dim * queries.element_size() if packing else 0
    # torch may make all scores of the many queries of a latent row at once.
    if not softmax.is_plain or is_latent:
        # Keys and values in float32, one after the other, and three tensors of scores.
        row_bytes += 4 * tokens * (head_dim + 3 * group)
    elif softmax.has_slopes:
        # What is added to the scores, in float32 and in the dtype of the queries.
        row_bytes += tokens * group * (4 + queries.element_size())
    return max(1, UNPACKED_AT_ONCE_BYTES // row_bytes) if row_bytes else rows


def _attend_part(rows: _Rows, context: torch.Tensor, softmax: _Softmax, out: torch.Tensor) -> None:
    """Attend to some rows. A function of its own, so that their temporaries are freed."""
    # Of latent attention, keys and values are one.
    keys, values = context[:, 0].transpose(0, 1), context[:, -1].transpose(0, 1)
    values = values[..., : out.shape[2]]
    if softmax.is_plain:
        out.copy_(_attend(rows, keys, values, softmax.scale))
    else:
        out.copy_(_attend_in_float32(rows, keys, values, softmax))


def _unpacked(context: torch.Tensor, packing: Packing | None, dtype: torch.dtype) -> torch.Tensor:
    if packing is None:
        return context
    tokens, vectors, rows, _ = context.shape
    shape = tokens * vectors, rows, packing.num_elements
    whole = torch.empty(shape, dtype=dtype, device=context.device)
    unpack_rows(context.flatten(0, 1), packing, whole)
    return whole.view(tokens, vectors, rows, -1)


def _attend(rows: _Rows, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend with [rows, group, head_dim] to [rows, tokens, head_dim], and to values that may be
    shorter."""
    mask = None if rows.seen is None else rows.seen[:, None, None, :]
    if rows.slopes is not None and rows.places is not None:
        added = (rows.slopes[..., None] * rows.places[:, None]).to(keys.dtype)
        mask = added[:, None] if mask is None else added[:, None].masked_fill_(~mask, -torch.inf)
    attended = F.scaled_dot_product_attention(
        rows.queries[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=scale
    )
    return attended[:, 0]


def _attend_in_float32(
    rows: _Rows, keys: torch.Tensor, values: torch.Tensor, softmax: _Softmax
) -> torch.Tensor:
    """Do the same with any softmax."""
    queries, seen, sinks = rows.queries, rows.seen, rows.sinks
    scores = queries.float() @ keys.float().transpose(1, 2) * softmax.scale
    if softmax.soft_cap is not None:
        scores.div_(softmax.soft_cap).tanh_().mul_(softmax.soft_cap)
    if rows.slopes is not None and rows.places is not None:
        scores.addcmul_(rows.slopes[..., None], rows.places[:, None].float())
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


def activate(x: torch.Tensor, activation: str) -> None:
    """See ``profiles.kernels.activate``."""
    if activation == "sigmoid":
        x.sigmoid_()
    elif activation == "silu":
        F.silu(x, inplace=True)
    else:
        # torch has no public in-place gelu, only the operator.
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_(x, approximate=approximate)


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float) -> None:
    """See ``profiles.kernels.clamped_swiglu``. Temporaries: ``GATED_AT_ONCE`` rows."""
    gate.clamp_(max=limit)
    up.clamp_(-limit, limit).add_(1)
    for part in gate.split(GATED_AT_ONCE):
        part.mul_((part * alpha).sigmoid_())
    gate.mul_(up)

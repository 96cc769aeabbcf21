"""Attention of one token for each lane to a KV cache in pages, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from profiles.kernels import paged_twins
from profiles.kernels.attention import Arguments, address, head_splits_of
from profiles.kernels.call import call_kernel, is_native
from profiles.packing import Packing


def paged_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    voids: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    carry: torch.Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    packing: Packing | None = None,
    sparsity: float = 1.0,
    value_sums: torch.Tensor | None = None,
    lanes: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> None:
    """Attend with one token per lane to the lane's pages, of one layer.

    A lane is one sequence. Its result is that of ``decode_attention`` to its tokens alone, in all
    bits on a CPU: neither other lanes, nor the places of pages, nor their order in the batch change
    it. Slots beyond a lane's length are never read.

    Parameters
    ----------
    q
        [lanes, heads, head_dim], dense but for the stride of the lanes.
    pool
        The layer's pages, [pages, rows, vectors, page_tokens, width]: rows are key heads, vectors
        are keys and values, dense but for the stride of the pages. ``page_tokens`` is a multiple of
        16. Of latent attention ``vectors`` is 1: the first elements of a key are its value. The
        dtype is that of ``q``, or bytes with a packing.
    out
        The result, [lanes * rows, group, value_dim], dense. ``group`` is the query heads of a key
        head; ``value_dim`` is ``head_dim``, or less where values are parts of keys.
    tables
        The numbers of each lane's pages, in the order of its slots: int32 [lanes, most pages],
        dense in its last dimension. Numbers behind a lane's last page are not read.
    lengths
        Slots in use of each lane, the new token's included, each 1 or more: int32 [lanes].
    voids
        Slots below its length that each lane does not attend to, int32 [lanes, 2]: the first, and
        one past the last. A first one behind the last wraps around: all slots are void but those
        from the last to the first. They are read and masked. ``None`` masks no slot.
    order
        The lanes in the order in which they are taken, int32 [lanes]: the longest first keeps all
        threads busy to the end. It does not change the result. ``None`` is that of the batch.
    carry
        What each lane has attended to before its pages, from ``prefix_attention``: float32 [lanes,
        heads, ``carry_width(head_dim)``], dense. Zeros are nothing. Not with ``slopes``, nor with
        ``sparsity`` below one.
    scale, soft_cap, sinks, slopes, packing, sparsity
        See ``decode_attention``. ``sinks`` are part of a carry that is not zero.
    value_sums
        For ``sparsity`` below one: the sums of the visible values, float32 [lanes of the job, rows,
        head_dim], dense, kept by the caller from step to step. The value of the last slot is added.
        Lanes with void slots cannot have them. Without them, all values are read.
    lanes
        The place of each lane in ``value_sums``, int32 [lanes]. ``None`` is that of the batch.
    begins
        Whether a lane's values are summed into ``value_sums`` anew, as in its first step: uint8
        [lanes]. ``None`` is no lane.
    """
    num_lanes, num_heads, head_dim = q.shape
    _, rows, vectors, page_tokens, _ = pool.shape
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous()
    assert out.shape[:2] == (num_lanes * rows, num_heads // rows) and out.shape[2] <= head_dim
    assert pool[0].is_contiguous() and vectors in (1, 2) and page_tokens % 16 == 0
    assert pool.dtype == (torch.uint8 if packing else q.dtype)
    assert tables.dtype == torch.int32 and tables.stride(1) == 1 and len(tables) == num_lanes
    for numbers, shape in ((lengths, (num_lanes,)), (voids, (num_lanes, 2)), (order, (num_lanes,))):
        if numbers is not None:
            assert numbers.dtype == torch.int32 and numbers.is_contiguous()
            assert numbers.shape == shape
    for of_heads in (sinks, slopes):
        assert of_heads is None or (of_heads.dtype, of_heads.shape) == (torch.float32, q.shape[1:2])
    assert value_sums is None or voids is None
    if carry is not None:
        assert carry.shape == (num_lanes, num_heads, carry_width(head_dim))
        assert carry.dtype == torch.float32 and carry.is_contiguous()
        assert slopes is None and sparsity == 1
    if num_lanes == 0:
        return
    how: dict[str, Any] = {
        "tables": tables,
        "lengths": lengths,
        "voids": voids,
        "carry": carry,
        "scale": head_dim**-0.5 if scale is None else scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "packing": packing,
    }
    if is_native(q):
        how |= {"value_sums": value_sums, "begins": begins, "sums_at": lanes}
        attend_natively(q, pool, out, order=order, slopes=slopes, sparsity=sparsity, **how)
    else:
        paged_twins.paged_attention(q, pool, out, slopes=slopes, sparsity=sparsity, **how)


def prefix_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    *,
    table: torch.Tensor,
    length: int,
    value_dim: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """Attend with one token of several lanes to a prefix that all share; its keys are read once.

    ``paged_attention`` goes on from the result with each lane's own pages. Where the prefix is of
    whole tiles, the result is that of attention without a cut, in all bits on a CPU.

    Parameters
    ----------
    q
        Queries of the lanes, [lanes, heads, head_dim].
    pool
        See ``paged_attention``.
    table
        The numbers of the prefix's pages, int32 [pages].
    length
        The prefix's tokens, a multiple of 16.
    value_dim
        Elements of a value; ``None`` is ``head_dim``.
    scale, soft_cap, sinks, packing
        As ``paged_attention`` is given them.

    Returns
    -------
    torch.Tensor
        The lanes' part of ``carry``, float32 [lanes, heads, ``carry_width(head_dim)``].
    """
    num_lanes, num_heads, head_dim = q.shape
    rows = pool.shape[1]
    assert length % 16 == 0 and table.dtype == torch.int32 and table.is_contiguous()
    if num_lanes == 0:
        return q.new_empty(0, num_heads, carry_width(head_dim), dtype=torch.float32)
    # The queries of all lanes are the group of one sequence's key heads.
    by_row = q.unflatten(1, (rows, -1)).transpose(0, 1).reshape(1, -1, head_dim)
    kept = q.new_empty(rows, by_row.shape[1] // rows, carry_width(head_dim), dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.view(rows, 1, -1).expand(-1, num_lanes, -1).flatten().contiguous()
    how: dict[str, Any] = {
        "value_dim": head_dim if value_dim is None else value_dim,
        "scale": head_dim**-0.5 if scale is None else scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "packing": packing,
    }
    if is_native(q):
        lengths = torch.tensor([length], dtype=torch.int32)
        attend_natively(by_row, pool, None, tables=table[None], lengths=lengths, carry=kept, **how)
    else:
        paged_twins.prefix_attention(by_row, pool, kept, table=table, length=length, **how)
    by_lane = kept.view(rows, num_lanes, num_heads // rows, -1).transpose(0, 1)
    return by_lane.flatten(1, 2)


def carry_width(head_dim: int) -> int:
    """Return the floats that attention carries on of a query: the sums of values in whole vectors,
    16 parts of the total, and the largest score with what tells it from nothing."""
    return -(-head_dim // 16) * 16 + 2 * 16


def attend_natively(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor | None,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    value_dim: int = 0,
    voids: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    carry: torch.Tensor | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    packing: Packing | None = None,
    sparsity: float = 1.0,
    value_sums: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
    sums_at: torch.Tensor | None = None,
) -> None:
    """See ``paged_attention``, with the native kernel on the CPU. Without ``out`` the carry is
    written, and values have ``value_dim`` elements."""
    num_rows, group = len(q) * pool.shape[1], q.shape[1] // pool.shape[1]
    is_latent = pool.shape[2] == 1
    shares_rows = (is_latent and value_sums is None) or out is None
    head_splits = head_splits_of(group) if shares_rows else 1
    arguments = Arguments(
        q=q.data_ptr(),
        sequence_stride=q.stride(0),
        kv_heads=pool.shape[1] * head_splits,
        group=group // head_splits,
        dim=q.shape[2],
        context=pool.data_ptr(),
        token_stride=pool.stride(3),
        value_stride=0 if is_latent else pool.stride(2),
        row_stride=pool.stride(1),
        rows=num_rows * head_splits,
        void_slots=address(voids),
        scale=scale,
        soft_cap=soft_cap or 0.0,
        sinks=address(sinks),
        slopes=address(slopes),
        out=address(out),
        group_size=packing.group_size if packing else 1,
        bits=packing.bits if packing else 0,
        sparsity=sparsity,
        value_sums=address(value_sums),
        begins=address(begins),
        value_dim=value_dim if out is None else out.shape[2],
        head_splits=head_splits,
        tables=tables.data_ptr(),
        table_stride=tables.stride(0),
        page_tokens=pool.shape[3],
        page_stride=pool.stride(0),
        lengths=lengths.data_ptr(),
        order=address(order),
        sums_at=address(sums_at),
        carry=address(carry),
        keeps_carry=out is None,
    )
    call_kernel("decode_attention", q.dtype, ctypes.byref(arguments))

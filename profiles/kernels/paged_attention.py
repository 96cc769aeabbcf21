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
    scale, soft_cap, sinks, slopes, packing, sparsity
        See ``decode_attention``.
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
    if num_lanes == 0:
        return
    how: dict[str, Any] = {
        "tables": tables,
        "lengths": lengths,
        "voids": voids,
        "scale": head_dim**-0.5 if scale is None else scale,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "slopes": slopes,
        "packing": packing,
        "sparsity": sparsity,
    }
    if is_native(q):
        how |= {"value_sums": value_sums, "lanes": lanes, "begins": begins}
        _attend_natively(q, pool, out, order=order, **how)
    else:
        paged_twins.paged_attention(q, pool, out, **how)


def _attend_natively(
    q: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    voids: torch.Tensor | None,
    order: torch.Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    packing: Packing | None,
    sparsity: float,
    value_sums: torch.Tensor | None,
    lanes: torch.Tensor | None,
    begins: torch.Tensor | None,
) -> None:
    """See ``paged_attention``, with the native kernel on the CPU."""
    group = out.shape[1]
    is_latent = pool.shape[2] == 1
    head_splits = head_splits_of(group) if is_latent and value_sums is None else 1
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
        rows=len(out) * head_splits,
        void_slots=address(voids),
        scale=scale,
        soft_cap=soft_cap or 0.0,
        sinks=address(sinks),
        slopes=address(slopes),
        out=out.data_ptr(),
        group_size=packing.group_size if packing else 1,
        bits=packing.bits if packing else 0,
        sparsity=sparsity,
        value_sums=address(value_sums),
        begins=address(begins),
        value_dim=out.shape[2],
        head_splits=head_splits,
        tables=tables.data_ptr(),
        table_stride=tables.stride(0),
        page_tokens=pool.shape[3],
        page_stride=pool.stride(0),
        lengths=lengths.data_ptr(),
        order=address(order),
        sums_at=address(lanes),
    )
    call_kernel("decode_attention", q.dtype, ctypes.byref(arguments))

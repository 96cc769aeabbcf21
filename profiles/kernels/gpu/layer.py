"""Norm and rotation of one layer: one launch each, without temporaries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements that one warp norms, and one program rotates.
WARP_ELEMENTS, PROGRAM_ELEMENTS = 512, 1024
MAX_WARPS = 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See ``profiles.kernels.rms_norm``."""
    rows, heads, dim = x.shape
    block = triton.next_power_of_2(dim)
    _norm[(rows * heads,)](
        x,
        weight,
        out,
        eps,
        heads,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        DIM=dim,
        BLOCK=block,
        num_warps=min(MAX_WARPS, max(1, block // WARP_ELEMENTS)),
    )


def rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, interleaved: bool = False
) -> None:
    """See ``profiles.kernels.rotate``."""
    rows, num_heads, _ = heads.shape
    half = cosines.shape[1]
    block = triton.next_power_of_2(half)
    at_once = max(1, PROGRAM_ELEMENTS // block)
    _rotate[(rows, triton.cdiv(num_heads, at_once))](
        heads,
        cosines,
        sines,
        num_heads,
        heads.stride(0),
        len(cosines),
        HEAD_STRIDE=heads.stride(1),
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK=block,
        HEADS=at_once,
    )


# Arguments that change from call to call must not trigger a new compilation.
@triton.jit(
    do_not_specialize=["heads", "x_outer", "x_inner", "out_outer", "out_inner"],
    do_not_specialize_on_alignment=["x", "out"],
)
def _norm(
    x,
    weight,
    out,
    eps,
    heads,
    x_outer,
    x_inner,
    out_outer,
    out_inner,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    outer = tl.program_id(0).to(tl.int64) // heads
    inner = tl.program_id(0).to(tl.int64) % heads
    i = tl.arange(0, BLOCK)
    mask = i < DIM
    values = tl.load(x + outer * x_outer + inner * x_inner + i, mask=mask, other=0.0)
    wide = values.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / DIM + eps)
    scaled = (wide * scale).to(values.dtype).to(tl.float32)
    factors = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    target = out + outer * out_outer + inner * out_inner + i
    tl.store(target, (scaled * factors).to(values.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["num_heads", "row_stride", "num_positions"],
    do_not_specialize_on_alignment=["x"],
)
def _rotate(
    x,
    cosines,
    sines,
    num_heads,
    row_stride,
    num_positions,
    HEAD_STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (head < num_heads) & (i < HALF)
    start = x + row * row_stride + head * HEAD_STRIDE
    left = start + (2 * i if INTERLEAVED else i)
    right = left + (1 if INTERLEAVED else HALF)
    angle = row % num_positions * HALF + i
    c = tl.load(cosines + angle, mask=i < HALF, other=0.0).to(tl.float32)
    s = tl.load(sines + angle, mask=i < HALF, other=0.0).to(tl.float32)
    first, second = tl.load(left, mask=mask, other=0.0), tl.load(right, mask=mask, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned = (a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)
    tl.store(left, turned.to(dtype), mask=mask)
    turned = (b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)
    tl.store(right, turned.to(dtype), mask=mask)

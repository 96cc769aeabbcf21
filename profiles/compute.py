"""Arithmetic and memory rates of one device: matrix products, attention, copies, fixed costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from profiles import kernels
from profiles.attention_rates import measure_decode_attention, measure_prefill_attention
from profiles.compute_plan import (
    COLD_BYTES,
    DTYPES,
    NUM_LAUNCHES,
    ComputePlan,
    measure_rate,
    noise,
    prefix_of,
)
from profiles.compute_rates import NARROW_WIDTH, ComputeRates
from profiles.encoded_rates import measure_encoded_matmul, measure_encoded_unpacking
from profiles.grouping import measure_grouping
from profiles.packing import DIRECT_ROWS, GPU_DIRECT_ROWS, Packing
from profiles.rate_curve import RateCurve
from profiles.repeats import Repeater
from profiles.task_overhead import measure_task_overhead

FEW_ROWS = 64
# Rows of the products with narrow weights.
NARROW_ROWS = (4, 16, 64, 256)


def measure_compute(
    device: str, plan: ComputePlan, repeater: Repeater, beside: Callable[[], object] | None = None
) -> ComputeRates:
    """Measure a device (``cpu`` or ``cuda``) in every dtype; what a task costs is measured while
    the CPU does ``beside``.

    Rows whose product would take longer than a figure's share of time are left out, and the
    curve is constant beyond its last point; the first is always measured.
    """
    with torch.inference_mode():
        decode = measure_decode_attention(device, plan, repeater)
        return ComputeRates(
            matmul={d: _measure_matmul(device, d, plan, repeater) for d in DTYPES},
            attention_prefill={
                d: measure_prefill_attention(device, d, plan, repeater) for d in DTYPES
            },
            attention_decode=decode.full,
            task_overhead_s=measure_task_overhead(
                device, f"{prefix_of(device)}.task_overhead", repeater, beside
            ),
            unpack_bytes_per_s=_measure_unpacking(device, 4, plan, repeater),
            packed_attention_bytes_per_s=decode.packed_4bit,
            sparse_attention_bytes_per_s=decode.sparse,
            packed_matmul=_measure_packed_matmul(device, plan, repeater),
            narrow_matmul=_measure_narrow(device, plan, repeater),
            narrow_packed_matmul=_measure_packed_matmul(
                device, _narrow(plan), repeater, name="packed_matmul.narrow"
            ),
            unpack_8bit_bytes_per_s=_measure_unpacking(device, 8, plan, repeater),
            packed_attention_8bit_bytes_per_s=decode.packed_8bit,
            attention_one_query=decode.one_query,
            attention_many_queries=decode.many_queries,
            attention_by_token=decode.by_token,
            encoded_matmul=measure_encoded_matmul(device, plan, repeater),
            encoded_unpack_bytes_per_s=measure_encoded_unpacking(device, plan, repeater),
            grouping_bytes_per_s=measure_grouping(device, repeater),
        )


def measure_memory(device: str, plan: ComputePlan, repeater: Repeater) -> float:
    """Measure how fast a device reads its memory, in bytes/s; copies are kept as samples too."""
    size = plan.stream_bytes
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> torch.Tensor:
        return target.copy_(source)

    with torch.inference_mode():
        measure_rate(device, "memory.copy", "bytes_per_s", copy, 2 * size, repeater)
        return measure_rate(device, "memory.read", "bytes_per_s", source.sum, size, repeater)


def _narrow(plan: ComputePlan) -> ComputePlan:
    """Return a few sizes with narrow weights; how narrow matters little where rows are many."""
    rows = tuple(size for size in plan.rows if size in NARROW_ROWS)
    return replace(plan, rows=rows, in_features=NARROW_WIDTH)


def _measure_narrow(device: str, plan: ComputePlan, repeater: Repeater) -> dict[str, RateCurve]:
    narrow = _narrow(plan)
    return {
        dtype: _measure_matmul(device, dtype, narrow, repeater, name="matmul.narrow")
        for dtype in (DTYPES if narrow.rows else ())
    }


def _measure_matmul(
    device: str, dtype: str, plan: ComputePlan, repeater: Repeater, *, name: str = "matmul"
) -> RateCurve:
    out_features, in_features = plan.out_features, plan.in_features
    turns = _cold_weights(device, dtype, plan)
    sizes: list[float] = []
    rates: list[float] = []
    num_calls = 1 if device == "cpu" else NUM_LAUNCHES
    for rows in plan.rows:
        flop = 2.0 * rows * out_features * in_features
        # The rate at few rows says nothing of more rows, so those are measured whatever it is.
        if rows > FEW_ROWS and not repeater.affords(num_calls * flop / rates[-1]):
            break
        multiply = partial(_multiply, noise(device, dtype, rows, in_features), turns)
        figure = f"{name}.{dtype}.rows{rows}"
        rates.append(measure_rate(device, figure, "flop_per_s", multiply, flop, repeater))
        sizes.append(float(rows))
    return RateCurve(sizes=tuple(sizes), rates=tuple(rates))


def matrix_product(
    device: str, dtype: str, rows: int, plan: ComputePlan
) -> tuple[Callable[[], torch.Tensor], float]:
    """Return a matrix product that finds its weights in memory, and its FLOP."""
    inputs = noise(device, dtype, rows, plan.in_features)
    multiply = partial(_multiply, inputs, _cold_weights(device, dtype, plan))
    return multiply, 2.0 * rows * plan.out_features * plan.in_features


def _cold_weights(device: str, dtype: str, plan: ComputePlan) -> Iterator[torch.Tensor]:
    out_features, in_features = plan.out_features, plan.in_features
    weight_bytes = out_features * in_features * DTYPES[dtype].itemsize
    num_weights = max(2, -(-COLD_BYTES // weight_bytes))
    return itertools.cycle(
        [noise(device, dtype, out_features, in_features) for _ in range(num_weights)]
    )


def _multiply(inputs: torch.Tensor, weights: Iterator[torch.Tensor]) -> torch.Tensor:
    return kernels.linear(inputs, next(weights))


def _measure_unpacking(device: str, bits: int, plan: ComputePlan, repeater: Repeater) -> float:
    """Measure unpacking a weight matrix, in bytes of bfloat16 output per second."""
    rows, width = plan.out_features, plan.in_features
    packing = Packing(num_elements=width, bits=bits)
    packed = torch.randint(0, 256, (1, rows, packing.row_bytes), dtype=torch.uint8, device=device)
    out = torch.empty(1, rows, width, dtype=torch.bfloat16, device=device)

    def unpack() -> None:
        kernels.unpack_rows(packed, packing, out)

    return measure_rate(device, f"unpack.{bits}bit", "bytes_per_s", unpack, out.nbytes, repeater)


def _measure_packed_matmul(
    device: str, plan: ComputePlan, repeater: Repeater, *, name: str = "packed_matmul"
) -> dict[str, RateCurve]:
    """Measure products with 4-bit weights, where a kernel does them: of few rows, unless it does
    those of many."""
    dtype, most = "bfloat16", float(DIRECT_ROWS if device == "cpu" else GPU_DIRECT_ROWS)
    if device == "cpu" and kernels.multiplies_codes(DTYPES[dtype]):
        most = math.inf
    sizes = sorted({*plan.packed_rows, *(size for size in plan.rows if size <= most)})
    if not plan.rows or not kernels.has_packed_products(noise(device, dtype, 1, 1)):
        return {}
    rows, width = plan.out_features, plan.in_features
    packing = Packing(num_elements=width, bits=4)
    count = max(2, -(-COLD_BYTES // (rows * packing.row_bytes)))
    turns = itertools.cycle(
        torch.randint(0, 256, (count, rows, packing.row_bytes), dtype=torch.uint8, device=device)
    )
    rates: list[float] = []
    for size in sizes:
        # One number above ``DIRECT_ROWS`` tells that any is multiplied so.
        is_told = len(rates) > 0 and sizes[len(rates) - 1] > DIRECT_ROWS
        if is_told and not repeater.affords(2.0 * size * rows * width / rates[-1]):
            break
        x = noise(device, dtype, size, width)
        out = x.new_empty(size, rows)
        multiply = partial(_multiply_packed, x, turns, packing, out)
        figure = f"{name}.{dtype}.rows{size}"
        flop = 2.0 * size * rows * width
        rates.append(measure_rate(device, figure, "flop_per_s", multiply, flop, repeater))
    measured = tuple(map(float, sizes[: len(rates)]))
    curve = RateCurve(sizes=measured, rates=tuple(rates))
    # A GPU multiplies all floats of 16 bits alike.
    return dict.fromkeys((dtype,) if device == "cpu" else (dtype, "float16"), curve)


def _multiply_packed(
    x: torch.Tensor, weights: Iterator[torch.Tensor], packing: Packing, out: torch.Tensor
) -> None:
    kernels.multiply_rows(x, next(weights), packing, out)

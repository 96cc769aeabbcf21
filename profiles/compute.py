"""Arithmetic and memory rates of one device: matrix products, attention, copies, fixed costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from profiles import kernels
from profiles.aligned_io import aligned_buffer
from profiles.compute_rates import NARROW_WIDTH, WIDTH, ComputeRates, RateCurve
from profiles.packing import DIRECT_ROWS, Packing
from profiles.sampling import Sampler
from profiles.task_overhead import measure_task_overhead
from profiles.units import MIB

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights and caches of one figure take turns, so that none is found in a processor's cache.
COLD_BYTES = 128 * MIB
HEAD_DIM = 128
GROUP_SIZE = 4
FEW_ROWS = 64
# Rows of the products with narrow weights.
NARROW_ROWS = (4, 16, 64, 256)
# Kernels that a GPU is given before it is waited for, so that waiting does not count.
NUM_LAUNCHES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePlan:
    """What is computed.

    Parameters
    ----------
    rows
        Rows (tokens) of the matrix products, increasing.
    out_features, in_features
        Shape of the weights.
    prompt_len, num_prompts, num_heads
        Shape of the attention over a prompt.
    context_len, num_cache_rows
        Tokens of the decode cache, and its rows: sequences times key heads.
    stream_bytes
        Size of the tensor that memory bandwidth is measured on.
    """

    rows: tuple[int, ...]
    out_features: int
    in_features: int = WIDTH
    prompt_len: int = 512
    num_prompts: int = 2
    num_heads: int = 16
    context_len: int = 512
    num_cache_rows: int = 64
    stream_bytes: int = 256 * MIB


QUICK_PLAN = ComputePlan(rows=(1, 16, 64, 256, 1024), out_features=4096)
FULL_PLAN = ComputePlan(rows=(1, 4, 16, 64, 256, 512, 1024, 2048, 4096), out_features=11008)


def measure_compute(device: str, plan: ComputePlan, sampler: Sampler) -> ComputeRates:
    """Measure a device (``cpu`` or ``cuda``) in every dtype.

    Rows whose product would take longer than a figure's share of time are left out, and the
    curve is constant beyond its last point; the first is always measured.
    """
    with torch.inference_mode():
        return ComputeRates(
            matmul={d: _measure_matmul(device, d, plan, sampler) for d in DTYPES},
            attention_prefill={d: _measure_prefill(device, d, plan, sampler) for d in DTYPES},
            attention_decode={d: _measure_decode(device, d, plan, sampler) for d in DTYPES},
            task_overhead_s=measure_task_overhead(
                device, f"{_prefix(device)}.task_overhead", sampler
            ),
            unpack_bytes_per_s=_measure_unpacking(device, 4, plan, sampler),
            packed_attention_bytes_per_s=_measure_packed_decode(device, 4, plan, sampler),
            sparse_attention_bytes_per_s=_measure_sparse_decode(device, plan, sampler),
            packed_matmul=_measure_packed_matmul(device, plan, sampler),
            narrow_matmul=_measure_narrow(device, plan, sampler),
            narrow_packed_matmul=_measure_packed_matmul(
                device, _narrow(plan), sampler, name="packed_matmul.narrow"
            ),
            unpack_8bit_bytes_per_s=_measure_unpacking(device, 8, plan, sampler),
            packed_attention_8bit_bytes_per_s=_measure_packed_decode(device, 8, plan, sampler),
        )


def measure_memory(device: str, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure how fast a device reads its memory, in bytes/s; copies are kept as samples too."""
    size = plan.stream_bytes
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> torch.Tensor:
        return target.copy_(source)

    with torch.inference_mode():
        _measure_rate(device, "memory.copy", "bytes_per_s", copy, 2 * size, sampler)
        return _measure_rate(device, "memory.read", "bytes_per_s", source.sum, size, sampler)


def _prefix(device: str) -> str:
    return "cpu" if device == "cpu" else "gpu"


def _measure_rate(
    device: str, name: str, unit: str, work: Callable[[], object], amount: float, sampler: Sampler
) -> float:
    """Measure the rate of ``work``, whose end is waited for on a GPU, and return the median."""
    name = f"{_prefix(device)}.{name}"
    if device == "cpu":
        return sampler.measure_rate(name, unit, work, amount).median

    def launch_and_wait() -> None:
        for _ in range(NUM_LAUNCHES):
            work()
        torch.cuda.synchronize()

    return sampler.measure_rate(name, unit, launch_and_wait, NUM_LAUNCHES * amount).median


def _noise(device: str, dtype: str, *shape: int) -> torch.Tensor:
    # A few random rows repeated: as good as all random for timing, and far quicker to make.
    seed = torch.randn(min(64, shape[0]), *shape[1:]).to(device, DTYPES[dtype])
    repeats = -(-shape[0] // seed.shape[0])
    return seed.repeat(repeats, *(1 for _ in shape[1:]))[: shape[0]].contiguous()


def _narrow(plan: ComputePlan) -> ComputePlan:
    """Return a few sizes with narrow weights; how narrow matters little where rows are many."""
    rows = tuple(size for size in plan.rows if size in NARROW_ROWS)
    return replace(plan, rows=rows, in_features=NARROW_WIDTH)


def _measure_narrow(device: str, plan: ComputePlan, sampler: Sampler) -> dict[str, RateCurve]:
    narrow = _narrow(plan)
    return {
        dtype: _measure_matmul(device, dtype, narrow, sampler, name="matmul.narrow")
        for dtype in (DTYPES if narrow.rows else ())
    }


def _measure_matmul(
    device: str, dtype: str, plan: ComputePlan, sampler: Sampler, *, name: str = "matmul"
) -> RateCurve:
    out_features, in_features = plan.out_features, plan.in_features
    turns = _cold_weights(device, dtype, plan)
    sizes: list[float] = []
    rates: list[float] = []
    num_calls = 1 if device == "cpu" else NUM_LAUNCHES
    for rows in plan.rows:
        flop = 2.0 * rows * out_features * in_features
        # The rate at few rows says nothing of more rows, so those are measured whatever it is.
        if rows > FEW_ROWS and not sampler.affords(num_calls * flop / rates[-1]):
            break
        multiply = partial(_multiply, _noise(device, dtype, rows, in_features), turns)
        figure = f"{name}.{dtype}.rows{rows}"
        rates.append(_measure_rate(device, figure, "flop_per_s", multiply, flop, sampler))
        sizes.append(float(rows))
    return RateCurve(sizes=tuple(sizes), rates=tuple(rates))


def matrix_product(
    device: str, dtype: str, rows: int, plan: ComputePlan
) -> tuple[Callable[[], torch.Tensor], float]:
    """Return a matrix product that finds its weights in memory, and its FLOP."""
    inputs = _noise(device, dtype, rows, plan.in_features)
    multiply = partial(_multiply, inputs, _cold_weights(device, dtype, plan))
    return multiply, 2.0 * rows * plan.out_features * plan.in_features


def _cold_weights(device: str, dtype: str, plan: ComputePlan) -> Iterator[torch.Tensor]:
    out_features, in_features = plan.out_features, plan.in_features
    weight_bytes = out_features * in_features * DTYPES[dtype].itemsize
    num_weights = max(2, -(-COLD_BYTES // weight_bytes))
    return itertools.cycle(
        [_noise(device, dtype, out_features, in_features) for _ in range(num_weights)]
    )


def _multiply(inputs: torch.Tensor, weights: Iterator[torch.Tensor]) -> torch.Tensor:
    return F.linear(inputs, next(weights))


def _measure_prefill(device: str, dtype: str, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure causal attention over prompts in FLOP/s, counting the full square.

    Heads lie beside one another in memory, as the projections leave them.
    """
    shape = (plan.num_prompts, plan.prompt_len, plan.num_heads, HEAD_DIM)
    query, key, value = (_noise(device, dtype, *shape).transpose(1, 2) for _ in range(3))

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    flop = 4.0 * plan.num_prompts * plan.num_heads * plan.prompt_len**2 * HEAD_DIM
    name = f"attention_prefill.{dtype}"
    return _measure_rate(device, name, "flop_per_s", attend, flop, sampler)


def _measure_decode(device: str, dtype: str, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure one decode step of attention in bytes of cache per second."""
    attend, cache_bytes = decode_attention(device, dtype, plan)
    name = f"attention_decode.{dtype}"
    return _measure_rate(device, name, "bytes_per_s", attend, cache_bytes, sampler)


def decode_attention(
    device: str, dtype: str, plan: ComputePlan, *, bits: int | None = None, sparsity: float = 1.0
) -> tuple[Callable[[], torch.Tensor], float]:
    """Return one decode step of attention, and the bytes of cache that it reads.

    A row of the cache is a key head of a sequence; ``GROUP_SIZE`` query heads share it. With
    ``bits`` the cache is packed, and the bytes are those that it would have unpacked.
    """
    rows, tokens = plan.num_cache_rows, plan.context_len
    cache_bytes = tokens * 2 * rows * HEAD_DIM * DTYPES[dtype].itemsize
    packing = Packing(num_elements=HEAD_DIM, bits=bits) if bits else None
    by_row = _noise(device, dtype, rows, 2, tokens, HEAD_DIM)
    held_bytes = cache_bytes
    if packing is not None:
        plain = by_row.flatten(0, 1)
        packed = torch.empty(
            *plain.shape[:2], packing.row_bytes, dtype=torch.uint8, device=plain.device
        )
        kernels.pack_rows(plain, packing, packed)
        by_row, held_bytes = packed.unflatten(0, (rows, 2)), packed.nbytes
    caches = [cache_at_home(device, by_row) for _ in range(max(2, -(-COLD_BYTES // held_bytes)))]
    turns = itertools.cycle(caches)
    query = _noise(device, dtype, rows, GROUP_SIZE, HEAD_DIM)
    out = torch.empty_like(query)
    sums = torch.zeros(rows, HEAD_DIM, device=device) if sparsity < 1 else None

    def attend() -> torch.Tensor:
        kernels.decode_attention(
            query, next(turns), out, packing=packing, sparsity=sparsity, value_sums=sums
        )
        return out

    return attend, float(cache_bytes)


def cache_at_home(device: str, by_row: torch.Tensor) -> torch.Tensor:
    """Lay a cache [rows, 2, tokens, head_dim] out as it lies where it is attended, and return it
    as [tokens, 2, rows, head_dim]: row by row and in huge pages on the CPU, else token by token."""
    if device != "cpu":
        return by_row.permute(2, 1, 0, 3).contiguous()
    home = torch.frombuffer(aligned_buffer(by_row.nbytes), dtype=by_row.dtype).view(by_row.shape)
    return home.copy_(by_row).permute(2, 1, 0, 3)


def _measure_unpacking(device: str, bits: int, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure unpacking a weight matrix, in bytes of bfloat16 output per second."""
    rows, width = plan.out_features, plan.in_features
    packing = Packing(num_elements=width, bits=bits)
    packed = torch.randint(0, 256, (1, rows, packing.row_bytes), dtype=torch.uint8, device=device)
    out = torch.empty(1, rows, width, dtype=torch.bfloat16, device=device)

    def unpack() -> None:
        kernels.unpack_rows(packed, packing, out)

    return _measure_rate(device, f"unpack.{bits}bit", "bytes_per_s", unpack, out.nbytes, sampler)


def _measure_packed_decode(device: str, bits: int, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure one decode step of attention over a packed cache, in bytes of the bfloat16 cache."""
    attend, cache_bytes = decode_attention(device, "bfloat16", plan, bits=bits)
    name = f"attention_decode.{bits}bit"
    return _measure_rate(device, name, "bytes_per_s", attend, cache_bytes, sampler)


def _measure_sparse_decode(device: str, plan: ComputePlan, sampler: Sampler) -> float:
    """Measure one decode step in which each query attends to a tenth of the keys."""
    attend, cache_bytes = decode_attention(device, "bfloat16", plan, sparsity=0.1)
    name = "attention_decode.sparse"
    return _measure_rate(device, name, "bytes_per_s", attend, cache_bytes, sampler)


def _measure_packed_matmul(
    device: str, plan: ComputePlan, sampler: Sampler, *, name: str = "packed_matmul"
) -> dict[str, RateCurve]:
    """Measure products of few rows with 4-bit weights, where a kernel does them."""
    dtype = "bfloat16"
    sizes = [size for size in plan.rows if size <= DIRECT_ROWS]
    if not sizes or not kernels.is_native(_noise(device, dtype, 1, 1)):
        return {}
    rows, width = plan.out_features, plan.in_features
    packing = Packing(num_elements=width, bits=4)
    count = max(2, -(-COLD_BYTES // (rows * packing.row_bytes)))
    turns = itertools.cycle(
        [torch.randint(0, 256, (rows, packing.row_bytes), dtype=torch.uint8) for _ in range(count)]
    )
    rates = []
    for size in sizes:
        x = _noise(device, dtype, size, width)
        out = x.new_empty(size, rows)
        multiply = partial(_multiply_packed, x, turns, packing, out)
        figure = f"{name}.{dtype}.rows{size}"
        flop = 2.0 * size * rows * width
        rates.append(_measure_rate(device, figure, "flop_per_s", multiply, flop, sampler))
    return {dtype: RateCurve(sizes=tuple(float(size) for size in sizes), rates=tuple(rates))}


def _multiply_packed(
    x: torch.Tensor, weights: Iterator[torch.Tensor], packing: Packing, out: torch.Tensor
) -> None:
    kernels.multiply_rows(x, next(weights), packing, out)

"""Rates of attention on one device: over prompts, and over the caches of decode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from profiles import kernels
from profiles.aligned_io import aligned_buffer
from profiles.compute_plan import COLD_BYTES, DTYPES, ComputePlan, measure_rate, noise
from profiles.compute_rates import FULL, GROUP_SIZE, HEAD_DIM, MANY_QUERIES, SHORT_HEAD_DIM
from profiles.packing import Packing
from profiles.repeats import Repeater

# What cache is measured in that is packed, or attended in other shapes than the first.
DTYPE = "bfloat16"
SPARSITY = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRates:
    """Rates of decode attention, as ``ComputeRates`` holds them."""

    full: dict[str, float]
    packed_4bit: float
    packed_8bit: float
    sparse: float
    one_query: dict[str, float]
    many_queries: dict[str, float]
    by_token: dict[str, float]


def measure_decode_attention(device: str, plan: ComputePlan, repeater: Repeater) -> DecodeRates:
    """Measure decode attention over every kind of cache.

    What another shape or layout costs is measured just after what it is compared with, because
    a machine's memory has faster and slower minutes.
    """
    bench = _DecodeBench(device=device, plan=plan, repeater=repeater)
    full = {dtype: bench.rate(dtype, dtype) for dtype in DTYPES if dtype != DTYPE}
    rates, one_query, many_queries, by_token = {}, {}, {}, {}
    for bits, name in ((None, DTYPE), (4, "4bit"), (8, "8bit")):
        key = str(bits or FULL)
        rates[key] = bench.rate(name, DTYPE, bits=bits)
        one = bench.rate(f"{name}.one_query", DTYPE, bits=bits, group_size=1)
        one_query[key] = max(1.0, one / rates[key])
        many = bench.rate(
            f"{name}.many_queries",
            DTYPE,
            bits=bits,
            group_size=MANY_QUERIES,
            head_dim=SHORT_HEAD_DIM,
        )
        many_queries[key] = min(1.0, many / rates[key])
        # A GPU has its cache token by token in any case.
        if device == "cpu":
            moved = bench.rate(f"{name}.by_token", DTYPE, bits=bits, lies_by_token=True)
            by_token[key] = min(1.0, moved / rates[key])
    sparse = bench.rate("sparse", DTYPE, sparsity=SPARSITY)
    _cold_caches.cache_clear()
    return DecodeRates(
        full={dtype: full.get(dtype, rates[FULL]) for dtype in DTYPES},
        packed_4bit=rates["4"],
        packed_8bit=rates["8"],
        sparse=sparse,
        one_query=one_query,
        many_queries=many_queries,
        by_token=by_token,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeBench:
    device: str
    plan: ComputePlan
    repeater: Repeater

    def rate(
        self,
        name: str,
        dtype: str,
        *,
        bits: int | None = None,
        sparsity: float = 1.0,
        group_size: int = GROUP_SIZE,
        head_dim: int = HEAD_DIM,
        lies_by_token: bool = False,
    ) -> float:
        """Measure one decode step in bytes of cache per second, as it is unpacked."""
        attend, cache_bytes = decode_attention_call(
            self.device,
            dtype,
            self.plan,
            bits=bits,
            sparsity=sparsity,
            group_size=group_size,
            head_dim=head_dim,
            lies_by_token=lies_by_token,
        )
        figure = f"attention_decode.{name}"
        return measure_rate(self.device, figure, "bytes_per_s", attend, cache_bytes, self.repeater)


def measure_prefill_attention(
    device: str, dtype: str, plan: ComputePlan, repeater: Repeater
) -> float:
    """Measure causal attention over prompts in FLOP/s, counting the full square.

    Heads are adjacent in memory, as the projections leave them. A CPU attends prompt by prompt.
    """
    shape = (plan.num_prompts, plan.prompt_len, plan.num_heads, HEAD_DIM)
    query, key, value = (noise(device, dtype, *shape) for _ in range(3))
    out = torch.empty_like(query)

    def attend() -> torch.Tensor:
        if device != "cpu":
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        for q, k, v, to in zip(query, key, value, out, strict=True):
            kernels.prompt_attention(q, [kernels.KeyRun.of(k, v)], to)
        return out

    flop = 4.0 * plan.num_prompts * plan.num_heads * plan.prompt_len**2 * HEAD_DIM
    name = f"attention_prefill.{dtype}"
    return measure_rate(device, name, "flop_per_s", attend, flop, repeater)


def decode_attention_call(
    device: str,
    dtype: str,
    plan: ComputePlan,
    *,
    bits: int | None = None,
    sparsity: float = 1.0,
    group_size: int = GROUP_SIZE,
    head_dim: int = HEAD_DIM,
    lies_by_token: bool = False,
) -> tuple[Callable[[], torch.Tensor], float]:
    """Return one decode step of attention, and the bytes of cache that it reads.

    A row of the cache is a key head of a sequence; ``group_size`` query heads share it. With
    ``bits`` the cache is packed, and the bytes are those that it would have unpacked.
    """
    rows, tokens = plan.num_cache_rows, plan.context_len
    cache_bytes = tokens * 2 * rows * head_dim * DTYPES[dtype].itemsize
    packing = Packing(num_elements=head_dim, bits=bits) if bits else None
    lies_by_token = lies_by_token or device != "cpu"
    turns = itertools.cycle(_cold_caches(device, dtype, plan, packing, head_dim, lies_by_token))
    query = noise(device, dtype, rows, group_size, head_dim)
    out = torch.empty_like(query)
    sums = torch.zeros(rows, head_dim, device=device) if sparsity < 1 else None

    def attend() -> torch.Tensor:
        kernels.decode_attention(
            query, next(turns), out, packing=packing, sparsity=sparsity, value_sums=sums
        )
        return out

    return attend, float(cache_bytes)


# The next figure is often of the same cache, which takes longer to make than to attend to.
@lru_cache(maxsize=1)
def _cold_caches(
    device: str,
    dtype: str,
    plan: ComputePlan,
    packing: Packing | None,
    head_dim: int,
    lies_by_token: bool,
) -> list[torch.Tensor]:
    """Make caches, as many as no processor's own memory holds."""
    by_row = noise(device, dtype, plan.num_cache_rows, 2, plan.context_len, head_dim)
    if packing is not None:
        plain = by_row.flatten(0, 1)
        packed = torch.empty(
            *plain.shape[:2], packing.row_bytes, dtype=torch.uint8, device=plain.device
        )
        kernels.pack_rows(plain, packing, packed)
        by_row = packed.unflatten(0, (plan.num_cache_rows, 2))
    at_home = cache_by_token if lies_by_token else cache_by_row
    return [at_home(by_row) for _ in range(max(2, -(-COLD_BYTES // by_row.nbytes)))]


def cache_by_row(by_row: torch.Tensor) -> torch.Tensor:
    """Return a CPU's cache [rows, 2, tokens, head_dim] as [tokens, 2, rows, head_dim], stored
    row by row in huge pages, as the cache that the CPU attends to."""
    home = torch.frombuffer(aligned_buffer(by_row.nbytes), dtype=by_row.dtype).view(by_row.shape)
    return home.copy_(by_row).permute(2, 1, 0, 3)


def cache_by_token(by_row: torch.Tensor) -> torch.Tensor:
    """Return the same, lying token by token: as it is where cache moves, and on a GPU."""
    by_token = by_row.permute(2, 1, 0, 3)
    if by_row.device.type != "cpu":
        return by_token.contiguous()
    buffer = torch.frombuffer(aligned_buffer(by_row.nbytes), dtype=by_row.dtype)
    return buffer.view(by_token.shape).copy_(by_token)

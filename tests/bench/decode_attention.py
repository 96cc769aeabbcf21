"""Attention of one decode step on the CPU, held against the memory's read rate and torch's own.

Rounds take turns: memory, ours, torch, then ours in pages, or with a ring, sinks or a soft cap. A
machine whose memory is shared with others then counts the same for all. The medians of the rounds'
ratios are printed. The cache is stored as a run has it in CPU memory. Progress goes to stderr, and
one JSON line with every figure to stdout.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from workload_run import BenchParser, circumstances, keep_result

from profiles import kernels
from profiles.aligned_io import aligned_buffer
from profiles.attention_rates import cache_by_row
from profiles.command import run
from profiles.compute_plan import COLD_BYTES, DTYPES
from profiles.compute_rates import HEAD_DIM
from profiles.errors import InputError
from profiles.units import MIB

STREAM_BYTES = 256 * MIB
GROUPS = (1, 4, 8)
# Sequences, key heads, tokens so far.
SHAPES = ((64, 8, 144), (16, 8, 576), (4, 8, 2048), (8, 32, 512))
WINDOW_S = 0.05
# Tokens of a page.
PAGE = 32
# What some models add to attention: slots of a ring without a token, sinks, a soft cap, ALiBi.
KINDS = ("ring", "sinks", "soft_cap", "slopes")
# Of latent attention (DeepSeek V2, V3): elements of a row and of its latent; heads that share it.
ROW_DIM, RANK = 576, 512
LATENT_HEADS = (1, 4, 8, 16, 128)


def main(arguments: list[str]) -> None:
    """Measure every shape, print the table and the line."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 3:
        raise InputError("--rounds", got=flags.rounds, allowed="3 or more")
    with torch.inference_mode():
        cases = [
            measure(flags.dtype, shape, group, flags.rounds) for shape in SHAPES for group in GROUPS
        ]
        latent = [measure_latent(flags.dtype, heads, flags.rounds) for heads in LATENT_HEADS]
    result = {
        "benchmark": "attention of one decode step",
        "dtype": flags.dtype,
        "rounds": flags.rounds,
        "cases": cases,
        "latent": latent,
        **circumstances("decode_attention.py", arguments, "torch"),
    }
    keep_result(flags, result)


def _parser() -> BenchParser:
    parser = BenchParser(
        "decode_attention.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/decode-attention.json",
    )
    add = parser.add_argument
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="(bfloat16)")
    add("--rounds", type=int, default=15, help="of which the median counts (15)")
    return parser


def measure(dtype: str, shape: tuple[int, int, int], group: int, rounds: int) -> dict[str, Any]:
    """Time one shape; rates are bytes of cache, or of memory, per second."""
    batch, kv_heads, tokens = shape
    cache_bytes = tokens * 2 * batch * kv_heads * HEAD_DIM * DTYPES[dtype].itemsize
    caches = [
        cache_by_row(torch.randn(batch * kv_heads, 2, tokens, HEAD_DIM).to(DTYPES[dtype]))
        for _ in range(max(2, -(-COLD_BYTES // cache_bytes)))
    ]
    turns = itertools.cycle(caches)
    q = torch.randn(batch, kv_heads * group, HEAD_DIM).to(DTYPES[dtype])
    out = torch.empty(batch * kv_heads, group, HEAD_DIM, dtype=DTYPES[dtype])
    stream = torch.ones(STREAM_BYTES // 4)
    pools, tables, lengths = in_pages(caches, batch)

    void_slots = torch.tensor([[0, min(i, tokens // 2)] for i in range(batch)], dtype=torch.int32)
    added: dict[str, dict[str, Any]] = {
        "ring": {"void_slots": void_slots},
        "sinks": {"sinks": torch.randn(kv_heads * group)},
        "soft_cap": {"soft_cap": 50.0},
        "slopes": {"slopes": torch.rand(kv_heads * group)},
    }

    def attend(**kind: Any) -> None:
        kernels.decode_attention(q, next(turns), out, **kind)

    def attend_to_pages() -> None:
        kernels.paged_attention(q, next(pools), out, tables=tables, lengths=lengths)

    def attend_with_torch() -> torch.Tensor:
        keys, values = (
            part.unflatten(1, (batch, kv_heads)).permute(1, 2, 0, 3)
            for part in next(turns).unbind(1)
        )
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=group > 1)

    memory: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []
    of_plain: dict[str, list[float]] = {kind: [] for kind in ("pages", *KINDS)}
    for _ in range(rounds):
        memory.append(measure_rate(stream.sum, STREAM_BYTES))
        ours.append(measure_rate(attend, cache_bytes))
        theirs.append(measure_rate(attend_with_torch, cache_bytes))
        of_plain["pages"].append(measure_rate(attend_to_pages, cache_bytes) / ours[-1])
        for kind in KINDS:
            rate = measure_rate(functools.partial(attend, **added[kind]), cache_bytes)
            of_plain[kind].append(rate / ours[-1])
    case: dict[str, Any] = {
        "batch": batch,
        "kv_heads": kv_heads,
        "tokens": tokens,
        "group": group,
        "memory_bytes_per_s": statistics.median(memory),
        "ours_bytes_per_s": statistics.median(ours),
        "torch_bytes_per_s": statistics.median(theirs),
        "of_memory": statistics.median(o / m for o, m in zip(ours, memory, strict=True)),
        "speedup": statistics.median(o / t for o, t in zip(ours, theirs, strict=True)),
        "of_plain": {kind: statistics.median(ratios) for kind, ratios in of_plain.items()},
    }
    kinds = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in case["of_plain"].items())
    print(
        f"{batch:>4} sequences {kv_heads:>3} key heads x {group} {tokens:>5} tokens:"
        f" {case['ours_bytes_per_s'] / 1e9:5.1f} GB/s, {case['of_memory']:.2f} of memory's"
        f" {case['memory_bytes_per_s'] / 1e9:5.1f}; {case['speedup']:5.1f} x torch;"
        f" of plain: {kinds}",
        file=sys.stderr,
        flush=True,
    )
    return case


def in_pages(
    caches: list[torch.Tensor], batch: int
) -> tuple[Iterator[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Copy caches [tokens, 2, rows, head_dim] to pages in random order; returns the pools in turn,
    and the tables and lengths of the lanes."""
    tokens, _, rows, head_dim = caches[0].shape
    count = -(-tokens // PAGE)
    tables = torch.randperm(batch * count, dtype=torch.int32).view(batch, count)
    shape = batch * count, rows // batch, 2, PAGE, head_dim
    pools = []
    for cache in caches:
        padded = F.pad(cache, (0, 0, 0, 0, 0, 0, 0, count * PAGE - tokens))
        by_page = padded.view(count, PAGE, 2, batch, -1, head_dim).permute(3, 0, 4, 2, 1, 5)
        buffer = aligned_buffer(by_page.numel() * cache.itemsize)
        pool = torch.frombuffer(buffer, dtype=cache.dtype).view(shape)
        pool[tables.flatten().long()] = by_page.flatten(0, 1)
        pools.append(pool)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    return itertools.cycle(pools), tables, lengths


def measure_latent(dtype: str, heads: int, rounds: int) -> dict[str, Any]:
    """Time latent attention beside plain attention to as many bytes (one query head a key head),
    and beside a product of as many rows as there are heads."""
    batch, tokens, kind = 16, 576, DTYPES[dtype]
    cache_bytes = batch * tokens * ROW_DIM * kind.itemsize
    plain_tokens = tokens * ROW_DIM // (2 * HEAD_DIM)
    count = max(2, -(-COLD_BYTES // cache_bytes))
    latents, plains = (
        itertools.cycle([cache_by_row(torch.randn(shape).to(kind)) for _ in range(count)])
        for shape in ((batch, 1, tokens, ROW_DIM), (batch, 2, plain_tokens, HEAD_DIM))
    )
    q, out = (
        torch.randn(batch, heads, ROW_DIM).to(kind),
        torch.empty(batch, heads, RANK, dtype=kind),
    )
    plain_q = torch.randn(batch, 1, HEAD_DIM).to(kind)
    plain_out = torch.empty(batch, 1, HEAD_DIM, dtype=kind)
    x, weight = torch.randn(heads, 2048).to(kind), torch.randn(4096, 2048).to(kind)

    def attend() -> None:
        kernels.decode_attention(q, next(latents), out, scale=0.1)

    def attend_plainly() -> None:
        kernels.decode_attention(plain_q, next(plains), plain_out)

    ours, plain, product = [], [], []
    for _ in range(rounds):
        ours.append(measure_rate(attend, cache_bytes))
        plain.append(measure_rate(attend_plainly, cache_bytes))
        product.append(measure_rate(lambda: kernels.linear(x, weight), 2 * heads * weight.numel()))
    flop_per_byte = 2 * heads * (ROW_DIM + RANK) / (ROW_DIM * kind.itemsize)
    ratios = [(o / p, o * flop_per_byte / m) for o, p, m in zip(ours, plain, product, strict=True)]
    case: dict[str, Any] = {
        "heads": heads,
        "ours_bytes_per_s": statistics.median(ours),
        "ours_flop_per_s": statistics.median(ours) * flop_per_byte,
        "of_plain": statistics.median(ratio for ratio, _ in ratios),
        "of_product": statistics.median(ratio for _, ratio in ratios),
    }
    print(
        f"{heads:>4} heads share a latent row: {case['ours_bytes_per_s'] / 1e9:5.1f} GB/s,"
        f" {case['of_plain']:.2f} of plain; {case['ours_flop_per_s'] / 1e9:.0f} GFLOP/s,"
        f" {case['of_product']:.2f} of a product of {heads} rows",
        file=sys.stderr,
        flush=True,
    )
    return case


def measure_rate(work: Callable[[], object], num_bytes: int) -> float:
    """Repeat for a window, and return bytes per second."""
    work()
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < WINDOW_S:
        work()
        count += 1
    return count * num_bytes / passed


if __name__ == "__main__":
    run(main)

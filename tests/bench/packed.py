"""Groups of four bits on the CPU: unpacking beside eager torch, attention beside the 16-bit cache.

Rounds take turns, so that a machine shared with others counts the same for all; medians of the
rounds' ratios are told. Attention sees the same tokens in both forms; its rate is that of the
16-bit cache which they stand for. Progress goes to stderr, one JSON line with every figure to
stdout.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

import torch
from decode_attention import GROUPS, SHAPES, measure_rate
from workload_run import BenchParser, circumstances, keep_result

from profiles import kernels
from profiles.attention_rates import cache_by_row
from profiles.command import run
from profiles.compute_plan import COLD_BYTES
from profiles.compute_rates import HEAD_DIM
from profiles.errors import InputError
from profiles.packing import DEFAULT_GROUP_SIZE, Packing

# Rows and columns of a matrix of a model of three billion parameters, and matrices in turn.
MATRIX = (8192, 3072)
NUM_MATRICES = 4


def main(arguments: list[str]) -> None:
    """Measure, print the table and the line."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 3:
        raise InputError("--rounds", got=flags.rounds, allowed="3 or more")
    with torch.inference_mode():
        result = {
            "benchmark": "groups of four bits",
            "rounds": flags.rounds,
            "unpacking": measure_unpacking(flags.rounds),
            "attention": [
                measure_attention(shape, group, flags.rounds)
                for shape in SHAPES
                for group in GROUPS
            ],
            **circumstances("packed.py", arguments, "torch"),
        }
    keep_result(flags, result)


def _parser() -> BenchParser:
    parser = BenchParser(
        "packed.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/packed.json",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of which the median counts (15)")
    return parser


def measure_unpacking(rounds: int) -> dict[str, Any]:
    """Unpack a matrix to bfloat16; rates are bytes of output per second."""
    rows, width = MATRIX
    packing = Packing(num_elements=width, bits=4)
    packed = [
        torch.randint(0, 256, (1, rows, packing.row_bytes), dtype=torch.uint8)
        for _ in range(NUM_MATRICES)
    ]
    turns = itertools.cycle(packed)
    out = torch.empty(1, rows, width, dtype=torch.bfloat16)

    def unpack() -> None:
        kernels.unpack_rows(next(turns), packing, out)

    groups = rows * width // DEFAULT_GROUP_SIZE
    codes = torch.randint(0, 256, (groups, DEFAULT_GROUP_SIZE // 2), dtype=torch.uint8)
    scale, minimum = (torch.rand(groups, 1).bfloat16() for _ in range(2))

    def unpack_eagerly() -> torch.Tensor:
        values = torch.empty(groups, DEFAULT_GROUP_SIZE, dtype=torch.bfloat16)
        values[:, : DEFAULT_GROUP_SIZE // 2] = codes & 15
        values[:, DEFAULT_GROUP_SIZE // 2 :] = codes >> 4
        return values.mul_(scale).add_(minimum)

    ours: list[float] = []
    eager: list[float] = []
    for _ in range(rounds):
        ours.append(measure_rate(unpack, out.nbytes))
        eager.append(measure_rate(unpack_eagerly, out.nbytes))
    found = {
        "ours_bytes_per_s": statistics.median(ours),
        "eager_bytes_per_s": statistics.median(eager),
        "speedup": statistics.median(o / e for o, e in zip(ours, eager, strict=True)),
    }
    print(
        f"unpacking {found['ours_bytes_per_s'] / 1e9:.1f} GB/s of output,"
        f" {found['speedup']:.1f} x eager torch",
        file=sys.stderr,
        flush=True,
    )
    return found


def measure_attention(shape: tuple[int, int, int], group: int, rounds: int) -> dict[str, Any]:
    """Attend to the same tokens in 16 and in 4 bits."""
    batch, kv_heads, tokens = shape
    packing = Packing(num_elements=HEAD_DIM, bits=4)
    by_row = torch.randn(batch * kv_heads * 2, tokens, HEAD_DIM).bfloat16()
    packed = torch.empty(*by_row.shape[:2], packing.row_bytes, dtype=torch.uint8)
    kernels.pack_rows(by_row, packing, packed)
    turns = {}
    for form, cache in (("plain", by_row), ("packed", packed)):
        count = max(2, -(-COLD_BYTES // cache.nbytes))
        whole = cache.unflatten(0, (batch * kv_heads, 2))
        turns[form] = itertools.cycle([cache_by_row(whole) for _ in range(count)])
    q = torch.randn(batch, kv_heads * group, HEAD_DIM).bfloat16()
    out = torch.empty(batch * kv_heads, group, HEAD_DIM, dtype=torch.bfloat16)
    sums = torch.zeros(batch * kv_heads, HEAD_DIM)

    def attend(form: str, how: Packing | None, sparsity: float = 1.0) -> float:
        kept = sums if sparsity < 1 else None
        return measure_rate(
            lambda: kernels.decode_attention(
                q, next(turns[form]), out, packing=how, sparsity=sparsity, value_sums=kept
            ),
            by_row.nbytes,
        )

    rates: dict[str, list[float]] = {"plain": [], "packed": [], "sparse": [], "sparse packed": []}
    for _ in range(rounds):
        rates["plain"].append(attend("plain", None))
        rates["packed"].append(attend("packed", packing))
        rates["sparse"].append(attend("plain", None, 0.1))
        rates["sparse packed"].append(attend("packed", packing, 0.1))
    case: dict[str, Any] = {
        "batch": batch,
        "kv_heads": kv_heads,
        "tokens": tokens,
        "group": group,
    }
    for form, found in rates.items():
        name = form.replace(" ", "_")
        case[f"{name}_bytes_per_s"] = statistics.median(found)
        ratios = (x / plain for x, plain in zip(found, rates["plain"], strict=True))
        case[f"{name}_speedup"] = statistics.median(ratios)
    print(
        f"{batch:>4} sequences {kv_heads:>3} key heads x {group} {tokens:>5} tokens: 16 bits"
        f" {case['plain_bytes_per_s'] / 1e9:5.1f} GB/s; 4 bits x {case['packed_speedup']:.2f},"
        f" sparse x {case['sparse_speedup']:.2f}, both x {case['sparse_packed_speedup']:.2f}",
        file=sys.stderr,
        flush=True,
    )
    return case


if __name__ == "__main__":
    run(main)

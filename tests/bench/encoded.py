"""Encoded matrices on the CPU: products with few rows and unpacking, beside our own packed rows.

Rates are bytes of encoded rows per second, and elements per second beside those of our own packed
rows with 4 or 8 bits, whichever is next. Rounds take turns, so that a machine shared with others
counts the same for all; medians of the rounds are told. ``memory`` is how fast torch sums as many
bytes: no product can read faster. Progress goes to stderr, one JSON line with every figure to
stdout.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from decode_attention import measure_rate
from workload_run import BenchParser, circumstances, keep_result

from profiles import encoded_rates, kernels
from profiles.command import run
from profiles.compute_plan import COLD_BYTES
from profiles.encodings import Encoding, find_encoding, fp8
from profiles.errors import InputError
from profiles.kernels import EncodedMatrix
from profiles.packing import Packing

# Outputs and inputs of a matrix of a model of three billion parameters.
MATRIX = (8192, 3072)
ROWS = (1, 4, 16, 64)
ENCODINGS = (*encoded_rates.ENCODINGS, fp8(1, 0))


def main(arguments: list[str]) -> None:
    """Measure, print the table and the line."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 1:
        raise InputError("--rounds", got=flags.rounds, allowed="1 or more")
    names = flags.encoding or [encoding.name for encoding in ENCODINGS]
    dtype = getattr(torch, flags.dtype)
    with torch.inference_mode():
        works = _works([find_encoding(name) for name in names], dtype)
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in works}
        for _ in range(flags.rounds):
            for key, (work, num_elements) in works.items():
                rates[key].append(measure_rate(work, num_elements))
    medians = {key: statistics.median(found) for key, found in rates.items()}
    result = {
        "benchmark": "encoded matrices",
        "rounds": flags.rounds,
        "dtype": flags.dtype,
        "threads": torch.get_num_threads(),
        "memory_bytes_per_s": medians.pop(("memory", "")),
        "cases": [_case(name, what, medians) for name, what in medians],
        **circumstances("encoded.py", arguments, "torch"),
    }
    keep_result(flags, result)


def _parser() -> BenchParser:
    parser = BenchParser(
        "encoded.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--result tests/bench/results/encoded.json",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts (7)")
    parser.add_argument("--encoding", action="append", help="one of them only; may be repeated")
    parser.add_argument("--dtype", default="bfloat16", help="of inputs and outputs (bfloat16)")
    return parser


def _works(
    encodings: Sequence[Encoding], dtype: torch.dtype
) -> dict[tuple[str, str], tuple[Callable[[], object], int]]:
    """Return what is measured, by encoding and task, with the elements that it reads."""
    memory = torch.ones(COLD_BYTES // 4)
    works: dict[tuple[str, str], tuple[Callable[[], object], int]] = {
        ("memory", ""): (memory.sum, memory.nbytes)
    }
    inputs = {rows: torch.randn(rows, MATRIX[1]).to(dtype) for rows in ROWS}
    out = torch.empty(MATRIX, dtype=dtype)

    def add(name: str, multiply: Callable[..., object], unpack: Callable[..., object]) -> None:
        for rows, x in inputs.items():
            result = torch.empty(rows, MATRIX[0], dtype=dtype)
            works[name, f"{rows} rows"] = partial(multiply, x, result), out.numel()
        works[name, "unpack"] = unpack, out.numel()

    for bits in (4, 8):
        add(f"own {bits} bits", *_packed_works(bits, out))
    for encoding in encodings:
        add(encoding.name, *_encoded_works(encoding, out))
    return works


def _packed_works(
    bits: int, out: torch.Tensor
) -> tuple[Callable[..., object], Callable[..., object]]:
    packing = Packing(num_elements=MATRIX[1], bits=bits)
    turns = _turns(MATRIX[0], packing.row_bytes)
    return (
        lambda x, result: kernels.multiply_rows(x, next(turns), packing, result),
        lambda: kernels.unpack_rows(next(turns)[None], packing, out[None]),
    )


def _encoded_works(
    encoding: Encoding, out: torch.Tensor
) -> tuple[Callable[..., object], Callable[..., object]]:
    table = None
    if encoding.has_table:
        table = torch.rand(encoding.table_elements(*MATRIX))
    turns = _turns(MATRIX[0], encoding.row_bytes(MATRIX[1]))

    def matrix() -> EncodedMatrix:
        rows = next(turns)
        return EncodedMatrix(rows=rows, encoding=encoding, num_elements=MATRIX[1], table=table)

    return (
        lambda x, result: kernels.multiply_encoded(x, matrix(), result),
        lambda: kernels.unpack_encoded(matrix(), out),
    )


def _turns(rows: int, row_bytes: int) -> itertools.cycle[torch.Tensor]:
    """Return matrices of any bytes, too many to be found in a processor's cache.

    Bytes of 32 to 95 make floats of every kind that are neither subnormal nor infinite.
    """
    count = max(2, -(-COLD_BYTES // (rows * row_bytes)))
    size = (count, rows, row_bytes)
    return itertools.cycle(torch.randint(32, 96, size, dtype=torch.uint8).unbind())


def _case(name: str, what: str, medians: dict[tuple[str, str], float]) -> dict[str, Any]:
    rate = medians[name, what]
    case: dict[str, Any] = {"encoding": name, "task": what, "elements_per_s": rate}
    told = f"{name:>16} {what:>8}: {rate / 1e9:6.2f} G elements/s"
    if not name.startswith("own"):
        encoding = find_encoding(name)
        row_bytes = encoding.row_bytes(MATRIX[1])
        bits = 4 if row_bytes < MATRIX[1] * 3 / 4 else 8
        case["bytes_per_s"] = rate * row_bytes / MATRIX[1]
        case["own_ratio"] = rate / medians[f"own {bits} bits", what]
        told += f", {case['bytes_per_s'] / 1e9:6.2f} GB/s, x {case['own_ratio']:.2f} of {bits} bits"
    print(told, file=sys.stderr, flush=True)
    return case


if __name__ == "__main__":
    run(main)

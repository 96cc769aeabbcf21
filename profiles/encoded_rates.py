"""Rates of encoded matrices on one device: products of few rows, and unpacking."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from profiles import kernels
from profiles.compute_plan import COLD_BYTES, DTYPES, ComputePlan, measure_rate, noise
from profiles.encodings import (
    BLOCK_ENCODINGS,
    BNB_INT8,
    Encoding,
    four_bit_floats,
    fp8,
    integers,
)
from profiles.kernels import EncodedMatrix
from profiles.rate_curve import RateCurve
from profiles.repeats import Repeater
from profiles.units import MIB

# One of each kind.
ENCODINGS = (
    *BLOCK_ENCODINGS.values(),
    integers(4, 128, "float16", has_zeros=True),
    integers(8, 128, "float16", has_zeros=True),
    fp8(128, 128),
    four_bit_floats(64, is_nested=True),
    BNB_INT8,
)
# In float32, FLOP/s of few rows are the same to a third, and never lower; but blocks of GGUF, which
# processors with AVX-512 VNNI or AVX2 multiply as integers, have a third to a half of them.
DTYPE = "bfloat16"
# Kinds are many and differ little, so that each gets little time.
NUM_SAMPLES, SAMPLE_S = 3, 0.01


def measure_encoded_matmul(
    device: str, plan: ComputePlan, repeater: Repeater
) -> dict[str, RateCurve]:
    """Measure products of few rows by the kind of their weights, where a kernel does them."""
    if device != "cpu" or not kernels.is_native(noise(device, DTYPE, 1, 1)):
        return {}
    repeater = repeater.with_samples(num_samples=NUM_SAMPLES, sample_s=SAMPLE_S)
    store = _any_bytes(device)
    curves = {}
    for encoding in ENCODINGS:
        turns = _matrices(store, encoding, plan)
        rates = []
        for size in plan.encoded_rows:
            x = noise(device, DTYPE, size, plan.in_features)
            multiply = partial(_multiply, x, turns, x.new_empty(size, plan.out_features))
            flop = 2.0 * size * plan.out_features * plan.in_features
            figure = f"encoded_matmul.{encoding.kind.name}.rows{size}"
            rates.append(measure_rate(device, figure, "flop_per_s", multiply, flop, repeater))
        sizes = tuple(float(size) for size in plan.encoded_rows)
        curves[encoding.kind.name] = RateCurve(sizes=sizes, rates=tuple(rates))
    return curves


def measure_encoded_unpacking(
    device: str, plan: ComputePlan, repeater: Repeater
) -> dict[str, float]:
    """Measure unpacking on a GPU, in bytes of bfloat16 output per second by kind.

    A CPU multiplies encoded matrices as they are.
    """
    if device == "cpu":
        return {}
    repeater = repeater.with_samples(num_samples=NUM_SAMPLES, sample_s=SAMPLE_S)
    store = _any_bytes(device)
    out = torch.empty(plan.out_features, plan.in_features, dtype=DTYPES[DTYPE], device=device)
    rates = {}
    for encoding in ENCODINGS:
        turns = _matrices(store, encoding, plan)
        unpack = partial(_unpack, turns, out)
        figure = f"encoded_unpack.{encoding.kind.name}"
        rate = measure_rate(device, figure, "bytes_per_s", unpack, out.nbytes, repeater)
        rates[encoding.kind.name] = rate
    return rates


def _multiply(x: torch.Tensor, turns: Iterator[EncodedMatrix], out: torch.Tensor) -> None:
    kernels.multiply_encoded(x, next(turns), out)


def _unpack(turns: Iterator[EncodedMatrix], out: torch.Tensor) -> None:
    kernels.unpack_encoded(next(turns), out)


def _any_bytes(device: str) -> torch.Tensor:
    """Return bytes that are floats of every kind, none subnormal or infinite."""
    return torch.randint(32, 96, (MIB,), dtype=torch.uint8, device=device).repeat(COLD_BYTES // MIB)


def _matrices(
    store: torch.Tensor, encoding: Encoding, plan: ComputePlan
) -> Iterator[EncodedMatrix]:
    """Yield matrices without end that share the bytes of ``store``, each once in a round."""
    shape = plan.out_features, plan.in_features
    row_bytes = encoding.row_bytes(plan.in_features)
    num_bytes = plan.out_features * row_bytes
    count = max(1, len(store) // num_bytes)
    table = None
    if encoding.has_table:
        table = torch.ones(encoding.table_elements(*shape), device=store.device)
    # A matrix that is larger than the store is its own.
    parts = store[: count * num_bytes] if num_bytes <= len(store) else store.repeat(2)[:num_bytes]
    return itertools.cycle(
        [
            EncodedMatrix(rows=rows, encoding=encoding, num_elements=plan.in_features, table=table)
            for rows in parts.view(count, plan.out_features, row_bytes)
        ]
    )

"""Matrix products whose parts are handed out to the cores as these come free.

torch divides a product into one equal share a thread and waits for the slowest. Beside another
program that is always a thread which was taken off its core.

Processors that cannot multiply 16-bit floats convert each part to float32. torch's own products
of bfloat16 take three times as long there (512 rows, Ice Lake).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from profiles.kernels.build import load_library
from profiles.mounts import read_lines
from profiles.product_parts import parts_of

# Of /proc/cpuinfo, where bfloat16 is multiplied: Intel, AMD and Arm.
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# With fewer, the weights are read as fast as they are converted.
LEAST_WIDE_ROWS = 12
_Work = ctypes.CFUNCTYPE(None)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply ``x`` [rows, in] by ``weight`` [out, in], add ``bias`` [out]: [rows, out].

    Sums are float32, rounded once. ``out`` may have a stride between its rows.
    """
    library = load_library() if x.device.type == "cpu" else None
    if library is None:
        return _whole(x, weight, bias, out)
    num_threads, is_wide = torch.get_num_threads(), multiplies_wide(x.dtype, len(x))
    parts = parts_of(len(x), *weight.shape, num_threads=num_threads, is_wide=is_wide)
    if not is_wide and (parts.input_rows, parts.weight_rows) == (len(x), len(weight)):
        return _whole(x, weight, bias, out)
    if out is None:
        out = x.new_empty(len(x), len(weight))
    pairs = _slices(len(x), parts.input_rows, len(weight), parts.weight_rows)
    multiply = _multiply_wide if is_wide else _multiply

    def work(rows: slice, columns: slice) -> None:
        added = None if bias is None else bias[columns]
        multiply(x[rows], weight[columns], added, out[rows, columns])

    if len(pairs) == 1:
        work(*pairs[0])
    else:
        _hand_out(library, work, pairs, num_threads)
    return out


def multiplies_wide(dtype: torch.dtype, num_rows: int) -> bool:
    """Whether a product on the CPU is done in float32, part by part."""
    if dtype is torch.bfloat16:
        return num_rows >= LEAST_WIDE_ROWS and not has_bfloat16()
    return dtype is torch.float16 and num_rows >= LEAST_WIDE_ROWS


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; assumed where nothing is known."""
    found = read_lines(Path("/proc/cpuinfo"))
    lines = [line for line in found if line.startswith(("flags", "Features"))]
    return not lines or bool(BFLOAT16_FLAGS & set(lines[0].split()))


def _slices(
    num_inputs: int, input_rows: int, num_weights: int, weight_rows: int
) -> list[tuple[slice, slice]]:
    return [
        (slice(first, first + input_rows), slice(column, column + weight_rows))
        for first in range(0, num_inputs, input_rows)
        for column in range(0, num_weights, weight_rows)
    ]


def _hand_out(
    library: ctypes.CDLL,
    work: Callable[[slice, slice], None],
    pairs: Sequence[tuple[slice, slice]],
    num_threads: int,
) -> None:
    """Do all the work with torch's own threads, each taking the next part when it is free."""
    failures: list[BaseException] = []
    # Threads share it: none of them sees an item that another has taken.
    parts = iter(pairs)

    def take_parts() -> None:
        try:
            with torch.inference_mode():
                for rows, columns in parts:
                    work(rows, columns)
        except BaseException as error:  # ctypes would print it and go on
            failures.append(error)

    library.work_together(_Work(take_parts), ctypes.c_int(num_threads))
    if failures:
        raise failures[0]


def _whole(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    _multiply(x, weight, bias, out)
    return out


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _multiply_wide(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    product = torch.mm(x.float(), weight.float().t())
    if bias is not None:
        product += bias.float()
    out.copy_(product)

"""What is computed to measure a device, and how one figure of it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from profiles.compute_rates import WIDTH
from profiles.packing import DIRECT_ROWS
from profiles.repeats import Repeater
from profiles.units import MIB

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights and caches of one figure take turns, so that none is found in a processor's cache. With
# half as much, up to a tenth was found in one of 32 MiB.
COLD_BYTES = 256 * MIB
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
    encoded_rows
        Rows of the products with encoded weights, increasing.
    packed_rows
        Rows of the products with 4-bit weights, wide and narrow, beside those in ``rows``.
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
    encoded_rows: tuple[int, ...] = (1, DIRECT_ROWS)
    packed_rows: tuple[int, ...] = (1, 2, 4, 8, 12)


# With more than one row, encoded weights differ little from plain ones.
QUICK_PLAN = ComputePlan(rows=(1, 16, 64, 256, 1024), out_features=4096, encoded_rows=(1,))
FULL_PLAN = ComputePlan(rows=(1, 4, 16, 64, 256, 512, 1024, 2048, 4096), out_features=11008)


def prefix_of(device: str) -> str:
    """Return what the figures of a device (``cpu`` or ``cuda``) begin with."""
    return "cpu" if device == "cpu" else "gpu"


def measure_rate(
    device: str, name: str, unit: str, work: Callable[[], object], amount: float, repeater: Repeater
) -> float:
    """Measure ``amount`` of ``unit`` per second of ``work``, whose end is waited for on a GPU, and
    return the median."""
    name = f"{prefix_of(device)}.{name}"
    if device == "cpu":
        return repeater.measure_rate(name, unit, work, amount).median

    def launch_and_wait() -> None:
        for _ in range(NUM_LAUNCHES):
            work()
        torch.cuda.synchronize()

    return repeater.measure_rate(name, unit, launch_and_wait, NUM_LAUNCHES * amount).median


def noise(device: str, dtype: str, *shape: int) -> torch.Tensor:
    """Return a few random rows repeated: as good as all random for timing, and quicker to make."""
    seed = torch.randn(min(64, shape[0]), *shape[1:]).to(device, DTYPES[dtype])
    repeats = -(-shape[0] // seed.shape[0])
    return seed.repeat(repeats, *(1 for _ in shape[1:]))[: shape[0]].contiguous()

"""What is enumerated outside the program: batch sizes, precision, and what must be allowed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from costmodel.model_spec import ModelSpec
from costmodel.problem import Problem
from costmodel.workload import Workload
from profiles.errors import InputError
from profiles.hardware import HardwareProfile

# Without a number of prompts, a block may be this large.
MAX_BLOCK_SIZE = 4096
# Rows of a matrix product in prefill: more run faster and take more memory.
PREFILL_ROWS = (8192, 2048, 512)
# What changes a model's outputs, or what the executor cannot run yet, is only offered by name.
ALLOWABLE = {
    "weights-8bit": "weights in 8 bits, in groups of 64",
    "weights-4bit": "weights in 4 bits, in groups of 64",
    "cache-8bit": "KV cache in 8 bits, in groups of 64",
    "cache-4bit": "KV cache in 4 bits, in groups of 64",
    "sparse-attention": "decode reads a tenth of the values, those with the largest scores",
    "cpu-weights": "beside a GPU, the CPU multiplies part of the weights where they lie",
}
SPARSITY = 0.1


def check_allowed(names: frozenset[str], hardware: HardwareProfile) -> None:
    """Refuse names that are not known, and quantization where its cost is not."""
    if unknown := sorted(names - ALLOWABLE.keys()):
        raise InputError("--allow", got=unknown[0], allowed=", ".join(ALLOWABLE))
    if any("bit" in name for name in names) and not hardware.knows_unpacking:
        raise InputError(
            "--allow",
            got=next(iter(sorted(n for n in names if "bit" in n))),
            allowed=f"no quantization, because {hardware.name} lacks the rate of unpacking",
            hint="python -m profiles.measure",
        )


def problems_of(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, allowed: frozenset[str]
) -> Iterator[Problem]:
    """Yield every problem that the search compares."""
    cpu_weights = [False, True] if "cpu-weights" in allowed and hardware.has_gpu else [False]
    # Fewer values never cost more in this model, so what is allowed is taken.
    sparsity = SPARSITY if "sparse-attention" in allowed else 1.0
    for batch, in_place, in_cpu, weight_bits, cache_bits in itertools.product(
        batch_sizes(workload), (True, False), cpu_weights,
        _bits(model, "weights", allowed), _bits(model, "cache", allowed),
    ):  # fmt: skip
        sizes = {_even_part(batch, rows // workload.prompt_len) for rows in PREFILL_ROWS}
        for prefill_batch_size in sorted(sizes):
            yield Problem(
                hardware=hardware,
                model=model,
                workload=workload,
                gpu_batch_size=batch,
                prefill_batch_size=prefill_batch_size,
                in_place=in_place,
                cpu_weights=in_cpu,
                weight_bits=weight_bits,
                cache_bits=cache_bits,
                attention_sparsity=sparsity,
            )


def smallest_problem(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, allowed: frozenset[str]
) -> Problem:
    """Return the problem that needs the least memory: one sequence at a time, in the fewest bits
    allowed."""
    return Problem(
        hardware=hardware,
        model=model,
        workload=workload,
        gpu_batch_size=1,
        prefill_batch_size=1,
        weight_bits=min(_bits(model, "weights", allowed)),
        cache_bits=min(_bits(model, "cache", allowed)),
    )


def batch_sizes(workload: Workload) -> list[int]:
    """Powers of two and the sizes between them, and those that divide the prompts evenly."""
    most = min(workload.num_prompts or MAX_BLOCK_SIZE, MAX_BLOCK_SIZE)
    powers = [2**i for i in range(most.bit_length())]
    sizes = {*powers, *(3 * p // 2 for p in powers if p > 1)}
    if workload.num_prompts is not None:
        sizes |= {-(-workload.num_prompts // parts) for parts in range(1, 9)}
    return sorted(size for size in sizes if size <= most)


def _bits(model: ModelSpec, kind: str, allowed: frozenset[str]) -> list[int]:
    """Full precision, and the fewest bits allowed: more of them cost as much to unpack."""
    packed = [bits for bits in (4, 8) if f"{kind}-{bits}bit" in allowed]
    return [model.full_bits, *packed[:1]]


def _even_part(size: int, most: int) -> int:
    """Return the largest of the equal parts, at most ``most`` each, that ``size`` is dealt into."""
    return -(-size // -(-size // max(1, most)))

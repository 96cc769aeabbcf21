"""Models larger than the GPU memory that they may take, and what FlexGen is given for each."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenPolicy:
    """FlexGen's own flags.

    Parameters
    ----------
    percent
        Of weights, cache and activations, on the GPU and on the CPU: six numbers.
    source
        Where they come from: the paper's table, or tried by hand.
    """

    percent: tuple[int, int, int, int, int, int]
    gpu_batch_size: int
    num_gpu_batches: int
    cpu_cache_compute: bool = False
    compresses_weights: bool = False
    compresses_cache: bool = False
    source: str = "by hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """A model, the caps, and the bits that the search may choose among.

    ``accelerate_batches`` are the batch sizes that accelerate is tried with; the best counts.
    """

    model: str
    gpu_memory: int
    cpu_memory: int
    weight_bits: int = 16
    cache_bits: int = 16
    num_prompts: int | None = None
    flexgen: tuple[FlexGenPolicy, ...] = ()
    accelerate_batches: tuple[int, ...] = ()


PAPER = "table 2 of the paper"
CPU_MEMORY = 110 * GIB
# Ours and FlexGen take as many prompts in one block, so few that a case takes minutes: the memory
# would hold a block two to three times as large.
CASES = {
    "opt-6.7b": GpuCase(
        model="opt-6.7b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=160,
        flexgen=(
            FlexGenPolicy(percent=(0, 100, 0, 100, 0, 100), gpu_batch_size=32, num_gpu_batches=5),
            FlexGenPolicy(
                percent=(0, 100, 0, 100, 0, 100),
                gpu_batch_size=32,
                num_gpu_batches=5,
                cpu_cache_compute=True,
            ),
            FlexGenPolicy(percent=(5, 95, 0, 100, 100, 0), gpu_batch_size=32, num_gpu_batches=5),
        ),
        accelerate_batches=(4,),
    ),
    "opt-6.7b 4 bits": GpuCase(
        model="opt-6.7b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        weight_bits=4,
        cache_bits=4,
        num_prompts=160,
        flexgen=(
            # With 32 sequences in a batch it runs out of GPU memory.
            FlexGenPolicy(
                percent=(0, 100, 0, 100, 0, 100),
                gpu_batch_size=16,
                num_gpu_batches=10,
                compresses_weights=True,
                compresses_cache=True,
            ),
            FlexGenPolicy(
                percent=(40, 60, 0, 100, 0, 100),
                gpu_batch_size=16,
                num_gpu_batches=10,
                compresses_weights=True,
                compresses_cache=True,
            ),
        ),
    ),
    "llama-3.1-8b": GpuCase(
        model="llama-3.1-8b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=384,
        accelerate_batches=(8,),
    ),
    "olmoe-1b-7b": GpuCase(
        model="olmoe-1b-7b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=128,
        accelerate_batches=(8,),
    ),
    "opt-13b": GpuCase(
        model="opt-13b",
        gpu_memory=16 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=96,
        flexgen=(
            FlexGenPolicy(percent=(40, 60, 0, 100, 0, 100), gpu_batch_size=32, num_gpu_batches=3),
            FlexGenPolicy(
                percent=(40, 60, 0, 100, 0, 100),
                gpu_batch_size=32,
                num_gpu_batches=3,
                cpu_cache_compute=True,
            ),
        ),
        accelerate_batches=(8,),
    ),
    "opt-30b 4 bits": GpuCase(
        model="opt-30b",
        gpu_memory=16 * GIB,
        cpu_memory=CPU_MEMORY,
        weight_bits=4,
        cache_bits=4,
        num_prompts=96,
        flexgen=(
            FlexGenPolicy(
                percent=(50, 50, 0, 100, 0, 100),
                gpu_batch_size=48,
                num_gpu_batches=2,
                compresses_weights=True,
                compresses_cache=True,
            ),
        ),
    ),
    "opt-30b": GpuCase(
        model="opt-30b",
        gpu_memory=16 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=48,
        flexgen=(
            FlexGenPolicy(
                percent=(15, 85, 0, 100, 0, 100),
                gpu_batch_size=24,
                num_gpu_batches=2,
                cpu_cache_compute=True,
                source=f"{PAPER}, a third of its block",
            ),
            FlexGenPolicy(percent=(15, 85, 0, 100, 0, 100), gpu_batch_size=24, num_gpu_batches=2),
        ),
        accelerate_batches=(4,),
    ),
    "cache on disk": GpuCase(
        model="opt-6.7b", gpu_memory=4 * GIB, cpu_memory=16 * GIB, num_prompts=64
    ),
    "weights on disk": GpuCase(
        model="opt-13b", gpu_memory=4 * GIB, cpu_memory=22 * GIB, cache_bits=4, num_prompts=16
    ),
}
# The same ways through the code, small enough for an emulated GPU on a few cores.
REHEARSALS = {
    "opt-125m": GpuCase(model="opt-125m", gpu_memory=GIB // 4, cpu_memory=2 * GIB, num_prompts=8),
    "opt-125m 4 bits": GpuCase(
        model="opt-125m",
        gpu_memory=GIB // 4,
        cpu_memory=2 * GIB,
        weight_bits=4,
        cache_bits=4,
        num_prompts=8,
    ),
    "weights on disk": GpuCase(
        model="qwen2.5-0.5b", gpu_memory=GIB // 2, cpu_memory=GIB, num_prompts=8
    ),
}

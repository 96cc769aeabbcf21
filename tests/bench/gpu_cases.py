"""Models larger than the GPU memory that they may take, and what the peers are given for each.

Seconds are those that a step takes on a machine with an H100 or H200 and 16 cores, its start
included: measured for OPT-6.7B and Llama 3.1 8B on 2026-11-26, reckoned from bytes for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from profiles.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenPolicy:
    """FlexGen's own flags.

    Parameters
    ----------
    percent
        Of weights, cache and activations, on the GPU and on the CPU: six numbers. The rest is on
        disk.
    """

    percent: tuple[int, int, int, int, int, int]
    gpu_batch_size: int
    num_gpu_batches: int
    cpu_cache_compute: bool = False
    compresses_weights: bool = False
    compresses_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """A model, its work, the limits of memory, and the settings that the peers are tried with.

    Parameters
    ----------
    model
        A preset; ``changes`` replace keys of its ``config.json``, such as the number of layers.
    experts
        Where decode multiplies the experts in CPU memory: all are ``sent`` to the GPU, or stay ``in
        place``. Empty leaves it to the search.
    is_main
        Whether the case is one of the five that attainment and prediction are judged by.
    accelerate_batches
        Sequences of one batch.
    ours_s, flexgen_s, accelerate_s
        Expected seconds of our run, and of all settings of a peer.
    """

    model: str
    gpu_memory: int
    cpu_memory: int
    ours_s: float
    num_prompts: int
    prompt_len: int = 512
    gen_len: int = 32
    dtype: str = "float16"
    changes: Mapping[str, Any] = field(default_factory=dict)
    weight_bits: int = 16
    cache_bits: int = 16
    is_mixture: bool = False
    experts: str = ""
    is_main: bool = False
    flexgen: tuple[FlexGenPolicy, ...] = ()
    flexgen_s: float = 0.0
    accelerate_batches: tuple[int, ...] = ()
    accelerate_s: float = 0.0


CPU_MEMORY = 110 * GIB
ALL_ON_CPU = (0, 100, 0, 100, 0, 100)


def _mixture(experts: str, **peers: Any) -> GpuCase:
    # Mixtral 8x7B, cut to 34 GB, of which the disk and the minutes of a call leave room.
    return GpuCase(
        model="mixtral-8x7b",
        changes={"num_hidden_layers": 12},
        dtype="bfloat16",
        gpu_memory=16 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=128,
        ours_s=75,
        is_mixture=True,
        experts=experts,
        **peers,
    )


def _alone(bits: int) -> GpuCase:
    # All of it on the GPU: what a product with packed weights is worth for one sequence.
    return GpuCase(
        model="llama-3.1-8b",
        gpu_memory=24 * GIB,
        cpu_memory=CPU_MEMORY,
        weight_bits=bits,
        num_prompts=1,
        ours_s=45,
    )


# In order of worth. Ours and the peers take as many prompts in one block, so few that a case takes
# a minute: the memory would hold a block two to three times as large.
CASES = {
    "opt-6.7b": GpuCase(
        model="opt-6.7b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=160,
        ours_s=60,
        is_main=True,
        flexgen=(
            FlexGenPolicy(percent=ALL_ON_CPU, gpu_batch_size=32, num_gpu_batches=5),
            FlexGenPolicy(
                percent=ALL_ON_CPU, gpu_batch_size=32, num_gpu_batches=5, cpu_cache_compute=True
            ),
            FlexGenPolicy(percent=(5, 95, 0, 100, 100, 0), gpu_batch_size=32, num_gpu_batches=5),
        ),
        flexgen_s=180,
        accelerate_batches=(4,),
        accelerate_s=60,
    ),
    "opt-6.7b 4 bits": GpuCase(
        model="opt-6.7b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        weight_bits=4,
        cache_bits=4,
        num_prompts=160,
        ours_s=45,
        is_main=True,
        # With 32 sequences in a batch, FlexGen runs out of GPU memory.
        flexgen=tuple(
            FlexGenPolicy(
                percent=(on_gpu, 100 - on_gpu, 0, 100, 0, 100),
                gpu_batch_size=16,
                num_gpu_batches=10,
                compresses_weights=packs,
                compresses_cache=True,
            )
            for on_gpu, packs in ((0, True), (40, True), (0, False))
        ),
        flexgen_s=190,
    ),
    "mixtral": _mixture("", is_main=True, accelerate_batches=(16, 48), accelerate_s=150),
    "llama-3.1-8b": GpuCase(
        model="llama-3.1-8b",
        gpu_memory=4 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=384,
        ours_s=80,
        is_main=True,
        accelerate_batches=(8,),
        accelerate_s=60,
    ),
    "weights on disk": GpuCase(
        model="opt-13b",
        gpu_memory=4 * GIB,
        cpu_memory=22 * GIB,
        num_prompts=16,
        gen_len=8,
        ours_s=90,
        is_main=True,
        flexgen=(
            FlexGenPolicy(percent=(0, 50, 0, 100, 0, 100), gpu_batch_size=8, num_gpu_batches=2),
            FlexGenPolicy(
                percent=(0, 50, 0, 100, 0, 100),
                gpu_batch_size=8,
                num_gpu_batches=2,
                cpu_cache_compute=True,
            ),
            FlexGenPolicy(percent=(0, 65, 0, 50, 0, 100), gpu_batch_size=8, num_gpu_batches=2),
        ),
        flexgen_s=180,
    ),
    "mixtral sent": _mixture("sent"),
    "mixtral in place": _mixture("in place"),
    "llama-3.1-8b alone": _alone(16),
    "llama-3.1-8b alone 4 bits": _alone(4),
    "opt-30b": GpuCase(
        model="opt-30b",
        gpu_memory=16 * GIB,
        cpu_memory=CPU_MEMORY,
        num_prompts=48,
        ours_s=110,
        # The first is that of table 2 of the paper, with a third of its block.
        flexgen=(
            FlexGenPolicy(
                percent=(15, 85, 0, 100, 0, 100),
                gpu_batch_size=24,
                num_gpu_batches=2,
                cpu_cache_compute=True,
            ),
            FlexGenPolicy(percent=(15, 85, 0, 100, 0, 100), gpu_batch_size=24, num_gpu_batches=2),
            FlexGenPolicy(percent=(10, 90, 0, 100, 100, 0), gpu_batch_size=24, num_gpu_batches=2),
        ),
        flexgen_s=260,
    ),
}

_SMALL: dict[str, Any] = {
    "gpu_memory": GIB // 4,
    "cpu_memory": 2 * GIB,
    "num_prompts": 8,
    "ours_s": 60.0,
}
_SMALL |= {"prompt_len": 64, "gen_len": 8, "is_main": True}
_SMALL_MIXTURE: dict[str, Any] = _SMALL | {
    "model": "mixtral-8x7b",
    "is_mixture": True,
    "changes": {
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
# The same ways through the code, small enough for an emulated GPU on a few cores.
REHEARSALS = {
    "opt-125m": GpuCase(model="opt-125m", accelerate_batches=(2, 4), accelerate_s=60, **_SMALL),
    "opt-125m 4 bits": GpuCase(model="opt-125m", weight_bits=4, cache_bits=4, **_SMALL),
    "mixtral": GpuCase(**_SMALL_MIXTURE, accelerate_batches=(4,), accelerate_s=60),
    "mixtral sent": GpuCase(**_SMALL_MIXTURE | {"experts": "sent", "is_main": False}),
    "mixtral in place": GpuCase(**_SMALL_MIXTURE | {"experts": "in place", "is_main": False}),
    "weights on disk": GpuCase(
        **_SMALL | {"model": "qwen2.5-0.5b", "gpu_memory": GIB // 2, "cpu_memory": GIB}
    ),
}

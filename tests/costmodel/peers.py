"""Policies that other systems would use, built by their own rules.

Each takes the largest batch that fits; what a system decides by hand is decided here as its
documentation advises. They are priced by the same model as ours.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from costmodel.model.layout import model_layers
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities
from costmodel.pricing.price import estimate
from profiles import HardwareProfile

PAPER_ROWS = Path(__file__).parents[2] / "notebooks" / "data" / "flexgen_paper.csv"
ON_GPU, ON_CPU, ON_DISK = Placement(gpu=1), Placement(cpu=1), Placement(disk=1)
MAX_BATCH = 1024


def fits(policy: Policy, hardware: HardwareProfile, *, margin: float = 0.0) -> bool:
    """Tell whether every tier holds the policy's peak."""
    peaks, limits = estimate(policy, hardware).peak_bytes, capacities(hardware)
    return all(peaks[tier] <= limits[tier] * (1 - margin) for tier in limits)


def _one_batch(
    model: ModelSpec,
    workload: Workload,
    size: int,
    *,
    weights: Placement,
    cache: Placement = ON_GPU,
    cpu_attention: float = 0.0,
    bits: int | None = None,
) -> Policy:
    """One batch, computed at once in both phases, with its hidden states on the GPU."""
    return Policy(
        model=model,
        workload=workload,
        gpu_batch_size=size,
        num_gpu_batches=1,
        prefill_batch_size=size,
        weights=placed_alike(model, weights),
        cache=cache,
        activations=ON_GPU,
        cpu_attention=cpu_attention,
        weight_bits=bits or model.full_bits,
        cache_bits=model.full_bits,
    )


def _largest(
    make: Callable[[int], Policy], hardware: HardwareProfile, num_prompts: int | None, margin: float
) -> Policy | None:
    """Return the policy of the largest batch that fits, ``None`` where none does."""
    best, size = None, 1
    while size <= min(MAX_BATCH, num_prompts or MAX_BATCH):
        policy = make(size)
        if not fits(policy, hardware, margin=margin):
            break
        best, size = policy, 2 * size
    return best


def accelerate(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, *, margin: float = 0.0
) -> Iterator[Policy]:
    """Hugging Face accelerate: weights streamed for one batch, cache on the GPU.

    ``device_map="auto"`` fills the GPU with whole layers, then CPU memory, then the disk; people
    who leave room for a batch stream all of them.
    """
    for weights in (ON_CPU, ON_DISK, *_filled(hardware, model, reserve=0.5)):
        policy = _largest(
            lambda size, w=weights: _one_batch(model, workload, size, weights=w),  # type: ignore[misc]
            hardware,
            workload.num_prompts,
            margin,
        )
        if policy is not None:
            yield policy


def _filled(hardware: HardwareProfile, model: ModelSpec, *, reserve: float) -> Iterator[Placement]:
    """Fill GPU, CPU and disk in turn with whole layers, but for a share of GPU memory."""
    assert hardware.gpu is not None
    layers = model_layers(model)
    total = sum(layer.num_bytes for layer in layers)
    left = {
        "gpu": hardware.gpu.memory_bytes * (1 - reserve),
        "cpu": hardware.cpu.memory_bytes * 0.9,
        "disk": float(hardware.disk.free_bytes),
    }
    placed = dict.fromkeys(left, 0)
    for layer in layers:
        tier = next((t for t, room in left.items() if room >= layer.num_bytes), None)
        if tier is None:
            return
        left[tier] -= layer.num_bytes
        placed[tier] += layer.num_bytes
    yield Placement(**{tier: count / total for tier, count in placed.items()})


def llama_cpp(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    *,
    bits: int | None = None,
    margin: float = 0.0,
) -> Iterator[Policy]:
    """``-ngl N``: N whole layers and their cache on the GPU. The CPU attends to the rest of the
    cache; what it would multiply is sent to the GPU, because products there have no price."""
    for size in (1, 4, 16, 64):
        if size > (workload.num_prompts or size):
            return
        for num_layers in range(model.num_layers, -1, -1):
            share = num_layers / model.num_layers
            split = Placement(gpu=share, cpu=1 - share)
            policy = _one_batch(
                model, workload, size, weights=split, cache=split, cpu_attention=1.0, bits=bits
            )
            if fits(policy, hardware, margin=margin):
                yield policy
                break


def zero_inference(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    *,
    bits: int | None = None,
    margin: float = 0.0,
) -> Iterator[Policy]:
    """DeepSpeed ZeRO-Inference: all weights streamed; the cache on the GPU, since 2023 also in
    CPU memory, where it is attended."""
    for weights in (ON_CPU, ON_DISK):
        for cache, attended in ((ON_GPU, 0.0), (ON_CPU, 0.0), (ON_CPU, 1.0)):

            def make(
                size: int, w: Placement = weights, c: Placement = cache, a: float = attended
            ) -> Policy:
                return _one_batch(
                    model, workload, size, weights=w, cache=c, cpu_attention=a, bits=bits
                )

            policy = _largest(make, hardware, workload.num_prompts, margin)
            if policy is not None:
                yield policy


def experts_on_cpu(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, *, margin: float = 0.0
) -> Iterator[Policy]:
    """llama.cpp's ``--n-cpu-moe``, KTransformers and Fiddler: all that every token passes through
    on the GPU, with the cache; the experts in CPU memory, which multiplies them there in decode.
    Of N layers the experts are on the GPU too."""
    for tenths in range(0, 10, 3):
        experts = Placement(gpu=tenths / 10, cpu=1 - tenths / 10)

        def make(size: int, e: Placement = experts) -> Policy:
            policy = _one_batch(model, workload, size, weights=ON_GPU)
            return replace(policy, weights={**policy.weights, "experts": e}, cpu_experts=1.0)

        policy = _largest(make, hardware, workload.num_prompts, margin)
        if policy is not None:
            yield policy


def flexgen_published() -> Iterator[tuple[Policy, float]]:
    """Yield the policies of FlexGen's paper (ICML 2023) and the token/s measured there."""
    with PAPER_ROWS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield _published(row), float(row["throughput_tok_per_s"])


def _published(row: dict[str, str]) -> Policy:
    def placement(kind: str) -> Placement:
        gpu, cpu = float(row[f"{kind}_gpu"]), float(row[f"{kind}_cpu"])
        return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))

    batch, model = int(row["gpu_batch_size"]), load_model_spec(row["model"])
    return Policy(
        model=model,
        workload=Workload(prompt_len=int(row["prompt_len"]), gen_len=int(row["gen_len"])),
        gpu_batch_size=batch,
        num_gpu_batches=int(row["num_gpu_batches"]),
        prefill_batch_size=batch,
        weights=placed_alike(model, placement("weights")),
        cache=placement("cache"),
        activations=placement("activations"),
        cpu_attention=float(row["cpu_attention"]),
        weight_bits=int(row["weight_bits"]),
        cache_bits=int(row["cache_bits"]),
    )

"""Policies drawn at random for real models: some by the search, some that nobody would choose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from costmodel.model.encoded_model import with_encodings
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.loading import load_model_spec
from costmodel.model.shapes import component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.rounding import round_policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import with_capacities
from costmodel.pricing.price import estimate
from profiles.emulate import with_emulated_gpu
from profiles.encodings import find_encoding
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile
from profiles.units import GIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Models to draw from, and the most layers, seconds and bytes of a run."""

    models: tuple[str, ...]
    num_layers: int
    longest_s: float
    most_bytes: int
    is_encoded: bool = False


DENSE = Shapes(
    models=("opt-125m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "opt-1.3b"),
    num_layers=99,
    longest_s=6.0,
    most_bytes=4 * GIB,
)
# A layer takes a gigabyte: few of them are enough, and a policy that loads whole layers stages two.
MIXTURES = Shapes(
    models=("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"),
    num_layers=3,
    longest_s=40.0,
    most_bytes=8 * GIB,
)
# Files of four bits with six for some matrices, of integers in groups, of floats with tiles.
MIXES = (
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q4_0", "Q4_1", "Q8_0"),
    ("INT4_G128_F16_Z",),
    ("INT8_G0_BF16",),
    ("E4M3_128X128",),
    ("MXFP4", "BF16"),
)
KINDS = ("searched", "by hand", "searched", "by hand", "searched, GPU", "by hand, GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A policy with the machine that it is to keep to, and how it came about."""

    policy: Policy
    kind: str
    predicted_bytes: int


def draw_policies(
    rng: random.Random, hardware: HardwareProfile, shapes: Shapes = DENSE
) -> Iterator[Drawn]:
    """Yield policies without end: searched, by hand, searched and by hand with an emulated GPU.

    Each carries the machine with budgets that it just fits, so that the executor's own watch over
    its budgets is tried as well.
    """
    while True:
        for kind in KINDS:
            drawn = None
            while drawn is None:
                draw = _search_one if kind.startswith("searched") else _draw_one
                drawn = draw(rng, hardware, kind, shapes)
            yield drawn


def _draw_work(rng: random.Random, shapes: Shapes) -> tuple[ModelSpec, Workload]:
    spec = load_model_spec(rng.choice(shapes.models))
    spec = spec.with_dtype(rng.choice(("bfloat16", "float32")))
    if shapes.is_encoded:
        spec = _draw_encodings(rng, spec)
    spec = first_layers(spec, rng.randint(2, min(spec.num_layers, shapes.num_layers)))
    return spec, Workload(
        prompt_len=rng.randint(16, 512), gen_len=rng.randint(2, 16), num_prompts=rng.randint(4, 64)
    )


def first_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """Cut a model to its first layers."""
    layers = [spec.layer(i) for i in range(count)]
    kinds = tuple(dict.fromkeys(layers))
    return replace(spec, layer_kinds=kinds, layer_order=tuple(map(kinds.index, layers)))


def _draw_encodings(rng: random.Random, spec: ModelSpec) -> ModelSpec:
    """Draw how the rows of each matrix are stored; those of stacked ones in two ways."""
    mix = rng.choice(MIXES)

    def rows_of(number: int, name: str) -> list[EncodedRows]:
        if number < 0:
            parts = [embedding_shapes(spec), head_shapes(spec, spec.vocab_size, is_first=True)]
        else:
            parts = [shapes for shapes, _ in component_shapes(spec, spec.layer(number)).values()]
        rows, width = next(shapes[name] for shapes in parts if name in shapes)
        fits = [name for name in mix if find_encoding(name).fits(width)]
        is_outside = number < 0 and find_encoding(mix[0]).has_table
        if not fits or is_outside or "router" in name:
            return []
        counts = (
            [rows // 2, rows - rows // 2] if name in ("qkv.weight", "gate_up.weight") else [rows]
        )
        # The same for equal names in alternate layers, so that there are few kinds of layers.
        chosen = random.Random(f"{name} {number % 2}")
        return [
            EncodedRows(tensor=name, rows=count, encoding=chosen.choice(fits)) for count in counts
        ]

    return with_encodings(spec, rows_of)


def _with_gpu(
    rng: random.Random, hardware: HardwareProfile, kind: str, shapes: Shapes
) -> HardwareProfile:
    if "GPU" not in kind:
        return hardware
    return with_emulated_gpu(
        hardware,
        memory_bytes=rng.randint(200 * MIB, shapes.most_bytes * 3 // 8),
        link_bytes_per_s=8e9,
    )


def _search_one(
    rng: random.Random, hardware: HardwareProfile, kind: str, shapes: Shapes
) -> Drawn | None:
    """Search under a budget between what hardly suffices and what is ample."""
    spec, work = _draw_work(rng, shapes)
    budget = hardware.cpu.runtime_bytes + rng.randint(100 * MIB, shapes.most_bytes * 3 // 4)
    hardware = _with_gpu(rng, hardware, kind, shapes)
    try:
        found = search(hardware.with_budget(cpu_memory=budget), spec, work)
    except InfeasibleError:
        return None
    return _check(found.policy, found.hardware, kind, shapes)


def _draw_one(
    rng: random.Random, hardware: HardwareProfile, kind: str, shapes: Shapes
) -> Drawn | None:
    """Draw batch sizes, a placement for each component, and who attends and runs experts, without
    asking whether it is wise."""
    spec, work = _draw_work(rng, shapes)
    hardware = _with_gpu(rng, hardware, kind, shapes)
    has_gpu = hardware.has_gpu
    has_experts = "experts" in spec.component_names
    gpu_batch_size = rng.randint(1, 32)
    policy = Policy(
        model=spec,
        workload=work,
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=rng.randint(1, 4),
        prefill_batch_size=rng.randint(1, gpu_batch_size),
        weights={name: draw_placement(rng, has_gpu=has_gpu) for name in spec.component_names},
        cache=draw_placement(rng, has_gpu=has_gpu),
        activations=draw_placement(rng, has_gpu=has_gpu),
        cpu_attention=rng.choice((0.0, 0.5, 1.0)) if has_gpu else 1.0,
        cpu_experts=rng.choice((0.0, 0.5, 1.0)) if has_gpu and has_experts else 0.0,
        loads_on_demand=has_experts and rng.random() < 0.5,
        weight_bits=spec.full_bits,
        cache_bits=spec.full_bits,
    )
    rounded = round_policy(policy, has_gpu=has_gpu)
    rounded = replace(rounded, workload=replace(work, num_prompts=rounded.block_size))
    peaks = estimate(rounded, hardware).peak_bytes
    return _check(rounded, with_capacities(hardware, peaks), kind, shapes)


def draw_placement(rng: random.Random, *, has_gpu: bool, has_disk: bool = True) -> Placement:
    """Draw fractions on the tiers that may be used."""
    # Every second share is zero, so that tiers which hold nothing are common.
    shares = [rng.random() * rng.randint(0, 1) for _ in range(3)]
    shares[0] *= has_gpu
    shares[2] *= has_disk
    total = sum(shares)
    if total == 0:
        return Placement(cpu=1)
    gpu, disk = shares[0] / total, shares[2] / total
    return Placement(gpu=gpu, cpu=max(0.0, 1 - gpu - disk), disk=disk)


def _check(policy: Policy, hardware: HardwareProfile, kind: str, shapes: Shapes) -> Drawn | None:
    """Leave out what takes too long, or more memory than a small machine has."""
    # One block, as full as the policy allows: that is what its memory was set aside for.
    work = replace(policy.workload, num_prompts=policy.block_size)
    policy = replace(policy, workload=work, hardware=replace(hardware, measurements=()))
    prediction = estimate(policy, hardware)
    tiers = ("cpu", "gpu") if hardware.has_gpu else ("cpu",)
    predicted_bytes = sum(prediction.peak_bytes[tier] for tier in tiers)
    if prediction.latency_s > shapes.longest_s or predicted_bytes > shapes.most_bytes:
        return None
    return Drawn(policy=policy, kind=kind, predicted_bytes=predicted_bytes)

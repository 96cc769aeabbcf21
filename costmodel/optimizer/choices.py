"""The choices that are enumerated outside the program: batch sizes, precision, experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from costmodel.model.spec import ModelSpec
from costmodel.plan.workload import Workload
from costmodel.pricing.problem import Problem
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.packing import BITS, DEFAULT_GROUP_SIZE, check_group_size
from profiles.start import called

# Without a number of prompts, a block may be this large.
MAX_BLOCK_SIZE = 4096
# Rows of a matrix product in prefill: more rows are faster and take more memory.
PREFILL_ROWS = (8192, 2048, 512)
FULL_BITS = 16
# Where a larger fraction of the experts is needed, all are loaded ahead.
MOST_DEMANDED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Permitted:
    """The choices that change a model's outputs and that the user permits.

    Parameters
    ----------
    weight_bits, cache_bits
        Some of 16 (stands for the model's own dtype), 8 and 4.
    group_size
        Quantized elements that share a scale.
    sparsity
        Least fraction of the keys that each query of decode attends to; 1 is dense attention.
    requantizes
        Whether ``weight_bits`` below 16 may quantize a model again whose checkpoint is quantized.
    """

    weight_bits: tuple[int, ...] = (FULL_BITS,)
    cache_bits: tuple[int, ...] = (FULL_BITS,)
    group_size: int = DEFAULT_GROUP_SIZE
    sparsity: float = 1.0
    requantizes: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bits", "cache_bits"):
            wrong = [bits for bits in getattr(self, name) if bits not in (FULL_BITS, *BITS)]
            if wrong or not getattr(self, name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(flag, got=wrong[0] if wrong else "none", allowed="16, 8, 4")
        check_group_size("--group-size", self.group_size)
        if not 0 < self.sparsity <= 1:
            raise InputError("--sparsity", got=self.sparsity, allowed="a fraction in (0, 1]")

    @property
    def packs(self) -> bool:
        """Whether anything may be quantized."""
        return min(*self.weight_bits, *self.cache_bits) < FULL_BITS

    def bits(self, model: ModelSpec, kind: str) -> list[int]:
        """Return the precisions to compare: the full one, and the fewest bits below it.

        More bits take as long to unpack and longer to move.
        """
        permitted: tuple[int, ...] = getattr(self, f"{kind}_bits")
        full = [model.full_bits] if FULL_BITS in permitted else []
        return full + [bits for bits in (4, 8) if bits in permitted][:1]


DEFAULT_PERMITTED = Permitted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What the stages of a pipeline share.

    Parameters
    ----------
    num_stages
        Stages, and blocks whose caches each stage keeps.
    block_size
        Sequences of a block.
    deviations
        Of lanes, the size of a block's cache (see ``pool_tokens``).
    """

    num_stages: int
    block_size: int
    deviations: float = math.inf


def check_permitted(permitted: Permitted, hardware: HardwareProfile, model: ModelSpec) -> None:
    """Refuse quantization on a machine without a rate of unpacking, and a second one unasked."""
    fewest = min(permitted.weight_bits)
    if model.is_encoded and fewest < FULL_BITS and not permitted.requantizes:
        raise InputError(
            "--weight-bits",
            got=fewest,
            allowed=f"16, because {model.name} is quantized and keeps its bits",
            hint="--requantize to quantize it a second time",
        )
    if permitted.packs and not hardware.knows_unpacking:
        raise InputError(
            "--weight-bits and --cache-bits",
            got="less than 16",
            allowed=f"16, because {hardware.name} lacks the rate of unpacking",
            hint=called("profiles.measure"),
        )


def open_problems(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    permitted: Permitted,
    *,
    pipeline: Pipeline | None = None,
) -> Iterator[Problem]:
    """Yield problems with open choices, which together stand for all that the search compares.

    ``decide`` closes the choices.
    """
    # The batches of a stage are even parts of the block that all stages share.
    block = replace(workload, num_prompts=pipeline.block_size) if pipeline else workload
    for batch, on_demand, on_cpu, weight_bits, cache_bits, sparsity in itertools.product(
        batch_sizes(block),
        (False, True),
        (False, True) if hardware.has_gpu else (False,),
        permitted.bits(model, "weight"),
        permitted.bits(model, "cache"),
        sorted({1.0, permitted.sparsity}, reverse=True),
    ):
        if on_demand and not _may_demand(model, workload.expert_skew, batch):
            continue
        if on_cpu and "experts" not in model.component_names:
            continue
        sizes = {_even_part(batch, rows // workload.prompt_len) for rows in PREFILL_ROWS}
        yield Problem(
            hardware=hardware,
            model=model,
            workload=workload,
            gpu_batch_size=batch,
            prefill_batch_size=min(sizes),
            open_prefill_batch_sizes=tuple(sorted(sizes)),
            hidden_in_place=None,
            weight_bits=weight_bits,
            cache_bits=cache_bits,
            group_size=permitted.group_size,
            attention_sparsity=sparsity,
            loads_on_demand=on_demand,
            cpu_experts=on_cpu,
            blocks_in_flight=pipeline.num_stages if pipeline else 1,
        )


def _may_demand(model: ModelSpec, skew: float, batch: int) -> bool:
    """Whether a batch needs so few experts that loads on demand may be worth their waits."""
    mixtures = [kind.experts for kind in model.layer_kinds if kind.experts]
    return any(e.touched(batch, skew) < MOST_DEMANDED * e.num_experts for e in mixtures)


def decide(problem: Problem) -> Iterator[Problem]:
    """Yield the problems that an open one stands for: its program bounds each of theirs."""
    for hidden_in_place, size in itertools.product((True, False), problem.prefill_batch_sizes):
        if (problem.loads_on_demand or problem.cpu_experts) and not hidden_in_place:
            # With these, the tokens of all batches pass through experts together, which needs their
            # hidden states in place.
            continue
        yield replace(
            problem,
            hidden_in_place=hidden_in_place,
            prefill_batch_size=size,
            open_prefill_batch_sizes=(),
        )


def problems_of(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, permitted: Permitted
) -> Iterator[Problem]:
    """Yield every problem that the search compares."""
    for problem in open_problems(hardware, model, workload, permitted):
        yield from decide(problem)


def smallest_problem(
    hardware: HardwareProfile, model: ModelSpec, workload: Workload, permitted: Permitted
) -> Problem:
    """Return the problem with the least memory: one sequence at a time, in the fewest bits."""
    return Problem(
        hardware=hardware,
        model=model,
        workload=workload,
        gpu_batch_size=1,
        prefill_batch_size=1,
        weight_bits=min(permitted.bits(model, "weight")),
        cache_bits=min(permitted.bits(model, "cache")),
        group_size=permitted.group_size,
    )


def batch_sizes(workload: Workload) -> list[int]:
    """Return powers of two, the sizes half-way between them, and even parts of the prompts."""
    most = min(workload.num_prompts or MAX_BLOCK_SIZE, MAX_BLOCK_SIZE)
    powers = [2**i for i in range(most.bit_length())]
    sizes = {*powers, *(3 * p // 2 for p in powers if p > 1)}
    if workload.num_prompts is not None:
        sizes |= {-(-workload.num_prompts // parts) for parts in range(1, 9)}
    return sorted(size for size in sizes if size <= most)


def _even_part(size: int, most: int) -> int:
    """Divide ``size`` evenly into as few parts as ``most`` permits; returns the largest part."""
    return -(-size // -(-size // max(1, most)))

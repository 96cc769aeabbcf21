"""The rows of programs as arrays; rows that several problems share are evaluated once.

A search compares hundreds of problems of one machine, model and workload. Two of them often have
rows in common: decode does not depend on the prefill batch size, and memory does not depend on the
number of loads.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from costmodel.optimizer.columns import PER_BLOCK, coefficients
from costmodel.optimizer.solver import Array
from costmodel.pricing.limits import limit_forms
from costmodel.pricing.linear_form import LinearForm, total
from costmodel.pricing.memory import capacities, memory_rows, with_capacities
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import unit_shares
from costmodel.pricing.stages import Stage
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True)
class Rows:
    """Named rows and their coefficients: [rows, shares]."""

    names: tuple[str, ...]
    matrix: Array


@dataclass(frozen=True, slots=True)
class Uses:
    """Bytes of memory as rows, and the tier of each row."""

    rows: Rows
    tiers: tuple[str, ...]


def memory_scale(problem: Problem, capacity: int) -> float:
    """Return the scale of memory rows, which are fractions of the capacity, for one batch.

    With it, the solver's absolute tolerance has the same meaning in every row.
    """
    return problem.gpu_batch_size / max(capacity, 1)


def time_forms(problem: Problem, stage: Stage) -> dict[str, LinearForm]:
    """Return the limits of a stage, named ``time.STAGE.LIMIT``: each is at most its seconds."""
    forms = limit_forms(problem, stage)
    return {f"time.{stage.name}.{name}": form for name, form in forms.items()}


def memory_forms(problem: Problem) -> dict[str, LinearForm]:
    """Return the bytes less the capacity, named ``capacity.TIER.MOMENT``: each is at most zero."""
    capacity, per_block = capacities(problem.hardware), unit_shares(problem.components).per_block
    return {
        _name(tier, moment): (use - per_block * capacity[tier])
        * memory_scale(problem, capacity[tier])
        for (tier, moment), use in _uses(problem).items()
    }


def _uses(problem: Problem) -> dict[tuple[str, str], LinearForm]:
    """Return the bytes per sequence on each tier at each moment."""
    memory = memory_rows(problem, unit_shares(problem.components))
    return {
        (tier, moment): total(terms.values())
        for tier in capacities(problem.hardware)
        for moment, terms in memory[tier].items()
    }


def _name(tier: str, moment: str) -> str:
    return f"capacity.{tier}.{moment}"


class RowTable:
    """Evaluated rows, keyed by the fields that they depend on.

    A table serves problems of one machine, model and workload. ``like`` is the table of another
    machine with the same model and workload; rows that the two machines share are evaluated once.
    """

    def __init__(self, hardware: HardwareProfile, like: RowTable | None = None) -> None:
        # Times do not depend on capacities, and bytes do not depend on rates.
        self._rates = with_capacities(hardware, dict.fromkeys(capacities(hardware), 1))
        has_rates = like is not None and like._rates == self._rates
        self._times: dict[Hashable, Rows] = like._times if like and has_rates else {}
        self._per_load: dict[Hashable, Array] = like._per_load if like and has_rates else {}
        self._uses: dict[Hashable, Uses] = like._uses if like else {}

    def stage_rows(self, problem: Problem, stage: Stage) -> Rows:
        """Return the rows of a stage.

        Formulas are linear in the number of loads of the weights: two evaluations give all others.
        """
        if stage.parts:
            # Lanes of each number have a stage of their own.
            forms = time_forms(problem, stage)
            return Rows(tuple(forms), coefficients(forms.values(), problem.components))
        key = _stage_key(problem, stage)
        once = self._of_loads(key, problem, stage, 1.0)
        more = problem.loads_per_block - 1.0
        if not more:
            return once
        if key not in self._per_load:
            twice = self._of_loads((key, "twice"), problem, stage, 2.0)
            self._per_load[key] = twice.matrix - once.matrix
        return Rows(once.names, once.matrix + more * self._per_load[key])

    def memory_rows(self, problem: Problem) -> Rows:
        """Return the rows of memory."""
        key = _memory_key(problem)
        if key not in self._uses:
            forms = _uses(problem)
            names = tuple(_name(tier, moment) for tier, moment in forms)
            rows = Rows(names, coefficients(forms.values(), problem.components))
            self._uses[key] = Uses(rows, tuple(tier for tier, _ in forms))
        uses, capacity = self._uses[key], capacities(problem.hardware)
        scale = {tier: memory_scale(problem, capacity[tier]) for tier in capacity}
        matrix = uses.rows.matrix.copy()
        matrix[:, PER_BLOCK] -= [capacity[tier] for tier in uses.tiers]
        matrix *= np.array([scale[tier] for tier in uses.tiers])[:, None]
        return Rows(uses.rows.names, matrix)

    def _of_loads(self, key: Hashable, problem: Problem, stage: Stage, loads: float) -> Rows:
        if key not in self._times:
            other = replace(problem, loads_per_block=loads)
            forms = time_forms(other, stage)
            matrix = coefficients(forms.values(), problem.components)
            self._times[key] = Rows(tuple(forms), matrix)
        return self._times[key]


def _precision(problem: Problem) -> Hashable:
    return (
        problem.gpu_batch_size,
        problem.weight_bits,
        problem.cache_bits,
        problem.group_size,
        problem.unpacks_per_batch,
        problem.attention_sparsity,
        problem.head_batches_at_once,
    )


def _stage_key(problem: Problem, stage: Stage) -> Hashable:
    if stage.is_prefill and not problem.walks_experts:
        return stage, _precision(problem), problem.loads_on_demand
    # Where experts are loaded ahead, only the stage depends on the number of batches.
    num_batches = (
        (problem.num_batches, problem.hidden_in_place) if problem.loads_on_demand else None
    )
    rarest = problem.rarest_on_disk, problem.rarest_off_gpu
    demand = problem.loads_on_demand and (*rarest, *(num_batches or ()))
    return stage, _precision(problem), problem.cpu_experts, demand


def _memory_key(problem: Problem) -> Hashable:
    has_experts = "experts" in problem.components
    hardware = problem.hardware
    machine = (hardware.has_gpu, hardware.uses_cuda, hardware.cpu.num_cores)
    return (
        machine,
        hardware.cpu.runtime_bytes,
        # Without a disk there is no padding.
        hardware.disk.free_bytes > 0,
        _precision(problem),
        problem.prefill_batch_sizes,
        problem.hidden_in_place,
        problem.cpu_experts,
        problem.loads_on_demand,
        problem.num_batches[0] if has_experts or problem.lanes else None,
        problem.blocks_in_flight,
        (problem.lanes, problem.stages_cache, problem.workload) if problem.lanes else None,
    )

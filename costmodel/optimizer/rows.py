"""The rows of programs, as arrays; what several problems have in common is evaluated once.

A search compares hundreds of problems of one machine, model and workload. Most pairs of them differ
in what only some rows depend on: the prefill batch size is nothing to decode, loads of weights are
nothing to memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from costmodel.optimizer.columns import coefficients
from costmodel.optimizer.solver import Array
from costmodel.pricing.limits import limit_forms
from costmodel.pricing.linear_form import LinearForm, total
from costmodel.pricing.memory import capacities, memory_rows
from costmodel.pricing.problem import Problem
from costmodel.pricing.shares import unit_shares
from costmodel.pricing.stages import Stage


@dataclass(frozen=True, slots=True)
class Rows:
    """Named rows and their coefficients: [rows, shares]."""

    names: tuple[str, ...]
    matrix: Array


def memory_scale(problem: Problem, capacity: int) -> float:
    """Rows of memory are fractions of the capacity and of one batch, so that the solver's absolute
    tolerance means the same everywhere."""
    return problem.gpu_batch_size / max(capacity, 1)


def time_forms(problem: Problem, stage: Stage) -> dict[str, LinearForm]:
    """Return the limits of a stage, named ``time.STAGE.LIMIT``: each at most its seconds."""
    forms = limit_forms(problem, stage)
    return {f"time.{stage.name}.{name}": form for name, form in forms.items()}


def memory_forms(problem: Problem) -> dict[str, LinearForm]:
    """Return what each tier lacks, named ``capacity.TIER.MOMENT``: each at most zero."""
    units = unit_shares(problem.components)
    memory, forms = memory_rows(problem, units), {}
    for tier, capacity in capacities(problem.hardware).items():
        scale = memory_scale(problem, capacity)
        for name, terms in memory[tier].items():
            use = total([*terms.values(), units.per_block * -capacity])
            forms[f"capacity.{tier}.{name}"] = use * scale
    return forms


class RowTable:
    """Rows by what they depend on, for problems of one machine, model and workload."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, Rows] = {}
        self._per_load: dict[Hashable, Array] = {}

    def stage_rows(self, problem: Problem, stage: Stage) -> Rows:
        """Return the rows of a stage.

        Formulas are linear in the loads of the weights, so that two of their values give all.
        """
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
        if key not in self._rows:
            self._rows[key] = _rows(problem, memory_forms(problem))
        return self._rows[key]

    def _of_loads(self, key: Hashable, problem: Problem, stage: Stage, loads: float) -> Rows:
        if key not in self._rows:
            other = replace(problem, loads_per_block=loads)
            self._rows[key] = _rows(other, time_forms(other, stage))
        return self._rows[key]


def _rows(problem: Problem, forms: Mapping[str, LinearForm]) -> Rows:
    return Rows(tuple(forms), coefficients(forms.values(), problem.components))


def _precision(problem: Problem) -> Hashable:
    return (
        problem.gpu_batch_size,
        problem.weight_bits,
        problem.cache_bits,
        problem.group_size,
        problem.unpacks_per_batch,
        problem.attention_sparsity,
    )


def _stage_key(problem: Problem, stage: Stage) -> Hashable:
    if stage.is_prefill:
        return stage, _precision(problem)
    # Where experts are loaded ahead, only the stage knows how many batches there are.
    num_batches = (problem.num_batches, problem.in_place) if problem.loads_on_demand else None
    return stage, _precision(problem), problem.cpu_experts, problem.loads_on_demand, num_batches


def _memory_key(problem: Problem) -> Hashable:
    has_experts = "experts" in problem.components
    return (
        "memory",
        _precision(problem),
        problem.prefill_batch_sizes,
        problem.in_place,
        problem.cpu_experts,
        problem.num_batches[0] if has_experts else None,
    )

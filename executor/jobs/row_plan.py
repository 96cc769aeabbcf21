"""The requests of a job that run, and the policy that runs them; the others become errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.prefixes import Prefixes
from costmodel.plan.workload import Workload
from executor.checkpoint.opening import OpenedCheckpoint
from executor.cli.job_options import JobOptions
from executor.jobs.input_file import InputFile
from executor.jobs.lane_room import Lack, refuse_lines, room_lacks
from executor.jobs.planning import Manifest, chosen_before, lengths_of, workload_of
from executor.jobs.reading import ReadJob
from executor.jobs.table import Prompts
from profiles.errors import InfeasibleError
from profiles.hardware import HardwareProfile

T = TypeVar("T")
Planned = tuple[Policy, HardwareProfile, OpenedCheckpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """The requests that run, with their lengths, and what runs them."""

    prompts: Prompts
    lengths: Lengths | None
    policy: Policy
    hardware: HardwareProfile
    source: OpenedCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlanner:
    """Plans some requests of a job.

    Parameters
    ----------
    options
        How the job is planned.
    old
        The manifest of the job that goes on; ``None`` for a new one.
    expected_len
        Tokens that outputs are expected to have (see ``lengths_of``).
    is_strict
        Whether nothing runs where any line cannot.
    prefixes
        What all requests of the job share.
    """

    read: ReadJob
    file: InputFile
    options: JobOptions
    source: OpenedCheckpoint
    old: Manifest | None
    expected_len: int | None
    is_strict: bool
    prefixes: Prefixes | None = None

    def plan(self, rows: Sequence[int]) -> RowPlan:
        """Plan the requests for which there is room; the lines of the others become errors.

        Raises
        ------
        InfeasibleError
            Where not even the shortest request fits in the memory.
        InputError
            Where no policy has room for any of them, and of the first line that cannot be run where
            nothing else is to run then.
        """
        if not rows:
            return self._of(rows, self._choose(rows))
        sizes = np.array([sum(self._size(row)) for row in rows])
        planned, kept = plan_within_memory(lambda some: self._choose(_at(rows, some)), sizes)
        left = self._left(rows, self._memory_lacks(rows, kept))
        lacks = room_lacks(planned[0], self._lengths(left))
        left = self._left(left, {left[place]: lack for place, lack in lacks.items()})
        return self._of(left, planned)

    def _of(self, rows: Sequence[int], planned: Planned) -> RowPlan:
        policy, hardware, source = planned
        if policy.lanes is not None and rows:
            skew = policy.workload.expert_skew
            workload = replace(self._workload(rows), expert_skew=skew)
            policy = replace(policy, workload=workload)
        return RowPlan(
            prompts=Prompts(self.read.table, rows),
            lengths=self._lengths(rows),
            policy=policy,
            hardware=hardware,
            source=source,
        )

    def _choose(self, rows: Sequence[int]) -> Planned:
        options = self.options
        if self.old is not None and options.policy is None:
            options = replace(options, permitted=chosen_before(options.permitted, self.old))
        return options.choose_policy(self.source, self._workload(rows))

    def _workload(self, rows: Sequence[int]) -> Workload:
        return workload_of(self.read, self._lengths(rows), self.source.spec, self.old)

    def _lengths(self, rows: Sequence[int]) -> Lengths | None:
        model = self.source.spec if self.options.uses_own_profile else None
        lengths = lengths_of(self.read.table, rows, model, self.expected_len)
        if lengths is None or self.prefixes is None:
            return lengths
        return lengths.sharing(self.prefixes.only(rows))

    def _size(self, row: int) -> tuple[int, int]:
        """Return the tokens of a prompt, and the most of its output."""
        table = self.read.table
        return table.prompt_len(row), table.params(row).max_tokens

    def _memory_lacks(self, rows: Sequence[int], kept: IntArray) -> dict[int, Lack]:
        """Return the requests that do not fit in the memory: all but those at some places."""
        if len(kept) == len(rows):
            return {}
        fitting = set(_at(rows, kept))
        most, its_output = max((self._size(row) for row in fitting), key=sum)
        return {
            row: Lack(
                got="{} tokens + {} generated".format(*self._size(row)),
                allowed=f"what fits in the memory, such as {most} + {its_output}",
                hint="more memory, or a smaller max_tokens",
            )
            for row in rows
            if row not in fitting
        }

    def _left(self, rows: Sequence[int], lacks: Mapping[int, Lack]) -> Sequence[int]:
        """Return requests but for those that cannot run, and all others of their lines."""
        if not lacks:
            return rows
        table = self.read.table
        lines = {table.line_of(row): lack for row, lack in lacks.items()}
        error = refuse_lines(table, self.file, lines, is_strict=self.is_strict)
        left = [row for row in rows if table.line_of(row) not in lines]
        if not left and self.old is None:
            raise error
        return left


def plan_within_memory(plan: Callable[[IntArray], T], sizes: IntArray) -> tuple[T, IntArray]:
    """Plan as many requests as fit in the memory, the smaller ones first.

    Parameters
    ----------
    plan
        Plans the requests at some places, int64 in rising order; raises ``InfeasibleError`` where
        they do not fit.
    sizes
        Of each request, in tokens.

    Returns
    -------
    What ``plan`` has returned, and the places of the requests that fit.

    Raises
    ------
    InfeasibleError
        That of all requests, where not even the smallest one fits.
    """
    limits = np.unique(sizes)

    def attempt(place: int) -> tuple[T, IntArray]:
        """Plan all requests up to a size."""
        places: IntArray = np.flatnonzero(sizes <= limits[place])
        return plan(places), places

    too_many, enough = len(limits) - 1, 0
    try:
        return attempt(too_many)
    except InfeasibleError as error:
        if not too_many:
            raise
        told = error
    try:
        # Without hope, nothing else is tried.
        found = attempt(enough)
    except InfeasibleError:
        raise told from None
    # As a rule, few are too long. So few are left out at first, and then ever more.
    step = 1
    while too_many - enough > 1:
        middle = max(too_many - step, (too_many + enough) // 2)
        try:
            found, enough = attempt(middle), middle
        except InfeasibleError:
            too_many, step = middle, 2 * step
    return found


def _at(rows: Sequence[int], places: IntArray) -> list[int]:
    return [rows[place] for place in places.tolist()]

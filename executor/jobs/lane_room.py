"""The requests of a job that lanes have no room for: they become errors before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE, PoolSizes
from costmodel.plan.policy import Policy
from costmodel.schedule.page_rules import runs_alone
from executor.cli.prompts import parse_object
from executor.jobs.input_file import InputFile
from executor.jobs.table import JobTable, LineError
from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What a request asks for, what there is room for, and what to try."""

    got: str
    allowed: str
    hint: str

    def error(self, where: str) -> InputError:
        """Return the error of the line that asks for it."""
        return InputError(where, got=self.got, allowed=self.allowed, hint=self.hint)


def room_lacks(policy: Policy, lengths: Lengths | None) -> dict[int, Lack]:
    """Return the requests that can never run with a policy, by their places, and why.

    In blocks, every request that the policy's workload permits has room.
    """
    if policy.lanes is None or lengths is None:
        return {}
    lanes = policy.lanes
    pool = PoolSizes.of(policy.model, pool_tokens=lanes.pool_tokens, most_lanes=policy.block_size)
    room = {"most_lanes": policy.block_size, "pass_rows": lanes.pass_rows}
    most_prompt = lanes.pass_rows - policy.block_size + 1
    found = {}
    for place in np.flatnonzero(~runs_alone(lengths, pool, **room)).tolist():
        prompt, limit = int(lengths.prompts[place]), int(lengths.limits[place])
        if prompt > most_prompt:
            found[place] = Lack(
                got=f"{prompt} tokens",
                allowed=f"{most_prompt}, the longest prompt of a pass",
                hint="a shorter prompt, or more memory",
            )
        else:
            found[place] = Lack(
                got=f"{prompt} tokens + {limit} generated",
                allowed=f"{max(pool.pages) * PAGE} tokens of the KV cache",
                hint="a smaller max_tokens, or more memory",
            )
    return found


def refuse_lines(
    table: JobTable, file: InputFile, lacks: Mapping[int, Lack], *, is_strict: bool
) -> InputError:
    """Add lines to the errors of a job, and return the first error.

    Parameters
    ----------
    lacks
        By line of the table, at least one.

    Raises
    ------
    InputError
        The first error, where ``is_strict``.
    """
    wanted = {table.place_of(line)[0]: line for line in lacks}
    first: InputError | None = None
    for number, (position, text) in enumerate(file.lines(), start=1):
        if (line := wanted.get(position)) is None:
            continue
        where = f"line {number} of {file.path.name}"
        error = lacks[line].error(where)
        if is_strict:
            raise error
        first = first or error
        custom_id = parse_object(text, where).get("custom_id")
        table.errors.append(
            LineError(
                number=number,
                custom_id=custom_id if isinstance(custom_id, str) else None,
                message=str(error),
            )
        )
    table.errors.sort(key=lambda error: error.number)
    assert first is not None
    return first

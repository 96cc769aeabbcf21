"""All requests of a job in flat arrays: some 50 bytes each beside their tokens."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from executor.jobs.params import RowParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """A line that cannot be run.

    Parameters
    ----------
    number
        Of the line in the file, from 1.
    custom_id
        The name that the line gives itself, where it has one.
    message
        What is wrong with it, in one line.
    """

    number: int
    custom_id: str | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedLine:
    """What a line asks for: ``count`` outputs for each of its prompts.

    Parameters
    ----------
    prompts
        Token ids of each prompt.
    params
        Of all its outputs.
    identities
        Of each output, prompt by prompt, what its draws depend on: 64 bits.
    """

    prompts: Sequence[Sequence[int]]
    params: RowParams
    identities: Sequence[int]


class JobTable:
    """The lines, prompts and requests of a job.

    A line is one that is not blank, counted from 0. It has one or more prompts, and for each of
    them one or more requests, which are numbered through the job. A bad line has none.
    """

    def __init__(self) -> None:
        self.errors: list[LineError] = []
        # Of each line, where it is in the input; of each line and prompt, where the next begins.
        self._positions, self._sizes = array("Q"), array("I")
        self._first_rows, self._starts = array("Q", [0]), array("Q", [0])
        self._ids = array("I")
        # Of each request.
        self._prompts, self._params = array("I"), array("I")
        self.identities = array("Q")
        self._distinct: list[RowParams] = []
        self._numbers: dict[RowParams, int] = {}

    def add(self, position: int, num_bytes: int, line: ParsedLine | LineError) -> None:
        """Add the next line, which is at ``position`` of the input."""
        self._positions.append(position)
        self._sizes.append(num_bytes)
        if isinstance(line, LineError):
            self.errors.append(line)
        else:
            self._add_rows(line)
        self._first_rows.append(len(self._params))

    def _add_rows(self, line: ParsedLine) -> None:
        number = self._numbers.setdefault(line.params, len(self._distinct))
        if number == len(self._distinct):
            self._distinct.append(line.params)
        count = len(line.identities) // len(line.prompts)
        for ids in line.prompts:
            self._prompts.extend([len(self._starts) - 1] * count)
            self._ids.extend(ids)
            self._starts.append(len(self._ids))
        self._params.extend([number] * len(line.identities))
        self.identities.extend(line.identities)

    @property
    def num_lines(self) -> int:
        """Lines, the bad ones included."""
        return len(self._positions)

    @property
    def num_rows(self) -> int:
        """Requests."""
        return len(self._params)

    @property
    def distinct_params(self) -> Sequence[RowParams]:
        """The different parameters of all requests."""
        return self._distinct

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return max((end - start for start, end in pairs), default=0)

    def rows_of(self, line: int) -> range:
        """Return the requests of a line."""
        return range(self._first_rows[line], self._first_rows[line + 1])

    def line_of(self, row: int) -> int:
        """Return the line of a request."""
        # Lines without requests begin where the next one does.
        return bisect_right(self._first_rows, row) - 1

    def place_of(self, line: int) -> tuple[int, int]:
        """Return the position and the bytes of a line in the input."""
        return self._positions[line], self._sizes[line]

    def params(self, row: int) -> RowParams:
        """Return the parameters of a request."""
        return self._distinct[self._params[row]]

    def prompt_len(self, row: int) -> int:
        """Return the number of tokens of a request's prompt."""
        prompt = self._prompts[row]
        return self._starts[prompt + 1] - self._starts[prompt]

    def prompt_ids(self, row: int) -> array[int]:
        """Return the tokens of a request's prompt."""
        prompt = self._prompts[row]
        return self._ids[self._starts[prompt] : self._starts[prompt + 1]]


class Prompts(Sequence[Sequence[int]]):
    """The prompts of some requests of a table, as a run takes them.

    Parameters
    ----------
    rows
        The requests, in the order in which the run numbers them.
    """

    def __init__(self, table: JobTable, rows: Iterable[int]) -> None:
        self._table = table
        self.rows = array("Q", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sequence[int]:  # type: ignore[override]
        return self._table.prompt_ids(self.rows[index])

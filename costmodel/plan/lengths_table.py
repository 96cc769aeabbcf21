"""The lengths of a job in a table, so that it can be planned without its prompts."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from costmodel.plan.lengths import Lengths
from profiles.errors import InputError

COLUMNS = ("prompt_len", "gen_len")
MAX_TOKENS, COUNT = "max_tokens", "count"
# Each prompt takes some bytes, and simulating it some time.
MOST_PROMPTS = 10_000_000


def read_lengths(path: Path) -> Lengths:
    """Read a CSV file with the columns ``prompt_len`` and ``gen_len``, in tokens.

    ``gen_len`` is what an answer is expected to have. Other columns are ignored, except those
    below. Each may be missing, or empty in a row:

    - ``max_tokens``: else ``gen_len``.
    - ``count``, prompts with these lengths: else 1.

    Raises
    ------
    InputError
        With the line of the first row that cannot be used.
    """
    rows, total = [], 0
    for number, row in enumerate(_rows(path), 2):
        try:
            prompt, output = (_number(row, name) for name in COLUMNS)
            limit, count = _number(row, MAX_TOKENS, output), _number(row, COUNT, 1)
        except InputError as error:
            raise error.inside(f"lengths {path}, row {number}") from None
        total += count
        if total > MOST_PROMPTS:
            raise InputError(
                f"lengths {path}", got=f"{total} prompts", allowed=f"at most {MOST_PROMPTS}"
            )
        rows.append((prompt, output, limit, count))
    if not rows:
        raise InputError(f"lengths {path}", got="no rows", allowed="one or more")
    prompts, outputs, limits, counts = np.array(rows, np.int64).T
    return Lengths(*(np.repeat(column, counts) for column in (prompts, outputs, limits)))


def _rows(path: Path) -> list[dict[str, str | None]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"lengths {path}", got=reason, allowed="a CSV file") from None
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(
            f"lengths {path}",
            got=f"no column {missing[0]!r}",
            allowed=f"{', '.join(COLUMNS)}, and perhaps {MAX_TOKENS} and {COUNT}",
        )
    return rows


def _number(row: Mapping[str, str | None], name: str, default: int | None = None) -> int:
    text = row.get(name)
    if not text and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        value = 0
    if not 1 <= value <= np.iinfo(np.int32).max:
        raise InputError(name, got=text or "nothing", allowed="a whole number, 1 or more")
    return value

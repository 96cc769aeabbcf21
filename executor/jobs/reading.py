"""Reads a job: every line of the input becomes requests, or an error of its own."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from executor.cli.prompts import parse_object
from executor.jobs.input_file import InputFile
from executor.jobs.table import JobTable, LineError, ParsedLine
from executor.run.finished import Finished
from profiles.errors import InputError


class Form(Protocol):
    """A format of lines, and of the answers to them."""

    name: str
    keeps_order: bool

    @staticmethod
    def is_one(line: dict[str, Any]) -> bool:
        """Whether an object has this form."""

    def parse(self, line: dict[str, Any], where: str) -> ParsedLine:
        """Return what a line asks for, or raise ``InputError``."""

    def answer(
        self, line: bytes, prompts: Sequence[Sequence[int]], done: Sequence[Finished]
    ) -> str:
        """Return the answer to a line, without a line end.

        ``done`` are all of its requests, and ``prompts`` the tokens of each one's prompt.
        """

    def refusal(self, error: LineError) -> str:
        """Return the line of the error file."""


@dataclass(frozen=True, slots=True)
class ReadJob:
    """What was read: the table, the form of its lines, and of each line a hash of all so far."""

    table: JobTable
    form: Form
    digests: array[int]


def read_job(
    file: InputFile,
    forms: Sequence[Form],
    *,
    is_strict: bool,
) -> ReadJob:
    """Read all lines; the first one that has one of ``forms`` decides for the whole file.

    Raises
    ------
    InputError
        For a file without lines, where no line can be run, and for the first bad line where
        ``is_strict``.
    """
    table, form, digest = JobTable(), None, xxhash.xxh3_64()
    digests = array("Q")
    first_error: InputError | None = None
    for number, (position, line) in enumerate(file.lines(), start=1):
        if not line.strip():
            continue
        digest.update(line.rstrip(b"\r\n") + b"\n")
        digests.append(digest.intdigest())
        where = f"line {number} of {file.path.name}"
        parsed: dict[str, Any] = {}
        try:
            parsed = parse_object(line, where)
            form = form or next((each for each in forms if each.is_one(parsed)), None)
            found: ParsedLine | LineError = (form or forms[0]).parse(parsed, where)
        except InputError as error:
            if is_strict:
                raise
            first_error = first_error or error
            custom_id = parsed.get("custom_id")
            found = LineError(
                number=number,
                custom_id=custom_id if isinstance(custom_id, str) else None,
                message=str(error),
            )
        table.add(position, len(line), found)
    if first_error is not None and not table.num_rows:
        raise first_error
    if not table.num_lines:
        raise InputError(f"prompts {file.path}", got="no prompts", allowed="one prompt a line")
    return ReadJob(table, form or forms[0], digests)

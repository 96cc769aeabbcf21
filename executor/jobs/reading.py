"""Reads a job: every line of the input becomes requests, or an error of its own."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import xxhash

from executor.cli.prompts import parse_object
from executor.jobs.drafts import Draft, encode_drafts
from executor.jobs.input_file import InputFile
from executor.jobs.table import JobTable, LineError, ParsedLine
from executor.run.finished import Finished
from executor.text.continuation import TextTokenizer
from profiles.errors import InputError

# Bytes of lines whose texts are encoded together: enough for all cores, and little memory.
BLOCK_BYTES = 2**18


class Form(Protocol):
    """A format of lines, and of the answers to them."""

    name: str
    keeps_order: bool

    @property
    def load_tokenizer(self) -> Callable[[], TextTokenizer]:
        """What loads the tokenizer, which is there by the second call."""

    @staticmethod
    def is_one(line: dict[str, Any]) -> bool:
        """Whether an object has this form."""

    @staticmethod
    def name_of(line: dict[str, Any]) -> object:
        """Return what no other line of the file may be called, or ``None``."""

    def draft(self, line: dict[str, Any], where: str) -> Draft:
        """Return what a line asks for, up to its tokens, or raise ``InputError``."""

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
    digest, digests = xxhash.xxh3_64(), array("Q")
    with ThreadPoolExecutor(1) as encoder:
        reader = _Reader(forms, file.path.name, encoder, is_strict=is_strict)
        for number, (position, line) in enumerate(file.lines(), start=1):
            if not line.strip():
                continue
            digest.update(line.rstrip(b"\r\n") + b"\n")
            digests.append(digest.intdigest())
            reader.take(number, position, line)
        reader.finish_all()
    table, form = reader.table, reader.form
    if reader.first_error is not None and not table.num_rows:
        raise reader.first_error
    if not table.num_lines:
        raise InputError(f"prompts {file.path}", got="no prompts", allowed="one prompt a line")
    return ReadJob(table, form, digests)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A line of the block that is being read: where it is, its name, and what became of it."""

    number: int
    position: int
    num_bytes: int
    custom_id: object
    found: Draft | InputError


class _Reader:
    """Checks line by line. The texts of a block are encoded while the next block is read."""

    def __init__(
        self,
        forms: Sequence[Form],
        file_name: str,
        encoder: ThreadPoolExecutor,
        *,
        is_strict: bool,
    ) -> None:
        self._forms, self._file_name, self._is_strict = forms, file_name, is_strict
        self._encoder = encoder
        self._form: Form | None = None
        self._block: list[_Waiting] = []
        self._num_bytes = 0
        # The block before, and the tokens that it waits for.
        self._before: list[_Waiting] = []
        self._encoded: Future[list[list[list[int]] | InputError]] | None = None
        # Of the lines in both blocks; the form knows those of lines that were finished.
        self._names: set[object] = set()
        self.table = JobTable()
        self.first_error: InputError | None = None

    @property
    def form(self) -> Form:
        """The form of all lines."""
        return self._form or self._forms[0]

    def take(self, number: int, position: int, line: bytes) -> None:
        """Read the next line."""
        where, parsed = self._where(number), dict[str, Any]()
        found: Draft | InputError
        try:
            parsed = parse_object(line, where)
            self._form = self._form or next((f for f in self._forms if f.is_one(parsed)), None)
            name = self.form.name_of(parsed)
            if name is not None and name in self._names:
                self.finish_all()
            self._names.add(name)
            found = self.form.draft(parsed, where)
        except InputError as error:
            found = error
        self._block.append(_Waiting(number, position, len(line), parsed.get("custom_id"), found))
        self._num_bytes += len(line)
        if self._is_strict and isinstance(found, InputError):
            self.finish_all()
        elif self._num_bytes >= BLOCK_BYTES:
            self._end_block()

    def finish_all(self) -> None:
        """Add all lines to the table that were taken."""
        self._end_block()
        self._end_block()
        self._names = set()

    def _end_block(self) -> None:
        """Begin to encode the block, and finish the one before it."""
        drafts = [line.found for line in self._block if isinstance(line.found, Draft)]
        encode = partial(encode_drafts, self.form.load_tokenizer, drafts)
        block, encoded = self._before, self._encoded
        self._before, self._encoded = self._block, self._encoder.submit(encode)
        self._block, self._num_bytes = [], 0
        if encoded is not None:
            self._finish(block, iter(encoded.result()))

    def _finish(
        self, block: Sequence[_Waiting], encoded: Iterator[list[list[int]] | InputError]
    ) -> None:
        for line in block:
            try:
                found: ParsedLine | LineError = self._finished(line, encoded)
            except InputError as error:
                if self._is_strict:
                    raise
                found = self._refused(line, error)
            self.table.add(line.position, line.num_bytes, found)

    def _finished(
        self, line: _Waiting, encoded: Iterator[list[list[int]] | InputError]
    ) -> ParsedLine:
        if isinstance(line.found, InputError):
            raise line.found
        ids = next(encoded)
        if isinstance(ids, InputError):
            raise ids.inside(self._where(line.number))
        return line.found.finish(ids)

    def _refused(self, line: _Waiting, error: InputError) -> LineError:
        self.first_error = self.first_error or error
        name = line.custom_id
        return LineError(
            number=line.number,
            custom_id=name if isinstance(name, str) else None,
            message=str(error),
        )

    def _where(self, number: int) -> str:
        return f"line {number} of {self._file_name}"

"""Answers from what has ended: a line is answered when all of its requests are done."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from executor.jobs.input_file import InputFile
from executor.jobs.reading import ReadJob
from executor.jobs.table import Prompts
from executor.run.finished import Finished
from profiles.outputs import OutputError, OutputFile

logger = logging.getLogger(__name__)


class Answers(Protocol):
    """Where answers go."""

    def add(self, answers: Iterable[tuple[int, str]]) -> None:
        """Take the answers of some lines."""


class AnswerStream:
    """Answers to a pipe or a device. A context manager, at whose end all that is held is written.

    Those that keep the order of the lines are held until then.

    Attributes
    ----------
    num_done
        Answers that were taken.
    """

    can_go_on = False
    num_dropped = 0
    lines: Sequence[int] = ()

    def __init__(self, path: Path, *, keeps_order: bool) -> None:
        self.num_done = 0
        self._output = OutputFile(path)
        self._keeps_order = keeps_order
        self._held: list[tuple[int, str]] = []

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._flush()
        except OutputError as late:
            if error is None:
                raise
            # What ended the run is told last, and decides the exit status.
            logger.error("%s", late)

    @property
    def kept_in(self) -> Path | None:
        """The stream, or the file with what it did not take."""
        return self._output.kept_in

    def begin(self, manifest: object) -> None:
        """Do nothing: nobody can go on with a stream."""

    def add(self, answers: Iterable[tuple[int, str]]) -> None:
        """Take the answers of some lines."""
        found = list(answers)
        self.num_done += len(found)
        self._held += found
        if not self._keeps_order:
            self._flush()

    def complete(self, *, keeps_order: bool) -> None:
        """Write what is held."""
        self._flush()

    def _flush(self) -> None:
        held, self._held = sorted(self._held), []
        if held:
            # It is tried once: where that fails, all of it is rescued.
            self._output.write(lambda handle: handle.writelines(f"{text}\n" for _, text in held))


class AnswerMaker:
    """Makes answers of requests as they end.

    Parameters
    ----------
    prompts
        The requests of the run, by whose place ``Finished`` names them.
    """

    def __init__(self, job: ReadJob, file: InputFile, prompts: Prompts, answers: Answers) -> None:
        self._job, self._file, self._prompts, self._answers = job, file, prompts, answers
        # Of lines that wait for others of their requests, those that are done.
        self._waiting: dict[int, dict[int, Finished]] = defaultdict(dict)

    def take(self, finished: Iterable[Finished]) -> None:
        """Answer the lines whose last requests these are."""
        ready = []
        for done in finished:
            row = self._prompts.rows[done.request]
            line = self._job.table.line_of(row)
            rows = self._job.table.rows_of(line)
            self._waiting[line][row] = done
            if len(self._waiting[line]) == len(rows):
                found = self._waiting.pop(line)
                ready.append((line, self._answer(line, [found[row] for row in rows])))
        if ready:
            self._answers.add(ready)

    def _answer(self, line: int, done: list[Finished]) -> str:
        table = self._job.table
        text = self._file.line_at(*table.place_of(line))
        prompts = [table.prompt_ids(row).tolist() for row in table.rows_of(line)]
        return self._job.form.answer(text, prompts, done)

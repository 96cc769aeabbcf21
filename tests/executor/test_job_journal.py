"""Answers and their journal: whatever is torn, lost or killed, each line is answered once."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from executor.jobs.answers import AnswerFile
from executor.jobs.journal import RECORD, Journal, journal_path
from profiles.errors import InputError, RunError

MANIFEST = {"form": "lines", "lines": 40}
NUM_LINES = 40


class Killed(BaseException):
    """The process is gone: nothing that follows happens."""


def answer_to(line: int) -> str:
    # Some answers are equal.
    return f'{{"line": {line % 30}, "text": "{"x" * (line % 7)}"}}'


def expected() -> list[str]:
    return [answer_to(line) for line in range(NUM_LINES)]


def run_job(path: Path, order: list[int], *, resumes: bool, sizes: random.Random) -> list[int]:
    """Answer what is left of the lines, a few at a time; returns the lines that were made."""
    made = []
    journal = Journal.read(path) if resumes else None
    with AnswerFile(path, journal) as answers:
        left = [line for line in order if line not in set(answers.lines)]
        answers.begin(MANIFEST)
        while left:
            count = sizes.randint(1, 5)
            made += left[:count]
            answers.add((line, answer_to(line)) for line in left[:count])
            left = left[count:]
        answers.complete(keeps_order=True)
    return made


@pytest.mark.parametrize("seed", range(25))
def test_killed_at_any_write(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes of the last write are there, and nothing is closed or cleaned up."""
    draws = random.Random(seed)
    path = tmp_path / "out.jsonl"
    write, truncate, end = os.write, os.ftruncate, AnswerFile.__exit__
    num_left = [0]

    def write_or_die(descriptor: int, data: Any) -> int:
        num_left[0] -= 1
        if num_left[0] <= 0:
            write(descriptor, data[: draws.randrange(len(data) + 1)])
            raise Killed
        return write(descriptor, data)

    def truncate_alive(descriptor: int, size: int) -> None:
        if num_left[0] > 0:
            truncate(descriptor, size)

    def end_alive(answers: AnswerFile, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            end(answers, kind, *rest)
        else:
            # The system closes the files of a dead process.
            assert answers._journal is not None
            answers._journal.close()

    monkeypatch.setattr(os, "write", write_or_die)
    monkeypatch.setattr(os, "ftruncate", truncate_alive)
    monkeypatch.setattr(AnswerFile, "__exit__", end_alive)
    order = list(range(NUM_LINES))
    draws.shuffle(order)
    num_killed, resumes = 0, False
    while journal_path(path).exists() or not resumes:
        num_left[0] = draws.randint(2, 12)
        with contextlib.suppress(Killed):
            run_job(path, order, resumes=resumes, sizes=random.Random(seed))
        num_killed += 1
        resumes = True
    assert num_killed >= 2
    assert path.read_text().splitlines() == expected()
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def interrupted(path: Path, count: int) -> list[int]:
    """Leave a job with so many answers, in a shuffled order; returns their lines."""
    order = list(range(NUM_LINES))
    random.Random(1).shuffle(order)
    with pytest.raises(Killed), AnswerFile(path) as answers:
        answers.begin(MANIFEST)
        answers.add((line, answer_to(line)) for line in order[:count])
        raise Killed
    return order[:count]


def remade(path: Path) -> list[int]:
    """Go on with a job; returns the lines that were made again."""
    made = run_job(path, list(range(NUM_LINES)), resumes=True, sizes=random.Random(0))
    assert path.read_text().splitlines() == expected()
    assert not journal_path(path).exists()
    return sorted(made)


def others(lines: list[int]) -> list[int]:
    return sorted(set(range(NUM_LINES)) - set(lines))


def test_going_on_makes_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = interrupted(path, 17)
    assert [*map(answer_to, lines)] == path.read_text().splitlines()
    assert remade(path) == others(lines)


def test_a_power_cut_leaves_torn_ends_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = interrupted(path, 17)
    with path.open("ab") as handle:
        handle.write(b'{"line": 3, "te')
    data = bytearray(journal_path(path).read_bytes())
    # The tenth record never reached the disk, and the last one only in part.
    begin = len(data) - 17 * RECORD.size
    data[begin + 9 * RECORD.size : begin + 10 * RECORD.size] = bytes(RECORD.size)
    journal_path(path).write_bytes(data[:-5])
    kept = [line for place, line in enumerate(lines) if place not in (9, 16)]
    assert remade(path) == others(kept)


def test_deleted_answers_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = interrupted(path, 17)
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*kept[:4], b"a note\n", *kept[6:]]))
    journal = Journal.read(path)
    assert AnswerFile(path, journal).num_dropped == 2
    journal.close()
    assert remade(path) == others(lines[:4] + lines[6:])
    lines = interrupted(path, 17)
    path.unlink()
    assert remade(path) == list(range(NUM_LINES))


def test_an_earlier_file_stays_until_the_first_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with AnswerFile(path) as answers:
        answers.begin(MANIFEST)
        assert journal_path(path).exists()
    # Without an answer there is nothing to go on with.
    assert path.read_text() == "old\n" and not journal_path(path).exists()
    with AnswerFile(path) as answers:
        answers.begin(MANIFEST)
        answers.add([(0, "new")])
        answers.complete(keeps_order=True)
    assert path.read_text() == "new\n"


def test_files_with_other_names_stay_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    (tmp_path / "other").hardlink_to(path)
    lines = interrupted(path, 17)
    assert remade(path) == others(lines)
    assert (tmp_path / "other").read_text().splitlines() == expected()


def test_nobody_begins_anew_over_a_job_that_has_not_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    interrupted(path, 3)
    with pytest.raises(InputError, match="--resume to go on"):
        AnswerFile(path).begin(MANIFEST)
    journal = Journal.read(path)
    with pytest.raises(InputError, match="one process at a time"):
        Journal.read(path)
    journal.close()
    journal_path(path).write_bytes(b"something else\n")
    with pytest.raises(InputError, match="another file"):
        Journal.read(path)
    journal_path(path).unlink()
    with pytest.raises(InputError, match="No such file"):
        Journal.read(path)


@pytest.mark.parametrize("number", range(2, 8))
def test_a_full_disk_leaves_whole_lines(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    original, calls = os.write, []

    def write(descriptor: int, data: Any) -> int:
        calls.append(descriptor)
        if len(calls) == number:
            original(descriptor, data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data)

    monkeypatch.setattr("executor.jobs.journal.os.write", write)
    with pytest.raises(RunError, match="No space left on device"):
        run_job(path, list(range(NUM_LINES)), resumes=False, sizes=random.Random(0))
    monkeypatch.undo()
    text = path.read_text()
    assert text.endswith("\n") or not text
    assert len(text.splitlines()) == len(set(text.splitlines()) & set(expected()))
    assert journal_path(path).exists() == bool(text)
    if text:
        remade(path)

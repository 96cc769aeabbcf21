"""The table of a job: its size, and input that comes in any way."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from executor.jobs.limits import RequestLimits
from executor.jobs.params import RowParams
from executor.jobs.table import JobTable, ParsedLine, Prompts
from profiles.errors import InputError
from tests.executor.job_files import prompts_of, read

LIMITS = RequestLimits(vocab_size=100, max_positions=4096)


@pytest.mark.parametrize("form", ["lines", "batch"])
def test_prompts_take_less_than_a_kilobyte_each(form: str, tmp_path: Path) -> None:
    path, count = tmp_path / "in.jsonl", 10_000
    with path.open("w") as handle:
        for number in range(count):
            ids = [number % 97] * (number % 30 + 1)
            line: dict[str, Any] = {"prompt_ids": ids}
            if form == "batch":
                body = {"prompt": ids, "max_tokens": number % 500 + 1, "seed": number}
                line = {"custom_id": f"request-{number}", "method": "POST", "body": body}
                line["url"] = "/v1/completions"
            handle.write(json.dumps(line) + "\n")
    tracemalloc.start()
    job = read(path, limits=LIMITS)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert job.form.name == form and job.table.num_rows == count
    assert len(job.table.distinct_params) == (500 if form == "batch" else 1)
    num_tokens = sum(job.table.prompt_len(row) for row in range(count))
    assert held - 4 * num_tokens < 300 * count
    assert most < 1000 * count


def test_requests_of_lines_and_prompts() -> None:
    table, params = JobTable(), RowParams(max_tokens=3)
    table.add(0, 5, ParsedLine(prompts=[[1, 2], [3]], params=params, identities=[7, 8, 9, 10]))
    table.add(5, 2, ParsedLine(prompts=[[4, 5, 6]], params=params, identities=[11]))
    assert [list(table.rows_of(line)) for line in (0, 1)] == [[0, 1, 2, 3], [4]]
    assert [table.line_of(row) for row in range(5)] == [0, 0, 0, 0, 1]
    ids = [[1, 2], [1, 2], [3], [3], [4, 5, 6]]
    assert [list(prompt) for prompt in Prompts(table, range(5))] == ids
    assert [table.prompt_len(row) for row in range(5)] == [len(each) for each in ids]
    assert (table.longest_prompt, table.num_rows, table.num_lines) == (3, 5, 2)
    assert list(table.identities) == [7, 8, 9, 10, 11]


def test_equal_prompts_are_drawn_differently_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"

    def identities(*prompts: list[int]) -> list[int]:
        path.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
        return list(read(path).table.identities)

    one, other, again = identities([1], [2], [1])
    assert len({one, other, again}) == 3
    assert identities([2], [1], [1]) == [other, one, again]


def test_a_compressed_pipe(tmp_path: Path) -> None:
    text = b'{"prompt": "a"}\n{"prompt_ids": [7]}'
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(gzip.compress(text)))
    writer.start()
    job = read(pipe)
    writer.join()
    assert prompts_of(job) == [[97], [7]]


def test_zstd_is_told_where_python_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="zstd, which this Python cannot read"):
        read(path)


def test_zstd_by_the_package(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "in.jsonl.zst"
    frames = [zstandard.compress(b'{"prompt_ids": [7]}\n'), zstandard.compress(b'{"prompt": "a"}')]
    path.write_bytes(b"".join(frames))
    assert prompts_of(read(path)) == [[7], [97]]
    path.write_bytes(frames[0][:-4])
    with pytest.raises(InputError, match="broken compressed text"):
        read(path)
    path.write_bytes(frames[0][:8] + b"?" * 9)
    with pytest.raises(InputError, match="broken compressed text"):
        read(path)

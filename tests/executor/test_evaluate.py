"""Perplexity and agreement, held to transformers and to the plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import executor.evaluate as evaluate_module
from costmodel.choices import Permitted
from executor.evaluate import main
from executor.job import Job
from executor.text import load_tokenizer
from profiles.errors import InfeasibleError, InputError

MODEL = Path(__file__).resolve().parents[2] / "models" / "kjv"
TEXT = "And God said, Let there be light: and there was light.\n" * 30
PROMPT_LEN, GEN_LEN = 6, 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def _figures(capsys: pytest.CaptureFixture[str], text: Path, *flags: str) -> dict[str, float]:
    main([
        "--model", str(MODEL), "--text", str(text), "--hardware", "cpu-2core",
        "--offload-dir", str(text.parent), "--prompt-len", str(PROMPT_LEN),
        "--gen-len", str(GEN_LEN), "--json", *flags,
    ])  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-1]
    figures: dict[str, float] = json.loads(last)
    return figures


def test_uncompressed_it_is_the_perplexity_of_transformers(
    capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    found = _figures(capsys, text)
    tokenizer = load_tokenizer(MODEL)
    (begin,) = tokenizer.encode("")
    ids = tokenizer.encode(TEXT)[1:]
    size = PROMPT_LEN + GEN_LEN - 1
    windows = torch.tensor(
        [[begin, *ids[at : at + size]] for at in range(0, len(ids) - size + 1, size)]
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        # The first token comes from prefill, and is not scored.
        logits = model(windows).logits[:, PROMPT_LEN:-1].double()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, PROMPT_LEN + 1 :].flatten()
    )
    assert found["num_tokens"] == len(windows) * (GEN_LEN - 1)
    assert found["perplexity"] == pytest.approx(float(losses.exp()), rel=0.01)
    assert (found["ratio"], found["agreement"]) == (1, 1)


def test_fewer_bits_are_told(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    eight = _figures(capsys, text, "--weight-bits", "8", "--cache-bits", "8")
    four = _figures(capsys, text, "--weight-bits", "4", "--cache-bits", "4", "--sparsity", "0.5")
    assert (four["weight_bits"], four["cache_bits"], four["sparsity"]) == (4, 4, 0.5)
    assert abs(eight["ratio"] - 1) < abs(four["ratio"] - 1) < 0.5
    assert four["agreement"] < eight["agreement"] < 1


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("And", encoding="utf-8")
    with pytest.raises(InputError, match="25 or more"):
        main([
            "--model", str(MODEL), "--text", str(tmp_path / "short.txt"), "--hardware",
            "cpu-2core", "--prompt-len", "6", "--gen-len", "20",
        ])  # fmt: skip


def test_where_the_whole_model_does_not_fit_perplexity_is_told_alone(
    capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = evaluate_module.plan_job

    def refuse(*arguments: Any) -> Job:
        if arguments[-1] == Permitted():
            raise InfeasibleError("too large")
        return plan(*arguments)

    monkeypatch.setattr(evaluate_module, "plan_job", refuse)
    found = _figures(capsys, text, "--weight-bits", "4")
    assert found["perplexity"] > 1 and found["ratio"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gen-len", "1"), "2 or more"),
        (("--prompt-len", "600"), "less than 512"),
        (("--text", "missing.txt"), "No such file"),
    ],
)
def test_mistakes_are_told(text: Path, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        main(["--model", str(MODEL), "--text", str(text), "--hardware", "cpu-2core", *flags])

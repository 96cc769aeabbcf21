"""Perplexity and agreement, held to transformers and to the plain loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import executor.evaluate as evaluate_module
from costmodel.optimizer.choices import Permitted
from costmodel.plan.policy import LanePolicy
from costmodel.plan.workload import Workload
from executor.checkpoint.folder import Checkpoint
from executor.cli.run_command import Job
from executor.data import MODEL
from executor.evaluate import main, read_windows
from executor.text.loading import load_tokenizer
from profiles.errors import InfeasibleError, InputError
from tests.executor.tiny_machines import make_hardware, make_policy
from tests.executor.tokenizer_structures import LINES, STRUCTURES, like, template

TEXT = "And God said, Let there be light: and there was light.\n" * 30
PROMPT_LEN, GEN_LEN = 6, 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def _figures(capsys: pytest.CaptureFixture[str], text: Path, *flags: str) -> dict[str, float]:
    main(
        [
            "--model",
            str(MODEL),
            "--text",
            str(text),
            "--hardware",
            "cpu-2core",
            "--offload-dir",
            str(text.parent),
            "--prompt-len",
            str(PROMPT_LEN),
            "--gen-len",
            str(GEN_LEN),
            "--json",
            *flags,
        ]
    )
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


def test_a_policy_with_lanes_scores_alike(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    spec = Checkpoint.open(MODEL, dtype="float32").spec
    policy = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    lanes = LanePolicy(pool_tokens=96, pass_rows=PROMPT_LEN + 4)
    path = text.with_name("policy.json")
    replace(policy, lanes=lanes, hardware=make_hardware()).save(path)
    arguments = [f"--model={MODEL}", f"--text={text}", f"--policy={path}", "--num-prompts=7"]
    main([*arguments, f"--offload-dir={text.parent}", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["num_tokens"] == 7 * (GEN_LEN - 1)
    # The uncompressed model runs in blocks.
    assert found["ratio"] == pytest.approx(1, abs=1e-6) and found["agreement"] == 1


def test_fewer_bits_are_told(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    eight = _figures(capsys, text, "--weight-bits", "8", "--cache-bits", "8")
    four = _figures(capsys, text, "--weight-bits", "4", "--cache-bits", "4", "--sparsity", "0.5")
    assert (four["weight_bits"], four["cache_bits"], four["sparsity"]) == (4, 4, 0.5)
    assert abs(eight["ratio"] - 1) < abs(four["ratio"] - 1) < 0.5
    # With some processors, the sums of 8 bits choose every token as those of 16 do.
    assert four["agreement"] < eight["agreement"] <= 1


def test_the_text_is_scored_as_it_stands(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    workload = Workload(prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    lines = "And God said,\r\nLet there be light:\r and there was light.\r\n" * 8
    for data in (lines.encode(), b"\xef\xbb\xbf" + lines.encode()):
        (tmp_path / "text.txt").write_bytes(data)
        windows = read_windows(tmp_path / "text.txt", MODEL, workload, 2)
        ids = windows[:, 1:].flatten().tolist()
        assert ids == tokenizer.encode(lines)[1 : len(ids) + 1]
    (tmp_path / "text.txt").write_bytes("\ufeffé".encode("utf-16"))
    with pytest.raises(InputError, match=r"text\.txt.*UTF-8 text"):
        read_windows(tmp_path / "text.txt", MODEL, workload, 2)


def test_windows_do_not_end_as_texts_do(tmp_path: Path) -> None:
    """Where the tokenizer ends a text with a token, that stands behind no window."""
    (tmp_path / "text.txt").write_text(LINES[0] + LINES[1], encoding="utf-8")
    base = STRUCTURES["Llama 2"]
    for begin, end in (("<s>", "</s>"), (None, "</s>"), ("<s>", None), (None, None)):
        parts = {"post_processor": template(begin=begin, end=end)}
        like(base, parts=parts).write(tmp_path)
        ids = load_tokenizer(tmp_path).encode(LINES[0] + LINES[1])
        if end:
            assert ids.pop() == 2
        windows = read_windows(
            tmp_path / "text.txt", tmp_path, Workload(prompt_len=1, gen_len=len(ids) - 1), 9
        )
        assert windows.tolist() == [ids]


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("And", encoding="utf-8")
    with pytest.raises(InputError, match="25 or more"):
        main(
            [
                "--model",
                str(MODEL),
                "--text",
                str(tmp_path / "short.txt"),
                "--hardware",
                "cpu-2core",
                "--prompt-len",
                "6",
                "--gen-len",
                "20",
            ]
        )


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

"""Texts of many lines are encoded at once: requests and errors are those of line by line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from executor.data import MODEL
from executor.jobs import reading
from executor.jobs.limits import RequestLimits
from executor.jobs.reading import ReadJob
from executor.text.loading import load_tokenizer
from profiles.errors import InputError
from tests.executor.job_files import LetterTokenizer, prompts_of, read

LIMITS = RequestLimits(vocab_size=100, max_positions=40)


class PickyTokenizer(LetterTokenizer):
    """Refuses a whole batch for one text."""

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        if any("?" in text for text in texts):
            raise InputError("text", got="?", allowed="letters")
        return super().encode_batch(texts, is_rendered=is_rendered)


def _line(name: str, **body: Any) -> str:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def _says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


LINES = [
    _line("a", prompt=["one", "two"], n=2),
    _line("b", messages=_says("hello")),
    _line("c", prompt="why?"),
    _line("d", messages=_says("too long " * 9)),
    # The line of this name before is a bad one, that of the next is not.
    _line("d", prompt=[1, 2, 3]),
    _line("b", messages=_says("again"), model="other"),
    "no object",
    _line("e", messages=_says("really?")),
    _line("f", prompt="end", top_p=7),
    _line("e", prompt=["x", "y"], max_tokens=3),
]


def _told(job: ReadJob) -> Any:
    table = job.table
    rows = range(table.num_rows)
    errors = [(error.number, error.custom_id, error.message) for error in table.errors]
    params = [table.params(row) for row in rows]
    return prompts_of(job), list(table.identities), [table.line_of(r) for r in rows], params, errors


@pytest.mark.parametrize("block_bytes", [1, 200, 400, 2**18])
def test_blocks_change_nothing(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    prompts, identities, lines, params, errors = _told(read(path, PickyTokenizer, limits=LIMITS))
    letters = LetterTokenizer().encode
    texts = ["one", "one", "two", "two", "u:hello;a:"]
    assert prompts == [*map(letters, texts), [1, 2, 3], letters("x"), letters("y")]
    assert lines == [0, 0, 0, 0, 1, 4, 9, 9] and len(set(identities)) == 8
    assert params[-1].max_tokens == 3
    assert [(number, name) for number, name, _ in errors] == [
        (3, "c"),
        (4, "d"),
        (6, "b"),
        (7, None),
        (8, "e"),
        (9, "f"),
    ]
    words = ("text: got ?", "positions", "'b' again", "not JSON", "text: got ?", "top-p")
    for (number, _, message), word in zip(errors, words, strict=True):
        assert word in message and message.startswith(f"line {number} of in.jsonl")


@pytest.mark.parametrize("block_bytes", [1, 2**18])
def test_the_first_bad_line_is_told_where_nothing_else_runs(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    with pytest.raises(InputError, match=r"line 3 of in\.jsonl: text: got \?"):
        read(path, PickyTokenizer, limits=LIMITS, is_strict=True)


def test_many_texts_are_encoded_as_one_by_one() -> None:
    tokenizer = load_tokenizer(MODEL)
    texts = ["In the beginning", "", "two  spaces", "<|endoftext|> ends", "größer 東京", "a" * 99]
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, is_rendered=False) == one_by_one
    rendered = [tokenizer.encode_rendered(text) for text in texts]
    assert tokenizer.encode_batch(texts, is_rendered=True) == rendered
    assert one_by_one != rendered

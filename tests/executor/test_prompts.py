"""Prompts in, outputs out, and the tokenizer between them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from executor.cli.prompts import Completion, PromptLimits, read_prompts, write_outputs
from executor.text.continuation import TextTokenizer
from executor.text.loading import load_tokenizer
from profiles.errors import InputError
from profiles.outputs import write_output

LIMITS = PromptLimits(vocab_size=100, max_positions=16, gen_len=4)


class LetterTokenizer:
    """One token for each character: its code modulo 100."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 100 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


def never() -> TextTokenizer:
    raise AssertionError("no tokenizer is needed")


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_prompts_come_back_with_ids_and_extra_keys(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        '\ufeff{"prompt": "ab", "id": 7, "tags": ["x", null]}',
        "",
        "   ",
        '{"prompt_ids": [0, 99]}\r',
        '{"prompt": "\u2028"}',
        "",
    )
    records = read_prompts(path, LIMITS, LetterTokenizer)
    assert [r.index for r in records] == [0, 1, 2]
    assert [r.prompt_ids for r in records] == [(97, 98), (0, 99), (0x2028 % 100,)]
    assert [r.prompt for r in records] == ["ab", None, "\u2028"]
    assert records[0].line == '{"prompt": "ab", "id": 7, "tags": ["x", null]}'


def test_a_file_of_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt_ids": [1]}')
    assert read_prompts(path, LIMITS, never)[0].prompt_ids == (1,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ""}', "an empty prompt"),
        ('{"prompt_ids": []}', "an empty prompt"),
        ('{"prompt": 5}', "not text"),
        ('{"prompt": null}', "not text"),
        ('{"question": "x"}', "neither prompt nor prompt_ids"),
        ('{"prompt": "x", "prompt_ids": [1]}', "both"),
        ("{prompt}", "not JSON"),
        ('["x"]', "a JSON list"),
        ('{"prompt": "x", "score": NaN}', "NaN is not a finite number"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "x", "prompt": "y"}', "prompt twice"),
        ('{"prompt_ids": [1' + "0" * 5000 + "]}", "whole numbers"),
        ('{"prompt_ids": [1e400]}', "whole numbers"),
        ('{"prompt": "x"}\x00', "not JSON"),
        ('{"prompt": "x", "text": "y"}', "'text'"),
        ('{"prompt_ids": [1, 100]}', "token id 100; allowed: 0 to 99"),
        ('{"prompt_ids": [-1]}', "token id -1"),
        ('{"prompt_ids": [1.0]}', "whole numbers"),
        ('{"prompt_ids": [true]}', "whole numbers"),
        ('{"prompt_ids": "1 2"}', "whole numbers"),
        ('{"prompt": "abcdefghijklm"}', r"13 tokens \+ 4 generated; allowed: 16 positions"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_are_told_by_number(line: str, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt": "good"}', "", line)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path, LIMITS, LetterTokenizer)
    assert str(caught.value).startswith("line 3 of p.jsonl: ")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(tmp_path / "p.jsonl", LIMITS, never)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "absent.jsonl", LIMITS, never)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match="line 1"):
        read_prompts(tmp_path / "latin.jsonl", LIMITS, never)


@pytest.mark.parametrize(
    "others",
    [
        '"score": 1e400',
        '"score":-1E+9999 ',
        '"id": ' + "7" * 5000,
        '"x": 0.10000000000000000001',
        '"x": {"a": 1, "a": 2}, "y": -0',
        '"half": "\\ud800", "e": "\u00e9\u2028"',
        '"deep": ' + "[" * 200 + "]" * 200,
        '"x": [1,\r2]',
    ],
)
def test_other_keys_come_back_unchanged(others: str, tmp_path: Path) -> None:
    """Whatever JSON can say, and Python's numbers and text cannot hold."""
    path = write_lines(tmp_path / "p.jsonl", f'{{"prompt": "x", {others}}}\r')
    (record,) = read_prompts(path, LIMITS, LetterTokenizer)
    result = Completion(record=record, output_ids=(1,), text="y", finish_reason="stop")
    write_output(tmp_path / "out", lambda handle: write_outputs(handle, [result]))
    begun, _, added = (tmp_path / "out").read_text(encoding="utf-8").partition(', "text"')
    assert begun.rstrip() == f'{{"prompt": "x", {others}'.replace("\r", " ").rstrip()
    assert added == ': "y", "output_ids": [1], "finish_reason": "stop"}\n'


def test_prompts_may_come_through_a_pipe_and_not_from_a_device(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "a"}\n{"prompt_ids": [7]}')
    os.close(writer)
    records = read_prompts(Path(f"/dev/fd/{reader}"), LIMITS, LetterTokenizer)
    assert [record.prompt_ids for record in records] == [(97,), (7,)]
    os.close(reader)
    # They have no end.
    with pytest.raises(InputError, match="/dev/zero: got a device"):
        read_prompts(Path("/dev/zero"), LIMITS, never)
    with pytest.raises(InputError, match="Is a directory"):
        read_prompts(tmp_path, LIMITS, never)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_other_encodings_are_told(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a"}\n'.encode(encoding))
    with pytest.raises(InputError, match=r"UTF-8|not JSON"):
        read_prompts(tmp_path / "p.jsonl", LIMITS, never)


def test_outputs_hold_every_key_in_order_of_the_prompts(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl", '{"id": "a", "prompt": "x"}', '{"prompt_ids": [3], "id": "b"}'
    )
    first, second = read_prompts(path, LIMITS, LetterTokenizer)
    results = [
        Completion(record=second, output_ids=(5,), text=None, finish_reason="stop"),
        Completion(record=first, output_ids=(1, 2), text="\xe9\n", finish_reason="length"),
    ]
    write_output(tmp_path / "out.jsonl", lambda handle: write_outputs(handle, results))
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "id": "a",
            "prompt": "x",
            "text": "\xe9\n",
            "output_ids": [1, 2],
            "finish_reason": "length",
        },
        {"id": "b", "prompt_ids": [3], "text": None, "output_ids": [5], "finish_reason": "stop"},
    ]


def test_outputs_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt": "x"}')
    (record,) = read_prompts(path, LIMITS, LetterTokenizer)

    def failing() -> Iterator[Completion]:
        yield Completion(record=record, output_ids=(1,), text="", finish_reason="stop")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_output(tmp_path / "out.jsonl", lambda handle: write_outputs(handle, failing()))
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def save_tokenizer(folder: Path, *, template: bool) -> None:
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "hello": 3, "world": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("template", [True, False])
def test_encoding_equals_transformers(template: bool, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=template)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    text = "hello world hello world"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert len(ours.encode(text)) == 4 + template
    assert ours.decode([0, 3, 4, 1]) == "hello world"


def test_missing_and_broken_tokenizers_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)

"""Prompts in, outputs out, and the tokenizer between them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from executor.text.continuation import TextTokenizer
from executor.text.loading import load_tokenizer
from profiles.errors import InputError
from tests.executor.job_files import done, prompts_of, read


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
    job = read(path)
    assert job.table.num_lines == 3
    assert prompts_of(job) == [[97, 98], [0, 99], [0x2028 % 100]]
    position, count = job.table.place_of(0)
    line = path.read_bytes()[position : position + count]
    assert line == b'{"prompt": "ab", "id": 7, "tags": ["x", null]}\n'


def test_a_file_of_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt_ids": [1]}')
    assert prompts_of(read(path, never)) == [[1]]


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
        read(path, is_strict=True)
    assert str(caught.value).startswith("line 3 of p.jsonl: ")
    job = read(path)
    assert prompts_of(job) == [[ord(c) % 100 for c in "good"]]
    (error,) = job.table.errors
    assert (error.number, error.message) == (3, str(caught.value))
    told = json.loads(job.form.refusal(error))
    assert told == {"line": 3, "error": {"message": str(caught.value)}}


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="no prompts"):
        read(tmp_path / "p.jsonl", never)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "absent.jsonl", never)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match="line 1"):
        read(tmp_path / "latin.jsonl", never)


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
    answer = read(path).form.answer(path.read_bytes(), [[20]], [done([121], "stop", stop=1)])
    begun, _, added = answer.partition(', "text"')
    assert begun.rstrip() == f'{{"prompt": "x", {others}'.replace("\r", " ").rstrip()
    assert added == ': "y", "output_ids": [121], "finish_reason": "stop"}'


def test_prompts_may_come_through_a_pipe_and_not_from_a_device(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "a"}\n{"prompt_ids": [7]}')
    os.close(writer)
    link = tmp_path / "pipe"
    link.symlink_to(f"/dev/fd/{reader}")
    assert prompts_of(read(link)) == [[97], [7]]
    os.close(reader)
    # They have no end.
    with pytest.raises(InputError, match="/dev/zero: got a device"):
        read(Path("/dev/zero"), never)
    with pytest.raises(InputError, match="Is a directory"):
        read(tmp_path, never)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_other_encodings_are_told(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a"}\n'.encode(encoding))
    with pytest.raises(InputError, match=r"UTF-8|not JSON"):
        read(tmp_path / "p.jsonl", never)


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

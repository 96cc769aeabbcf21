"""Text to ids and back, held to transformers over the structures of public tokenizers."""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from executor.text.continuation import TextTokenizer, decode_continuation
from executor.text.loading import load_tokenizer
from profiles.errors import InputError
from tests.executor.tokenizer_structures import (
    LINES,
    OTHER_LINES,
    STRUCTURES,
    Json,
    Structure,
    like,
)

NUM_CONTINUATIONS = 200


def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def continuation(theirs: Any, prompt: list[int], output: list[int]) -> str:
    """Transformers' text of both, without the characters that are the prompt's."""
    whole = theirs.decode(prompt + output, skip_special_tokens=True)
    alone = theirs.decode(prompt, skip_special_tokens=True)
    while not whole.startswith(alone):
        alone = alone[:-1]
    return str(whole[len(alone) :])


def texts(structure: Structure) -> list[str]:
    """Prompts: plain, with spaces and ends of lines, and with tokens written out."""
    tokens = [*structure.added, "<|im_start|>", "<mask>", "<|endoftext|>", "<unk>"]
    written = "".join(f"a {token} b{token}c " for token in tokens)
    plain = [
        " leading",
        "trailing ",
        "two  spaces",
        "\r\n\tlines\n\n",
        "123 4567",
        "a b",
        "\u00a0x",
    ]
    return [*LINES[:5], *OTHER_LINES, *plain, *tokens, written, "".join(tokens)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_ids_and_text_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    structure = STRUCTURES[name]
    structure.write(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), reference(tmp_path)
    for text in texts(structure):
        assert ours.encode(text) == theirs.encode(text), text
    draw = random.Random(name)
    size = len(theirs) + 3
    for number in range(NUM_CONTINUATIONS):
        if number % 2:
            ids = [draw.randrange(size) for _ in range(draw.randrange(1, 24))]
        else:
            ids = theirs.encode(" ".join(draw.sample(LINES + OTHER_LINES * 100, 2)))
            begin = draw.randrange(len(ids))
            ids = ids[begin : begin + draw.randrange(1, 40)]
        cut = draw.randrange(len(ids) + 1)
        prompt, output = ids[:cut], ids[cut:]
        found = decode_continuation(ours, prompt, output)
        assert found == continuation(theirs, prompt, output), (prompt, output)
    if name not in ("T5", "BERT"):  # their decoded prompts have other spaces or letters
        check_that_prompt_and_text_join(ours)


def check_that_prompt_and_text_join(ours: TextTokenizer) -> None:
    """Nothing is glued, doubled or lost where the prompt comes back as it was written."""
    for line in LINES[:4]:
        ids = ours.encode(line)
        for cut in range(1, len(ids)):
            prompt = ours.decode(ids[:cut])
            if "\ufffd" not in prompt:
                assert prompt + decode_continuation(ours, ids[:cut], ids[cut:]) == line


def load_both(structure: Structure, folder: Path) -> tuple[Any, Any]:
    structure.write(folder)
    return load_tokenizer(folder), reference(folder)


class Bytes:
    """A token for every byte; punctuation draws closer, as where spaces are cleaned up."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace").replace(" .", ".")


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        (b"a", b"b", "b"),
        (b"", b"ab", "ab"),
        (b"ab", b"", ""),
        # A character that the output completes, or leaves open, is the output's.
        ("aé".encode()[:2], "aé".encode()[2:] + b"!", "é!"),
        ("a🙂".encode()[:3], "a🙂".encode()[3:4], ""),
        (b"a", "é".encode()[:1], "\ufffd"),
        (b"a\xff", b"b", "b"),
        # Punctuation that is drawn closer.
        (b"a ", b".", "."),
    ],
)
def test_text_begins_where_the_prompt_ends(prompt: bytes, output: bytes, text: str) -> None:
    assert decode_continuation(Bytes(), list(prompt), list(output)) == text


def test_a_character_cut_at_the_end_is_replaced_as_transformers_does(tmp_path: Path) -> None:
    for name in ("Llama 2", "Gemma 2", "GPT-2", "Unigram with bytes"):
        ours, theirs = load_both(STRUCTURES[name], tmp_path / name)
        ids = ours.encode("The king 日本𝄞")
        for end in range(3, len(ids)):
            found = decode_continuation(ours, ids[:2], ids[2:end])
            assert found == continuation(theirs, ids[:2], ids[2:end])
        assert "\ufffd" in decode_continuation(ours, ids[:2], ids[2:-1])


FLAGS: Json = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NEW = "<|new|>"
OUTSIDE: dict[str, tuple[Json, dict[str, Json]]] = {
    "added_tokens_decoder": (
        {"added_tokens_decoder": {"600": {"content": NEW, **FLAGS, "special": True}}},
        {},
    ),
    "of its own kind": (
        {"added_tokens_decoder": {"600": {"content": NEW, **FLAGS, "special": False}}},
        {},
    ),
    "added_tokens.json": ({}, {"added_tokens.json": {NEW: 600, "<x>": 601}}),
    "added and special": (
        {"additional_special_tokens": [NEW]},
        {"added_tokens.json": {"<x>": 600, NEW: 601}},
    ),
    "additional_special_tokens": ({"additional_special_tokens": ["<x>", NEW]}, {}),
    "extra_special_tokens": ({"extra_special_tokens": {"image_token": NEW}}, {}),
    "named": ({"pad_token": NEW, "image_token": "<x>"}, {}),
    "named with flags": ({"pad_token": {"__type": "AddedToken", "content": NEW, **FLAGS}}, {}),
    "special_tokens_map.json": (
        {},
        {"special_tokens_map.json": {"pad_token": {"content": NEW, **FLAGS, "rstrip": True}}},
    ),
    "special_tokens_map.json, more": (
        {},
        {"special_tokens_map.json": {"additional_special_tokens": [NEW]}},
    ),
    "split": ({"additional_special_tokens": [NEW], "split_special_tokens": True}, {}),
    "default of the class": ({"eos_token": None}, {}),
}


@pytest.mark.parametrize("base", ["plain", "rebuilt"])
@pytest.mark.parametrize("place", OUTSIDE)
def test_tokens_outside_tokenizer_json_are_those_of_transformers(
    place: str, base: str, tmp_path: Path
) -> None:
    config, files = OUTSIDE[place]
    named = "PreTrainedTokenizerFast" if base == "plain" else "GPTNeoXTokenizer"
    structure = like(
        STRUCTURES["GPT-2"],
        added={},
        config={"tokenizer_class": named, **config},
        other_files=files,
    )
    ours, theirs = load_both(structure, tmp_path)
    for text in (f"a{NEW}b", f" {NEW} <x>", "<|endoftext|>"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"added_tokens.json": {"<x>": 5}},
            "added token '<x>': got id 5, which is '&'; allowed: 600",
        ),
        ({"added_tokens.json": {"<x>": 700}}, "'<x>': got id 700; allowed: 601"),
        ({"added_tokens.json": {"e": 601}}, "'e': got id 601"),
        ({"added_tokens.json": {"<x>": -1}}, "id of a token in added_tokens.json: got -1"),
        ({"added_tokens.json": ["<x>"]}, "added_tokens.json: got a JSON list"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "got 'x'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config.json": {"bos_token": 5}}, "bos_token: got 5"),
        ({"tokenizer_config.json": {"extra_special_tokens": 5}}, "extra_special_tokens: got 5"),
        ({"special_tokens_map.json": {"eos_token": {"content": 1}}}, "eos_token"),
    ],
)
def test_tokens_that_contradict_are_refused(
    files: dict[str, Json], said: str, tmp_path: Path
) -> None:
    like(STRUCTURES["GPT-2"], other_files=files).write(tmp_path)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("begin", ["<s>", None])
def test_tokenizer_json_decides_the_first_token_and_that_is_told(
    adds: bool, begin: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = STRUCTURES["Llama 2"]
    parts = {} if begin else {"post_processor": None}
    ours, theirs = load_both(like(base, parts=parts, config={"add_bos_token": adds}), tmp_path)
    assert ours.encode("<s>a") == theirs.encode("<s>a")
    assert (ours.encode("a")[0] == 1) == (begin is not None)
    told = "add_bos_token of tokenizer_config.json" in capsys.readouterr().err
    assert told == (adds != (begin is not None))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
PIECES = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", PIECES, "pip install sentencepiece protobuf"),
        ("spiece.model", PIECES, "pip install sentencepiece protobuf"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "pip install tiktoken"),
        ("tiktoken.model", b"IQ== 0\n", "pip install tiktoken"),
        ("tokenizer.model", POINTER, "git lfs pull"),
        ("tokenizer.model", b"", "an empty file"),
        ("vocab.json", POINTER, "git lfs pull"),
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.json", b"", "an empty file"),
        ("tokenizer.json", None, "Is a directory"),
        ("tokenizer.json", b'{"model": ', "not JSON"),
        ("tokenizer.json", b'{"model": {}}', "allowed: a tokenizer.json"),
        ("other.txt", b"", "no tokenizer.json; allowed: a checkpoint with one"),
    ],
)
def test_files_that_cannot_be_read_are_told(
    name: str, content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package in ("sentencepiece", "protobuf", "tiktoken"):
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("executor.text.transformers_tokenizer.version", without)
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "pip install transformers"), ("4.57.1", "transformers 5 or newer")],
)
def test_a_class_that_only_transformers_reads_needs_it(
    found: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr("executor.text.transformers_tokenizer.version", version)
    STRUCTURES["Cohere"].write(tmp_path)
    with pytest.raises(InputError, match="tokenizer_class CohereTokenizer") as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)


def test_a_damaged_tokenizer_is_no_traceback(tmp_path: Path) -> None:
    STRUCTURES["Llama 3"].write(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["post_processor"]["processors"][1]["special_tokens"] = {}
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(InputError, match=r"a post_processor that adds '<\|begin_of_text\|>'"):
        load_tokenizer(tmp_path)
    del spec["post_processor"], spec["pre_tokenizer"]
    spec["added_tokens"] = []
    spec["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    path.write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="text: got"):
        load_tokenizer(tmp_path).encode("b")


NONSENSE: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e400,
    "",
    "x",
    [],
    {},
    {"type": "ByteLevel"},
    {"Regex": "("},
    10**30,
)
MUTATED = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value, but not inside a vocabulary."""
    if path and path[-1] in ("vocab", "merges"):
        return [path]
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    inner = [
        found
        for key, item in items
        for found in (
            places(item, (*path, key)) if isinstance(item, dict | list) else [(*path, key)]
        )
    ]
    return [path, *inner] if path else inner


def test_nonsense_in_the_files_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    """Once for each structure: the fuzz targets try more, all with one structure."""
    draw = random.Random(0)
    for name in (name for name in STRUCTURES if name not in ("T5", "Code Llama", "Cohere")):
        folder = tmp_path / name
        STRUCTURES[name].write(folder)
        path = folder / draw.choice(MUTATED)
        content = json.loads(path.read_text(encoding="utf-8"))
        *way, key = draw.choice(places(content))
        part = content
        for step in way:
            part = part[step]
        part[key] = draw.choice(NONSENSE)
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("The LORD  said\n é🙂 <s></s>"))
        except InputError as error:
            assert "\n" not in str(error)

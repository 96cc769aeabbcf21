"""Text to ids and back, held to transformers over the structures of public tokenizers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from executor.text import decode_continuation, load_tokenizer
from tests.executor.tokenizer_structures import LINES, OTHER_LINES, STRUCTURES, Structure

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

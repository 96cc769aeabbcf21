"""Text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from profiles.errors import InputError
from profiles.files import read_json

TOKENIZER_FILES = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")


class TextTokenizer(Protocol):
    """What the commands need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with the special tokens that the model was trained on."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""


class FastTokenizer:
    """A ``tokenizer.json``.

    Parameters
    ----------
    begin_id, adds_begin
        The id that begins a text, and whether the checkpoint's ``tokenizer_config.json`` wants
        it there; ``None`` leaves that to ``tokenizer.json``.
    """

    def __init__(
        self, tokenizer: Tokenizer, begin_id: int | None = None, adds_begin: bool | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._begin_id = begin_id
        self._adds_begin = adds_begin
        # What the file says of padding and cutting is for training, not for prompts.
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with special tokens added."""
        ids: list[int] = self._tokenizer.encode(text).ids
        if self._begin_id is None or self._adds_begin is None:
            return ids
        plain: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        # Not merely whether it is there: the text itself may begin with the token.
        was_added = ids[: len(plain) + 1] == [self._begin_id, *plain]
        if was_added == self._adds_begin:
            return ids
        return [self._begin_id, *ids] if self._adds_begin else ids[1:]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class TransformersTokenizer:
    """A tokenizer that only transformers can read."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with special tokens added."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load a checkpoint's tokenizer: ``tokenizer.json``, else through transformers."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return _load_fast(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(
            f"tokenizer of {folder}", got="no tokenizer.json", allowed="a checkpoint with one",
            hint="prompt_ids in place of prompt",
        )  # fmt: skip
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise InputError(
            f"tokenizer of {folder}", got="files that only transformers reads",
            allowed="tokenizer.json", hint="pip install transformers",
        ) from None  # fmt: skip
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # its readers raise whatever their formats raise
        raise InputError(
            f"tokenizer of {folder}", got=error, allowed="files that transformers can read"
        ) from error
    return TransformersTokenizer(tokenizer)


def _load_fast(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"tokenizer {path}", got=error, allowed="a tokenizer.json") from error
    path = folder / "tokenizer_config.json"
    config = read_json(path, "tokenizer config") if path.exists() else {}
    begin = config.get("bos_token")
    content = begin.get("content") if isinstance(begin, dict) else begin
    begin_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
    adds_begin = config.get("add_bos_token")
    return FastTokenizer(tokenizer, begin_id, adds_begin if isinstance(adds_begin, bool) else None)

"""Tokenizers that only transformers can read, and what it needs for that."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from executor.text.tokenizer_json import cannot_encode, refuse_pointer
from profiles.errors import InputError

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_FILES = ("tiktoken.model", "vocab.json", "vocab.txt", "tekken.json")
# A line of tiktoken's format: a token in base 64 and its rank.
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class TransformersTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with special tokens added."""
        return self._encode(text, adds_special=True)

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of ``text`` that holds its special tokens already."""
        return self._encode(text, adds_special=False)

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """Return the ids of many texts."""
        return [self._encode(text, adds_special=not is_rendered) for text in texts]

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by their role, such as ``bos_token``."""
        return {str(role): str(token) for role, token in self._tokenizer.special_tokens_map.items()}

    def _encode(self, text: str, *, adds_special: bool) -> list[int]:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=adds_special)
            return [int(i) for i in ids]
        except Exception as error:  # tokenizers raises bare Exception
            raise cannot_encode(error) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token, also of a special one."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))


def has_tokenizer_file(folder: Path) -> bool:
    """Whether a checkpoint folder holds a tokenizer of any kind."""
    names = ("tokenizer.json", *SENTENCEPIECE_FILES, *OTHER_FILES)
    return any((folder / name).exists() for name in names)


def load_through_transformers(folder: Path, why: str) -> TransformersTokenizer:
    """Load a checkpoint's tokenizer with transformers' own reader.

    Parameters
    ----------
    why
        What makes that necessary, for messages.
    """
    what = f"tokenizer of {folder}"
    packages = ["transformers", *_packages_for(folder)]
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise InputError(
            what,
            got=f"{why}, and {', '.join(missing)} not installed",
            allowed="a tokenizer.json that is read without transformers",
            hint=f"pip install {' '.join(missing)}",
        )
    found = version("transformers")
    if int(found.split(".")[0]) < 5:
        raise InputError(
            what,
            got=f"{why}, and transformers {found}",
            allowed="transformers 5 or newer",
            hint="pip install --upgrade transformers",
        )
    try:
        tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # its readers raise whatever their formats raise
        raise InputError(
            what,
            got=_damage(folder) or error,
            allowed="files that transformers can read",
            hint="a tokenizer.json, which save_pretrained of transformers writes",
        ) from error
    return TransformersTokenizer(tokenizer)


def _packages_for(folder: Path) -> list[str]:
    """Return what transformers needs beside itself for the files of a folder."""
    if (folder / "tokenizer.json").exists():
        return []
    pieces = _pieces_file(folder)
    if pieces is None:
        others = [folder / name for name in OTHER_FILES if (folder / name).exists()]
        if not others:
            raise InputError(
                f"tokenizer of {folder}",
                got="no tokenizer.json",
                allowed="a checkpoint with one",
                hint="prompt_ids in place of prompt; generate then needs no tokenizer",
            )
        for path in others:
            refuse_pointer(path)
        return ["tiktoken"] if others[0].name == "tiktoken.model" else []
    refuse_pointer(pieces)
    return ["tiktoken"] if _is_tiktoken(pieces) else ["sentencepiece", "protobuf"]


def _pieces_file(folder: Path) -> Path | None:
    paths = (folder / name for name in SENTENCEPIECE_FILES)
    return next((path for path in paths if path.exists()), None)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as handle:
        return TIKTOKEN_LINE.match(handle.readline(1000)) is not None


def _damage(folder: Path) -> str | None:
    """Return what SentencePiece says of a file that transformers then takes for tiktoken's."""
    path = _pieces_file(folder)
    if (folder / "tokenizer.json").exists() or path is None or _is_tiktoken(path):
        return None
    try:
        importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError, or OSError by the file
        return f"a damaged {path.name} ({error})"
    return None


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True

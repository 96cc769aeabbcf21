"""The vocabulary of a model in GGUF: the metadata of its tokenizer, within bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.gguf.model import GgufModel
from profiles.errors import InputError
from profiles.units import MIB

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
# Values of ``tokenizer.ggml.token_type``.
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 0, 1, 2, 3, 4
# The longest tokens of known vocabularies have 1024 and 93 bytes. All ways to split a piece of
# SentencePiece are tried.
MAX_TOKEN_BYTES: Mapping[str, int] = {BYTE_LEVEL: 2**12, SENTENCEPIECE: 2**9}
# Types of tokens that are found in a text before it is split. The library compiles them, in some 80
# bytes of memory for each of theirs. Gemma 3 has 80 kB, a model with 65,536 codes of speech 0.7 MB.
ADDED_TYPES = (UNKNOWN, CONTROL, USER_DEFINED)
MAX_ADDED_BYTES = 2 * MIB
# Special tokens by their role in chat templates, and their keys.
ROLES: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# What files of SentencePiece leave unsaid.
SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The metadata of a tokenizer.

    Parameters
    ----------
    kind
        ``tokenizer.ggml.model``.
    tokens
        Texts by their ids.
    types
        The type of each token.
    metadata, path
        Of the file.
    """

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]
    path: Path

    @classmethod
    def read(cls, model: GgufModel, path: Path) -> Vocabulary:
        """Read and check the metadata.

        Raises
        ------
        InputError
            For an unknown kind, tokens without types, and tokens that take too long to compile.
        """
        kind, label = model.metadata.get("tokenizer.ggml.model"), f"tokenizer of {path}"
        if not isinstance(kind, str) or kind not in (BYTE_LEVEL, SENTENCEPIECE):
            raise InputError(
                label,
                got="none" if kind is None else f"tokenizer.ggml.model {kind!r}",
                allowed=f"{BYTE_LEVEL} or {SENTENCEPIECE}",
                hint="prompt_ids in place of prompt; generate then needs no tokenizer",
            )
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, tuple) or not tokens:
            raise InputError(label, got="no tokens", allowed="tokenizer.ggml.tokens as texts")
        longest = max(len(token.encode()) for token in tokens)
        if longest > (most := MAX_TOKEN_BYTES[kind]):
            got, allowed = f"a token of {longest} bytes", f"at most {most}"
            raise InputError(f"{label}, tokens", got=got, allowed=allowed)
        types = model.metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), NORMAL))
        vocabulary = cls(
            kind=kind,
            tokens=tokens,
            types=numbers(types, "token_type", len(tokens), label).tolist(),
            metadata=model.metadata,
            path=path,
        )
        total = sum(len(token.encode()) for token, _ in vocabulary.added())
        if total > MAX_ADDED_BYTES:
            got, allowed = f"{total} bytes in all", f"at most {MAX_ADDED_BYTES}"
            raise InputError(f"{label}, special tokens", got=got, allowed=allowed)
        return vocabulary

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of ``tokenizer.ggml``."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, repr(value), "true or false")
        return value

    def token_id(self, key: str) -> int | None:
        """Return the id of a special token; ``None`` where there is none, or none in range."""
        default = SENTENCEPIECE_IDS.get(key) if self.kind == SENTENCEPIECE else None
        found = self.get(key, default)
        return found if type(found) is int and 0 <= found < len(self.tokens) else None

    def roles(self) -> dict[str, str]:
        """Return special tokens by their role."""
        ids = {role: self.token_id(key) for role, key in ROLES.items()}
        return {role: self.tokens[found] for role, found in ids.items() if found is not None}

    def added(self) -> Iterator[tuple[str, int]]:
        """Yield the tokens that are found in a text before it is split, each with its type."""
        for token, kind in zip(self.tokens, self.types, strict=True):
            if kind in ADDED_TYPES:
                yield token, kind

    def ids(self) -> dict[str, int]:
        """Return ids by their texts."""
        return {token: number for number, token in enumerate(self.tokens)}

    def error(self, key: str, got: object, allowed: str) -> InputError:
        """Make the error for a key."""
        return InputError(f"tokenizer.ggml.{key} of {self.path}", got=got, allowed=allowed)


def numbers(value: Any, key: str, count: int, label: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a value of the metadata that has a number for each of ``count`` tokens.

    Raises
    ------
    InputError
        For any other value.
    """
    if not isinstance(value, np.ndarray) or len(value) != count:
        got = f"{len(value)} values" if isinstance(value, np.ndarray) else "no numbers"
        raise InputError(f"{label}, {key}", got=got, allowed=f"{count} numbers, one a token")
    return value

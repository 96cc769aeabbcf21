"""Tokens that stand beside a vocabulary, added as transformers 5 adds them.

``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` may name tokens
that ``tokenizer.json`` lacks. The order of the additions decides the ids of those without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from profiles.errors import InputError
from profiles.files import read_json

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredTokens:
    """The tokens that the files beside a vocabulary declare.

    Parameters
    ----------
    by_id
        Tokens with an id of their own.
    special
        Special tokens, each once; those that ``by_id`` lacks take the next free ids.
    """

    by_id: Mapping[int, AddedToken]
    special: tuple[AddedToken, ...]

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add every token that the tokenizer lacks.

        Raises
        ------
        InputError
            Where a token with a declared id would get another one.
        """
        tokens = [self.by_id[index] for index in sorted(self.by_id)]
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        known.update(token.content for token in tokens)
        tokenizer.add_tokens([*tokens, *(t for t in self.special if t.content not in known)])
        for index, token in self.by_id.items():
            found = tokenizer.token_to_id(token.content)
            if token.content and found != index:
                raise InputError(
                    f"added token {token.content!r}", got=f"id {index}",
                    allowed=f"{found}, its id beside the vocabulary of tokenizer.json",
                )  # fmt: skip


def read_declared_tokens(
    folder: Path,
    config: Mapping[str, Any],
    in_vocabulary: object,
    defaults: Mapping[str, str | None],
) -> DeclaredTokens:
    """Read the tokens of a checkpoint folder.

    Parameters
    ----------
    config
        ``tokenizer_config.json``. With an ``added_tokens_decoder`` it stands alone; without one,
        the two older files and ``in_vocabulary`` are read, too.
    in_vocabulary
        The ``added_tokens`` of ``tokenizer.json``.
    defaults
        The special tokens that the tokenizer's class has where the files name none.
    """
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get(EXTRA) or config.get(OLD_EXTRA)
    if "added_tokens_decoder" in config:
        by_id = _tokens_by_id(config["added_tokens_decoder"])
    else:
        older = _read_object(folder / "special_tokens_map.json")
        named |= {key: value for key, value in older.items() if key.endswith("_token")}
        declared = [_token(named[name], name) for name in NAMES if named.get(name)]
        special = {token.content for token in [*declared, *_token_list(extra)]}
        by_id = _older_tokens_by_id(folder, in_vocabulary, special)
        extra = extra or older.get(EXTRA) or older.get(OLD_EXTRA)
    named_tokens = _named_tokens({**defaults, **named})
    names = {token.content for token in named_tokens}
    for token in [*named_tokens, *by_id.values()]:
        token.special = token.special or token.content in names
    once: dict[str, AddedToken] = {}
    for token in [*named_tokens, *_token_list(extra)]:
        once.setdefault(token.content, token)
    return DeclaredTokens(by_id=by_id, special=tuple(once.values()))


def _named_tokens(named: Mapping[str, Any]) -> list[AddedToken]:
    """Return the tokens in the order in which transformers adds them."""
    tokens = [_token(named[name], name) for name in NAMES if named.get(name)]
    others = {name: value for name, value in named.items() if name not in NAMES}
    tokens += [
        _token(value, name)
        for name, value in others.items()
        if isinstance(value, dict) and value.get("__type") == "AddedToken"
    ]
    return tokens + [_token(value, name) for name, value in others.items() if type(value) is str]


def _tokens_by_id(value: object) -> dict[int, AddedToken]:
    where = "added_tokens_decoder of tokenizer_config.json"
    if not isinstance(value, dict):
        raise InputError(where, got=repr(value), allowed="an object of ids and tokens")
    return {_id(index, where): _token(token, where) for index, token in value.items()}


def _older_tokens_by_id(
    folder: Path, in_vocabulary: object, special: set[str]
) -> dict[int, AddedToken]:
    tokens = {
        _id(index, "added_tokens.json"): AddedToken(
            content, normalized=content not in special, special=content in special
        )
        for content, index in _read_object(folder / "added_tokens.json").items()
    }
    where = "added_tokens of tokenizer.json"
    for value in in_vocabulary if isinstance(in_vocabulary, list) else []:
        tokens[_id(value.get("id"), where)] = _token(value, where)
    return tokens


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, "tokens") if path.exists() else {}


def _id(value: object, where: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise InputError(f"id of a token in {where}", got=repr(value), allowed=f"0 to {2**32 - 1}")
    return value


def _token_list(value: object) -> list[AddedToken]:
    """Return the tokens of a list, or of an object that names each."""
    values = list(value.values()) if isinstance(value, dict) else value or []
    if not isinstance(values, list):
        raise InputError(EXTRA, got=repr(value), allowed="a list of tokens")
    return [_token(item, EXTRA) for item in values]


def _token(value: object, where: str) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = value if isinstance(value, dict) else {}
    flags = {key: fields[key] for key in FLAGS if key in fields}
    content = fields.get("content")
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(where, got=repr(value), allowed="text, or an object with content")
    return AddedToken(content, **flags)

"""Tokens that stand beside a vocabulary, added as transformers 5 adds them.

``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` may name tokens
that ``tokenizer.json`` lacks. The order of the additions decides the ids of those without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


# A plain string has the usual flags of a special token.
Token = str | AddedToken


def read_if_there(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object of a file that a checkpoint need not have."""
    return read_json(path, what) if path.exists() else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredTokens:
    """The tokens that the files beside a vocabulary declare.

    Parameters
    ----------
    by_id
        Tokens with an id of their own.
    named, extra
        Special tokens with a role, and others; those that ``by_id`` lacks take the next free ids.
    roles
        The special tokens that transformers knows by a role, such as ``bos_token``.
    """

    by_id: Mapping[int, AddedToken]
    roles: Mapping[str, str]
    named: tuple[Token, ...]
    extra: tuple[Token, ...]

    @property
    def special(self) -> list[str]:
        """The content of every special token, each once."""
        return list(dict.fromkeys(_content(token) for token in (*self.named, *self.extra)))

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add every token that the tokenizer lacks.

        Raises
        ------
        InputError
            Where a token with a declared id would get another one.
        """
        tokens: list[Token] = [self.by_id[index] for index in sorted(self.by_id)]
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        known.update(_content(token) for token in tokens)
        for token in (*self.named, *self.extra):
            if _content(token) not in known and token not in tokens:
                tokens.append(token)
        names = {_content(token) for token in self.named}
        added = [AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens]
        for token in added:
            token.special = token.special or token.content in names
        tokenizer.add_tokens(added)
        for index, token in self.by_id.items():
            found = tokenizer.token_to_id(token.content)
            if token.content and found != index:
                other = tokenizer.id_to_token(index)
                taken = "" if other is None else f", which is {other!r}"
                raise InputError(
                    f"added token {token.content!r}",
                    got=f"id {index}{taken}",
                    allowed=f"{found}, its id beside the vocabulary of tokenizer.json",
                )


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
    named = _named_tokens(config)
    extra = config.get(EXTRA) or config.get(OLD_EXTRA, config.get(EXTRA))
    if isinstance(extra, dict):
        named |= {str(name): _token(token, EXTRA) for name, token in extra.items()}
        extra = None
    extra_tokens = _token_list(extra)
    older_file: Mapping[str, Any] = {}
    if "added_tokens_decoder" in config:
        older = {}
        by_id = _tokens_by_id(config["added_tokens_decoder"])
    else:
        older_file = read_if_there(folder / "special_tokens_map.json", "tokens")
        older = _named_tokens(older_file, special=True)
        special = _plain_content(named, older, extra_tokens)
        by_id = _older_tokens_by_id(folder, in_vocabulary, special)
    extra_tokens += _token_list(older_file.get(EXTRA), special=True)
    if extra is None and EXTRA not in older_file:
        extra_tokens = _token_list({**config, **older_file}.get(OLD_EXTRA))
    found = {**defaults, **named, **older}
    return DeclaredTokens(
        by_id=by_id,
        roles={name: _content(token) for name in NAMES if (token := found.get(name))},
        named=_in_order(named, older, defaults),
        extra=tuple(extra_tokens),
    )


def _plain_content(
    named: Mapping[str, Token | None], older: Mapping[str, Token | None], extra: Sequence[Token]
) -> set[str]:
    """Return what transformers takes for special in ``added_tokens.json``.

    It compares strings, and so finds no token that has flags in ``tokenizer_config.json``.
    """
    plain = {name: token for name, token in named.items() if isinstance(token, str)} | dict(older)
    roles = (plain.get(name) for name in NAMES)
    return {_content(token) for token in roles if token} | {t for t in extra if isinstance(t, str)}


def _in_order(
    named: Mapping[str, Token | None],
    older: Mapping[str, Token | None],
    defaults: Mapping[str, str | None],
) -> tuple[Token, ...]:
    """Return roles, then other names with flags of their own, then those without."""
    roles = {**defaults, **named, **older}
    others = [token for name, token in named.items() if name not in NAMES]
    ordered = [
        *(roles.get(name) for name in NAMES),
        *(token for token in others if isinstance(token, AddedToken)),
        *(token for name, token in older.items() if name not in NAMES),
        *(token for token in others if isinstance(token, str)),
    ]
    return tuple(token for token in ordered if token)


def _named_tokens(
    values: Mapping[str, Any], *, special: bool | None = None
) -> dict[str, Token | None]:
    """Return the tokens that have a name; keys such as ``add_bos_token`` hold none."""
    tokens: dict[str, Token | None] = {}
    for name, value in values.items():
        is_token = isinstance(value, str | dict) if special else _is_token(value)
        if name in NAMES or (name.endswith("_token") and is_token):
            tokens[name] = None if value is None else _token(value, name, special=special)
    return tokens


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and value.get("__type") == "AddedToken"
    )


def _tokens_by_id(value: object) -> dict[int, AddedToken]:
    where = "added_tokens_decoder of tokenizer_config.json"
    if not isinstance(value, dict):
        raise InputError(where, got=repr(value), allowed="an object of ids and tokens")
    return {_id(index, where): _flagged_token(token, where) for index, token in value.items()}


def _older_tokens_by_id(
    folder: Path, in_vocabulary: object, special: set[str]
) -> dict[int, AddedToken]:
    tokens = {
        _id(index, "added_tokens.json"): AddedToken(
            content, normalized=content not in special, special=content in special
        )
        for content, index in read_if_there(folder / "added_tokens.json", "tokens").items()
    }
    where = "added_tokens of tokenizer.json"
    for value in in_vocabulary if isinstance(in_vocabulary, list) else []:
        token = _flagged_token(value, where)
        tokens[_id(value.get("id"), where)] = token
    return tokens


def _id(value: object, where: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise InputError(f"id of a token in {where}", got=repr(value), allowed=f"0 to {2**32 - 1}")
    return value


def _token_list(value: object, *, special: bool | None = None) -> list[Token]:
    values = [] if value is None else value
    if not isinstance(values, list):
        raise InputError(EXTRA, got=repr(value), allowed="a list of tokens")
    return [_token(item, EXTRA, special=special) for item in values]


def _token(value: object, where: str, *, special: bool | None = None) -> Token:
    return value if isinstance(value, str) else _flagged_token(value, where, special=special)


def _flagged_token(value: object, where: str, *, special: bool | None = None) -> AddedToken:
    fields = value if isinstance(value, dict) else {}
    flags = {key: fields[key] for key in FLAGS if key in fields}
    content = fields.get("content")
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(where, got=repr(value), allowed="text, or an object with content")
    return AddedToken(content, **(flags if special is None else {**flags, "special": special}))


def _content(token: Token) -> str:
    return token if isinstance(token, str) else str(token.content)

"""``tokenizer.json`` as transformers 5 reads it, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from executor.text.special_tokens import read_declared_tokens, read_if_there
from executor.text.tokenizer_classes import PLAIN_CLASSES, REBUILT, Rebuilt, class_name
from profiles.errors import InputError
from profiles.files import read_json

# Keys of tokenizer_config.json that change how the file is read, and are not followed here.
UNUSUAL_KEYS = ("auto_map", "fast_tokenizer_files", "fix_mistral_regex")
# Without this one, spaces of byte-pair tokenizers are kept.
FORCED_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
# What a file begins with that Git LFS has not fetched.
POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """``tokenizer.json``, the files beside it, and the class that transformers reads them with."""

    folder: Path
    spec: dict[str, Any]
    config: dict[str, Any]
    class_name: str

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read the files of a checkpoint folder."""
        path = folder / "tokenizer.json"
        spec = read_json(path, "tokenizer")
        config = read_if_there(folder / "tokenizer_config.json", "tokenizer config")
        model = read_if_there(folder / "config.json", "model config")
        is_byte_level = b'"ByteLevel"' in path.read_bytes()
        name = class_name(model, config, is_byte_level=is_byte_level)
        return cls(folder=folder, spec=spec, config=config, class_name=name)

    def only_transformers(self) -> str | None:
        """Return what only transformers reads of the files, or ``None``."""
        unusual = [key for key in UNUSUAL_KEYS if self.config.get(key)]
        if unusual:
            return f"{unusual[0]} in tokenizer_config.json"
        if self.class_name in PLAIN_CLASSES:
            return None
        if self.class_name in REBUILT and self._kind == "BPE":
            return None
        return f"tokenizer_class {self.class_name} with a model of type {self._kind}"

    @property
    def cleans_up(self) -> bool:
        """Whether spaces before punctuation are removed from decoded text."""
        is_asked = self.config.get("clean_up_tokenization_spaces")
        return bool(is_asked and (self._kind != "BPE" or self.config.get(FORCED_CLEAN_UP)))

    @property
    def _kind(self) -> object:
        model = self.spec.get("model")
        return model.get("type") if isinstance(model, dict) else None

    def build(self) -> tuple[Tokenizer, Mapping[str, str]]:
        """Return the tokenizer with all its tokens, and its special tokens by their role."""
        rebuilt = None if self.class_name in PLAIN_CLASSES else REBUILT[self.class_name]
        tokenizer = self._load(self.spec if rebuilt is None else self._rebuild(rebuilt))
        padding = tokenizer.padding or {}
        defaults = {"pad_token": padding.get("pad_token")}
        if rebuilt is not None:
            defaults |= rebuilt.tokens
        declared = read_declared_tokens(
            self.folder, self.config, self.spec.get("added_tokens"), defaults
        )
        declared.add_to(tokenizer)
        if self.class_name == "Qwen2Tokenizer":
            # Its special tokens lose the flags that the files give them.
            tokenizer.add_tokens([AddedToken(t, special=True) for t in declared.special])
        # What the file says of padding and cutting is for training, not for prompts.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = bool(self.config.get("split_special_tokens"))
        return tokenizer, declared.roles

    def _load(self, spec: Mapping[str, Any]) -> Tokenizer:
        what = f"tokenizer {self.folder / 'tokenizer.json'}"
        try:
            tokenizer = Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise InputError(what, got=error, allowed="a tokenizer.json") from error
        missing = _missing_in_template(spec.get("post_processor"))
        if missing:
            raise InputError(
                what,
                got=f"a post_processor that adds {missing[0]!r}, which it does not describe",
                allowed="only tokens of its special_tokens",
            )
        return tokenizer

    def _rebuild(self, rebuilt: Rebuilt) -> dict[str, Any]:
        parts = {"normalizer": None, **rebuilt.parts(self.config)}
        kept = {key: self.spec["model"].get(key) for key in ("type", "vocab", "merges")}
        return {**self.spec, **parts, "model": {**kept, **parts["model"]}, "added_tokens": []}


def refuse_pointer(path: Path) -> None:
    """Refuse what is no file, is empty, or is a pointer of Git LFS."""
    try:
        with path.open("rb") as handle:
            head = handle.read(len(POINTER))
    except OSError as error:
        raise InputError(f"tokenizer {path}", got=error.strerror, allowed="a file") from error
    if not head:
        raise InputError(f"tokenizer {path}", got="an empty file", allowed="the tokenizer")
    if head == POINTER:
        raise InputError(
            f"tokenizer {path}",
            got="a pointer of Git LFS",
            allowed="the tokenizer",
            hint="git lfs pull",
        )


def cannot_encode(error: Exception) -> InputError:
    """Return the error for a text that a tokenizer stops at."""
    return InputError("text", got=error, allowed="text that the checkpoint's tokenizer can encode")


def _missing_in_template(processor: Any) -> list[str]:
    """Return the tokens that a template adds and lacks; the library aborts at the first text."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        return [name for part in processor["processors"] for name in _missing_in_template(part)]
    if kind != "TemplateProcessing":
        return []
    names = [
        piece["SpecialToken"]["id"] for piece in processor["single"] if "SpecialToken" in piece
    ]
    return [name for name in names if name not in processor["special_tokens"]]

"""The classes that transformers 5 reads a ``tokenizer.json`` with, as data.

Some take only the vocabulary and the post-processor from the file, and set the other parts
themselves. So the class decides what a text's ids are: Llama 2's file puts a space before the text
behind every special token, its class only before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from costmodel.families import tokenizer_owner
from costmodel.model.family import GENERIC_TOKENIZER

# Classes that use the file unchanged.
PLAIN_CLASSES = (
    GENERIC_TOKENIZER,
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "PythonBackend",
    "BloomTokenizer",
)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a class sets itself.

    ``parts`` makes sections of ``tokenizer.json`` from ``tokenizer_config.json``; ``tokens`` are
    the special tokens where that names none.
    """

    parts: Callable[[Mapping[str, Any]], dict[str, Any]]
    tokens: Mapping[str, str | None]


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    has_prefix = config.get("add_prefix_space") in (None, True)
    first = "always" if config.get("legacy") else "first"
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "model": {"fuse_unk": True, "byte_fallback": True},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": first if has_prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": steps if has_prefix else steps[:-1]},
    }


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    unknown = config.get("unk_token", "<unk>")
    if isinstance(unknown, dict):
        unknown = unknown.get("content")
    return {
        "model": {"fuse_unk": True, "byte_fallback": True, "unk_token": str(unknown)},
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
    }


def _byte_level(*, prefix: bool = True, regex: bool = True) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": prefix,
        "trim_offsets": True,
        "use_regex": regex,
    }


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        "pre_tokenizer": _byte_level(prefix=bool(config.get("add_prefix_space"))),
        "decoder": _byte_level(),
    }


def _gpt_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_gpt2(config), "normalizer": {"type": "NFC"}, "post_processor": None}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_ = _byte_level(prefix=bool(config.get("add_prefix_space")), regex=False)
    return {
        **_gpt2(config),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
    }


REBUILT = {
    "LlamaTokenizer": Rebuilt(
        parts=_llama, tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ),
    "GemmaTokenizer": Rebuilt(
        parts=_gemma,
        tokens={
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
    "GPT2Tokenizer": Rebuilt(
        parts=_gpt2,
        tokens={
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": None,
        },
    ),
    "GPTNeoXTokenizer": Rebuilt(
        parts=_gpt_neox,
        tokens={
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": "<|padding|>",
        },
    ),
    "Qwen2Tokenizer": Rebuilt(
        parts=_qwen2,
        tokens={"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
    ),
}


def class_name(model: Mapping[str, Any], config: Mapping[str, Any], *, is_byte_level: bool) -> str:
    """Return the class that transformers chooses, without the ending ``Fast``."""
    owner = tokenizer_owner(model.get("model_type"))
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if owner and (owner.fixes_tokenizer_class or not named):
        return owner.tokenizer_class
    if not named:
        return GENERIC_TOKENIZER
    named = str(named).removesuffix("Fast")
    # Files of Llama 3 and its like name the class of Llama 2, which could not read them.
    return GENERIC_TOKENIZER if named == "LlamaTokenizer" and is_byte_level else named

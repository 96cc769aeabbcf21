"""Loads what belongs to the text of a checkpoint folder or a GGUF file: the tokenizer, the chat
template, the settings of generation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from costmodel.gguf.model import GgufModel
from costmodel.gguf.paths import is_gguf
from executor.model.generation_config import GenerationConfig
from executor.model.gguf_generation import gguf_generation_config
from executor.text.chat import ChatTemplate
from executor.text.continuation import ChatTokenizer, FastTokenizer
from executor.text.gguf_tokenizer import gguf_chat_template, load_gguf_tokenizer
from executor.text.tokenizer_json import TokenizerFiles, refuse_pointer
from executor.text.transformers_tokenizer import has_tokenizer_file, load_through_transformers


def load_generation_config(model: Path) -> GenerationConfig:
    """Load the settings of generation, which may be none."""
    if is_gguf(model):
        return gguf_generation_config(GgufModel.open(model), model)
    return GenerationConfig.load(model)


def has_tokenizer(model: Path) -> bool:
    """Whether there is a tokenizer of any kind."""
    if is_gguf(model):
        return "tokenizer.ggml.model" in GgufModel.open(model).metadata
    return has_tokenizer_file(model)


def load_template(model: Path) -> ChatTemplate:
    """Load the chat template; raises ``InputError`` where there is none."""
    if is_gguf(model):
        return gguf_chat_template(GgufModel.open(model), model)
    return ChatTemplate.load(model)


def load_tokenizer(model: Path) -> ChatTokenizer:
    """Load the tokenizer of a checkpoint folder as transformers 5 does, or of a GGUF file.

    ``tokenizer.json`` is read without transformers where that gives the same ids and text.
    """
    if is_gguf(model):
        return load_gguf_tokenizer(GgufModel.open(model), model)
    path = model / "tokenizer.json"
    if path.exists():
        refuse_pointer(path)
        files = TokenizerFiles.read(model)
        why = files.only_transformers()
        if why is None:
            tokenizer, roles = files.build()
            _tell_ignored_keys(files.config, tokenizer)
            return FastTokenizer(tokenizer, cleans_up=files.cleans_up, special_tokens=roles)
        return load_through_transformers(model, why)
    return load_through_transformers(model, "no tokenizer.json")


def _tell_ignored_keys(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Print a note where ``tokenizer_config.json`` contradicts what ``tokenizer.json`` adds."""
    ids = tokenizer.encode("").ids
    for key, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not isinstance(config.get(key), bool):
            continue
        if config[key] != (tokenizer.token_to_id(content) in ids):
            does = "does not add it" if config[key] else "adds it all the same"
            print(
                f"note: {key} of tokenizer_config.json is {str(config[key]).lower()}, and"
                f" tokenizer.json {does}; as in transformers 5, tokenizer.json decides",
                file=sys.stderr,
            )

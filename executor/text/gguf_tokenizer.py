"""The tokenizer of a model in GGUF, built from its metadata.

``tokenizer.ggml.model`` is ``gpt2`` for byte-level BPE, whose merges are in the file. It is
``llama`` for the BPE of SentencePiece, where the score of a token says when its parts are merged.
transformers' converter is not used: it splits text as GPT-2 does for names of
``tokenizer.ggml.pre`` that it does not know, such as that of SmolLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from costmodel.gguf.model import GgufModel
from executor.text.chat import ChatTemplate
from executor.text.continuation import FastTokenizer
from executor.text.gguf_vocabulary import (
    BYTE_LEVEL,
    NORMAL,
    SENTENCEPIECE,
    UNDEFINED,
    USER_DEFINED,
    Vocabulary,
    numbers,
)
from executor.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from profiles.errors import InputError

# How SentencePiece writes a space.
SPACE = "▁"
# Tokens of Phi 3 that take no spaces behind them away.
_PLAIN_PHI3 = ("<unk>", "<s>", "<|endoftext|>")


def load_gguf_tokenizer(model: GgufModel, path: Path) -> FastTokenizer:
    """Build the tokenizer of a model.

    Parameters
    ----------
    path
        The model's file, for messages.

    Raises
    ------
    InputError
        Where the file has no tokenizer, or one of a kind that is not read.
    """
    vocabulary = Vocabulary.read(model, path)
    pre = None
    if vocabulary.kind == BYTE_LEVEL:
        pre = _pre_tokenizer(vocabulary)
        tokenizer = _byte_level(vocabulary, pre)
    else:
        tokenizer = _sentencepiece(vocabulary)
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary, adds_bos=pre is None or pre.adds_bos)
    return FastTokenizer(tokenizer, special_tokens=vocabulary.roles())


def gguf_chat_template(model: GgufModel, path: Path) -> ChatTemplate:
    """Compile the template of a model; see ``ChatTemplate``.

    Raises
    ------
    InputError
        Where the file has none.
    """
    text = model.metadata.get("tokenizer.chat_template")
    if not isinstance(text, str):
        raise InputError(
            f"chat template of {path}",
            got="none",
            allowed="tokenizer.chat_template in the file",
            hint="generate, with prompts in the form that the model was trained on",
        )
    return ChatTemplate(text, f"{path}: tokenizer.chat_template")


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise vocabulary.error("pre", repr(name), ", ".join(sorted(PRE_TOKENIZERS)))
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, pre: PreTokenizer) -> Tokenizer:
    merges = vocabulary.get("merges")
    if not isinstance(merges, tuple):
        raise vocabulary.error("merges", "none", "pairs of tokens as texts")
    ids = vocabulary.ids()
    # A part may itself begin with a space.
    pairs = [(m[:cut], m[cut + 1 :]) for m in merges if (cut := m.find(" ", 1)) > 0]
    known = [(a, b) for a, b in pairs if a in ids and b in ids and a + b in ids]
    bpe = models.BPE(vocab=ids, merges=known, ignore_merges=pre.ignores_merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    scores = vocabulary.get("scores")
    scores = numbers(scores, "scores", len(vocabulary.tokens), f"tokenizer of {vocabulary.path}")
    if scores.dtype.kind != "f" or np.isnan(scores).any():
        got = "NaN" if scores.dtype.kind == "f" else f"numbers of {scores.dtype}"
        raise vocabulary.error("scores", got, "floats")
    unknown = vocabulary.token_id("unknown_token_id")
    bpe = models.BPE(
        vocab=vocabulary.ids(),
        merges=_merges_by_score(vocabulary, scores.tolist()),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    )
    tokenizer = Tokenizer(bpe)
    has_prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, the one with the highest score first.

    Tokens of equal scores are merged in the order of their ids: some converters write one score
    for all.
    """
    ids = {
        token: number
        for number, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if kind in (UNDEFINED, NORMAL, USER_DEFINED)
    }
    order = sorted(ids.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [
        (head, tail)
        for token, _ in order
        for cut in range(1, len(token))
        if (head := token[:cut]) in ids and (tail := token[cut:]) in ids
    ]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Add the tokens that are found in a text before it is split."""
    # The tokens of Phi 3 take the spaces behind them away, which no key says.
    takes_spaces = (
        vocabulary.kind == SENTENCEPIECE
        and vocabulary.metadata.get("general.architecture") == "phi3"
    )

    # All at once, because each call compiles all tokens anew.
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                normalized=False,
                special=kind != USER_DEFINED,
                rstrip=takes_spaces and token not in _PLAIN_PHI3,
            )
            for token, kind in vocabulary.added()
        ]
    )


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, *, adds_bos: bool) -> None:
    """Add the tokens at the beginning and end of each text."""
    template = ["$A"]
    ends: list[dict[str, Any]] = []
    for flag, key, default in (
        ("add_bos_token", "bos_token_id", adds_bos),
        ("add_eos_token", "eos_token_id", False),
    ):
        found = vocabulary.token_id(key)
        if not vocabulary.flag(flag, default) or found is None:
            continue
        # A colon has a meaning in templates, so tokens are not named by their texts.
        template = [key, *template] if key == "bos_token_id" else [*template, key]
        ends.append({"id": key, "ids": [found], "tokens": [vocabulary.tokens[found]]})
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=ends
        )

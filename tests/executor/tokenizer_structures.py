# ruff: noqa: RUF001 - the public patterns and tokens hold such characters
"""Small tokenizers with the structures of public ones.

Four vocabularies are trained. Around them stand the normalizers, pre-tokenizers, decoders,
post-processors, added tokens and configurations that the public checkpoints have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from executor.data import HELD_OUT

Json = dict[str, Any]
LINES = HELD_OUT.read_text(encoding="utf-8").splitlines()
OTHER_LINES = [
    "café naïve façade, 2024: 3.14159 and 1000000 (it's, don't, we've)!",
    "日本語のテキスト と 한국어 텍스트 и русский текст",
    "def f(x):\n    return x ** 2  # ünïcödé\n\n\t\tend",
    "emoji 🙂🙃 and 👩‍👩‍👧 “quotes” — dashes…",
]
CORPUS = [line for line in LINES if line][:250] + OTHER_LINES * 4
SIZE = 600
USUAL_FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM_PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK_PATTERNS = (
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One checkpoint's tokenizer: what ``write`` puts into a folder."""

    vocabulary: Callable[[], Json]
    parts: Json
    # Contents of the tokens behind the vocabulary, with flags that differ from the usual.
    added: Mapping[str, Json] = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    model_type: str = "llama"
    # Whether tokenizer_config.json lists the added tokens, as newer checkpoints do.
    lists_added: bool = True
    other_files: Mapping[str, Json] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files and the ``config.json`` that names the model's type."""
        folder.mkdir(parents=True, exist_ok=True)
        spec: Json = json.loads(
            json.dumps(
                {
                    "version": "1.0",
                    "truncation": None,
                    "padding": None,
                    "added_tokens": [],
                    "normalizer": None,
                    "pre_tokenizer": None,
                    "post_processor": None,
                    "decoder": None,
                }
                | self.parts
            )
        )
        spec["model"] = {**self.vocabulary(), **self.parts.get("model", {})}
        vocab = spec["model"]["vocab"]
        ids = {piece[0]: i for i, piece in enumerate(vocab)} if isinstance(vocab, list) else vocab
        free, listed = len(ids), {}
        for content, flags in self.added.items():
            fields = {"content": content, **USUAL_FLAGS, **flags}
            index = ids.get(content, free)
            free += content not in ids
            spec["added_tokens"].append({"id": index, **fields})
            listed[str(index)] = fields
        spec["added_tokens"].sort(key=lambda entry: entry["id"])
        config = dict(self.config)
        if self.lists_added:
            config["added_tokens_decoder"] = listed
        _fill_template(
            spec["post_processor"], {t["content"]: t["id"] for t in spec["added_tokens"]}
        )
        files = {
            "tokenizer.json": spec,
            "tokenizer_config.json": config,
            "config.json": {"model_type": self.model_type},
            **self.other_files,
        }
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _fill_template(processor: Json | None, ids: Mapping[str, int]) -> None:
    for part in (processor or {}).get("processors", [processor]):
        for name, entry in (part or {}).get("special_tokens", {}).items():
            entry |= {"id": name, "ids": [ids[name]], "tokens": [name]}


def template(*, begin: str | None = None, end: str | None = None) -> Json:
    """A post-processor that puts tokens around a text."""
    first, last = ([{"SpecialToken": {"id": t, "type_id": 0}}] if t else [] for t in (begin, end))
    text, other = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, other],
        "special_tokens": {t: {} for t in (begin, end) if t},
    }


def split(pattern: str, behavior: str = "Isolated") -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def byte_level(*, prefix: bool = False, trim: bool = True, regex: bool = True) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": prefix,
        "trim_offsets": trim,
        "use_regex": regex,
    }


def sequence(kind: str, *parts: Json) -> Json:
    return {"type": "Sequence", kind: list(parts)}


def replace(old: str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


PREPEND = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
BYTES = ({"type": "ByteFallback"}, {"type": "Fuse"})
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PIECES = sequence("decoders", replace("▁", " "), *BYTES, STRIP)


def metaspace(scheme: str, *, splits: bool) -> Json:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": splits}


def _model(tokenizer: Tokenizer) -> Json:
    model: Json = json.loads(tokenizer.to_str())["model"]
    return model


@cache
def byte_pairs() -> Json:
    """Byte-level pairs, as GPT-2 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    return _model(tokenizer)


@cache
def piece_pairs() -> Json:
    """Pairs of pieces with bytes to fall back on, as Llama 2 has them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS[:250],
        trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False),
    )
    return _model(tokenizer)


@cache
def unigram() -> Json:
    """Unigram pieces, as T5 has them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=SIZE,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return _model(tokenizer)


@cache
def unigram_with_bytes() -> Json:
    """Unigram pieces with bytes to fall back on."""
    model = json.loads(json.dumps(unigram()))
    model["vocab"] += [[f"<0x{i:02X}>", -20.0] for i in range(256)]
    return {**model, "byte_fallback": True}


@cache
def word_pieces() -> Json:
    """Word pieces, as BERT has them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=SIZE,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            show_progress=False,
        ),
    )
    return _model(tokenizer)


def token(content: str) -> Json:
    """A token of an older tokenizer_config.json."""
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


LLAMA2 = Structure(
    vocabulary=piece_pairs,
    parts={
        "normalizer": PREPEND,
        "decoder": PIECES,
        "post_processor": template(begin="<s>"),
    },
    added={"<unk>": {}, "<s>": {}, "</s>": {}},
    config={
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": token("<s>"),
        "legacy": False,
        "eos_token": token("</s>"),
        "unk_token": token("<unk>"),
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
        "padding_side": "right",
    },
    lists_added=False,
    other_files={
        "special_tokens_map.json": {
            "bos_token": {
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            },
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
    },
)
SMALL_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA3 = Structure(
    vocabulary=byte_pairs,
    parts={
        "model": {"ignore_merges": True},
        "pre_tokenizer": sequence("pretokenizers", split(LLAMA3_PATTERN), byte_level(regex=False)),
        "post_processor": sequence(
            "processors", byte_level(prefix=True, trim=False), template(begin="<|begin_of_text|>")
        ),
        "decoder": byte_level(prefix=True),
    },
    added={
        t: {}
        for t in (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        )
    },
    config={
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
    },
)
QWEN25 = Structure(
    vocabulary=byte_pairs,
    model_type="qwen2",
    parts={
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(
            "pretokenizers", split(QWEN_PATTERN), byte_level(trim=False, regex=False)
        ),
        "post_processor": byte_level(trim=False, regex=False),
        "decoder": byte_level(trim=False, regex=False),
    },
    added={
        **{t: {} for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")},
        **{t: {"special": False} for t in ("<tool_call>", "</tool_call>", "<|fim_prefix|>")},
    },
    config={
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "split_special_tokens": False,
        "errors": "replace",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|vision_pad|>"],
        "clean_up_tokenization_spaces": False,
    },
)
GPT2 = Structure(
    vocabulary=byte_pairs,
    parts={
        "pre_tokenizer": byte_level(),
        "post_processor": byte_level(prefix=True, trim=False),
        "decoder": byte_level(prefix=True),
    },
    added={"<|endoftext|>": {"normalized": True}},
    config={"tokenizer_class": "GPT2Tokenizer"},
    lists_added=False,
)
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


def like(base: Structure, **changes: Any) -> Structure:
    """Return a structure that differs from another one; ``parts`` and ``config`` are merged."""
    merged = {
        key: {**getattr(base, key), **value} if key in ("parts", "config") else value
        for key, value in changes.items()
    }
    return Structure(**{**vars(base), **merged})


STRUCTURES: Mapping[str, Structure] = {
    "Llama 2": LLAMA2,
    "Llama 3": LLAMA3,
    "Mistral 7B": like(
        LLAMA2,
        model_type="mistral",
        lists_added=True,
        other_files={},
        config={**SMALL_CONFIG, "legacy": True, "additional_special_tokens": []},
    ),
    "Mistral 7B 0.3": like(
        LLAMA2,
        model_type="mistral",
        lists_added=True,
        other_files={},
        parts={"normalizer": None, "pre_tokenizer": metaspace("first", splits=False)},
        added={"<unk>": {}, "<s>": {}, "</s>": {}, "[INST]": {}, "[/INST]": {}},
        config={**SMALL_CONFIG, "legacy": False},
    ),
    "Mistral Nemo": like(
        LLAMA3,
        model_type="mistral",
        parts={
            "pre_tokenizer": sequence(
                "pretokenizers", split(TEKKEN_PATTERN), byte_level(regex=False)
            ),
            "post_processor": template(begin="<s>"),
            "decoder": byte_level(),
        },
        added={t: {} for t in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<SPECIAL_20>")},
        config={
            **SMALL_CONFIG,
            "tokenizer_class": "GPT2TokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    ),
    "Mixtral": like(
        LLAMA2,
        model_type="mixtral",
        lists_added=True,
        other_files={},
        config={**SMALL_CONFIG, "legacy": True, "sp_model_kwargs": {}},
    ),
    "Qwen 2.5": QWEN25,
    "Qwen 3": like(
        QWEN25,
        model_type="qwen3",
        added={**QWEN25.added, "<think>": {"special": False}, "</think>": {"special": False}},
    ),
    "Qwen 3 with experts": like(QWEN25, model_type="qwen3_moe", config={"tokenizer_class": None}),
    "Gemma 2": Structure(
        vocabulary=piece_pairs,
        parts={
            "normalizer": replace(" ", "▁"),
            "post_processor": template(begin="<bos>"),
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "invert": False,
                "behavior": "MergedWithPrevious",
            },
            "decoder": sequence("decoders", replace("▁", " "), *BYTES),
        },
        added={
            **{t: {} for t in GEMMA_TOKENS},
            **{t: {"special": False} for t in ("<2mass>", "▁▁", "▁▁▁▁", "\n\n", "<h1>")},
        },
        config={
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
            "spaces_between_special_tokens": False,
            "use_default_system_prompt": False,
        },
    ),
    "Phi-3": like(
        LLAMA2,
        lists_added=True,
        other_files={},
        added={
            "<unk>": {},
            "<s>": {},
            "</s>": {"rstrip": True, "special": False},
            "<|endoftext|>": {},
            **{t: {"rstrip": True} for t in ("<|assistant|>", "<|user|>", "<|end|>")},
        },
        config={
            **SMALL_CONFIG,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "add_prefix_space": None,
            "add_bos_token": False,
        },
    ),
    "GPT-2": GPT2,
    "GPT-NeoX": like(
        GPT2,
        parts={"normalizer": {"type": "NFC"}, "post_processor": byte_level(trim=True)},
        added={
            "<|endoftext|>": {},
            "<|padding|>": {},
            **{" " * n: {"special": False, "normalized": True} for n in (8, 6, 4, 3, 2)},
        },
        config={
            "tokenizer_class": "GPTNeoXTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "add_bos_token": False,
            "add_prefix_space": False,
        },
    ),
    "Falcon": like(
        GPT2,
        parts={
            "pre_tokenizer": sequence(
                "pretokenizers",
                {"type": "Punctuation", "behavior": "Contiguous"},
                byte_level(),
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ),
        },
        added={t: {} for t in (">>TITLE<<", ">>SUFFIX<<", "<|endoftext|>")},
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "add_prefix_space": False,
            "special_tokens_map_file": None,
        },
    ),
    "BLOOM": like(
        GPT2,
        parts={
            "pre_tokenizer": sequence(
                "pretokenizers", split(BLOOM_PATTERN), byte_level(regex=False)
            ),
            "decoder": byte_level(prefix=True, regex=False),
        },
        added={t: {} for t in ("<unk>", "<s>", "</s>", "<pad>")},
        config={**SMALL_CONFIG, "pad_token": "<pad>", "tokenizer_class": "BloomTokenizerFast"},
    ),
    "DeepSeek": like(
        LLAMA3,
        parts={
            "normalizer": sequence("normalizers"),
            "pre_tokenizer": sequence(
                "pretokenizers",
                *(split(p) for p in DEEPSEEK_PATTERNS),
                {"type": "Digits", "individual_digits": True},
                byte_level(regex=False),
            ),
            "post_processor": template(begin="<｜begin▁of▁sentence｜>"),
        },
        added={
            "<｜begin▁of▁sentence｜>": {"normalized": True},
            "<｜end▁of▁sentence｜>": {"normalized": True},
            "<｜fim▁hole｜>": {"special": False, "normalized": True},
            "ø": {"special": False, "normalized": True},
            "<｜User｜>": {"special": False, "normalized": True},
        },
        config={
            "tokenizer_class": "LlamaTokenizerFast",
            "legacy": True,
            "add_bos_token": True,
            "bos_token": token("<｜begin▁of▁sentence｜>"),
            "eos_token": token("<｜end▁of▁sentence｜>"),
            "unk_token": None,
            "sp_model_kwargs": {},
        },
        lists_added=False,
    ),
    "T5": Structure(
        vocabulary=unigram,
        parts={
            "normalizer": {"type": "NFKC"},
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "WhitespaceSplit"}, metaspace("always", splits=True)
            ),
            "decoder": metaspace("always", splits=True),
            "post_processor": template(end="</s>"),
        },
        added={t: {} for t in ("<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>")},
        config={
            "tokenizer_class": "T5Tokenizer",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "extra_ids": 2,
            "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"],
        },
        lists_added=False,
    ),
    "Unigram with bytes": Structure(
        vocabulary=unigram_with_bytes,
        parts={
            "normalizer": sequence("normalizers", {"type": "NFKC"}, replace(" ", "▁")),
            "pre_tokenizer": metaspace("first", splits=False),
            "decoder": PIECES,
            "post_processor": template(begin="</s>"),
        },
        added={"<pad>": {}, "</s>": {}, "<unk>": {}, "<mask>": {"lstrip": True}},
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": True,
        },
    ),
    "SmolLM": like(
        GPT2,
        parts={
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "Digits", "individual_digits": True}, byte_level()
            ),
            "post_processor": None,
        },
        added={t: {} for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")},
        config={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "vocab_size": 49152,
        },
        lists_added=True,
    ),
    "Granite": like(
        GPT2,
        model_type="granite",
        parts={
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "Digits", "individual_digits": True}, byte_level()
            ),
        },
        added={t: {} for t in ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")},
        config={
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|end_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|end_of_text|>",
            "unk_token": "<|end_of_text|>",
            "add_prefix_space": False,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": True,
            "errors": "replace",
        },
        lists_added=True,
    ),
    "Yi": like(
        LLAMA2,
        lists_added=True,
        other_files={},
        parts={
            "normalizer": replace(" ", "▁"),
            "post_processor": None,
            "decoder": sequence("decoders", replace("▁", " "), *BYTES),
        },
        added={"<unk>": {}, "<s>": {}, "</s>": {}, "<|im_start|>": {}, "<|im_end|>": {}},
        config={**SMALL_CONFIG, "legacy": True, "add_bos_token": False},
    ),
    "OLMo 2": like(
        LLAMA3,
        model_type="olmo2",
        parts={"post_processor": None, "decoder": byte_level(prefix=True)},
        added={
            t: {"special": t != "|||IP_ADDRESS|||"}
            for t in ("<|endoftext|>", "<|pad|>", "|||IP_ADDRESS|||")
        },
        config={
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "unk_token": "<|endoftext|>",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    ),
    "OPT": like(
        GPT2,
        model_type="opt",
        parts={"post_processor": template(begin="</s>")},
        added={"<pad>": {"normalized": True}, "</s>": {"normalized": True}},
        config={
            "bos_token": token("</s>"),
            "eos_token": token("</s>"),
            "unk_token": token("</s>"),
            "pad_token": token("<pad>"),
            "add_bos_token": True,
            "errors": "replace",
        },
    ),
    "Code Llama": like(
        LLAMA2,
        added={
            "<unk>": {},
            "<s>": {},
            "</s>": {},
            **{t: {"normalized": False} for t in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")},
        },
        config={
            **SMALL_CONFIG,
            "tokenizer_class": "CodeLlamaTokenizer",
            "legacy": None,
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
        },
    ),
    "Cohere": like(
        GPT2,
        parts={
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": sequence(
                "pretokenizers", {"type": "Digits", "individual_digits": True}, byte_level()
            ),
            "post_processor": template(begin="<BOS_TOKEN>"),
        },
        added={
            t: {}
            for t in (
                "<PAD>",
                "<UNK>",
                "<CLS>",
                "<SEP>",
                "<MASK_TOKEN>",
                "<BOS_TOKEN>",
                "<EOS_TOKEN>",
                "<|END_OF_TURN_TOKEN|>",
            )
        },
        config={
            "tokenizer_class": "CohereTokenizer",
            "bos_token": "<BOS_TOKEN>",
            "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>",
            "legacy": True,
        },
        lists_added=True,
    ),
    "BERT": Structure(
        vocabulary=word_pieces,
        parts={
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "lowercase": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": template(begin="[CLS]", end="[SEP]"),
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        },
        added={t: {} for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")},
        config={"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True},
    ),
}

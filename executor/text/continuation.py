"""Text to token ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Protocol

from tokenizers import Tokenizer

from executor.text.tokenizer_json import cannot_encode

# What transformers removes from decoded text where a checkpoint asks for it, in this order.
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class TextTokenizer(Protocol):
    """What the commands need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with the special tokens that the model was trained on."""

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """Return the ids of many texts, as one by one.

        ``is_rendered``: whether they hold their special tokens already. Raises ``InputError``
        where any of them cannot be encoded.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""


class ChatTokenizer(TextTokenizer, Protocol):
    """What a chat template needs beside."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by their role, such as ``bos_token``."""

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of ``text`` that holds its special tokens already."""

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token, also of a special one."""


class FastTokenizer:
    """A ``tokenizer.json``.

    Parameters
    ----------
    cleans_up
        Whether spaces before punctuation are removed from decoded text.
    special_tokens
        By their role.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        cleans_up: bool = False,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._cleans_up = cleans_up
        self.special_tokens = special_tokens or {}
        # Candidates for the tokens of a job name the same ones again and again.
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` with special tokens added."""
        return self._encode(text, adds_special=True)

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of ``text`` that holds its special tokens already."""
        return self._encode(text, adds_special=False)

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """Return the ids of many texts, encoded on all cores."""
        try:
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=not is_rendered)
        except Exception as error:  # the library raises bare Exception
            raise cannot_encode(error) from error
        return [encoding.ids for encoding in found]

    def _encode(self, text: str, *, adds_special: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=adds_special).ids
        except Exception as error:  # the library raises bare Exception
            raise cannot_encode(error) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if self._cleans_up:
            for spaced, clean in CLEAN_UP:
                text = text.replace(spaced, clean)
        return text

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token, also of a special one."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
            self._token_texts[token_id] = text
        return text


def decode_continuation(
    tokenizer: TextTokenizer, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> str:
    """Return the text that ``output_ids`` add to the text of ``prompt_ids``.

    Both are decoded together, and the text of the prompt alone is removed. The output is not
    decoded alone, because some decoders drop a leading space. The output may change the end of
    the prompt: it may complete a character, or remove a space before punctuation. The text then
    begins with the first character that differs from the prompt's text.
    """
    prompt = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode([*prompt_ids, *output_ids])
    # A prompt of thousands of tokens is decoded in a millisecond, so all of it is the context.
    return whole[len(prompt) if whole.startswith(prompt) else shared_length(prompt, whole) :]


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

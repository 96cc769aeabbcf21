"""Lines whose texts wait for their tokens: a tokenizer encodes many at once in less time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from executor.jobs.table import ParsedLine
from executor.text.continuation import TextTokenizer
from profiles.errors import InputError

Encoded = list[int] | InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A line that was checked up to its tokens.

    Parameters
    ----------
    finish
        Returns what the line asks for, given the tokens of each text. Raises ``InputError``.
    texts
        Texts to encode.
    is_rendered
        Whether they hold their special tokens already.
    """

    finish: Callable[[Sequence[list[int]]], ParsedLine]
    texts: Sequence[str] = ()
    is_rendered: bool = False


def encode_drafts(
    load_tokenizer: Callable[[], TextTokenizer], drafts: Sequence[Draft]
) -> list[list[list[int]] | InputError]:
    """Return the tokens of each draft's texts, or why one of them has none."""
    pools = {}
    for is_rendered in (False, True):
        texts = [text for d in drafts if d.is_rendered is is_rendered for text in d.texts]
        found = _encode(load_tokenizer(), texts, is_rendered=is_rendered) if texts else []
        pools[is_rendered] = iter(found)
    told: list[list[list[int]] | InputError] = []
    for draft in drafts:
        each = list(islice(pools[draft.is_rendered], len(draft.texts)))
        error = next((one for one in each if isinstance(one, InputError)), None)
        told.append(error or [one for one in each if not isinstance(one, InputError)])
    return told


def _encode(
    tokenizer: TextTokenizer, texts: Sequence[str], *, is_rendered: bool
) -> Sequence[Encoded]:
    try:
        return tokenizer.encode_batch(texts, is_rendered=is_rendered)
    except InputError:
        # It does not tell of which text.
        return [_encode_one(tokenizer, text, is_rendered=is_rendered) for text in texts]


def _encode_one(tokenizer: TextTokenizer, text: str, *, is_rendered: bool) -> Encoded:
    try:
        (ids,) = tokenizer.encode_batch([text], is_rendered=is_rendered)
    except InputError as error:
        return error
    return ids

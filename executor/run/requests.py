"""Prompts of the Python interface, and what comes back for each. The names are those of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.cli.prompts import PromptLimits, check_ids, check_text
from executor.text.continuation import TextTokenizer
from profiles.errors import InputError

PROMPT_FORM = 'text, a list of token ids, or a dict with "prompt" or "prompt_token_ids"'

# A dict holds a text, token ids, or token ids with their text.
Prompt = str | Sequence[int] | Mapping[str, Any]
_KEYS = {"prompt", "prompt_token_ids"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, ready to run.

    Parameters
    ----------
    index
        Its position among the prompts of a call, from zero.
    prompt
        Its text; ``None`` where only token ids were given.
    prompt_token_ids
        At least one.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """What was generated for a prompt.

    Parameters
    ----------
    text
        The text that the tokens add to the prompt. Empty where the model has no tokenizer.
    token_ids
        Without an end-of-sequence token.
    finish_reason
        ``stop`` at an end-of-sequence token, ``length`` at the limit.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt with its outputs.

    Parameters
    ----------
    index
        Position of the prompt among those of the call, from zero.
    prompt
        Its text; ``None`` where only token ids were given.
    prompt_token_ids
        Its tokens.
    outputs
        One.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


def read_requests(
    prompts: Prompt | Sequence[Prompt],
    limits: PromptLimits,
    load_tokenizer: Callable[[], TextTokenizer],
) -> list[Request]:
    """Check one prompt or a list of them, and turn texts into token ids.

    Raises
    ------
    InputError
        With the number of the prompt, on anything that could not be run.
    """
    requests = []
    for index, prompt in enumerate(_listed(prompts)):
        where = f"prompt {index + 1}"
        text, ids = _parts(prompt, where)
        if text is not None:
            check_text(text, where)
        if ids is None:
            assert text is not None
            ids = load_tokenizer().encode(text)
        ids = list(ids) if isinstance(ids, Sequence) else ids
        check_ids(ids, limits, where)
        requests.append(Request(index=index, prompt=text, prompt_token_ids=ids))
    return requests


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[object]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise InputError("prompts", got=repr(prompts), allowed=f"one or a list of: {PROMPT_FORM}")
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _parts(prompt: object, where: str) -> tuple[str | None, Sequence[int] | None]:
    """Return the text and the ids of a prompt, whatever was given of them."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, list | tuple):
        return None, prompt
    keys = set(prompt) if isinstance(prompt, Mapping) else set()
    if not isinstance(prompt, Mapping) or not keys or keys - _KEYS:
        raise InputError(where, got=repr(prompt), allowed=PROMPT_FORM)
    return prompt.get("prompt"), prompt.get("prompt_token_ids")

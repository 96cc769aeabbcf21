"""Prompts of the Python interface, and what comes back for each. The names are those of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.cli.prompts import PromptLimits, check_ids, check_text
from executor.run.logprobs import Candidates, candidates_of
from executor.run.results import BlockResult
from executor.text.continuation import ChatTokenizer, TextTokenizer, decode_continuation
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
    logprobs
        Candidates for each of ``token_ids``, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Candidates] | None = None


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
    prompt_logprobs
        Candidates for each of ``prompt_token_ids``, where they were asked for; ``None`` for the
        first token.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Candidates | None] | None = None


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


def output_of(
    requests: Sequence[Request], tokenizer: ChatTokenizer | None, index: int, block: BlockResult
) -> RequestOutput:
    """Return what a block generated for the prompt with an index."""
    request, ids = requests[index], list(block.output_ids[index])
    text, decode_token = "", _no_text
    if tokenizer is not None:
        text = decode_continuation(tokenizer, request.prompt_token_ids, ids)
        decode_token = tokenizer.decode_token
    logprobs: list[Candidates] | None = None
    prompt_logprobs: list[Candidates | None] | None = None
    if index in block.output_scores:
        logprobs = candidates_of(ids, block.output_scores[index], decode_token)
    if index in block.prompt_scores:
        later, scores = request.prompt_token_ids[1:], block.prompt_scores[index]
        prompt_logprobs = [None, *candidates_of(later, scores, decode_token)]
    completion = CompletionOutput(
        text=text,
        token_ids=ids,
        finish_reason="stop" if index in block.stopped else "length",
        logprobs=logprobs,
    )
    return RequestOutput(
        index=index,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion],
        prompt_logprobs=prompt_logprobs,
    )


def _no_text(token_id: int) -> str | None:
    return None

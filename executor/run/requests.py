"""Prompts of the Python interface, and what comes back for each. The names are those of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from executor.cli.prompts import PromptLimits, check_ids, check_text
from executor.jobs.endings import text_of
from executor.model.sampling_params import SamplingParams
from executor.model.token_scores import TokenScores
from executor.run.finished import Finished
from executor.run.logprobs import Candidates, candidates_of
from executor.run.results import BlockResult
from executor.text.continuation import ChatTokenizer, TextTokenizer
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
    """One of the outputs of a prompt.

    Parameters
    ----------
    text
        The text that the tokens add to the prompt, up to a stop string. Empty where the model has
        no tokenizer.
    token_ids
        Without an end-of-sequence token.
    finish_reason
        ``stop`` at an end-of-sequence token or a stop string, ``length`` at the limit.
    logprobs
        Candidates for each of ``token_ids``, where they were asked for.
    index
        Its place among the outputs of the prompt, from zero.
    stop_reason
        The stop string or the token that it ended at; ``None`` at the limit.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Candidates] | None = None
    index: int = 0
    stop_reason: int | str | None = None


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
        As many as were asked for, in their order.
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
    prompts: Sequence[object],
    limits: Sequence[PromptLimits],
    load_tokenizer: Callable[[], TextTokenizer],
) -> list[Request]:
    """Check prompts, each by limits of its own, and turn texts into token ids.

    Raises
    ------
    InputError
        With the number of the prompt, on anything that could not be run.
    """
    requests = []
    for index, (prompt, most) in enumerate(zip(prompts, limits, strict=True)):
        where = f"prompt {index + 1}"
        text, ids = _parts(prompt, where)
        if text is not None:
            check_text(text, where)
        if ids is None:
            assert text is not None
            ids = load_tokenizer().encode(text)
        ids = list(ids) if isinstance(ids, Sequence) else ids
        check_ids(ids, most, where)
        requests.append(Request(index=index, prompt=text, prompt_token_ids=ids))
    return requests


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[object]:
    """Return one prompt or a list of them as a list, or raise ``InputError``."""
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


class OutputMaker:
    """Makes the outputs of prompts as they end.

    Parameters
    ----------
    requests
        The prompts.
    params
        Of each prompt: how many outputs it has, and what is told of them.
    tokenizer
        The model's; ``None`` where it has none.

    Attributes
    ----------
    prompts
        Of each output of the run, the index of its prompt. Those of a prompt are adjacent.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        params: Sequence[SamplingParams],
        tokenizer: ChatTokenizer | None,
    ) -> None:
        self._requests, self._params, self._tokenizer = requests, params, tokenizer
        self.prompts = [index for index, each in enumerate(params) for _ in range(each.n)]
        # Of prompts some of whose outputs have ended: these by their places in the run.
        self._ended: dict[int, dict[int, CompletionOutput]] = {}
        self._prompt_scores: dict[int, TokenScores] = {}

    def take(self, block: BlockResult) -> list[RequestOutput]:
        """Return the prompts whose last outputs are among those that have ended, in their order."""
        ready = []
        for done in block.finished:
            index = self.prompts[done.request]
            ended = self._ended.setdefault(index, {})
            ended[done.request] = self._completion(index, done)
            if done.request in block.prompt_scores:
                self._prompt_scores[index] = block.prompt_scores[done.request]
            if len(ended) == self._params[index].n:
                ready.append(index)
        return [self._output(index) for index in sorted(ready)]

    def _output(self, index: int) -> RequestOutput:
        request, ended = self._requests[index], self._ended.pop(index)
        outputs = [replace(ended[row], index=i) for i, row in enumerate(sorted(ended))]
        scores, prompt_logprobs = self._prompt_scores.pop(index, None), None
        wanted = self._params[index].prompt_logprobs
        if scores is not None and wanted is not None:
            later = request.prompt_token_ids[1:]
            found = candidates_of(later, scores.top(wanted), self._decode_token)
            prompt_logprobs = [None, *found]
        return RequestOutput(
            index=index,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=prompt_logprobs,
        )

    def _completion(self, index: int, done: Finished) -> CompletionOutput:
        params, ids = self._params[index], self._requests[index].prompt_token_ids
        text, logprobs = "", None
        if self._tokenizer is not None:
            keeps_stop = params.include_stop_str_in_output
            text = text_of(self._tokenizer, ids, done, keeps_stop=keeps_stop)
        if done.scores is not None and params.logprobs is not None:
            scores = done.scores.top(params.logprobs)
            logprobs = candidates_of(done.ids, scores, self._decode_token)
        return CompletionOutput(
            text=text,
            token_ids=list(done.ids),
            finish_reason=done.reason,
            logprobs=logprobs,
            stop_reason=done.stop,
        )

    def _decode_token(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode_token(token_id)

"""OpenAI's batch files, as vLLM reads them too: requests for chat or plain completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from executor.cli.prompts import check_text, parse_object
from executor.jobs.drafts import Draft
from executor.jobs.endings import text_of
from executor.jobs.journal import hash_of
from executor.jobs.limits import RequestLimits, identities_of
from executor.jobs.openai_params import read_params
from executor.jobs.params import Asked, ParamsMaker, RowParams
from executor.jobs.table import LineError, ParsedLine
from executor.run.finished import Finished
from executor.run.logprobs import Candidates, candidates_of
from executor.text.chat import ChatTemplate, check_messages
from executor.text.continuation import ChatTokenizer
from profiles.errors import InputError

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
LINE_KEYS = ("custom_id", "method", "url", "body")


class BatchLines:
    """Lines with ``custom_id``, ``method``, ``url`` and ``body``.

    Parameters
    ----------
    model
        The name of the model in answers to requests without one.
    created
        Seconds since 1970, for the answers.
    """

    name = "batch"
    keeps_order = False

    def __init__(
        self,
        limits: RequestLimits,
        maker: ParamsMaker,
        load_tokenizer: Callable[[], ChatTokenizer],
        load_template: Callable[[], ChatTemplate],
        *,
        model: str,
        created: int,
    ) -> None:
        self._limits, self._maker = limits, maker
        self.load_tokenizer, self._load_template = load_tokenizer, load_template
        self._model, self._created = model, created
        self._first_model: object = None
        self._names: set[int] = set()

    @staticmethod
    def is_one(line: dict[str, Any]) -> bool:
        """Whether an object has this form."""
        return "body" in line or "custom_id" in line

    @staticmethod
    def name_of(line: dict[str, Any]) -> object:
        """Return the name that no other line may have."""
        name = line.get("custom_id")
        return name if isinstance(name, str) else None

    def draft(self, line: dict[str, Any], where: str) -> Draft:
        """Return the prompts of a request, or raise ``InputError``."""
        name, is_chat, body = self._envelope(line, where)
        try:
            asked, count = read_params(body, is_chat=is_chat)
            params = self._params(asked)
            if is_chat:
                prompts: list[str | list[int]] = [self._chat_text(body, where)]
            else:
                prompts = self._plain_prompts(body.get("prompt"), where)
        except InputError as error:
            raise error if error.what.startswith(where) else error.inside(where) from None
        identities = identities_of(name, self._maker.seed(asked), count * len(prompts))
        return Draft(
            finish=partial(self._finish, where, name, prompts, params, identities),
            texts=[prompt for prompt in prompts if isinstance(prompt, str)],
            is_rendered=is_chat,
        )

    def _finish(
        self,
        where: str,
        name: bytes,
        prompts: Sequence[str | list[int]],
        params: RowParams,
        identities: Sequence[int],
        encoded: Sequence[list[int]],
    ) -> ParsedLine:
        texts = iter(encoded)
        found = [next(texts) if isinstance(prompt, str) else prompt for prompt in prompts]
        for ids in found:
            self._limits.check(ids, params.max_tokens, where)
        self._names.add(hash_of(name))
        return ParsedLine(prompts=found, params=params, identities=identities)

    def _envelope(self, line: dict[str, Any], where: str) -> tuple[bytes, bool, dict[str, Any]]:
        """Check what is around a request; returns its name, whether it is a chat, and itself."""
        name, body = line.get("custom_id"), line.get("body")
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: custom_id", got=repr(name), allowed="text")
        if line.get("method") != "POST":
            raise InputError(f"{where}: method", got=repr(line.get("method")), allowed='"POST"')
        if line.get("url") not in (CHAT, PLAIN):
            allowed = f"{CHAT} or {PLAIN}"
            raise InputError(f"{where}: url", got=repr(line.get("url")), allowed=allowed)
        if not isinstance(body, dict):
            raise InputError(f"{where}: body", got=repr(body), allowed="an object")
        key = name.encode(errors="backslashreplace")
        if hash_of(key) in self._names:
            raise InputError(
                f"{where}: custom_id", got=f"{name!r} again", allowed="a name of its own"
            )
        model = body.get("model", self._model)
        self._first_model = self._first_model or model
        if not isinstance(model, str) or model != self._first_model:
            allowed = f"{self._first_model!r}, the model of the lines before"
            raise InputError(f"{where}: model", got=repr(model), allowed=allowed)
        return key, line["url"] == CHAT, body

    def _params(self, asked: Asked) -> RowParams:
        settings = self._maker.api_defaults | dict(asked.settings)
        return self._maker.make(replace(asked, settings=settings))

    def _chat_text(self, body: Mapping[str, Any], where: str) -> str:
        options = body.get("chat_template_kwargs") or {}
        if not isinstance(options, dict):
            raise InputError("chat_template_kwargs", got=repr(options), allowed="an object")
        messages = [_flat(m) for m in check_messages(body.get("messages"), "messages")]
        special_tokens = self.load_tokenizer().special_tokens
        text = self._load_template().render(messages, special_tokens, options)
        check_text(text, where)
        return text

    def _plain_prompts(self, prompt: object, where: str) -> list[str | list[int]]:
        """Return the prompts of a plain completion: text or ids, or a list of either."""
        is_list = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        found: list[str | list[int]] = []
        for one in prompt if is_list else [prompt]:  # type: ignore[attr-defined]
            if not isinstance(one, list):
                check_text(one, where)
                self.load_tokenizer()
            found.append(one)
        return found

    def answer(
        self, line: bytes, prompts: Sequence[Sequence[int]], done: Sequence[Finished]
    ) -> str:
        """Return the answer to a request; ``prompts`` are those of each of ``done``."""
        asked = parse_object(line, "a line that was read before")
        body, is_chat = asked["body"], asked["url"] == CHAT
        params, count = read_params(body, is_chat=is_chat)
        choices = [
            self._choice(index, ids, each, params, is_chat=is_chat)
            for index, (ids, each) in enumerate(zip(prompts, done, strict=True))
        ]
        num_prompt = sum(len(ids) for ids in prompts[::count])
        num_output = sum(each.num_generated for each in done)
        key = f"{hash_of(asked['custom_id'].encode(errors='backslashreplace')):016x}"
        answer = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._created,
            "model": body.get("model", self._model),
            "choices": choices,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            },
        }
        response = {"status_code": 200, "request_id": f"req_{key}", "body": answer}
        told = {
            "id": f"batch_req_{key}",
            "custom_id": asked["custom_id"],
            "response": response,
            "error": None,
        }
        return json.dumps(told, ensure_ascii=False)

    def refusal(self, error: LineError) -> str:
        """Return the line of the error file."""
        told = {
            "id": f"batch_req_line_{error.number}",
            "custom_id": error.custom_id,
            "response": None,
            "error": {"code": "invalid_request", "message": error.message, "line": error.number},
        }
        return json.dumps(told, ensure_ascii=False)

    def _choice(
        self, index: int, ids: Sequence[int], done: Finished, params: Asked, *, is_chat: bool
    ) -> dict[str, Any]:
        tokenizer = self.load_tokenizer()
        text = text_of(tokenizer, ids, done, keeps_stop=params.keeps_stop)
        logprobs = None
        if params.logprobs is not None and done.scores is not None:
            decode = tokenizer.decode_token
            found = candidates_of(done.ids, done.scores.top(params.logprobs), decode)
            told = list(_told(found, params.logprobs))
            logprobs = _chat_logprobs(told) if is_chat else _plain_logprobs(told)
        choice: dict[str, Any] = {"index": index}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice | {"logprobs": logprobs, "finish_reason": done.reason}


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its parts of text as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InputError("messages", got=f"a part {part!r}", allowed="parts of text")
    return message | {"content": "\n".join(part["text"] for part in content)}


# A token and its logarithm, and the likeliest in its place.
Told = tuple[tuple[str, float], list[tuple[str, float]]]


def _told(found: Sequence[Candidates], num_top: int) -> Iterator[Told]:
    for candidates in found:
        listed = list(candidates.values())
        ranked = sorted((c for c in listed if c.rank is not None), key=lambda c: c.rank or 0)
        first = listed[0]
        yield (
            (first.decoded_token or "", first.logprob),
            [(each.decoded_token or "", each.logprob) for each in ranked[:num_top]],
        )


def _chat_logprobs(told: Sequence[Told]) -> dict[str, Any]:
    content = [
        _chat_entry(*token) | {"top_logprobs": [_chat_entry(*each) for each in top]}
        for token, top in told
    ]
    return {"content": content, "refusal": None}


def _chat_entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _plain_logprobs(told: Sequence[Told]) -> dict[str, Any]:
    offsets, end = [], 0
    for (text, _), _ in told:
        offsets.append(end)
        end += len(text)
    return {
        "tokens": [text for (text, _), _ in told],
        "token_logprobs": [logprob for (_, logprob), _ in told],
        "top_logprobs": [dict([token, *top]) for token, top in told],
        "text_offset": offsets,
    }

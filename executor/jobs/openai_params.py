"""The parameters of a request to OpenAI's API, with those that vLLM adds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from executor.jobs.params import Asked
from profiles.errors import InputError

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 128, 20, 64
# Settings of a line that are settings of ours.
SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "max_tokens",
)
# They change no token here.
WITHOUT_EFFECT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "priority",
    }
)
KNOWN = WITHOUT_EFFECT.union(
    SETTINGS, ("n", "stop", "stop_token_ids", "include_stop_str_in_output", "logprobs")
)
CHAT_KEYS = KNOWN | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
PLAIN_KEYS = KNOWN | {"prompt"}
# They are not known here, and may be given with a value that changes nothing.
IDLE: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "stream": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


def read_params(body: Mapping[str, Any], *, is_chat: bool) -> tuple[Asked, int]:
    """Return what a request asks of its tokens, and how many outputs it wants of each prompt.

    Raises
    ------
    InputError
        For a parameter that is not known here, or a value that it cannot have.
    """
    given = {key: value for key, value in body.items() if value is not None}
    known = CHAT_KEYS if is_chat else PLAIN_KEYS
    for key, value in given.items():
        if key in known or (key in IDLE and value in IDLE[key]):
            continue
        got = f"{value!r}"
        allowed = f"{IDLE[key][0]!r}, or no {key}" if key in IDLE else "parameters of the reference"
        raise InputError(key, got=got, allowed=allowed)
    if "max_completion_tokens" in given:
        given["max_tokens"] = given["max_completion_tokens"]
    settings = {key: given[key] for key in SETTINGS if key in given}
    if "top_k" in settings and settings["top_k"] == -1:
        settings["top_k"] = 0
    for key, value in settings.items():
        check_number(key, value)
    _checked(settings, "seed", 0, lambda seed: type(seed) is int, "a whole number")
    asked = Asked(
        settings=settings,
        stops=_listed(given, "stop", _is_stop, "text or a list of text, not empty"),
        stop_ids=_listed(given, "stop_token_ids", _is_id, "a list of token ids"),
        keeps_stop=_checked(given, "include_stop_str_in_output", False, _is_bool, "true or false"),
        logprobs=_logprobs(given, is_chat=is_chat),
    )
    count = _checked(given, "n", 1, lambda n: _is_count(n, 1, MOST_CHOICES), f"1 to {MOST_CHOICES}")
    return asked, int(count)


def check_number(key: str, value: object) -> None:
    """Refuse a number that is larger than a float; ``SamplingParams`` refuses other types."""
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise InputError(key, got=value, allowed="a finite number")


def _logprobs(given: Mapping[str, Any], *, is_chat: bool) -> int | None:
    allowed = f"0 to {MOST_LOGPROBS}"
    if not is_chat:
        value = _checked(given, "logprobs", None, _is_top, allowed)
        return None if value is None else int(value)
    wanted = _checked(given, "logprobs", False, _is_bool, "true or false")
    top = _checked(given, "top_logprobs", None, _is_top, allowed)
    if top is not None and not wanted:
        raise InputError("top_logprobs", got=f"{top} without logprobs", allowed='"logprobs": true')
    return int(top or 0) if wanted else None


def _checked(
    given: Mapping[str, Any], key: str, default: Any, is_valid: Callable[[Any], bool], allowed: str
) -> Any:
    if key not in given:
        return default
    if not is_valid(given[key]):
        raise InputError(key, got=repr(given[key]), allowed=allowed)
    return given[key]


def _listed(
    given: Mapping[str, Any], key: str, is_valid: Callable[[Any], bool], allowed: str
) -> tuple[Any, ...]:
    value = given.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(map(is_valid, values)) or len(values) > MOST_STOPS:
        raise InputError(key, got=repr(value), allowed=allowed)
    return tuple(values)


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(value: object) -> bool:
    return _is_count(value, 0, 2**32 - 1)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_top(value: object) -> bool:
    return _is_count(value, 0, MOST_LOGPROBS)


def _is_count(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most

"""Checks of a line, a text and token ids, before any work."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from profiles.errors import InputError
from profiles.files import refuse_constant

PROMPT_KEYS = ("prompt", "prompt_ids")
LINE_FORM = 'an object with "prompt" (text) or "prompt_ids" (whole numbers)'
# Longer ones are no token ids, and Python reads no number of any length.
MOST_DIGITS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """What a model and a workload allow of a prompt."""

    vocab_size: int
    max_positions: int
    gen_len: int


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """Return a line's JSON object, or refuse it; ``where`` names it."""
    try:
        parsed = json.loads(
            line.decode().strip(" \t\r\n"),
            parse_constant=refuse_constant,
            parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else math.inf,
            object_pairs_hook=_refuse_two_prompts,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(where, got=f"text that is not JSON ({error})", allowed=LINE_FORM) from None
    except ValueError as error:
        raise InputError(where, got=error, allowed=LINE_FORM) from None
    if not isinstance(parsed, dict):
        raise InputError(where, got=f"a JSON {type(parsed).__name__}", allowed=LINE_FORM)
    return parsed


def check_text(text: object, where: str) -> None:
    """Refuse a prompt that is no text, or none that can be encoded."""
    if not (isinstance(text, str) and text):
        got = "an empty prompt" if text == "" else "a prompt that is not text"
        raise InputError(where, got=got, allowed="text of at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            where, got="half of a surrogate pair in a prompt", allowed="whole characters"
        ) from None


def check_ids(ids: object, limits: PromptLimits, where: str) -> None:
    """Refuse token ids that the model cannot continue."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise InputError(where, got="token ids of another kind", allowed="a list of whole numbers")
    if not ids:
        raise InputError(where, got="an empty prompt", allowed="at least one token")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        outside = [i for i in ids if not 0 <= i < limits.vocab_size]
        raise InputError(
            where,
            got=f"token id {outside[0]}",
            allowed=f"0 to {limits.vocab_size - 1}, the model's vocabulary",
        )
    if len(ids) + limits.gen_len > limits.max_positions:
        raise InputError(
            where,
            got=f"{len(ids)} tokens + {limits.gen_len} generated",
            allowed=f"{limits.max_positions} positions",
            hint="a shorter prompt, or fewer tokens to generate",
        )


def _refuse_two_prompts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        for key in PROMPT_KEYS:
            if counts[key] > 1:
                raise ValueError(f"{key} twice")
    return found

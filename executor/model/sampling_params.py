"""What a user asks of the tokens: how many, and how each is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from executor.model.generation_config import DRAW_DEFAULTS
from profiles.errors import InputError

# Settings that replace those of a checkpoint.
CHOICES = (*DRAW_DEFAULTS, "repetition_penalty")
# What the annotations of the fields begin with.
_TYPES: Mapping[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "True or False"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How many tokens to generate, and how each is chosen.

    ``None`` takes the setting of the model's ``generation_config.json``, else the default of
    transformers.

    Parameters
    ----------
    max_tokens
        Tokens to generate for each prompt. ``None`` takes the policy's number, or 32 without a
        policy.
    temperature
        0 takes the likeliest token. Above 0, the logits are divided by it.
    top_k
        Draw from this many likeliest tokens. 0 keeps all.
    top_p
        Draw from the fewest likeliest tokens whose probabilities sum to this.
    min_p
        Draw from tokens at least this share as likely as the likeliest.
    repetition_penalty
        Divides the logits of tokens in the prompt and in the output so far. 1 changes nothing.
    seed
        Of the draws. A draw depends on the seed, the prompt and the position. Equal prompts of a
        call are drawn differently.
    ignore_eos
        Generate ``max_tokens`` tokens even after an end-of-sequence token.
    ignore_generation_config
        Take only the end-of-sequence tokens from ``generation_config.json``.
    logprobs, prompt_logprobs
        Return the log-probability of each generated token, and of each prompt token after the
        first, with this many of the likeliest alternatives. ``None`` computes none.

    n
        Outputs of each prompt, each drawn for itself.
    stop
        A string, or several, that end an output. Its text ends before the first of them.
    stop_token_ids
        Tokens that end an output beside the model's own, and are not part of it.
    include_stop_str_in_output
        Whether the text ends with the stop string rather than before it.

    Raises
    ------
    InputError
        For a value of the wrong type. Values out of range are refused before a run.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    ignore_generation_config: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _LISTS or (value is None and field.default is None):
                continue
            kind, allowed = _TYPES[str(field.type).partition(" ")[0]]
            # A truth value is a whole number to Python.
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise InputError(field.name, got=repr(value), allowed=allowed)
        for name, least in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0), ("n", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(name, got=value, allowed=f"{least} or more")
        for name, (is_valid, allowed) in _LISTS.items():
            # Tuples, so that equal parameters can be told to be equal.
            object.__setattr__(self, name, _listed(name, getattr(self, name), is_valid, allowed))

    @property
    def choices(self) -> Mapping[str, Any]:
        """The settings that replace those of the checkpoint, by name."""
        values = {name: getattr(self, name) for name in CHOICES}
        return {name: value for name, value in values.items() if value is not None}


def _listed(
    name: str, value: object, is_valid: Callable[[object], bool], allowed: str
) -> tuple[Any, ...] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(map(is_valid, values)):
        raise InputError(name, got=repr(value), allowed=allowed)
    return tuple(values)


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


# Settings that are lists: what each entry must be.
_LISTS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "stop": (_is_stop, "text or a list of text, not empty"),
    "stop_token_ids": (_is_id, "a list of token ids"),
}

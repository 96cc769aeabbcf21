"""What a user asks of the tokens: how many, and how each is chosen."""

from __future__ import annotations

from collections.abc import Mapping
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            kind, allowed = _TYPES[str(field.type).partition(" ")[0]]
            # A truth value is a whole number to Python.
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise InputError(field.name, got=repr(value), allowed=allowed)
        for name, least in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(name, got=value, allowed=f"{least} or more")

    @property
    def choices(self) -> Mapping[str, Any]:
        """The settings that replace those of the checkpoint, by name."""
        values = {name: getattr(self, name) for name in CHOICES}
        return {name: value for name, value in values.items() if value is not None}

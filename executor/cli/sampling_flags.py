"""The flags that say how tokens are chosen, and what they leave to the checkpoint."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from executor.model.generation_config import (
    DRAW_DEFAULTS,
    PROCESSOR_KEYS,
    GenerationConfig,
    show,
)
from executor.model.logits_processors import LogitsProcessors
from executor.model.sampling import Sampler
from executor.model.sampling_params import CHOICES, SamplingParams
from profiles.command import Parser
from profiles.errors import InputError, clipped

logger = logging.getLogger(__name__)


def add_sampling_flags(parser: Parser) -> None:
    """Add the flags; by default, all but the seed are as the checkpoint says."""
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        help="0 takes the most likely token (default: the model's, else 0)",
    )
    add(
        "--top-k",
        type=int,
        help="draw from this many most likely tokens; 0: all (default: the model's, else 50)",
    )
    add(
        "--top-p",
        type=float,
        help="draw from the top tokens of this total probability (default: the model's, else 1)",
    )
    add(
        "--min-p",
        type=float,
        help="drop tokens below this share of the top probability (default: the model's, else 0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        help="penalty for tokens that occurred before; 1: none (default: the model's, else 1)",
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    add(
        "--ignore-generation-config",
        action="store_true",
        help="read only the end tokens from the model's generation_config.json",
    )


def read_sampling_params(flags: argparse.Namespace) -> SamplingParams:
    """Return what the flags ask for."""
    return SamplingParams(
        **{name: getattr(flags, name) for name in CHOICES},
        seed=flags.seed,
        ignore_eos=flags.ignore_eos,
        ignore_generation_config=flags.ignore_generation_config,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and who said so.

    Parameters
    ----------
    sampler
        What was made of flags, file and defaults.
    path
        The file that was read; ``None`` where there is none.
    from_flags, from_file, by_default
        The settings that count, by name.
    idle
        Settings of the file for draws, where nothing is drawn.
    not_followed
        Settings of the file that would change the tokens, and that this executor does not know.
    eos_ids
        The ids that end a sequence.
    """

    sampler: Sampler
    path: Path | None
    from_flags: Mapping[str, Any]
    from_file: Mapping[str, Any]
    by_default: Mapping[str, Any]
    idle: Mapping[str, Any]
    not_followed: Mapping[str, Any]
    eos_ids: frozenset[int]

    def describe(self) -> str:
        """Say in one line how tokens are chosen and where each setting comes from."""
        parts = ["tokens: the likeliest" if self.sampler.is_greedy else "tokens: drawn"]
        if self.from_flags:
            parts.append(f"{_join(self.from_flags)} from the flags")
        if self.from_file:
            parts.append(f"{_join(self.from_file)} from {self.path}")
        if self.by_default:
            parts.append(f"{_join(self.by_default)} by default")
        if self.idle:
            parts.append(f"{_join(self.idle)} there would need do_sample true")
        return "; ".join(parts)

    def warn(self) -> None:
        """Tell in one line what is not followed."""
        if self.not_followed:
            logger.warning(
                "%s: not followed here: %s; --ignore-generation-config ignores the file",
                self.path,
                _join(self.not_followed),
            )

    def as_json(self) -> dict[str, Any]:
        """Return every setting under its name."""
        return {
            "generation_config": None if self.path is None else str(self.path),
            "do_sample": not self.sampler.is_greedy,
            "seed": self.sampler.seed,
            "eos_token_id": sorted(self.eos_ids),
            **self.by_default,
            **self.from_file,
            **self.from_flags,
            "not_followed": dict(self.not_followed),
        }


def choose_sampling(
    params: SamplingParams, config: GenerationConfig, *, vocab_size: int, has_length: bool
) -> Sampling:
    """Put a user's settings, a checkpoint's and the defaults together.

    ``has_length`` says whether the user has set the number of tokens to generate.

    Raises
    ------
    InputError
        With the flag, or the file and its key, on a value that is out of place.
    """
    given = params.choices
    told = _left_to(config, given, ignores=params.ignore_generation_config)
    draws = given["temperature"] != 0 if "temperature" in given else told.flag("do_sample")
    limits = {name: value for name, value in given.items() if name in DRAW_DEFAULTS}
    if draws:
        for name in DRAW_DEFAULTS:
            read = told.count if name == "top_k" else told.number
            limits.setdefault(name, read(name, DRAW_DEFAULTS[name]))
        if limits["temperature"] == 0:
            raise InputError(
                f"temperature in {told.path}",
                got="0 with do_sample true",
                allowed="above 0",
                hint="--temperature 0 to take the likeliest tokens",
            )
    processors = told.processors(vocab_size)
    if "repetition_penalty" in given:
        processors = replace(processors, repetition_penalty=given["repetition_penalty"])
    try:
        sampler = Sampler(**limits, seed=params.seed, processors=processors)
    except InputError as error:
        key = error.what.replace("-", "_")
        if key not in told.values:
            raise
        raise InputError(f"{key} in {told.path}", got=error.got, allowed=error.allowed) from None
    idle = {}
    if not draws and "temperature" not in given:
        idle = {key: told.values[key] for key in DRAW_DEFAULTS if key in told.values}
    return Sampling(
        sampler=sampler,
        path=told.path,
        from_flags=given,
        from_file=_that_count(told, sampler, ignores_eos=params.ignore_eos),
        by_default={
            name: DRAW_DEFAULTS[name]
            for name in ("temperature", "top_k")
            if draws and name not in given and name not in told.values
        },
        idle=idle,
        not_followed=told.not_followed(draws=draws, has_length=has_length),
        eos_ids=frozenset() if params.ignore_eos else told.eos_ids,
    )


def _left_to(
    config: GenerationConfig, given: Mapping[str, Any], *, ignores: bool
) -> GenerationConfig:
    """Return a config without what flags say in its place, whatever it holds there."""
    dropped = {*given, *(("do_sample",) if "temperature" in given else ())}
    return replace(
        config,
        values={
            key: value
            for key, value in config.values.items()
            if key not in dropped and (key == "eos_token_id" or not ignores)
        },
    )


def _that_count(config: GenerationConfig, sampler: Sampler, *, ignores_eos: bool) -> dict[str, Any]:
    """Return the settings of the file that change what is chosen."""
    idle = LogitsProcessors()
    keys = [key for key in PROCESSOR_KEYS if getattr(sampler.processors, key) != getattr(idle, key)]
    if not sampler.is_greedy:
        keys = ["do_sample", *DRAW_DEFAULTS, *keys]
    if not ignores_eos:
        keys.append("eos_token_id")
    return {key: config.values[key] for key in keys if key in config.values}


def _join(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {clipped(show(value))}" for name, value in settings.items())

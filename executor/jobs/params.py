"""What a line of a job asks of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from executor.cli.sampling_flags import Sampling, choose_sampling
from executor.model.generation_config import GenerationConfig
from executor.model.sampling import Sampler
from executor.model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParams:
    """How the tokens of a request are chosen, and where they end. Equal ones are one object.

    Parameters
    ----------
    max_tokens
        Tokens at most.
    sampler
        Chooses them. Its seed is 0: that of a request is part of its identity.
    end_ids
        Tokens that end it, and are not part of the output.
    stops
        Strings that end it.
    keeps_stop
        Whether the output ends with the stop string rather than before it.
    logprobs
        Alternatives of each token that are told; ``None`` for no log-probabilities at all.
    """

    max_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    end_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    keeps_stop: bool = False
    logprobs: int | None = None

    @property
    def may_end_early(self) -> bool:
        """Whether anything but the limit ends it."""
        return bool(self.end_ids or self.stops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The settings that a line has, by the names of ``SamplingParams``, and its stops."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    keeps_stop: bool = False
    logprobs: int | None = None


class ParamsMaker:
    """Puts the settings of lines, of flags and of the checkpoint together.

    Parameters
    ----------
    flags
        The settings of the command, for what a line leaves open.
    config
        The checkpoint's ``generation_config.json``.
    vocab_size
        Tokens of the model.
    gen_len
        Tokens to generate where a line does not say.
    """

    def __init__(
        self, flags: SamplingParams, config: GenerationConfig, *, vocab_size: int, gen_len: int
    ) -> None:
        self._flags, self._config = flags, config
        self._vocab_size, self._gen_len = vocab_size, gen_len
        self._made: dict[tuple[Any, ...], RowParams] = {}
        told = {**config.values, **flags.choices}
        # Settings of a line of OpenAI's API that has none.
        self.api_defaults = {
            name: told.get(name, value) for name, value in (("temperature", 1.0), ("top_k", 0))
        }

    def seed(self, asked: Asked) -> int:
        """Return the seed of a line's draws."""
        return int(asked.settings.get("seed", self._flags.seed))

    def make(self, asked: Asked) -> RowParams:
        """Return the parameters of a line; raises ``InputError`` for a value out of range."""
        settings = {key: value for key, value in asked.settings.items() if key != "seed"}
        others = asked.stops, asked.stop_ids, asked.keeps_stop, asked.logprobs
        key = (*sorted(settings.items()), *others)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(asked, settings)
        return found

    def _make(self, asked: Asked, settings: Mapping[str, Any]) -> RowParams:
        params = replace(self._flags, **settings)
        if settings.get("temperature") == 0:
            # As in the API, the likeliest token needs no other limit.
            params = replace(params, top_k=None, top_p=None, min_p=None)
        chosen = choose_sampling(params, self._config, vocab_size=self._vocab_size, has_length=True)
        asked_for = replace(
            params,
            stop=asked.stops,
            stop_token_ids=asked.stop_ids,
            include_stop_str_in_output=asked.keeps_stop,
            logprobs=asked.logprobs,
        )
        return row_params(asked_for, chosen, max_tokens=params.max_tokens or self._gen_len)


def row_params(params: SamplingParams, chosen: Sampling, *, max_tokens: int) -> RowParams:
    """Return the parameters of outputs of at most ``max_tokens``; ``chosen`` was made of the same
    settings."""
    return RowParams(
        max_tokens=max_tokens,
        sampler=replace(chosen.sampler, seed=0),
        end_ids=chosen.eos_ids.union(params.stop_token_ids or ()),
        stops=tuple(params.stop or ()),
        keeps_stop=params.include_stop_str_in_output,
        logprobs=params.logprobs,
    )

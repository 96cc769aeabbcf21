"""A checkpoint's ``generation_config.json``, read the way transformers reads it.

Flags come first, then the file, then the defaults of transformers: greedy decoding, and top-k 50
where tokens are sampled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.model.logits_processors import LogitsProcessors
from profiles.errors import InputError
from profiles.files import read_json

# Parameters of sampling, with their values where neither a flag nor the file has one.
DRAW_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# Other keys that are supported.
PROCESSOR_KEYS = (
    "sequence_bias",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
)
FOLLOWED = ("do_sample", *DRAW_DEFAULTS, *PROCESSOR_KEYS, "eos_token_id")
# Keys that would change the tokens and are not supported, with values that have no effect.
NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": ([],),
    "max_time": (),
    "cache_implementation": ("dynamic", "hybrid"),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "assistant_ensemble_weight": (),
}
# Keys of NOT_FOLLOWED that have an effect only where tokens are sampled.
DRAW_ONLY = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# The number of tokens is part of the plan: it comes from --gen-len or the policy.
LENGTHS = ("max_length", "max_new_tokens")
# Keys without an effect on the tokens of a decoder-only model: returned values, speed, memory, and
# parameters of beams or of the keys above. Assisted generation keeps the distribution. Logits that
# are not finite end a run, whatever ``remove_invalid_values`` says.
HARMLESS = frozenset(
    {
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
        "renormalize_logits",
        "remove_invalid_values",
        "use_cache",
        "cache_config",
        "max_cache_len",
        "low_memory",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "speculation_type",
        "use_mtp",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "prefill_chunk_size",
        "transformers_version",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """The settings of a checkpoint that are not null, and their file."""

    path: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> GenerationConfig:
        """Read ``generation_config.json``, or ``config.json`` in its absence.

        Where both exist, transformers ignores ``config.json`` here, even its end tokens.
        """
        for name in ("generation_config.json", "config.json"):
            path = Path(folder) / name
            if path.exists():
                found = read_json(path, "generation config")
                inner = found.get("text_config")
                if name == "config.json" and isinstance(inner, Mapping):
                    # As in transformers, the decoder's settings fill in.
                    found = {**inner, **{k: v for k, v in found.items() if v is not None}}
                return cls(path=path, values={k: v for k, v in found.items() if v is not None})
        return cls()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a sequence."""
        return frozenset(self._ids("eos_token_id", allows_one=True))

    def flag(self, key: str) -> bool:
        """Return a boolean, false where it is absent."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number, ``default`` where it is absent."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, "a number")
        # JSON permits 1e400, and integers with hundreds of digits.
        if not abs(value) <= sys.float_info.max:
            raise self._error(key, "a finite number")
        return value

    def count(self, key: str, default: int = 0) -> int:
        """Return a whole number of 0 or more, ``default`` where it is absent."""
        value = self.number(key, default)
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise self._error(key, "a whole number, 0 or more")
        return value

    def processors(self, vocab_size: int) -> LogitsProcessors:
        """Return the processors of logits.

        Token ids outside the vocabulary are dropped, but refused in biases and bad words.
        """
        ends = sorted(i for i in self.eos_ids if 0 <= i < vocab_size)
        words = self._list("bad_words_ids", lambda word: _is_run(word, vocab_size), "runs of ids")
        biases = self._list(
            "sequence_bias",
            lambda pair: (
                isinstance(pair, list)
                and len(pair) == 2
                and _is_run(pair[0], vocab_size)
                and type(pair[1]) in (int, float)
                and abs(pair[1]) <= sys.float_info.max
            ),
            "pairs of a run of ids and a number",
        )
        known = [
            [i for i in self._ids(key) if 0 <= i < vocab_size]
            for key in ("suppress_tokens", "begin_suppress_tokens")
        ]
        # As in transformers, the minimum of new tokens replaces that of all.
        min_length = 0 if "min_new_tokens" in self.values else self.count("min_length")
        return LogitsProcessors(
            # The last of two biases for one run counts.
            sequence_bias=tuple({tuple(ids): float(bias) for ids, bias in biases}.items()),
            repetition_penalty=float(self.number("repetition_penalty", 1.0)),
            no_repeat_ngram_size=self.count("no_repeat_ngram_size"),
            # An end token is never a bad word.
            bad_words_ids=tuple(tuple(ids) for ids in words if ids not in [[i] for i in ends]),
            min_length=min_length if ends else 0,
            min_new_tokens=self.count("min_new_tokens") if ends else 0,
            suppress_tokens=tuple(known[0]),
            begin_suppress_tokens=tuple(known[1]),
            eos_token_id=tuple(ends),
        )

    def not_followed(self, *, draws: bool, has_length: bool) -> dict[str, Any]:
        """Return the settings that would change the tokens and are not supported.

        Parameters
        ----------
        draws
            Whether tokens are sampled.
        has_length
            Whether the user has set the number of tokens to generate.
        """
        ignored = HARMLESS.union(FOLLOWED, () if draws else DRAW_ONLY)
        if self.path is not None and self.path.name == "config.json":
            # All other keys of config.json belong to the model.
            candidates = {*NOT_FOLLOWED, *LENGTHS} - ignored
        else:
            candidates = {key for key in self.values if not key.startswith("_")} - ignored
        if has_length:
            candidates -= set(LENGTHS)
        return {
            key: value
            for key, value in self.values.items()
            if key in candidates and value not in NOT_FOLLOWED.get(key, ())
        }

    def _list(self, key: str, is_valid: Callable[[Any], bool], what: str) -> list[Any]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(is_valid(item) for item in value):
            raise self._error(key, f"a list of {what}, within the vocabulary")
        return value

    def _ids(self, key: str, *, allows_one: bool = False) -> list[int]:
        value = self.values.get(key, [])
        ids = [value] if allows_one and not isinstance(value, list) else value
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**63 for i in ids):
            raise self._error(key, "an id or a list of ids" if allows_one else "a list of ids")
        return ids

    def _error(self, key: str, allowed: str) -> InputError:
        return InputError(f"{key} in {self.path}", got=show(self.values[key]), allowed=allowed)


def _is_run(ids: Any, vocab_size: int) -> bool:
    return (
        isinstance(ids, list)
        and len(ids) > 0
        and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    )


def show(value: object) -> str:
    """Return a value as text, with booleans as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)

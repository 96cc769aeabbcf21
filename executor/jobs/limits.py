"""What a model and a policy allow of a request, and what its draws depend on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from executor.cli.prompts import PromptLimits, check_ids
from profiles.errors import InputError
from profiles.start import called


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Tokens of a request.

    Parameters
    ----------
    vocab_size, max_positions
        Of the model.
    prompt_len, gen_len
        Those that a policy was made for; ``None`` where it will be searched for.
    """

    vocab_size: int
    max_positions: int
    prompt_len: int | None = None
    gen_len: int | None = None

    def check(self, ids: object, max_tokens: int, where: str) -> None:
        """Refuse what cannot be run, whatever ``ids`` are; ``where`` names the line."""
        limits = PromptLimits(
            vocab_size=self.vocab_size, max_positions=self.max_positions, gen_len=max_tokens
        )
        check_ids(ids, limits, where)
        assert isinstance(ids, list)
        for flag, name, got, most in (
            ("--prompt-len", "tokens", len(ids), self.prompt_len),
            ("--gen-len", "tokens to generate", max_tokens, self.gen_len),
        ):
            if most is not None and got > most:
                raise InputError(
                    where,
                    got=f"{got} {name}",
                    allowed=f"{most}, for which the policy was made",
                    hint=f"{called('costmodel.search')} {flag} {got}",
                )


def identities_of(name: bytes, seed: int, count: int) -> list[int]:
    """Return 64 bits for each output of a line, on which its draws depend, and on no other line.

    ``name`` tells the line from all others.
    """
    return [
        xxhash.xxh3_64(f"{seed} {choice} ".encode() + name).intdigest() for choice in range(count)
    ]


class PromptNames:
    """Identities of prompts without a name, by their tokens; equal ones have a number beside."""

    def __init__(self) -> None:
        # Of each prompt, how many equal ones came before.
        self._seen: dict[int, int] = {}

    def identities(self, ids: Sequence[int], seed: int, count: int) -> list[int]:
        """Return the identities of so many outputs of the next prompt."""
        key = xxhash.xxh3_64(bytes_of(ids)).intdigest()
        number = self._seen[key] = self._seen.get(key, -1) + 1
        return identities_of(bytes_of([*ids, number]), seed, count)


def bytes_of(ids: Sequence[int]) -> bytes:
    """Return token ids as bytes."""
    return array("I", ids).tobytes()

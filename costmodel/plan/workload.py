"""The work: how many prompts, how long, and how many tokens to generate for each."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts of ``prompt_len`` tokens, ``gen_len`` tokens generated for each.

    Parameters
    ----------
    prompt_len
        Tokens of the longest prompt; shorter ones are padded to it.
    gen_len
        Tokens generated for each prompt. Prefill makes the first, ``gen_len - 1`` decode steps make
        the rest.
    num_prompts
        Number of prompts; ``None`` means enough to fill a block of any size.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_len", "gen_len", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"workload.{name}", got=value, allowed="1 or more")

    @property
    def context_len(self) -> int:
        """Slots of the KV cache that one sequence uses; its last token needs no slot."""
        return self.prompt_len + self.gen_len - 1

"""The work: how many prompts, how long, and how many tokens to generate for each."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.expert_use import MOST_SKEW
from costmodel.plan.lengths import Sketch
from profiles.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts of ``prompt_len`` tokens, ``gen_len`` tokens generated for each, or fewer.

    Parameters
    ----------
    prompt_len
        Tokens of the longest prompt; shorter ones are padded to it.
    gen_len
        Tokens generated for each prompt. Prefill makes the first, ``gen_len - 1`` decode steps make
        the rest.
    num_prompts
        Number of prompts; ``None`` means enough to fill a block of any size.
    logprobs, prompt_logprobs
        Whether to compute the log-probability of each generated token, and of each prompt token
        after the first, and how many alternatives to return with it. ``None`` computes none.
    lengths
        The length of every prompt and answer, where they differ; ``None``: all are as long as the
        longest. ``prompt_len`` is then the longest prompt, and ``gen_len`` the largest limit.
    expert_skew
        The exponent of Zipf's law that describes how often routers choose each expert. With 0, they
        choose all alike, which needs the most loads.
    """

    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    lengths: Sketch | None = None
    expert_skew: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "gen_len", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"workload.{name}", got=value, allowed="1 or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"workload.{name}", got=value, allowed="0 or more")
        if not 0 <= self.expert_skew <= MOST_SKEW:
            raise InputError(
                "workload.expert_skew", got=self.expert_skew, allowed=f"0 to {MOST_SKEW:g}"
            )
        if self.lengths is not None:
            self._check_lengths(self.lengths)

    def _check_lengths(self, lengths: Sketch) -> None:
        """Refuse lengths of another job."""
        longest = {
            "prompt_len": max(lengths.prompts),
            "gen_len": max(lengths.limits),
            "num_prompts": lengths.num_prompts,
        }
        for name, value in longest.items():
            if getattr(self, name) != value:
                raise InputError(
                    f"workload.{name}",
                    got=getattr(self, name),
                    allowed=f"{value}, as workload.lengths has it",
                )

    def sketch(self, num_prompts: int) -> Sketch:
        """Return the lengths of all prompts and answers; where none are given, of ``num_prompts``
        that are as long as the longest, unless the workload has another number."""
        return self.lengths or Sketch(
            prompts=(self.prompt_len,),
            outputs=(self.gen_len,),
            limits=(self.gen_len,),
            weights=(self.num_prompts or num_prompts,),
        )

    @property
    def mean_output(self) -> float:
        """Tokens that are generated for a prompt in the mean, as expected."""
        if self.lengths is None:
            return float(self.gen_len)
        pairs = zip(self.lengths.outputs, self.lengths.weights, strict=True)
        return sum(output * weight for output, weight in pairs) / self.lengths.num_prompts

    @property
    def context_len(self) -> int:
        """Slots of the KV cache that one sequence uses; its last token needs no slot."""
        return self.kept_prompt_len + self.gen_len - 1

    @property
    def num_positions(self) -> int:
        """Positions of the longest sequence; its last token goes through no layer."""
        if self.lengths is not None:
            pairs = zip(self.lengths.prompts, self.lengths.limits, strict=True)
            return max(prompt + limit for prompt, limit in pairs) - 1
        return self.prompt_len + self.gen_len - 1

    @property
    def kept_prompt_len(self) -> int:
        """Slots that the prompt uses: with one token to generate, no pass reads the cache."""
        return self.prompt_len if self.gen_len > 1 else 0

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of prompt tokens are computed."""
        return self.prompt_logprobs is not None

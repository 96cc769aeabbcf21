"""Choosing the next token: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from profiles.errors import InputError, RunError

MAX_SEED = 2**64 - 1
# Logits that are drawn from at once; each costs up to 36 bytes for as long.
DRAWN_LOGITS = 2**18


class Chooser(Protocol):
    """Whoever says how each sequence goes on."""

    def sample(
        self, logits: torch.Tensor, sequence_ids: Sequence[int] | torch.Tensor, step: int
    ) -> torch.Tensor:
        """Return one token for each sequence (see ``Sampler.sample``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How tokens are chosen.

    Parameters
    ----------
    temperature
        Zero takes the likeliest token; above zero the logits are divided by it.
    top_k
        Keep only this many likeliest tokens; zero keeps all.
    top_p
        Keep the fewest likeliest tokens whose probabilities sum to this; 1 keeps all.
    seed
        The draw for a sequence depends on the seed, the sequence's index and the step, and on
        nothing else: neither its batch nor any placement changes it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError("temperature", got=self.temperature, allowed="0 (greedy) or above")
        if self.top_k < 0:
            raise InputError("top-k", got=self.top_k, allowed="1 or more, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise InputError("top-p", got=self.top_p, allowed="above 0, at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError("seed", got=self.seed, allowed=f"0 to {MAX_SEED}")
        if self.is_greedy and (self.top_k or self.top_p < 1):
            raise InputError(
                "top-k and top-p", got="a limit with temperature 0, which takes the likeliest",
                allowed="a limit with a temperature above 0",
            )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at all."""
        return self.temperature == 0

    def sample(
        self, logits: torch.Tensor, sequence_ids: Sequence[int] | torch.Tensor, step: int
    ) -> torch.Tensor:
        """Choose one token per sequence.

        Parameters
        ----------
        logits
            float32 [batch, vocabulary], on any device.
        sequence_ids
            Index of each sequence in the whole run, [batch].
        step
            Which generated token this is, from zero.

        Returns
        -------
        torch.Tensor
            int64 [batch], on the device of the logits.
        """
        peaks, best = logits.max(dim=-1)
        if not bool(peaks.isfinite().all()):
            raise RunError(
                "the model's logits are not finite numbers; "
                "try computing in bfloat16 or float32, or check the checkpoint"
            )
        if self.is_greedy:
            return best
        uniform = torch.tensor(
            [_uniform(self.seed, int(sequence), step) for sequence in sequence_ids],
            dtype=torch.float64,
            device=logits.device,
        )
        # A few rows at a time: the temporaries are several times as large as the logits.
        step = max(1, DRAWN_LOGITS // logits.shape[1])
        drawn = [
            self._draw(rows, numbers)
            for rows, numbers in zip(logits.split(step), uniform.split(step), strict=True)
        ]
        return torch.cat(drawn)

    def _draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Invert each row's distribution at its own number; no row sees another."""
        ids = None
        if self.top_k:
            logits, ids = logits.topk(min(self.top_k, logits.shape[1]))
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True)
        scaled = (logits.double() - logits.amax(-1, keepdim=True)) / self.temperature
        cumulative = scaled.softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        if self.top_p < 1:
            kept = torch.searchsorted(cumulative, torch.full_like(total, self.top_p))
            total = cumulative.gather(1, kept.clamp(max=logits.shape[1] - 1))
        # Right, so that a token of probability zero is never drawn, not even with uniform 0.
        place = torch.searchsorted(cumulative, total * uniform[:, None], right=True)
        place = place.clamp(max=logits.shape[1] - 1)
        return (place if ids is None else ids.gather(1, place))[:, 0]


def _uniform(seed: int, sequence: int, step: int) -> float:
    """Return the one number in [0, 1) that belongs to a seed, a sequence and a step."""
    key = np.array([seed, sequence], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([0, 0, 0, step], dtype=np.uint64))
    return float(np.random.Generator(generator).random())

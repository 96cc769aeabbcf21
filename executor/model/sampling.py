"""Choosing the next token: greedy, or drawn after temperature, top-k, top-p and min-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from executor.model.logits_processors import History, LogitsProcessors, Steps
from profiles.errors import InputError, RunError

MAX_SEED = 2**64 - 1
# Logits that are sampled from at once. Each takes up to 9 bytes of temporaries, or 40 where the
# likeliest are looked for.
DRAWN_LOGITS = 2**20
LIMITED_LOGITS = 2**18
# Tokens whose weights are summed before one of them is looked for.
GROUP_TOKENS = 128
# The largest share of a sum that a product in float64 does not round to the whole sum.
LARGEST_SHARE = 1 - 2.0**-52
# Far beyond them, temperatures are zero or infinite in float32. At them, draws are the same.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-30, 1e30


def no_history() -> torch.Tensor:
    """Take the place of the tokens so far where no processor needs them."""
    raise RuntimeError("the tokens so far were not given")


class Chooser(Protocol):
    """Chooses the next token of each sequence."""

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence (see ``Sampler.sample``)."""


@runtime_checkable
class EndingChooser(Chooser, Protocol):
    """A chooser that knows which sequences have ended beside those with an end token."""

    def has_ended(self, sequence_ids: Sequence[int]) -> torch.Tensor:
        """Return whether each sequence has ended: bool [batch]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Greedy decoding or sampling.

    Parameters
    ----------
    temperature
        Zero is greedy decoding; above zero the logits are divided by it.
    top_k
        Keep only this many likeliest tokens; zero keeps all.
    top_p
        Keep the fewest likeliest tokens whose probabilities sum to this; 1 keeps all.
    min_p
        Keep the tokens that are at least this share as likely as the likeliest; 0 keeps all.
    processors
        Processors that change the logits first.
    seed
        A sequence's random numbers depend on the seed, its index and the step only, not on its
        batch or on any placement.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    processors: LogitsProcessors = field(default_factory=LogitsProcessors)
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError("temperature", got=self.temperature, allowed="0 (greedy) or above")
        if self.top_k < 0:
            raise InputError("top-k", got=self.top_k, allowed="1 or more, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise InputError("top-p", got=self.top_p, allowed="above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError("min-p", got=self.min_p, allowed="0 to 1")
        penalty = self.processors.repetition_penalty
        if not math.isfinite(penalty) or penalty <= 0:
            raise InputError(
                "repetition-penalty", got=penalty, allowed="above 0; 1 changes nothing"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError("seed", got=self.seed, allowed=f"0 to {MAX_SEED}")
        if self.is_greedy and (self.top_k or self.top_p < 1 or self.min_p):
            raise InputError(
                "top-k, top-p and min-p",
                got="a limit with temperature 0, the likeliest",
                allowed="a limit with a temperature above 0",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Choose one token per sequence.

        Parameters
        ----------
        logits
            float32 [batch, vocabulary], on any device; processors change them in place.
        sequence_ids
            Index of each sequence in the whole run, [batch].
        step
            The index of the generated token, from zero; or one of each sequence, int64 [batch].
        history
            Returns the tokens so far, int64 [batch, tokens], padded with ``NO_TOKEN`` on the left.

        Returns
        -------
        torch.Tensor
            int64 [batch], on the device of the logits.
        """
        _check(
            logits,
            "the model's logits are not finite numbers; "
            "try computing in bfloat16 or float32, or check the checkpoint",
        )
        if not self.processors.is_idle:
            self.processors.apply(logits, step, history)
            _check(
                logits,
                "penalties, biases and forbidden tokens leave no token with a finite logit; "
                "try --ignore-generation-config",
            )
        if self.is_greedy:
            return logits.argmax(-1)
        steps = torch.as_tensor(step).expand(len(logits)).tolist()
        uniform = torch.tensor(
            [_uniform(self.seed, int(i), n) for i, n in zip(sequence_ids, steps, strict=True)],
            dtype=torch.float64,
            device=logits.device,
        )
        # A few rows at a time: the temporaries are several times as large as the logits.
        most = LIMITED_LOGITS if self.top_k or self.top_p < 1 else DRAWN_LOGITS
        count = max(1, most // logits.shape[1])
        drawn = [
            self._draw(rows, numbers)
            for rows, numbers in zip(logits.split(count), uniform.split(count), strict=True)
        ]
        return torch.cat(drawn)

    def weights(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights for sampling.

        Returns
        -------
        weights
            [rows, tokens], in proportion to the probabilities; 0 for dropped tokens. Those of the
            whole vocabulary are float32, others float64.
        ids
            The tokens of the weights, [rows, tokens]; ``None`` for the whole vocabulary.
        """
        ids = None
        if self.top_k:
            logits, ids = _largest(logits, min(self.top_k, logits.shape[1]))
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True, stable=True)
        if self.temperature != 1:
            logits = logits - logits.amax(-1, keepdim=True)
            logits.div_(min(max(self.temperature, LEAST_TEMPERATURE), LARGEST_TEMPERATURE))
        # Rows of the likeliest tokens are as wide as the widest in the batch, which rounds sums in
        # float32 another way.
        weights = logits.softmax(-1, dtype=None if ids is None else torch.float64)
        if self.top_p < 1:
            # A token is dropped where the likelier ones reach the sum; the first is always kept.
            cumulative = weights.cumsum(-1)
            is_beyond = cumulative - weights >= self.top_p * cumulative[:, -1:]
            weights.masked_fill_(is_beyond, 0)
        if self.min_p:
            weights.masked_fill_(weights < self.min_p * weights.amax(-1, keepdim=True), 0)
        return weights, ids

    def _draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Invert each row's cumulative distribution at its own random number."""
        weights, ids = self.weights(logits)
        place = _place_of(weights, uniform)
        return (place if ids is None else ids.gather(1, place))[:, 0]


def _place_of(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return where the cumulative sum of each row passes a share of its whole, int64 [rows, 1].

    ``shares`` are float64 [rows]. Sums of neighbours are looked through first. A cumulative sum of
    a whole vocabulary would take longer than its exponentials.
    """
    width = weights.shape[1]
    in_groups = width - width % GROUP_TOKENS
    sums = weights[:, :in_groups].unflatten(1, (-1, GROUP_TOKENS)).sum(-1)
    sums = torch.cat([sums, weights[:, in_groups:].sum(-1, keepdim=True)], 1)
    group, shares = _passed(sums, shares[:, None])
    tokens = group * GROUP_TOKENS + torch.arange(GROUP_TOKENS, device=group.device)
    found = weights.gather(1, tokens.clamp(max=width - 1)).masked_fill_(tokens >= width, 0)
    return group * GROUP_TOKENS + _passed(found, shares)[0]


def _passed(weights: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the cumulative sum of each row passes a share of its whole, int64 [rows, 1], and
    the share of the weight there that is left of it, float64 [rows, 1]."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted = cumulative[:, -1:] * shares.clamp(max=LARGEST_SHARE)
    # With ``right=True``, a weight of zero is never chosen, even at a share of 0.
    place = torch.searchsorted(cumulative, wanted, right=True)
    own = weights.gather(1, place).double()
    return place, ((wanted - cumulative.gather(1, place)) / own + 1).clamp(min=0)


def _check(logits: torch.Tensor, complaint: str) -> None:
    """Raise ``RunError`` where the largest logit of a row is not finite."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise RunError(complaint)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's largest logits and their ids, largest first, then by id.

    Logits equal to the last one are kept too. Where rows keep different numbers, the rest of a row
    is minus infinity.
    """
    top = logits.topk(count)
    least = top.values[:, -1:]
    width = int((logits >= least).sum(-1).max())
    if width > count:
        top = logits.topk(width)
    ids = top.indices.sort().values
    found = logits.gather(1, ids)
    found, order = found.masked_fill(found < least, -math.inf).sort(descending=True, stable=True)
    return found, ids.gather(1, order)


def _uniform(seed: int, sequence: int, step: int) -> float:
    """Return the random number in [0, 1) of a seed, a sequence and a step."""
    key = np.array([seed, sequence], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([0, 0, 0, step], dtype=np.uint64))
    return float(np.random.Generator(generator).random())

"""Log-probabilities of tokens, from logits that come a part of the vocabulary at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from profiles.errors import RunError

# Exponentials below add nothing to a sum that has a one, and take a processor a hundred times as
# long where they are too small for normal floats.
LEAST_EXPONENT = -80.0
# Logits whose exponentials are in memory at once.
SUMMED_LOGITS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What the model made of some tokens of a sequence.

    Parameters
    ----------
    log_probs
        float32 [tokens]: natural logarithm of each token's probability.
    is_greedy
        bool [tokens]: whether it was the likeliest.
    top_ids, top_log_probs
        int64 and float32 [tokens, alternatives]: the likeliest tokens in its place, in order.
    """

    log_probs: npt.NDArray[np.float32]
    is_greedy: npt.NDArray[np.bool_]
    top_ids: npt.NDArray[np.int64]
    top_log_probs: npt.NDArray[np.float32]

    def first(self, num_tokens: int) -> TokenScores:
        """Return those of the first tokens."""
        return self._part(slice(0, num_tokens))

    def top(self, num_top: int) -> TokenScores:
        """Return them with fewer alternatives."""
        return replace(
            self, top_ids=self.top_ids[:, :num_top], top_log_probs=self.top_log_probs[:, :num_top]
        )

    def split(self, counts: Sequence[int]) -> list[TokenScores]:
        """Return parts of so many tokens each."""
        ends = np.cumsum(counts)
        return [self._part(slice(end - n, end)) for n, end in zip(counts, ends, strict=True)]

    def _part(self, part: slice) -> TokenScores:
        return TokenScores(
            log_probs=self.log_probs[part],
            is_greedy=self.is_greedy[part],
            top_ids=self.top_ids[part],
            top_log_probs=self.top_log_probs[part],
        )


def stack_steps(steps: Sequence[TokenScores]) -> list[TokenScores]:
    """Return the scores of each sequence, of one token of all sequences a step."""
    parts = [
        np.stack([getattr(step, name) for step in steps], axis=1)
        for name in ("log_probs", "is_greedy", "top_ids", "top_log_probs")
    ]
    return [
        TokenScores(log_probs=row[0], is_greedy=row[1], top_ids=row[2], top_log_probs=row[3])
        for row in zip(*parts, strict=True)
    ]


def join(steps: Sequence[TokenScores]) -> TokenScores:
    """Return the scores of one sequence, of those of one token a step."""
    names = ("log_probs", "is_greedy", "top_ids", "top_log_probs")
    parts = (np.concatenate([getattr(step, name) for step in steps]) for name in names)
    log_probs, is_greedy, top_ids, top_log_probs = parts
    return TokenScores(
        log_probs=log_probs, is_greedy=is_greedy, top_ids=top_ids, top_log_probs=top_log_probs
    )


def log_sums(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of the exponentials of each row, a few rows at once.

    ``logits`` are [rows, vocabulary]; the result is [rows], of their dtype.
    """
    rows = max(1, SUMMED_LOGITS // logits.shape[1])
    return torch.cat([part.logsumexp(-1) for part in logits.split(rows)])


class LogitSums:
    """What is kept of the logits of some tokens while ever more of the vocabulary is seen.

    Parameters
    ----------
    targets
        int64 [tokens]: the tokens to score, on the device of the logits.
    num_top
        Alternatives to keep beside each.
    """

    def __init__(self, targets: torch.Tensor, num_top: int) -> None:
        self._targets = targets
        shape, device = (len(targets),), targets.device
        self._log_sum = torch.full(shape, -math.inf, device=device)
        self._target = torch.full(shape, -math.inf, device=device)
        self._largest = torch.full(shape, -math.inf, device=device)
        self._likeliest = torch.zeros(shape, dtype=torch.int64, device=device)
        self._num_top = num_top
        self._top = torch.empty(*shape, 0, device=device)
        self._top_ids = torch.empty(*shape, 0, dtype=torch.int64, device=device)
        if num_top:
            self._top = torch.full((*shape, num_top), -math.inf, device=device)
            self._top_ids = torch.zeros((*shape, num_top), dtype=torch.int64, device=device)

    def add(self, part: slice, logits: torch.Tensor, first_column: int) -> None:
        """Take the logits of some tokens for a part of the vocabulary: float32 [tokens, columns].

        They are overwritten.
        """
        peaks, places = logits.max(dim=-1)
        is_larger = peaks > self._largest[part]
        self._largest[part] = torch.where(is_larger, peaks, self._largest[part])
        places += first_column
        self._likeliest[part] = torch.where(is_larger, places, self._likeliest[part])
        wanted = self._targets[part] - first_column
        is_here = (wanted >= 0) & (wanted < logits.shape[1])
        found = logits.gather(1, wanted.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self._target[part] = torch.where(is_here, found, self._target[part])
        if self._num_top:
            self._add_top(part, logits, first_column)
        sums = logits.sub_(peaks[:, None]).clamp_(min=LEAST_EXPONENT).exp_().sum(-1)
        sums.log_().add_(peaks)
        self._log_sum[part] = torch.logaddexp(self._log_sum[part], sums)

    def _add_top(self, part: slice, logits: torch.Tensor, first_column: int) -> None:
        values, ids = logits.topk(min(self._num_top, logits.shape[1]))
        values = torch.cat([self._top[part], values], dim=1)
        ids = torch.cat([self._top_ids[part], ids + first_column], dim=1)
        self._top[part], order = values.topk(self._num_top)
        self._top_ids[part] = ids.gather(1, order)

    def scores(self) -> TokenScores:
        """Return the scores when the whole vocabulary has been seen."""
        check_finite(self._log_sum)
        return TokenScores(
            log_probs=(self._target - self._log_sum).cpu().numpy(),
            is_greedy=(self._targets == self._likeliest).cpu().numpy(),
            top_ids=self._top_ids.cpu().numpy(),
            top_log_probs=(self._top - self._log_sum[:, None]).cpu().numpy(),
        )


def score_chosen(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> TokenScores:
    """Score one token of each sequence by its logits, float32 [batch, vocabulary], which are
    overwritten."""
    sums = LogitSums(ids, min(num_top, logits.shape[1]))
    sums.add(slice(0, len(ids)), logits, 0)
    return sums.scores()


def check_finite(log_sums: torch.Tensor) -> None:
    """Refuse logits the logarithms of whose sums of exponentials are not all finite."""
    if not bool(log_sums.isfinite().all()):
        raise RunError(
            "the model's logits are not finite numbers; "
            "try computing in bfloat16 or float32, or check the checkpoint"
        )

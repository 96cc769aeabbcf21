"""Processors of the logits before a token is chosen: penalties, biases, and forbidden tokens.

Each step is equal to the processor of the same name in transformers. The order is the same too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

# Padding in a history, before the first token of a shorter prompt.
NO_TOKEN = -1
# Returns int64 [batch, tokens]: all tokens so far, padded with NO_TOKEN on the left.
History = Callable[[], torch.Tensor]
# The index of the generated token, from zero: of all rows, or int64 [batch] of each.
Steps = int | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsProcessors:
    """The processors of transformers, by the names of their settings. The defaults have no effect.

    Parameters
    ----------
    sequence_bias
        Runs of token ids with a bias. It is added to the logit of the last id where the others are
        the last tokens.
    repetition_penalty
        Positive logits of previous tokens are divided by it, negative ones multiplied.
    no_repeat_ngram_size
        No n-gram of this size appears twice; 0 permits all.
    bad_words_ids
        Runs of token ids that are never completed.
    min_length, min_new_tokens
        Fewest tokens before an end token, with the prompt and without it.
    suppress_tokens, begin_suppress_tokens
        Tokens that are never chosen, and that are never chosen first.
    eos_token_id
        The end tokens of ``min_length`` and ``min_new_tokens``.
    """

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether no processor changes the logits."""
        return all(
            getattr(self, field.name) == field.default
            for field in fields(self)
            if field.name != "eos_token_id"
        )

    def apply(self, logits: torch.Tensor, step: Steps, history: History) -> None:
        """Change logits in place.

        Parameters
        ----------
        logits
            float32 [batch, vocabulary], on any device.
        step
            The index of the generated token, from zero; or one of each row, int64 [batch].
        history
            Returns the tokens so far; called only where a processor needs them.
        """
        tokens = torch.empty(0, dtype=torch.int64)
        if self._needs_history:
            tokens = history().to(logits.device)
        if self.sequence_bias:
            _add_biases(logits, tokens, self.sequence_bias)
        if self.repetition_penalty != 1:
            _penalize(logits, tokens, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            _forbid_repeated(logits, tokens, self.no_repeat_ngram_size)
        if self.bad_words_ids:
            _add_biases(logits, tokens, [(ids, -math.inf) for ids in self.bad_words_ids])
        if self.min_length:
            is_short = (tokens != NO_TOKEN).sum(-1) < self.min_length
            _forbid(logits, self.eos_token_id, is_short)
        steps = torch.as_tensor(step, device=logits.device).expand(len(logits))
        _forbid(logits, self.eos_token_id, steps < self.min_new_tokens)
        logits[:, list(self.suppress_tokens)] = -math.inf
        _forbid(logits, self.begin_suppress_tokens, steps == 0)

    @property
    def _needs_history(self) -> bool:
        return bool(
            self.sequence_bias
            or self.repetition_penalty != 1
            or self.no_repeat_ngram_size
            or self.bad_words_ids
            or self.min_length
        )


def _forbid(logits: torch.Tensor, tokens: Sequence[int], rows: torch.Tensor) -> None:
    """Forbid tokens in the rows of a mask, bool [batch]."""
    ids = torch.tensor(tokens, device=logits.device, dtype=torch.int64)
    logits[:, ids] = logits[:, ids].masked_fill(rows[:, None], -math.inf)


def _add_biases(
    logits: torch.Tensor, tokens: torch.Tensor, biases: Sequence[tuple[tuple[int, ...], float]]
) -> None:
    """Add each bias to the last token of its run, in rows that end with the run's other tokens."""
    for length in sorted({len(ids) for ids, _ in biases}):
        if length - 1 > tokens.shape[1]:
            continue
        group = [(ids, bias) for ids, bias in biases if len(ids) == length]
        runs = torch.tensor([ids for ids, _ in group], device=logits.device)
        values = torch.tensor([bias for _, bias in group], device=logits.device)
        ends = tokens[:, None, tokens.shape[1] - (length - 1) :]
        is_match = (ends == runs[:, :-1]).all(-1)
        logits.index_add_(1, runs[:, -1], torch.where(is_match, values, 0).to(logits.dtype))


def _penalize(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> None:
    """Penalize the tokens so far. Temporaries are as large as the tokens, not the vocabulary."""
    # Padding is replaced by the last token, which each sequence has; a token is penalized once.
    ids = torch.where(tokens == NO_TOKEN, tokens[:, -1:], tokens)
    found = logits.gather(1, ids)
    logits.scatter_(1, ids, torch.where(found < 0, found * penalty, found / penalty))


def _forbid_repeated(logits: torch.Tensor, tokens: torch.Tensor, size: int) -> None:
    """Forbid each token that has followed the last ``size - 1`` tokens at an earlier place."""
    if tokens.shape[1] < size:
        return
    windows = tokens.unfold(1, size, 1)
    ends = tokens[:, None, tokens.shape[1] - (size - 1) :]
    is_match = (windows[..., :-1] == ends).all(-1) & (windows != NO_TOKEN).all(-1)
    rows, places = is_match.nonzero(as_tuple=True)
    logits[rows, windows[rows, places, -1]] = -math.inf

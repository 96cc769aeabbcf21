"""Log-probabilities in the form of vLLM: for each token, a dict of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from executor.model.token_scores import TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One candidate for a position.

    Parameters
    ----------
    logprob
        Natural logarithm of its probability, by the logits of the model before any setting changes
        them.
    rank
        1 for the likeliest token. ``None`` where it is not among the alternatives asked for.
    decoded_token
        Its text; ``None`` where the model has no tokenizer.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None


# By token id: the token itself, then the likeliest ones.
Candidates = dict[int, Logprob]


def candidates_of(
    token_ids: Sequence[int], scores: TokenScores, decode: Callable[[int], str | None]
) -> list[Candidates]:
    """Return the candidates for each position that ``scores`` covers."""
    found = []
    tops = zip(scores.top_ids.tolist(), scores.top_log_probs.tolist(), strict=True)
    scored = zip(scores.log_probs.tolist(), scores.is_greedy.tolist(), strict=True)
    for token, (logprob, is_greedy), (ids, values) in zip(token_ids, scored, tops, strict=True):
        ranks = {other: rank for rank, other in enumerate(ids, start=1)}
        rank = ranks.get(token, 1 if is_greedy else None)
        text = decode(token)
        candidates = {token: Logprob(logprob=logprob, rank=rank, decoded_token=text)}
        for other, value in zip(ids, values, strict=True):
            if other != token:
                entry = Logprob(logprob=value, rank=ranks[other], decoded_token=decode(other))
                candidates[other] = entry
        found.append(candidates)
    return found

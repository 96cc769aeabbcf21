"""Whoever chooses the tokens of a job: one that looks at known tokens, one that ends at strings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from executor.jobs.endings import Decode, stop_in
from executor.model.logits_processors import History, Steps
from executor.model.sampling import Chooser, no_history
from executor.model.token_scores import check_finite, log_sums


class NextTokens:
    """Scores tokens that may follow each prompt, and goes on with the first of them.

    Parameters
    ----------
    targets
        Of each prompt, the tokens to score.
    """

    def __init__(self, targets: Sequence[Sequence[int]]) -> None:
        self._targets = targets
        # Of each prompt, the log-probability of each target in nats, and the likeliest token.
        self.log_probs: dict[int, dict[int, float]] = {}
        self.likeliest: dict[int, int] = {}

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence (see ``Sampler.sample``)."""
        indices = [int(index) for index in sequence_ids]
        best = logits.argmax(-1).tolist()
        sums = log_sums(logits)
        check_finite(sums)
        for row, index in enumerate(indices):
            targets = list(self._targets[index])
            found = (logits[row, targets] - sums[row]).tolist()
            self.log_probs[index] = dict(zip(targets, found, strict=True))
            self.likeliest[index] = best[row]
        first = [self._targets[index][0] for index in indices]
        return torch.tensor(first, device=logits.device)


class UntilStrings:
    """Ends each sequence behind the first of its stop strings, with an end token.

    Parameters
    ----------
    chooser
        Chooses the tokens.
    stops
        Of each prompt, the strings that end it.
    decode
        Returns the text of tokens, special ones included.
    end_id
        Follows a stop string. It must end a sequence.
    """

    def __init__(
        self,
        chooser: Chooser,
        stops: Sequence[Sequence[str]],
        *,
        decode: Decode,
        end_id: int,
    ) -> None:
        self._chooser = chooser
        self._stops = stops
        self._decode = decode
        self._end_id = end_id
        # Of each sequence that goes on, the tokens so far; ``None`` behind a stop string.
        self._ids: dict[int, list[int] | None] = {}

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence (see ``Sampler.sample``)."""
        chosen = self._chooser.sample(logits, sequence_ids, step, history).tolist()
        for row, index in enumerate(int(index) for index in sequence_ids):
            ids = self._ids.setdefault(index, [])
            if ids is None:
                chosen[row] = self._end_id
                continue
            ids.append(chosen[row])
            if stop_in(ids, self._stops[index], self._decode) is not None:
                self._ids[index] = None
        return torch.tensor(chosen, device=logits.device)

"""What chooses the tokens of a job whose continuations are known, and scores them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from executor.model.logits_processors import History, Steps
from executor.model.sampling import no_history
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

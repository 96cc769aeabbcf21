"""The sequences of a batch as token ids: prompts and generated tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from executor.model.logits_processors import NO_TOKEN
from executor.model.token_scores import TokenScores


class Batch:
    """Sequences computed at once: prompts padded on the right, and their generated tokens.

    Parameters
    ----------
    prompts
        Token ids, at most ``prompt_len`` each.
    sequence_ids
        Index of each prompt among all prompts; it seeds the sampling.
    prompt_len, gen_len
        Padded length of the prompts, and number of tokens to generate.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sequence_ids: Sequence[int],
        *,
        prompt_len: int,
        gen_len: int,
    ) -> None:
        self.sequence_ids = list(sequence_ids)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.prompt_ids = torch.zeros(len(prompts), prompt_len, dtype=torch.int64)
        for row, prompt in zip(self.prompt_ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self.shortest = int(self.lengths.min())
        # Whether any prompt is shorter than the longest.
        self.is_padded = self.shortest < prompt_len
        self.generated = torch.zeros(len(prompts), gen_len, dtype=torch.int64)
        self.is_finished = torch.zeros(len(prompts), dtype=torch.bool)
        # Of each prompt, where they are asked for; and of all sequences, token by token.
        self.prompt_scores: list[TokenScores] = []
        self.output_scores: list[TokenScores] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def token_ids(self, token: int) -> torch.Tensor:
        """Return the input of a pass over the model: int64 [batch, tokens]."""
        return self.prompt_ids if token == 0 else self.generated[:, token - 1 : token]

    def history(self, token: int) -> torch.Tensor:
        """Return all tokens before those that a pass chooses: int64 [batch, tokens].

        Unlike ``prompt_ids``, they are padded on the left, with ``NO_TOKEN``.
        """
        prompts = self.prompt_ids
        if self.is_padded:
            width = prompts.shape[1]
            places = torch.arange(width) - (width - self.lengths[:, None])
            prompts = prompts.gather(1, places.clamp(min=0)).masked_fill(places < 0, NO_TOKEN)
        return torch.cat([prompts, self.generated[:, :token]], dim=1)

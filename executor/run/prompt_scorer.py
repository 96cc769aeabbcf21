"""Scores prompts: the log-probability of each of their tokens, from one pass of prefill.

The logits of all tokens of a batch would be larger than everything else. They are made in tiles, of
which ``LogitSums`` keeps a few figures of each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from costmodel.model.spec import ModelSpec
from costmodel.pricing.workspace import LOGIT_BYTES, SCORED_COLUMNS, SCORED_ROWS
from executor.model import layers
from executor.model.matrices import LayerWeights, Matrix, multiply
from executor.model.token_scores import LogitSums, TokenScores
from profiles.compute_plan import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    """Tokens of a batch's prompts that are scored.

    Parameters
    ----------
    rows
        The rows of the hidden states before them, int64 [tokens].
    ids
        The tokens, int64 [tokens].
    counts
        Tokens of each prompt; those of a prompt are adjacent.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    counts: list[int]


class PromptScorer:
    """Scores prompts, batch by batch, over the chunks of the head.

    Parameters
    ----------
    model
        Whose head it is.
    num_top
        Alternatives to keep beside each token.
    tile
        ``scored_tile_bytes`` bytes on the device that computes.
    """

    def __init__(self, model: ModelSpec, num_top: int, tile: torch.Tensor) -> None:
        self._model = model
        count = SCORED_ROWS * min(SCORED_COLUMNS, model.vocab_size)
        self._wide = tile[: count * LOGIT_BYTES].view(torch.float32)
        # A model of another dtype multiplies into this first.
        self._narrow = tile[count * LOGIT_BYTES :].view(DTYPES[model.dtype])
        self._num_top = min(num_top, model.vocab_size)
        self._first_weights: LayerWeights = {}
        self._sums: dict[int, LogitSums] = {}
        # By batch, from its first chunk to its last.
        self._tokens: dict[int, ScoredTokens] = {}

    def add(
        self,
        number: int,
        hidden: torch.Tensor,
        weights: LayerWeights,
        *,
        tokens: Callable[[], ScoredTokens],
        first_row: int,
        is_last: bool,
    ) -> list[TokenScores]:
        """Pass a batch through one chunk of the head.

        Parameters
        ----------
        number
            Of the batch.
        hidden
            What the last layer made of all tokens, [rows, hidden].
        tokens
            Returns what is scored; asked at the first chunk.
        first_row
            First token of the vocabulary that the chunk is of.
        is_last
            Whether no chunk follows.

        Returns
        -------
        list of TokenScores
            Of each prompt, behind the last chunk; else none.
        """
        if first_row == 0:
            self._begin(number, tokens(), weights)
        scored, sums = self._tokens[number], self._sums[number]
        for first in range(0, len(scored.rows), SCORED_ROWS):
            part = slice(first, first + SCORED_ROWS)
            taken = hidden[scored.rows[part]]
            made = layers.head_input(taken, self._first_weights, self._model.final_norm)
            self._add_tiles(sums, part, made, weights, first_row)
        if not is_last:
            return []
        del self._tokens[number]
        return self._sums.pop(number).scores().split(scored.counts)

    def _begin(self, number: int, tokens: ScoredTokens, weights: LayerWeights) -> None:
        # Only the first chunk comes with these, whose place is then taken by other weights.
        self._first_weights = {
            name: [chunk.clone() for chunk in chunks]
            for name, chunks in weights.items()
            if name.startswith(("final_norm.", "output_projection."))
        }
        self._tokens[number] = tokens
        self._sums[number] = LogitSums(tokens.ids, self._num_top)

    def _add_tiles(
        self,
        sums: LogitSums,
        part: slice,
        normed: torch.Tensor,
        weights: LayerWeights,
        first_row: int,
    ) -> None:
        before = 0
        for chunk in weights["head.weight"]:
            for first in range(0, chunk.shape[0], SCORED_COLUMNS):
                logits = self._logits(normed, chunk[first : first + SCORED_COLUMNS])
                layers.finish_logits(logits, weights, self._model.head, before + first)
                sums.add(part, logits, first_row + before + first)
            before += chunk.shape[0]

    def _logits(self, normed: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        shape = len(normed), matrix.shape[0]
        logits = self._wide[: math.prod(shape)].view(shape)
        if normed.dtype == torch.float32:
            multiply(normed, matrix, logits)
        else:
            narrow = self._narrow[: math.prod(shape)].view(shape)
            multiply(normed, matrix, narrow)
            logits.copy_(narrow)
        return logits

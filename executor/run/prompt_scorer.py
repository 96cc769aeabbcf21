"""Scores prompts: the log-probability of each of their tokens, from one pass of prefill.

The logits of all tokens of a batch would be larger than everything else. They are made in tiles, of
which ``LogitSums`` keeps a few figures of each token.
"""

from __future__ import annotations

import math

import torch

from costmodel.model.spec import ModelSpec
from costmodel.pricing.workspace import LOGIT_BYTES, SCORED_COLUMNS, SCORED_ROWS
from executor.model import layers
from executor.model.matrices import LayerWeights, Matrix, multiply
from executor.model.token_scores import LogitSums
from executor.run.batch import Batch
from profiles.compute_plan import DTYPES


class PromptScorer:
    """Scores the prompts of a block, batch by batch, over the chunks of the head.

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
        # Places [2, tokens] of each batch's scored tokens: sequence, and position before the token.
        self._places: dict[int, torch.Tensor] = {}

    def add(
        self,
        batch: tuple[int, Batch],
        hidden: torch.Tensor,
        weights: LayerWeights,
        *,
        first_row: int,
        is_last: bool,
    ) -> None:
        """Pass a batch through one chunk of the head.

        Parameters
        ----------
        batch
            Its number and its sequences.
        hidden
            What the last layer made of all tokens, [batch, tokens, hidden].
        first_row
            First token of the vocabulary that the chunk is of.
        is_last
            Whether no chunk follows.
        """
        number, sequences = batch
        if first_row == 0:
            self._begin(number, sequences, hidden.device, weights)
        rows, positions = self._places[number]
        sums = self._sums[number]
        for first in range(0, len(rows), SCORED_ROWS):
            part = slice(first, first + SCORED_ROWS)
            taken = hidden[rows[part], positions[part]]
            made = layers.head_input(taken, self._first_weights, self._model.final_norm)
            self._add_tiles(sums, part, made, weights, first_row)
        if is_last:
            counts = (sequences.lengths - 1).tolist()
            sequences.prompt_scores = self._sums.pop(number).scores().split(counts)
            del self._places[number]

    def _begin(
        self, number: int, batch: Batch, device: torch.device, weights: LayerWeights
    ) -> None:
        # Only the first chunk comes with these, whose place is then taken by other weights.
        self._first_weights = {
            name: [chunk.clone() for chunk in chunks]
            for name, chunks in weights.items()
            if name.startswith(("final_norm.", "output_projection."))
        }
        width = batch.prompt_ids.shape[1]
        places = (torch.arange(width) < batch.lengths[:, None] - 1).nonzero().T
        targets = batch.prompt_ids[places[0], places[1] + 1]
        self._places[number] = places.to(device)
        self._sums[number] = LogitSums(targets.to(device), self._num_top)

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

"""The output head of lanes: logits of the rows that a token is chosen for, and the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from costmodel.plan.policy import Policy
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.model.logits_processors import NO_TOKEN
from executor.model.matrices import LayerWeights
from executor.model.sampling import Chooser, EndingChooser
from executor.model.token_scores import TokenScores, score_chosen
from executor.run.head import LogitHead
from executor.run.lanes import Lane
from executor.run.pass_plan import PassBatch
from executor.run.prompt_scorer import ScoredTokens
from executor.stores.pass_rows import PassRows
from executor.stores.weights import WeightStore


class LaneHead(LogitHead):
    """The head for rows of prompts and of decode together.

    Parameters
    ----------
    hidden
        The rows of a pass.
    lanes
        The lanes at work, by number; each has what chooses its tokens.
    """

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        weights: WeightStore,
        hidden: PassRows,
        lanes: Mapping[int, Lane],
    ) -> None:
        super().__init__(policy, machine, weights)
        self._hidden, self._lanes = hidden, lanes
        self._batches: Sequence[PassBatch] = ()
        # Of this pass, by lane: the token, and its scores where they are asked for.
        self.chosen: dict[int, int] = {}
        self.scores: dict[int, TokenScores] = {}
        # Lanes that end in this pass, where what chooses their tokens knows more than end tokens.
        self.ended: set[int] = set()
        # Of each prompt that begins in this pass, where they are asked for.
        self.prompt_scores: dict[int, TokenScores] = {}

    def start_pass(self, batches: Sequence[PassBatch]) -> None:
        """Prepare for a pass."""
        self._batches = batches
        self.chosen, self.scores, self.prompt_scores = {}, {}, {}
        self.ended = set()

    def _last_rows(self, task: Task) -> torch.Tensor:
        rows = self._hidden.of(range(task.batch, task.batch + 1))
        return rows[self._batches[task.batch].emit_rows, 0]

    def _score_prompts(
        self, task: Task, weights: LayerWeights, *, first_row: int, is_last: bool
    ) -> None:
        batch = self._batches[task.batch]
        if self._prompt_scorer is None or not batch.prompts:
            return
        found = self._prompt_scorer.add(
            task.batch,
            self._hidden.of(range(task.batch, task.batch + 1))[:, 0],
            weights,
            tokens=lambda: _scored_tokens(batch),
            first_row=first_row,
            is_last=is_last,
        )
        if is_last:
            lanes = (part.lane for part in batch.prompts)
            self.prompt_scores.update(zip(lanes, found, strict=True))

    def _choose(self, task: Task, logits: torch.Tensor) -> None:
        numbers = self._batches[task.batch].emit_lanes
        lanes = [self._lanes[number] for number in numbers]
        # Choosing may change the logits.
        kept = None if self._num_top is None else logits.clone()
        rows: dict[Chooser, list[int]] = {}
        for row, lane in enumerate(lanes):
            rows.setdefault(lane.chooser, []).append(row)
        ids = torch.empty(len(lanes), dtype=torch.int64)
        for chooser, places in rows.items():
            part = logits if len(rows) == 1 else logits[places]
            ids[places] = _sample(chooser, part, [lanes[row] for row in places])
            if isinstance(chooser, EndingChooser):
                has_ended = chooser.has_ended([lanes[row].request for row in places])
                self.ended.update(numbers[places[i]] for i in has_ended.nonzero()[:, 0].tolist())
        self.chosen.update(zip(numbers, ids.tolist(), strict=True))
        if kept is not None and self._num_top is not None:
            found = score_chosen(kept, ids, self._num_top).split([1] * len(numbers))
            self.scores.update(zip(numbers, found, strict=True))


def _sample(chooser: Chooser, logits: torch.Tensor, lanes: Sequence[Lane]) -> torch.Tensor:
    """Choose a token for each of some lanes, int64 [lanes]."""
    steps = torch.tensor([len(lane.generated) for lane in lanes])
    requests = [lane.request for lane in lanes]
    return chooser.sample(logits, requests, steps, lambda: _history(lanes))


def _scored_tokens(batch: PassBatch) -> ScoredTokens:
    """Return all tokens of a batch's prompts but the first of each."""
    rows = [torch.arange(part.rows.start, part.rows.stop - 1) for part in batch.prompts]
    places = torch.cat(rows)
    return ScoredTokens(rows=places, ids=batch.ids[places + 1], counts=[len(part) for part in rows])


def _history(lanes: Sequence[Lane]) -> torch.Tensor:
    """Return the tokens so far, int64 [lanes, tokens], padded with ``NO_TOKEN`` on the left."""
    rows = [np.concatenate([lane.prompt, lane.generated]).astype(np.int64) for lane in lanes]
    width = max(map(len, rows))
    padded = np.full((len(rows), width), NO_TOKEN, np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[width - len(ids) :] = ids
    return torch.from_numpy(padded)

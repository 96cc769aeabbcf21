"""The last layers of a pass: logits, the choice of each sequence's next token, and its scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from costmodel.plan.policy import Policy
from costmodel.pricing.workspace import LOGIT_BYTES, scored_tile_bytes
from costmodel.schedule.tasks import Task
from executor.machine.tiers import Machine
from executor.model import layers
from executor.model.matrices import LayerWeights, linear
from executor.model.sampling import Chooser, EndingChooser
from executor.model.token_scores import score_chosen
from executor.run.batch import Batch
from executor.run.prompt_scorer import PromptScorer, ScoredTokens
from executor.stores.activations import HiddenStates
from executor.stores.weights import WeightStore


class LogitHead(ABC):
    """The output head, which may be cut into several chunks of rows.

    Parameters
    ----------
    machine
        Its compute device has room for the logits, and for a tile of scored ones.
    """

    def __init__(self, policy: Policy, machine: Machine, weights: WeightStore) -> None:
        self._spec = policy.model
        self._num_top = policy.workload.logprobs
        self._weights = weights
        self._kinds = [layer.kind for layer in weights.layers]
        # By first batch, the input of the chunks that follow the first, and the rows of each batch.
        self._inputs: dict[int, tuple[torch.Tensor, list[int]]] = {}
        # Allocated once: logits that are allocated for every token would fragment the heap. With a
        # head of one chunk, batches take turns in one buffer.
        count = policy.num_gpu_batches if self._kinds.count("head") > 1 else 1
        shape = count, policy.gpu_batch_size, self._spec.vocab_size * self._spec.has_head
        raw = machine.compute.allocate("logits", math.prod(shape) * LOGIT_BYTES)
        self._logits = raw.view(torch.float32).view(shape)
        self._prompt_scorer: PromptScorer | None = None
        num_top = policy.workload.prompt_logprobs
        if num_top is not None and self._spec.has_head:
            tile = machine.compute.allocate("scored logits", scored_tile_bytes(self._spec))
            self._prompt_scorer = PromptScorer(self._spec, num_top, tile)

    @property
    def scores_prompts(self) -> bool:
        """Whether the head takes all tokens of prompts, not only each prompt's last."""
        return self._prompt_scorer is not None

    def compute(self, task: Task) -> None:
        """Pass one batch, or several, through one chunk; after the last chunk, choose their next
        tokens."""
        weights = self._weights.layer(task)
        (layout,) = self._weights.layers[task.layer].components
        first, is_last = layout.first_row, task.layer == len(self._kinds) - 1
        together = self._together(task)
        if self._kinds[task.layer - 1] != "head":
            norm = self._spec.final_norm
            parts = [layers.head_input(self._last_rows(t), weights, norm) for t in together]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._inputs[task.batch] = whole, list(map(len, parts))
        for each in together:
            self._score_prompts(each, weights, first_row=first, is_last=is_last)
        inputs, counts = self._inputs[task.batch]
        # The rows of several batches are adjacent, from the place of the first one on.
        slots, batch_size, vocab_size = self._logits.shape
        start = task.batch % slots * batch_size
        logits = self._logits.view(-1, vocab_size)[start : start + len(inputs)]
        for chunk in weights["head.weight"]:
            columns = slice(first, first + chunk.shape[0])
            logits[:, columns] = linear(inputs, [chunk])
            first += chunk.shape[0]
        layers.finish_logits(logits[:, layout.first_row : first], weights, self._spec.head)
        if is_last:
            del self._inputs[task.batch]
            for each, part in zip(together, logits.split(counts), strict=True):
                self._choose(each, part)

    def _together(self, task: Task) -> Sequence[Task]:
        """Return the tasks of all batches that pass through a chunk with a task's own."""
        return [task]

    @abstractmethod
    def _last_rows(self, task: Task) -> torch.Tensor:
        """Return the hidden states [rows, hidden] behind which a token is chosen."""

    @abstractmethod
    def _score_prompts(
        self, task: Task, weights: LayerWeights, *, first_row: int, is_last: bool
    ) -> None:
        """Score the prompts of a batch by one chunk (see ``PromptScorer.add``), if they are."""

    @abstractmethod
    def _choose(self, task: Task, logits: torch.Tensor) -> None:
        """Choose a token for each row of logits, float32 [rows, vocabulary]; they may change."""


class Head(LogitHead):
    """The head of sequences that are in step.

    Parameters
    ----------
    hidden
        The hidden states of all sequences.
    sampler
        Chooses the tokens.
    eos_ids
        Tokens that end a sequence.
    """

    def __init__(
        self,
        policy: Policy,
        machine: Machine,
        weights: WeightStore,
        hidden: HiddenStates,
        sampler: Chooser,
        eos_ids: frozenset[int],
    ) -> None:
        super().__init__(policy, machine, weights)
        self._hidden, self._sampler = hidden, sampler
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64)
        self._batches: Sequence[Batch] = ()
        # For each batch, the number of tokens of each prompt, int64 [batch] on the compute device.
        self._lengths: Sequence[torch.Tensor] = ()

    def start_block(self, batches: Sequence[Batch], lengths: Sequence[torch.Tensor]) -> None:
        """Prepare for a block; ``lengths`` are those of ``KVCache.start_block``."""
        self._batches, self._lengths = batches, lengths

    def _together(self, task: Task) -> Sequence[Task]:
        count = self._weights.plan.head_batches_at_once
        batches = range(task.batch, min(task.batch + count, len(self._batches)))
        return [replace(task, batch=batch) for batch in batches]

    def _last_rows(self, task: Task) -> torch.Tensor:
        hidden = self._hidden.gather(task)
        if not task.is_prefill:
            return hidden[:, 0]
        last = self._lengths[task.batch] - 1
        return hidden[torch.arange(len(last), device=last.device), last]

    def _score_prompts(
        self, task: Task, weights: LayerWeights, *, first_row: int, is_last: bool
    ) -> None:
        if not task.is_prefill or self._prompt_scorer is None:
            return
        batch, hidden = self._batches[task.batch], self._hidden.gather(task)
        batch.prompt_scores = self._prompt_scorer.add(
            task.batch,
            hidden.flatten(0, 1),
            weights,
            tokens=lambda: _scored_tokens(batch, hidden.device),
            first_row=first_row,
            is_last=is_last,
        )

    def _choose(self, task: Task, logits: torch.Tensor) -> None:
        batch = self._batches[task.batch]
        history = partial(batch.history, task.token)
        # Choosing may change the logits.
        kept = None if self._num_top is None else logits.clone()
        chosen = self._sampler.sample(logits, batch.sequence_ids, task.token, history)
        if kept is not None and self._num_top is not None:
            batch.output_scores.append(score_chosen(kept, chosen, self._num_top))
        ids = chosen.cpu()
        batch.generated[:, task.token] = ids
        batch.is_finished |= torch.isin(ids, self._eos_ids)
        if isinstance(self._sampler, EndingChooser):
            batch.is_finished |= self._sampler.has_ended(batch.sequence_ids)


def _scored_tokens(batch: Batch, device: torch.device) -> ScoredTokens:
    """Return all tokens of a batch's prompts but the first of each."""
    width = batch.prompt_ids.shape[1]
    sequences, positions = (torch.arange(width) < batch.lengths[:, None] - 1).nonzero().T
    return ScoredTokens(
        rows=(sequences * width + positions).to(device),
        ids=batch.prompt_ids[sequences, positions + 1].to(device),
        counts=(batch.lengths - 1).tolist(),
    )

"""Where requests end: at an end token, a stop string or their limit, each at its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from executor.jobs.params import RowParams
from executor.model.logits_processors import History, Steps
from executor.model.sampling import no_history
from executor.run.finished import Finished
from executor.run.results import BlockResult
from executor.text.continuation import TextTokenizer, decode_continuation

Decode = Callable[[Sequence[int]], str]


def stop_in(ids: Sequence[int], stops: Sequence[str], decode: Decode) -> str | None:
    """Return the stop string that the last token of ``ids`` completes, or ``None``."""
    for stop in stops:
        # A token is at least a byte, and the string may begin within one.
        tail = ids[-len(stop.encode()) - 1 :]
        # The first token of a text may be decoded otherwise: only the whole text decides.
        if stop in decode(tail) and stop in decode(ids):
            return stop
    return None


class RowChooser:
    """Chooses the next token of each request by its own parameters, and knows which have ended.

    Parameters
    ----------
    params
        Returns those of a request, by its number.
    identity
        Returns what the draws of a request depend on beside the step: 64 bits.
    decode
        Returns the text of tokens; called for requests with stop strings only.
    """

    def __init__(
        self,
        params: Callable[[int], RowParams],
        identity: Callable[[int], int],
        decode: Decode | None = None,
    ) -> None:
        self._params, self._identity = params, identity
        self._decode = decode or (lambda ids: "")
        # Of each request that goes on, its tokens so far; and those that have ended.
        self._ids: dict[int, list[int]] = {}
        self._ended: dict[int, str | int | None] = {}

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence, any token where it has ended (see ``Sampler``)."""
        requests = [int(request) for request in sequence_ids]
        rows_by_sampler = defaultdict(list)
        for row, request in enumerate(requests):
            if request not in self._ended:
                rows_by_sampler[self._params(request).sampler].append(row)
        chosen = torch.zeros(len(requests), dtype=torch.int64, device=logits.device)
        for sampler, rows in rows_by_sampler.items():
            places = torch.tensor(rows, device=logits.device)
            # A copy: processors change logits in place.
            part = logits if len(rows) == len(requests) else logits[places]
            identities = [self._identity(requests[row]) for row in rows]
            steps = step if isinstance(step, int) else step[rows]
            chosen[places] = sampler.sample(part, identities, steps, _rows_of(history, rows))
        for request, token in zip(requests, chosen.tolist(), strict=True):
            if request not in self._ended:
                self._take(request, token)
        return chosen

    def has_ended(self, sequence_ids: Sequence[int]) -> torch.Tensor:
        """Return whether each sequence has ended: bool [batch]."""
        return torch.tensor([request in self._ended for request in sequence_ids])

    def finish(self, block: BlockResult) -> BlockResult:
        """Return a block whose outputs end where its requests do, and forget the requests."""
        done: list[Finished] = []
        for request in sorted(block.output_ids):
            stop = self._ended.pop(request)
            ids = tuple(self._ids.pop(request))
            ids = ids[:-1] if isinstance(stop, int) else ids
            scores = block.output_scores.get(request)
            done.append(
                Finished(
                    request=request,
                    ids=ids,
                    reason="length" if stop is None else "stop",
                    stop=stop,
                    scores=None if scores is None else scores.first(len(ids)),
                )
            )
        return replace(
            block,
            output_ids={each.request: each.ids for each in done},
            stopped=frozenset(each.request for each in done if each.reason == "stop"),
            output_scores={each.request: each.scores for each in done if each.scores is not None},
            finished=tuple(done),
        )

    def _take(self, request: int, token: int) -> None:
        params, ids = self._params(request), self._ids.setdefault(request, [])
        ids.append(token)
        if token in params.end_ids:
            self._ended[request] = token
        elif (stop := stop_in(ids, params.stops, self._decode)) is not None:
            self._ended[request] = stop
        elif len(ids) == params.max_tokens:
            self._ended[request] = None


def _rows_of(history: History, rows: Sequence[int]) -> History:
    return lambda: history()[rows]


def text_of(
    tokenizer: TextTokenizer, prompt_ids: Sequence[int], done: Finished, *, keeps_stop: bool = False
) -> str:
    """Return the text that a request has added to its prompt, cut at its stop string."""
    text = decode_continuation(tokenizer, prompt_ids, done.ids)
    if not isinstance(done.stop, str) or done.stop not in text:
        return text
    before, stop, _ = text.partition(done.stop)
    return before + stop if keeps_stop else before

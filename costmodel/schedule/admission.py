"""Which sequences run in a pass: lanes that end are given to waiting requests.

The executor and the simulation of a job admit with this same code. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths
from costmodel.plan.pages import PAGE, PoolSizes
from costmodel.schedule.page_rules import BoolArray, Forecast, PageNeeds, is_safe, runs_alone
from costmodel.schedule.pass_lanes import PassLanes
from costmodel.schedule.prefix_pages import PrefixPages
from profiles.errors import InputError

# Waiting requests that are looked at for one that fits, so that a long one does not block others.
LOOKAHEAD = 64
# After so many others were admitted before it, the first request waits for room alone.
MOST_OVERTAKEN = 64


def longest_first(lengths: Lengths, requests: IntArray | None = None) -> IntArray:
    """Return ``requests``, all of them by default, in the order in which they are admitted.

    The longest expected answer is first, because long answers set when a job ends; among equals,
    the longest prompt.
    """
    rows: IntArray = np.arange(len(lengths)) if requests is None else requests
    return rows[np.lexsort((rows, -lengths.prompts[rows], -lengths.outputs[rows]))]


@dataclass(slots=True)
class _Room:
    """Rows that a pass has left, and tokens of prompts that it may still begin."""

    rows: int
    prompt_tokens: int

    def use(self, tokens: int) -> None:
        """Take a prompt of some tokens."""
        self.rows -= tokens
        self.prompt_tokens -= tokens


class Admission:
    """Gives lanes to waiting requests, and pages of the cache to lanes as they grow.

    A request is admitted where no lane will have to wait if every answer is as long as expected.
    Where answers are longer, a lane waits for its next page if the others could then not end in
    every case (see ``is_safe``). So every job ends, whatever was expected. While a lane waits,
    nobody is admitted. Prefixes that requests share are kept once (see ``PrefixPages``).

    Parameters
    ----------
    lengths
        The lengths of all requests.
    pool
        Pages of the cache.
    most_lanes, batch_lanes
        Most lanes in a pass and in a batch.
    pass_rows
        Most rows of a pass: tokens that are decoded and tokens of prompts.
    order
        Requests in the order in which they are admitted; ``None``: ``longest_first``.
    prompt_tokens
        Tokens of prompts, at least 1, after which a pass admits nobody else; ``None`` admits all
        that fit.
    is_handed_out
        Whether requests are handed out while the job runs: none waits before ``hand_out``. Those
        that cannot run alone are then never handed out.

    Raises
    ------
    InputError
        For a request that cannot run alone (see ``runs_alone``).
    """

    def __init__(
        self,
        lengths: Lengths,
        pool: PoolSizes,
        *,
        most_lanes: int,
        batch_lanes: int,
        pass_rows: int,
        order: IntArray | None = None,
        prompt_tokens: int | None = None,
        is_handed_out: bool = False,
    ) -> None:
        order = longest_first(lengths) if order is None else order
        runs = runs_alone(lengths, pool, most_lanes=most_lanes, pass_rows=pass_rows)[order]
        if is_handed_out:
            order = order[runs]
        elif not runs.all():
            raise InputError(
                "requests of the job",
                got=f"{int((~runs).sum())} that do not fit in the cache or in a pass",
                allowed=f"prompt and answer within {min(pool.pages) * PAGE} tokens, prompt within"
                f" {pass_rows - most_lanes + 1}",
                hint="more memory, or a smaller max_tokens",
            )
        self._lengths, self._needs = lengths, PageNeeds(pool)
        self._capacity: IntArray = np.array(pool.pages, np.int64)
        self._free = self._capacity.copy()
        self._most_lanes, self._batch_lanes, self._pass_rows = most_lanes, batch_lanes, pass_rows
        self._prompt_tokens = pass_rows if prompt_tokens is None else max(1, prompt_tokens)
        # What comes first is at the end of a list, where it is taken.
        self._queue: list[int] = [] if is_handed_out else order[::-1].tolist()
        self._free_lanes = list(range(most_lanes))[::-1]
        self._prefixes = PrefixPages(lengths, pool, order)
        # An answer of one token stores nothing.
        self._prompts: IntArray = np.where(lengths.limits > 1, lengths.prompts, 0)
        self._most = self._own(lengths.stored, np.arange(len(lengths)))
        self._latest: IntArray = lengths.outputs.max(keepdims=True)
        # Of the lanes at work, the oldest first.
        self.lanes: IntArray = np.zeros(0, np.int64)
        self.requests: IntArray = np.zeros(0, np.int64)
        self.steps: IntArray = np.zeros(0, np.int64)
        self._held: IntArray = np.zeros((0, len(pool.pages)), np.int64)
        # Tokens of each newcomer's prompt that are in the cache.
        self._skipped: list[int] = []
        self._num_passes = self._overtaken = 0
        # Who does not fit now is not tried again before a lane ends.
        self._may_admit = True
        self._waits = False

    def hand_out(self, requests: Sequence[int]) -> None:
        """Let requests wait behind those that do."""
        self._queue[:0] = reversed(requests)
        self._may_admit = self._may_admit or len(requests) > 0

    @property
    def num_waiting(self) -> int:
        """Requests without a lane."""
        return len(self._queue)

    def plan(self) -> PassLanes | None:
        """Begin a pass and return its lanes; ``None`` where no request is left."""
        if not len(self.lanes) and not self._queue:
            return None
        goes_on = self._grow()
        self.steps = self.steps + goes_on
        decoding, waiting = self.lanes[goes_on], self.lanes[~goes_on]
        self._waits, self._skipped = len(waiting) > 0, []
        requests = self._admit() if self._may_admit and not self._waits else []
        self._num_passes += 1
        return PassLanes(
            number=self._num_passes - 1,
            decoding=decoding,
            newcomers=self.lanes[len(self.lanes) - len(requests) :],
            requests=np.array(requests, np.int64),
            waiting=waiting,
            batch_lanes=self._batch_lanes,
            prefixes=self._prefixes.numbers[requests],
            skipped=np.array(self._skipped, np.int64),
            dropped=self._prefixes.take_dropped(),
        )

    def skip(self, most: int) -> int:
        """Begin up to ``most`` passes at once that are like the last one, and return their number.

        In these passes nobody is admitted and every lane goes on, as ``plan`` would decide for each
        of them. The caller knows that no lane ends in them.
        """
        if self._waits or (self._may_admit and self._queue):
            return 0
        while most > 0:
            wanted = self._wanted(most)
            # What is safe at the end of these passes is so in each of them.
            if self._can_give(wanted):
                self._give(wanted)
                self.steps = self.steps + most
                self._num_passes += most
                break
            most //= 2
        return max(0, most)

    def ended(self, lanes: Iterable[int]) -> None:
        """Free the pages of lanes whose answers ended in the pass that was planned last."""
        is_gone = np.zeros(self._most_lanes, bool)
        is_gone[list(lanes)] = True
        gone = is_gone[self.lanes]
        prefix_pages = self._prefixes.end(self.requests[gone])
        self._free = self._free + self._held[gone].sum(axis=0) + prefix_pages
        self._free_lanes += self.lanes[gone].tolist()
        self.lanes, self.requests = self.lanes[~gone], self.requests[~gone]
        self.steps, self._held = self.steps[~gone], self._held[~gone]
        self._may_admit = self._may_admit or bool(gone.any())

    @property
    def used_pages(self) -> IntArray:
        """Pages that lanes and their prefixes hold, int64 [pools]."""
        return self._capacity - self._free

    def _wanted(self, passes: int) -> IntArray:
        """Return the pages that each lane needs besides its own for some passes more."""
        tokens = self._prompts[self.requests] + self.steps + (passes - 1)
        return self._own(tokens, self.requests) - self._held

    def _own(self, tokens: IntArray, requests: IntArray) -> IntArray:
        """Return the pages of lanes with ``tokens`` besides those of their prefixes."""
        own: IntArray = np.maximum(self._needs.of(tokens) - self._prefixes.in_table(requests), 0)
        return own

    def _can_give(self, wanted: IntArray) -> bool:
        return self._is_safe(self.requests, self._held + wanted, self._free - wanted.sum(axis=0))

    def _is_safe(self, requests: IntArray, held: IntArray, free: IntArray) -> bool:
        """Whether lanes of ``requests`` that hold pages can end in any case."""
        prefixes = self._prefixes
        numbers = prefixes.numbers[requests]
        return is_safe(held, self._most[requests] - held, free, numbers, prefixes.pages)

    def _give(self, wanted: IntArray) -> None:
        self._held = self._held + wanted
        self._use(wanted.sum(axis=0))

    def _use(self, pages: IntArray) -> None:
        self._free = self._free - pages
        self._prefixes.fit(self._free)

    def _grow(self) -> BoolArray:
        """Give lanes the pages for one token each, and return which lanes have room for it."""
        wanted = self._wanted(1)
        if not wanted.any():
            return np.ones(len(wanted), bool)
        if self._can_give(wanted):
            self._give(wanted)
            return np.ones(len(wanted), bool)
        goes_on: BoolArray = (wanted == 0).all(axis=1)
        for lane in np.flatnonzero(~goes_on):
            alone = np.zeros_like(wanted)
            alone[lane] = wanted[lane]
            if self._can_give(alone):
                self._give(alone)
                goes_on[lane] = True
        return goes_on

    def _admit(self) -> list[int]:
        """Admit requests behind the lanes at work, and return them."""
        admitted: list[int] = []
        room = _Room(self._pass_rows - len(self.lanes), self._prompt_tokens)
        forecast = self._forecast() if self._queue and self._free_lanes else None
        while forecast is not None and self._queue:
            most = 1 if self._overtaken >= MOST_OVERTAKEN else LOOKAHEAD
            waiting = np.array(self._queue[: -most - 1 : -1])
            places = self._take(waiting, forecast, room)
            for place in reversed(places):
                del self._queue[-1 - place]
            admitted += waiting[places].tolist()
            if len(places) < len(waiting):
                break
        # A pass that was full of prompts is no reason to wait until a lane ends.
        self._may_admit = bool(admitted)
        return admitted

    def _take(self, waiting: IntArray, forecast: Forecast, room: _Room) -> list[int]:
        """Admit what fits of the first requests of the queue; return their places there.

        Once a request does not fit, it fits no better when others were admitted.
        """
        prompts, passes = self._lengths.prompts[waiting], self._lengths.outputs[waiting] - 1
        own = self._later(forecast, self._prompts[waiting], passes, waiting)
        numbers = self._prefixes.numbers[waiting]
        places: list[int] = []
        place = 0
        while self._free_lanes and room.prompt_tokens > 0:
            pages = own[place:] + forecast.prefix_pages(numbers[place:], passes[place:])
            rows = prompts[place:] - self._prefixes.skipped(waiting[place:])
            fits = forecast.fits(pages, self._capacity) & (rows <= room.rows)
            found = np.flatnonzero(fits)
            while len(found) and not self._is_safe_with(int(waiting[place + found[0]])):
                found = found[1:]
            overtakes = len(found) > 0 and place + found[0] > 0 and places[:1] != [0]
            if not len(found) or (overtakes and self._overtaken >= MOST_OVERTAKEN):
                break
            self._overtaken = self._overtaken + 1 if overtakes else 0
            room.use(int(rows[found[0]]))
            forecast.add(own[place + found[0]])
            place += int(found[0])
            forecast.hold(numbers[place : place + 1], passes[place : place + 1])
            self._append(int(waiting[place]))
            places.append(place)
            place += 1
        return places

    def _is_safe_with(self, request: int) -> bool:
        """Whether lanes can still end in any case when this request is admitted."""
        requests = np.append(self.requests, request)
        pages = self._first_pages(request)
        held = np.concatenate([self._held, pages])
        free = self._free - pages[0] - self._prefixes.taken_with(request)
        return self._is_safe(requests, held, free)

    def _append(self, request: int) -> None:
        self.lanes = np.append(self.lanes, self._free_lanes.pop())
        self.requests = np.append(self.requests, request)
        self.steps = np.append(self.steps, 1)
        self._skipped += self._prefixes.skipped(self.requests[-1:]).tolist()
        pages = self._first_pages(request)
        self._held = np.concatenate([self._held, pages])
        taken = pages[0] + self._prefixes.taken_with(request)
        self._prefixes.begin(request)
        self._use(taken)

    def _first_pages(self, request: int) -> IntArray:
        """Return the pages that a lane takes for its prompt, int64 [1, pools]."""
        requests: IntArray = np.array([request])
        return self._own(self._prompts[requests], requests)

    def _later(
        self, forecast: Forecast, tokens: IntArray, passes: IntArray, requests: IntArray
    ) -> IntArray:
        """Return the pages of lanes in later passes besides those of their prefixes."""
        in_table = self._prefixes.in_table(requests)
        found: IntArray = np.maximum(forecast.pages(tokens, passes) - in_table[:, None], 0)
        return found

    def _forecast(self) -> Forecast:
        """Return the pages of the lanes at work in later passes."""
        outputs, limits = self._lengths.outputs[self.requests], self._lengths.limits[self.requests]
        # An answer that is longer than expected may become twice as long as it is.
        longer = np.minimum(limits, 2 * self.steps)
        passes = np.where(self.steps < outputs, outputs, longer) - self.steps
        next_ends = self._lengths.outputs[self._queue[: -LOOKAHEAD - 1 : -1]] - 1
        ends = np.concatenate([passes, next_ends, self._latest])
        forecast = Forecast(self._needs, ends, self._prefixes.pages)
        tokens = self._prompts[self.requests] + self.steps - 1
        forecast.add(self._later(forecast, tokens, passes, self.requests).sum(axis=0))
        forecast.hold(self._prefixes.numbers[self.requests], passes)
        return forecast

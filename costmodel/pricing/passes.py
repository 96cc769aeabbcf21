"""The seconds of any pass over lanes: every limit is linear in a few counts of the pass.

The coefficients are differences of the terms of ``latency``, so that no formula is written twice.
They depend on rows of products, and are tabulated over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.plan.policy import Policy
from costmodel.pricing.channels import channel_seconds
from costmodel.pricing.latency import TaskWork, stage_work
from costmodel.pricing.limits import (
    IN_SERIES,
    ONE_BATCH,
    fill_seconds,
    work_limits,
)
from costmodel.pricing.pass_stages import (
    PassStage,
    Reach,
    decode_stage,
    prompt_stage,
    reach_of,
)
from costmodel.pricing.problem import Problem, problem_of
from costmodel.pricing.shares import PRODUCTS, Shares, TierShares, product_name, shares_of
from profiles.errors import InputError
from profiles.hardware import HardwareProfile

FloatArray = NDArray[np.float64]

# Passes that are priced at once, which bounds the temporaries.
PASSES_AT_ONCE = 4096
# Between two passes over lanes, tokens are taken, requests admitted and the next rows laid out.
# With tiny models this took 0.9 to 1.3 ms, where a layer took 0.27 to 0.29 ms.
LAYERS_BETWEEN_PASSES = 3
# Differences are taken over so many slots, so that they are not lost beside products.
MANY = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCounts:
    """What passes compute; every array has an entry for each pass.

    Parameters
    ----------
    decoding, newcomers
        Lanes that decode a token, and lanes whose prompts pass. Each of them chooses a token.
    prompt_tokens
        Tokens of the newcomers' prompts.
    slots
        Slots of the cache that all lanes read in one layer, by its window.
    stored
        Slots of the cache that prompts fill in one layer, by its window.
    seen
        Twice the keys that the queries of all prompts see in one layer, by its ``Reach``.
    held
        Slots of the pages in use before each pass in one layer, by its window; without an entry
        where no layer's cache is on disk.
    """

    decoding: FloatArray
    newcomers: FloatArray
    prompt_tokens: FloatArray
    slots: Mapping[int | None, FloatArray]
    stored: Mapping[int | None, FloatArray]
    seen: Mapping[Reach, FloatArray]
    held: Mapping[int | None, FloatArray] = field(default_factory=dict)

    def part(self, which: slice) -> PassCounts:
        """Return the counts of some of the passes."""
        return PassCounts(
            decoding=self.decoding[which],
            newcomers=self.newcomers[which],
            prompt_tokens=self.prompt_tokens[which],
            slots={key: value[which] for key, value in self.slots.items()},
            stored={key: value[which] for key, value in self.stored.items()},
            seen={key: value[which] for key, value in self.seen.items()},
            held={key: value[which] for key, value in self.held.items()},
        )


@dataclass(frozen=True, slots=True)
class _Table:
    """Costs at some numbers of rows, which begin with 0, and between them in proportion.

    ``costs`` is [rows, columns] (see ``PassPrice``).
    """

    rows: FloatArray
    costs: FloatArray

    def at(self, rows: FloatArray) -> FloatArray:
        """Return the costs at any rows, [passes, columns]; beyond the last, those of the last."""
        place = np.clip(np.searchsorted(self.rows, rows), 1, len(self.rows) - 1)
        low, high = self.rows[place - 1], self.rows[place]
        share = np.clip((rows - low) / (high - low), 0, 1)[:, None]
        found: FloatArray = self.costs[place - 1] * (1 - share) + self.costs[place] * share
        return found


def seconds_between_passes(hardware: HardwareProfile) -> float:
    """Return the seconds between two passes, in which the next one is planned."""
    return LAYERS_BETWEEN_PASSES * hardware.cpu.compute.task_overhead_s


class PassPrice:
    """The price of passes over the lanes of one policy on one machine.

    Costs are kept in columns: the seconds of every kind of task, its traffic in CPU memory, and the
    seconds of one batch in series.

    Parameters
    ----------
    policy
        A policy with ``lanes``, whose fractions are rounded (see ``round_policy``). Its block size
        is the most lanes of a pass.
    """

    def __init__(self, policy: Policy, hardware: HardwareProfile) -> None:
        if policy.lanes is None:
            raise InputError("policy.lanes", got="null", allowed="a policy of lanes")
        self._policy, self._hardware = policy, hardware
        self._problem, shares = problem_of(policy, hardware), shares_of(policy)
        self._fill_s = fill_seconds(self._problem, shares) * policy.block_size
        decode = decode_stage(self._problem, tokens=1)
        self._work = stage_work(self._problem, shares, decode)
        self._tabulate_decode(_sizes(policy.gpu_batch_size, policy.block_size))
        # Prompts are one sequence, and load nothing.
        nothing = {c: TierShares(gpu=0.0, cpu=0.0, disk=0.0) for c in shares.weights}
        products = {product_name(name): 0.0 for name in PRODUCTS}
        loaded = replace(shares, per_block=0.0, weights=nothing, **products)
        self._chunk_rows = min(policy.lanes.chunk_rows, policy.lanes.pass_rows)
        self._tabulate_prompts(loaded, _sizes(self._chunk_rows, self._chunk_rows))

    def seconds(self, counts: PassCounts) -> FloatArray:
        """Return the seconds of each pass, with the planning of the next; the first of them waits
        for its first load."""
        size = len(counts.decoding)
        between_s = seconds_between_passes(self._hardware)
        found: FloatArray = np.zeros(size)
        for first in range(0, size, PASSES_AT_ONCE):
            which = slice(first, first + PASSES_AT_ONCE)
            limits = self.limits(counts.part(which), begins=first == 0)
            found[which] = np.maximum.reduce(list(limits.values())) + between_s
        return found

    def limits(self, counts: PassCounts, *, begins: bool = False) -> dict[str, FloatArray]:
        """Return ``{limit: seconds of each pass}``: a pass lasts as long as the largest.

        ``begins`` is whether the first pass waits for its first load.
        """
        costs = self._costs(counts)
        fill: Any = np.zeros(len(costs))
        fill[:1] = begins * self._fill_s
        limits = work_limits(self._problem, self._work_of(costs), fill=fill)
        return {**limits, ONE_BATCH: costs[:, -1]}

    def channels(self, counts: PassCounts) -> dict[str, FloatArray]:
        """Return ``{channel: busy seconds in each pass}``."""
        return channel_seconds(self._work_of(self._costs(counts)))

    def _work_of(self, costs: FloatArray) -> list[TaskWork[Any]]:
        """Return the work of each pass; limits are sums and products, of arrays as of numbers."""
        count = len(self._work)
        return [
            TaskWork(
                w.kind,
                w.channel,
                costs[:, i],
                None if w.memory_bytes is None else costs[:, count + i],
            )
            for i, w in enumerate(self._work)
        ]

    def _costs(self, counts: PassCounts) -> FloatArray:
        """Return the costs of each pass, [passes, columns]."""
        decoding, newcomers, tokens = counts.decoding, counts.newcomers, counts.prompt_tokens
        costs = self._per_pass.at(decoding + newcomers)
        if self._problem.loads_on_demand:
            costs[:, self._late] = self._per_pass.at(decoding + tokens)[:, self._late]
        costs += self._decoded.at(decoding)
        for window, table in self._read.items():
            costs += table.at(decoding) * counts.slots[window][:, None]
        rows = np.minimum(tokens, self._chunk_rows)
        costs += self._multiplied.at(rows) * (tokens / np.maximum(rows, 1))[:, None]
        costs += self._ended.at(rows) * newcomers[:, None]
        for window, cost in self._stored.items():
            costs += counts.stored[window][:, None] * cost
        for window, held in counts.held.items():
            costs += held[:, None] * self._held[window]
        for reach, cost in self._seen.items():
            costs += counts.seen[reach][:, None] * cost
        unpacks = self._is_direct.at(decoding + newcomers) * (tokens > 0)[:, None]
        return costs + unpacks * self._unpacked

    def _tabulate_decode(self, lanes: list[int]) -> None:
        """Tabulate what a pass costs by itself, for each token, and for each slot that is read."""
        assert self._policy.lanes is not None
        problem = self._problem
        # Routed experts are those of all rows of a pass, which may be more than its lanes.
        most = self._policy.lanes.pass_rows if problem.loads_on_demand else lanes[-1]
        more = [n for n in _sizes(lanes[-1], most) if n > lanes[-1]]
        windows = dict.fromkeys(kind.cache.window for kind in problem.layer_kinds)
        length = float(problem.workload.context_len or 1)
        passes, tokens, direct = [], [], []
        slots: dict[int | None, list[FloatArray]] = {window: [] for window in windows}
        for count in lanes + more:
            of_lanes, shares = self._of_lanes(count)
            empty = self._cost(of_lanes, shares, decode_stage(of_lanes, tokens=0)) * count
            full = self._cost(of_lanes, shares, decode_stage(of_lanes, tokens=1)) * count
            passes.append(empty)
            tokens.append(full - empty)
            direct.append([float(of_lanes.multiplies_packed(self._hardware.compute))])
            for window, costs in slots.items():
                stage = decode_stage(of_lanes, tokens=1, slots={window: length})
                costs.append((self._cost(of_lanes, shares, stage) - full / count) / length)
        kinds = [w.kind for w in self._work]
        late = [i for i, kind in enumerate(kinds) if kind in ("read_experts", "send_experts")]
        self._late = [*late, *(len(kinds) + i for i in late)]
        rows = np.array([0, *lanes, *more], float)
        self._per_pass = _Table(rows, np.array([passes[0], *passes]))
        self._decoded = _Table(rows, np.array([0 * tokens[0], *tokens]))
        self._is_direct = _Table(rows, np.array([direct[0], *direct]))
        self._read = {w: _Table(rows, np.array([c[0], *c])) for w, c in slots.items()}

    def _tabulate_prompts(self, shares: Shares[float], rows: list[int]) -> None:
        """Tabulate what the tokens of prompts cost, the last token of each, and their cache."""
        problem = self._problem
        scores = problem.workload.scores_prompts
        multiplied, ended = [], []

        def cost(size: int, *kinds: str, tokens: int, scored: int) -> FloatArray:
            stage = prompt_stage(problem, tokens=tokens, rows=size, scored_tokens=scored)
            return self._cost(problem, shares, stage, kinds)

        for n in rows:
            one = cost(n, tokens=n, scored=n * scores)
            multiplied.append(cost(n, tokens=2 * n, scored=2 * n * scores) - one)
            # The last layer finishes the last token of each prompt, unless all are finished; no
            # token is scored by the last one.
            kinds, sign = (("head",), -1) if scores else (("finish", "experts"), 1)
            more = cost(n, *kinds, tokens=n, scored=1) - cost(n, *kinds, tokens=n, scored=0)
            ended.append(sign * more)
        sizes = np.array([0, *rows], float)
        self._multiplied = _Table(sizes, np.array([0 * multiplied[0], *multiplied]))
        self._ended = _Table(sizes, np.array([ended[0], *ended]))
        none = prompt_stage(problem, tokens=1, rows=1)
        plain = self._cost(problem, shares, none)
        once = self._cost(problem, replace(shares, per_block=1.0), none)
        self._unpacked = once - plain

        def slope(stage: PassStage) -> FloatArray:
            return (self._cost(problem, shares, stage) - plain) / MANY

        windows = {kind.cache.window for kind in problem.layer_kinds}
        reaches = {reach_of(kind.spec.attention) for kind in problem.layer_kinds}
        self._stored = {w: slope(replace(none, stored={w: MANY})) for w in windows}
        self._held = {w: slope(replace(none, held={w: MANY})) for w in windows}
        self._seen = {r: slope(replace(none, seen={r: MANY})) for r in reaches}

    def _of_lanes(self, count: int) -> tuple[Problem, Shares[float]]:
        """Return the problem of a block of so many lanes, in as few batches as hold them."""
        policy = self._policy
        batches = min(-(-count // policy.gpu_batch_size), policy.num_gpu_batches)
        size = -(-count // batches)
        policy = replace(
            policy,
            gpu_batch_size=size,
            num_gpu_batches=batches,
            prefill_batch_size=min(size, policy.prefill_batch_size),
        )
        return problem_of(policy, self._hardware), shares_of(policy)

    def _cost(
        self,
        problem: Problem,
        shares: Shares[float],
        stage: PassStage,
        kinds: tuple[str, ...] = (),
    ) -> FloatArray:
        """Return the costs of a stage for one sequence, of all kinds of tasks or of some."""
        work = stage_work(problem, shares, stage)
        alone = work
        # A single batch is all of them.
        if not stage.is_prefill and problem.num_batches[1] > 1:
            alone = stage_work(problem, shares.of_one_batch(problem.gpu_batch_size), stage)
        kept = [not kinds or w.kind in kinds for w in work]
        seconds = [w.seconds * keep for w, keep in zip(work, kept, strict=True)]
        moved = [(w.memory_bytes or 0.0) * keep for w, keep in zip(work, kept, strict=True)]
        series = sum(
            w.seconds for w, keep in zip(alone, kept, strict=True) if keep and w.kind in IN_SERIES
        )
        return np.array([*seconds, *moved, series])


def _sizes(first: int, last: int) -> list[int]:
    """Return the powers of two below ``first``, ``first`` and its multiples by them, ``last``."""
    below = [2**i for i in range(first.bit_length()) if 2**i < first]
    above = [first * 2**i for i in range(last.bit_length()) if first * 2**i < last]
    return [*below, *above, last]

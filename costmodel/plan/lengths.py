"""The lengths of a job: the prompts, the answers that are expected, and the longest allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodel.model.cache import CacheSpec
from costmodel.plan.pages import ring_tokens
from costmodel.plan.prefixes import Prefixes
from profiles.errors import InputError

IntArray = NDArray[np.int64]

# Answers that a sketch keeps one by one: the longest ones set when a job ends.
EXACT_ANSWERS = 8
# Prefixes that a sketch tells of; prompts with another count as if they had none.
MOST_PREFIXES = 4
# More prompts, or tokens of one, are a mistake, and overflow numbers later.
MOST = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """A job's lengths in few numbers, as a policy's file keeps them.

    Entry ``i`` stands for ``weights[i]`` prompts of ``prompts[i]`` tokens, whose answers are
    expected to have ``outputs[i]`` tokens and may have ``limits[i]``. The first tokens of these
    prompts are the prefix ``prefixes[i]``, of ``prefix_tokens[prefixes[i]]`` tokens; -1 is none.
    """

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    limits: tuple[int, ...]
    weights: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    prefix_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.prompts, self.outputs, self.limits, self.weights)
        sizes = {len(column) for column in columns}
        if len(sizes) > 1 or sizes == {0}:
            raise InputError(
                "lengths",
                got=f"{', '.join(str(len(column)) for column in columns)} entries",
                allowed="as many prompts, outputs, limits and weights, and at least one",
            )
        known = range(-1, len(self.prefix_tokens))
        if self.prefixes and (
            len(self.prefixes) != len(self.weights) or not set(self.prefixes) <= set(known)
        ):
            raise InputError(
                "lengths.prefixes",
                got=f"{len(self.prefixes)} of {len(self.prefix_tokens)} prefixes",
                allowed="none, or for each entry a place in lengths.prefix_tokens or -1",
            )
        for value in (min(map(min, columns)), max(map(max, columns)), self.num_prompts):
            if not 1 <= value <= MOST:
                raise InputError("lengths", got=value, allowed=f"1 to {MOST}")

    @property
    def num_prompts(self) -> int:
        """Prompts of the job."""
        return sum(self.weights)

    def scaled(self, num_prompts: int) -> Sketch:
        """Return a job of so many prompts, fewer than these, in the same proportions.

        Entries of one prompt, such as the longest, are kept. Others may have none left.
        """
        single = sum(weight == 1 for weight in self.weights)
        factor = max(0, num_prompts - single) / max(1, self.num_prompts - single)
        weights, reached, taken = [], 0, 0
        for weight in self.weights:
            reached += 0 if weight == 1 else weight
            last, taken = taken, round(reached * factor)
            weights.append(1 if weight == 1 else taken - last)
        kept = [i for i, weight in enumerate(weights) if weight]
        columns = (self.prompts, self.outputs, self.limits, weights)
        prompts, outputs, limits, counts = (tuple(column[i] for i in kept) for column in columns)
        return Sketch(
            prompts=prompts,
            outputs=outputs,
            limits=limits,
            weights=counts,
            prefixes=tuple(self.prefixes[i] for i in kept) if self.prefixes else (),
            prefix_tokens=self.prefix_tokens,
        )

    def lengths(self) -> Lengths:
        """Return a job of as many prompts with these lengths."""
        columns = (np.repeat(c, self.weights) for c in (self.prompts, self.outputs, self.limits))
        prompts, outputs, limits = columns
        numbers = np.repeat(self.prefixes or [-1] * len(self.weights), self.weights)
        prefixes = Prefixes(numbers, np.array(self.prefix_tokens, np.int64))
        return Lengths(prompts, outputs, limits, prefixes=prefixes)


class Lengths:
    """The lengths of every prompt of a job in tokens, each an int64 [requests].

    Parameters
    ----------
    prompts
        Tokens of each prompt.
    outputs
        Tokens that each answer is expected to have; more than its limit counts as the limit.
    limits
        Most tokens of each answer (``max_tokens``). ``None``: ``outputs``.
    prefixes
        What prompts share, with at least one token less than each of them. ``None``: nothing.

    Raises
    ------
    InputError
        Without prompts, for columns of different lengths, or for a length below 1.
    """

    def __init__(
        self,
        prompts: ArrayLike,
        outputs: ArrayLike,
        limits: ArrayLike | None = None,
        *,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.prompts: IntArray = np.array(prompts, np.int64)
        self.limits: IntArray = np.array(outputs if limits is None else limits, np.int64)
        columns = {"prompts": self.prompts, "outputs": np.array(outputs, np.int64)}
        columns["limits"] = self.limits
        for name, column in columns.items():
            if column.shape != (len(self.prompts),) or not len(column):
                raise InputError(
                    f"lengths of {name}",
                    got=f"{column.size} for {self.prompts.size} prompts",
                    allowed="one for each prompt, and at least one prompt",
                )
            if (smallest := int(column.min())) < 1:
                raise InputError(f"lengths of {name}", got=smallest, allowed="1 or more")
        self.outputs: IntArray = np.minimum(columns["outputs"], self.limits)
        self.prefixes = prefixes or Prefixes.none(len(self))
        assert (self.prefixes.of_prompts < self.prompts).all()

    def __len__(self) -> int:
        return len(self.prompts)

    def expecting(self, outputs: ArrayLike) -> Lengths:
        """Return the same requests with other expected answers, int [requests]."""
        return Lengths(self.prompts, outputs, self.limits, prefixes=self.prefixes)

    def sharing(self, prefixes: Prefixes) -> Lengths:
        """Return the same requests with what their prompts share."""
        return Lengths(self.prompts, self.outputs, self.limits, prefixes=prefixes)

    @property
    def own(self) -> Lengths:
        """The same requests without the tokens that their prompts share."""
        prompts = self.prompts - self.prefixes.of_prompts
        return Lengths(prompts, self.outputs, self.limits)

    @property
    def stored(self) -> IntArray:
        """Most tokens of each sequence that the cache keeps, int64 [requests]. The last token is
        never attended to, and an answer of one token reads no cache."""
        return np.where(self.limits > 1, self.prompts + self.limits - 1, 0)

    @property
    def mean_prompt(self) -> float:
        """Mean tokens of a prompt."""
        return float(self.prompts.mean())

    @property
    def mean_output(self) -> float:
        """Mean tokens of an answer, as expected."""
        return float(self.outputs.mean())

    @property
    def mean_context(self) -> float:
        """Mean tokens that one sequence keeps, over all passes of all sequences.

        Long answers take part in more passes. This is more than half an answer behind a prompt.
        """
        return self._moments(None)[0]

    @property
    def sd_context(self) -> float:
        """Standard deviation of the tokens that one sequence keeps in a random pass."""
        return self._moments(None)[1]

    def slots(self, cache: CacheSpec) -> tuple[float, float]:
        """Return mean and standard deviation of the slots of one sequence in a layer's cache."""
        return self._moments(ring_tokens(cache.window))

    def _moments(self, most: int | None) -> tuple[float, float]:
        """Return mean and deviation of ``min(context, most)`` over the passes of all sequences."""
        prompts, passes = self.prompts.astype(float), self.outputs.astype(float)
        # The context grows by a token a pass: from the prompt to the last token but one.
        growing = passes if most is None else np.clip(most - prompts, 0, passes)
        ramp = growing * (growing - 1) / 2
        ramp_squares = ramp * (2 * growing - 1) / 3
        sums = growing * prompts + ramp
        squares = growing * prompts**2 + 2 * prompts * ramp + ramp_squares
        if most is not None:
            sums += (passes - growing) * most
            squares += (passes - growing) * most**2
        mean = sums.sum() / passes.sum()
        variance = squares.sum() / passes.sum() - mean**2
        return float(mean), float(max(0.0, variance) ** 0.5)

    def sketch(self, count: int = 48) -> Sketch:
        """Return at most ``count`` entries for the job: the means of ``groups``."""
        groups = self.groups(count)
        columns = (self.prompts, self.outputs, self.limits)
        prompts, outputs, limits = (means_of(column, groups) for column in columns)
        weights = tuple(len(group) for group in groups)
        kept, numbers = self._largest_prefixes()
        prefixes = tuple(int(numbers[group[0]]) for group in groups) if kept else ()
        return Sketch(
            prompts=prompts,
            outputs=outputs,
            limits=limits,
            weights=weights,
            prefixes=prefixes,
            prefix_tokens=tuple(int(self.prefixes.tokens[number]) for number in kept),
        )

    def _largest_prefixes(self) -> tuple[list[int], IntArray]:
        """Return the prefixes that save the most tokens, and for each request the place of its own
        among them, -1 for none: int64 [requests]."""
        numbers = self.prefixes.numbers
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self.prefixes.tokens))
        saved = (counts - 1) * self.prefixes.tokens
        kept = [int(i) for i in np.argsort(-saved, kind="stable")[:MOST_PREFIXES] if saved[i] > 0]
        places: IntArray = np.full(len(self), -1, np.int64)
        for place, number in enumerate(kept):
            places[numbers == number] = place
        return kept, places

    def groups(self, count: int = 48) -> list[IntArray]:
        """Return the requests in at most ``count`` groups of similar lengths.

        The longest answers are alone, as are the longest prompt, the largest limit and the most
        tokens that the cache keeps. All others are grouped by their answers, then by their prompts,
        so that groups have about equal numbers of tokens. Those that share one of the largest
        prefixes are apart.
        """
        by_output = np.lexsort((self.prompts, self.outputs))
        longest = by_output[: -EXACT_ANSWERS - 1 : -1].tolist()
        largest = (int(c.argmax()) for c in (self.prompts, self.limits, self.stored))
        exact = np.array(list(dict.fromkeys([*longest, *largest])))
        groups = [exact[i : i + 1] for i in range(len(exact))]
        rest, wanted = by_output[~np.isin(by_output, exact)], count - len(exact)
        prefixes = self._largest_prefixes()[1][rest]
        for prefix in np.unique(prefixes):
            alike = rest[prefixes == prefix]
            share = max(1, wanted * len(alike) // len(rest))
            num_bins = max(1, round(share**0.5))
            for part in _parts(alike, self.outputs, num_bins):
                by_prompt = part[np.argsort(self.prompts[part], kind="stable")]
                groups += _parts(by_prompt, self.prompts, max(1, share // num_bins))
        return groups


def means_of(column: IntArray, groups: Sequence[IntArray]) -> tuple[int, ...]:
    """Return the rounded mean of a column, int64 [requests], over each group of requests."""
    return tuple(round(float(column[group].mean())) for group in groups)


def _parts(requests: IntArray, tokens: IntArray, count: int) -> list[IntArray]:
    """Cut requests into at most ``count`` parts of about as many ``tokens`` each."""
    reached = np.cumsum(tokens[requests])
    if not len(reached):
        return []
    ends = np.searchsorted(reached, reached[-1] / count * np.arange(1, count))
    return [part for part in np.split(requests, ends) if len(part)]

"""The lengths of answers to be expected, by those of earlier runs.

An answer that was cut by its limit only tells that it is longer. So the share of answers that
exceed a length is estimated as of lifetimes (Kaplan and Meier 1958).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from costmodel.plan.lengths import IntArray

# A length above this keeps so many leading bits that it is off by at most 3 %.
EXACT_LEN, LEADING_BITS = 32, 5
# Beyond so many answers of one kind of prompts, older ones lose half their weight.
MOST_ANSWERS = 20_000
# With fewer answers that ended by themselves, others are asked.
LEAST_ENDED = 20
# Prompts of 2**20 tokens and more are one kind.
MOST_KINDS = 21


@dataclass(slots=True)
class AnswerCounts:
    """How often answers of each length occurred: ``ended`` by themselves, or ``cut`` there."""

    ended: Counter[int] = field(default_factory=Counter)
    cut: Counter[int] = field(default_factory=Counter)

    def add(self, length: int, *, is_cut: bool) -> None:
        """Count one answer; lengths of more than ``EXACT_LEN`` tokens are rounded."""
        (self.cut if is_cut else self.ended)[rounded_len(length)] += 1
        if self.ended.total() + self.cut.total() > MOST_ANSWERS:
            for counts in (self.ended, self.cut):
                for kept, count in list(counts.items()):
                    counts[kept] = count // 2
                    if not counts[kept]:
                        del counts[kept]

    def expected(self, limits: IntArray) -> NDArray[np.float64]:
        """Return the expected length of answers that are cut at ``limits``, float64 [requests].

        Beyond the longest answer that was seen to end, none is expected to.
        """
        lengths = np.array(sorted({*self.ended, *self.cut}), np.int64)
        ended = np.array([self.ended[n] for n in lengths.tolist()], float)
        cut = np.array([self.cut[n] for n in lengths.tolist()], float)
        # Those that had not ended or been cut before; what is cut at a length did not end there.
        at_risk = np.cumsum((ended + cut)[::-1])[::-1]
        exceeds = np.cumprod(1 - ended / at_risk)
        # E[min(G, limit)] is the sum of P(G > t) over t below the limit: a step from each length.
        begins = np.concatenate([[0], lengths])
        shares = np.concatenate([[1.0], exceeds])
        sums = np.concatenate([[0.0], np.cumsum(shares[:-1] * np.diff(begins))])
        place = np.searchsorted(begins, limits, side="right") - 1
        found: NDArray[np.float64] = sums[place] + shares[place] * (limits - begins[place])
        return found


@dataclass(slots=True)
class AnswerHistory:
    """Lengths of answers by the length of their prompt: of kind ``k`` from ``2**k`` tokens on."""

    kinds: dict[int, AnswerCounts] = field(default_factory=dict)

    def add(self, prompts: Iterable[int], outputs: Iterable[int], is_cut: Iterable[bool]) -> None:
        """Count answers of ``outputs`` tokens to ``prompts`` of so many tokens, 1 or more each."""
        for prompt, length, cut in zip(prompts, outputs, is_cut, strict=True):
            self.kinds.setdefault(kind_of(prompt), AnswerCounts()).add(length, is_cut=cut)

    def expected(self, prompts: IntArray, limits: IntArray) -> IntArray:
        """Return the tokens to be expected of each answer, int64 [requests], at most its limit.

        Kinds of prompts with few answers are estimated by the answers to all prompts; where these
        are few as well, the limit is expected.
        """
        found = limits.copy()
        kinds = np.array([kind_of(n) for n in prompts.tolist()], np.int64)
        together = AnswerCounts()
        for counts in self.kinds.values():
            together.ended.update(counts.ended)
            together.cut.update(counts.cut)
        for kind in np.unique(kinds).tolist():
            own = self.kinds.get(kind, together)
            counts = own if own.ended.total() >= LEAST_ENDED else together
            if counts.ended.total() >= LEAST_ENDED:
                of_kind = kinds == kind
                mean = np.rint(counts.expected(limits[of_kind])).astype(np.int64)
                found[of_kind] = np.clip(mean, 1, limits[of_kind])
        return found


def kind_of(prompt: int) -> int:
    """Return the kind of a prompt of so many tokens: the logarithm to base 2, rounded down."""
    return min(prompt.bit_length() - 1, MOST_KINDS - 1)


def rounded_len(length: int) -> int:
    """Return a length with its leading bits, so that few different ones occur."""
    if length <= EXACT_LEN:
        return length
    step: int = 1 << (length.bit_length() - LEADING_BITS)
    return (length + step // 2) // step * step

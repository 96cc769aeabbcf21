"""Tokens that several prompts of a job begin with, which are computed and kept once. No torch.

Prompts are compared in whole pages, so that a prefix is as many pages of the cache. The prompts
whose pages begin alike are the nodes of a tree. Of these nodes, those are chosen that save the most
tokens, where each prompt has at most one prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from costmodel.plan.pages import PAGE

IntArray = NDArray[np.int64]

# A shorter prefix saves less than it takes to keep.
LEAST_TOKENS = 2 * PAGE


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of a job.

    Parameters
    ----------
    numbers
        The prefix of each prompt, -1 without one: int64 [prompts].
    tokens
        The tokens of each prefix, whole pages: int64 [prefixes].
    """

    numbers: IntArray
    tokens: IntArray

    @classmethod
    def none(cls, num_prompts: int) -> Prefixes:
        """Return that no prompt has a prefix."""
        return cls(np.full(num_prompts, -1, np.int64), np.zeros(0, np.int64))

    def only(self, prompts: Sequence[int] | IntArray) -> Prefixes:
        """Return those of some prompts, in their order."""
        return Prefixes(self.numbers[np.asarray(prompts, np.int64)], self.tokens)

    @property
    def of_prompts(self) -> IntArray:
        """Tokens of each prompt's prefix, 0 without one: int64 [prompts]."""
        # The last entry is that of prompts without a prefix, number -1.
        of_prompts: IntArray = np.append(self.tokens, 0)[self.numbers]
        return of_prompts


@dataclass(slots=True)
class _Node:
    """Prompts with the same first ``pages``; ``own`` are those that share nothing longer.

    ``above`` are the pages of the nodes above it, 0 first: one of them is the nearest prefix. For
    each of these, ``opens`` says whether this node is then a prefix too.
    """

    pages: int
    parent: _Node | None = None
    own: list[int] = field(default_factory=list)
    above: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))
    opens: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    # The place of the nearest prefix in ``above`` of this node's children, and its number.
    nearest: int = 0
    number: int = -1


def find_prefixes(
    ids: NDArray[np.uint32], offsets: IntArray, groups: IntArray | None = None
) -> Prefixes:
    """Choose the prefixes of a job.

    A prefix has at least ``LEAST_TOKENS`` tokens and two prompts. Each of them has at least one
    token more, whose hidden state chooses the first token of its answer.

    Parameters
    ----------
    ids
        The tokens of all prompts, uint32 [tokens].
    offsets
        Where each prompt begins there, and the end of the last: int64 [prompts + 1].
    groups
        Of each prompt, int64 [prompts]: prompts of different groups share nothing.

    Returns
    -------
    Prefixes
        Those with which the fewest tokens are computed.

    Notes
    -----
    A million tokens take some tenths of a second, and temporaries of as many bytes as ``ids``.
    """
    pages = np.maximum(np.diff(offsets) - 1, 0) // PAGE
    count = len(pages)
    long = np.flatnonzero(pages * PAGE >= LEAST_TOKENS).tolist()
    starts, group_of = offsets.tolist(), np.zeros(count) if groups is None else groups
    # Bytes compare faster than arrays. Their order does not matter, only that equal ones are next
    # to each other.
    keys = {i: (int(group_of[i]), _tokens(ids, starts[i], int(pages[i])).tobytes()) for i in long}
    order = sorted(long, key=keys.__getitem__)
    shared = [
        _shared_pages(ids, (starts[a], int(pages[a])), (starts[b], int(pages[b])))
        if group_of[a] == group_of[b]
        else 0
        for a, b in pairwise(order)
    ]
    nodes = _tree(order, shared)
    return _chosen(nodes, count)


def _tokens(ids: NDArray[np.uint32], start: int, pages: int) -> NDArray[np.uint32]:
    return ids[start : start + pages * PAGE]


def _shared_pages(ids: NDArray[np.uint32], a: tuple[int, int], b: tuple[int, int]) -> int:
    """Return how many first pages two prompts share, each given by its start and its pages."""
    most = min(a[1], b[1])
    differ = _tokens(ids, a[0], most) != _tokens(ids, b[0], most)
    return int(differ.argmax()) // PAGE if differ.any() else most


def _tree(order: list[int], shared: list[int]) -> list[_Node]:
    """Return the nodes, each behind its children; ``shared`` are the pages that neighbours in
    ``order`` share."""
    done: list[_Node] = []
    # From the root, which no prompt counts as shared, to the present node.
    path = [_Node(0)]
    for prompt, behind in zip(order, [*shared, 0], strict=False):
        behind = behind if behind * PAGE >= LEAST_TOKENS else 0
        if behind > path[-1].pages:
            path.append(_Node(behind))
        path[-1].own.append(prompt)
        while path[-1].pages > behind:
            ended = path.pop()
            if path[-1].pages < behind:
                path.append(_Node(behind))
            ended.parent = path[-1] if path[-1].pages else None
            done.append(ended)
    return done


def _chosen(nodes: list[_Node], num_prompts: int) -> Prefixes:
    """Choose the nodes that save the most pages."""
    for node in reversed(nodes):
        if node.parent is not None:
            node.above = np.append(node.parent.above, node.parent.pages)
    # Of each node the pages saved below it, where the nearest prefix is one above or itself.
    below = {id(node): np.zeros(len(node.above) + 1, np.int64) for node in nodes}
    for node in nodes:
        saved, own = below.pop(id(node)), len(node.own)
        # The prefix itself is computed once.
        opened = saved[-1] + (own - 1) * node.pages
        closed = saved[:-1] + own * node.above
        node.opens = opened > closed
        if node.parent is not None:
            below[id(node.parent)] += np.maximum(opened, closed)
    numbers, tokens = np.full(num_prompts, -1, np.int64), list[int]()
    for node in reversed(nodes):
        if node.parent is not None:
            node.nearest, node.number = node.parent.nearest, node.parent.number
        if node.opens[node.nearest]:
            node.nearest, node.number = len(node.above), len(tokens)
            tokens.append(node.pages * PAGE)
        numbers[node.own] = node.number
    return Prefixes(numbers, np.array(tokens, np.int64))

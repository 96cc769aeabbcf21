"""Teams of nodes, each of which runs a copy of the model: the best ones of nodes of few kinds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

# How many nodes of each kind.
Counts = tuple[int, ...]
# Up to so many different copies are compared; of more, some regular ones.
MOST_TEAMS = 70


def best_teams(nodes: Counts, worth: Callable[[Counts], float], *, largest: int) -> list[Counts]:
    """Divide nodes into teams so that the sum of what the teams are worth is the largest.

    Each team runs one copy of the model. Nodes may be left out. The result is the best division
    into ``teams_of(nodes)``.

    Parameters
    ----------
    worth
        What a team is worth; zero or less for one that can do nothing.
    largest
        Most nodes of a team.
    """
    teams = [team for team in teams_of(nodes, largest) if worth(team) > 0]

    @functools.cache
    def best(left: Counts) -> tuple[float, tuple[Counts, ...]]:
        found: tuple[float, tuple[Counts, ...]] = (0.0, ())
        for team in teams:
            rest = tuple(a - b for a, b in zip(left, team, strict=True))
            if min(rest) >= 0:
                value, others = best(rest)
                if worth(team) + value > found[0] * (1 + 1e-12):
                    found = worth(team) + value, (team, *others)
        return found

    # Smaller numbers first, so that no call goes deep.
    for left in itertools.product(*(range(count + 1) for count in nodes)):
        best(left)
    return list(best(nodes)[1])


def teams_of(nodes: Counts, largest: int) -> list[Counts]:
    """Return the teams to compare: all, or where they are too many, regular ones.

    Regular are few nodes of one kind, an even part of one kind, and an even part of all nodes.
    """
    if math.prod(count + 1 for count in nodes) - 1 <= MOST_TEAMS and sum(nodes) <= 8:
        teams = itertools.product(*(range(n + 1) for n in nodes))
        return [team for team in teams if 1 <= sum(team) <= largest]
    found: dict[Counts, None] = {}
    for kind, count in enumerate(nodes):
        for size in _regular(min(count, largest)):
            found[_of_kind(nodes, kind, size)] = None
    for parts in _regular(max(nodes)):
        team = tuple(count // parts for count in nodes)
        if 1 <= sum(team) <= largest:
            found[team] = None
    return list(found)


def _of_kind(nodes: Sequence[int], kind: int, size: int) -> Counts:
    return tuple(size if place == kind else 0 for place in range(len(nodes)))


def _regular(count: int) -> list[int]:
    """Return powers of two, their sums of one and a half, and the number itself."""
    powers = [1 << i for i in range(count.bit_length())]
    sizes = {*powers, *(3 * power // 2 for power in powers if power > 1), count}
    return sorted(size for size in sizes if 1 <= size <= count)

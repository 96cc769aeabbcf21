"""Cuts of the layers, and teams of nodes, against all that there are."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from costmodel.cluster.cuts import MOST_CUTS, all_cuts, best_cut, even_cut, num_cuts
from costmodel.cluster.teams import MOST_TEAMS, Counts, best_teams, teams_of


def test_all_cuts_of_a_few_layers() -> None:
    cuts = list(all_cuts(4, 3))
    assert sorted(cuts) == [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    assert len(set(all_cuts(9, 4))) == num_cuts(9, 4) == 56
    assert list(all_cuts(5, 1)) == [(5,)]


@pytest.mark.parametrize(
    ("num_layers", "weights", "cut"),
    [
        (12, [1, 1, 1], (4, 4, 4)),
        (12, [3, 2, 1], (6, 4, 2)),
        (7, [1, 1], (4, 3)),
        (4, [100, 1, 1], (2, 1, 1)),
    ],
)
def test_an_even_cut_follows_the_weights(
    num_layers: int, weights: list[float], cut: tuple[int, ...]
) -> None:
    assert even_cut(num_layers, weights) == cut


def test_moves_find_the_best_of_many_cuts() -> None:
    """Stages of 60 layers: the fewest seconds are those of the best cut, tried by hand."""
    speeds = [1.0, 2.5, 0.7, 4.0]
    assert num_cuts(60, 4) > MOST_CUTS

    def seconds_of(cut: tuple[int, ...]) -> float:
        # The last stage also has a head.
        loads = [count / speed for count, speed in zip(cut, speeds, strict=True)]
        loads[-1] += 3.0
        return max(loads) + sum(loads) / 100

    found = best_cut(even_cut(60, [1.0] * 4), seconds_of)
    assert sum(found) == 60
    assert seconds_of(found) == pytest.approx(min(map(seconds_of, all_cuts(60, 4))), rel=0.02)


def test_few_cuts_are_all_tried() -> None:
    """The best cut is no move away from the even one."""
    assert best_cut((2, 2, 2), lambda cut: 0.0 if cut == (4, 1, 1) else 1.0) == (4, 1, 1)


def _worth_of(nodes: Counts, worth: dict[Counts, float]) -> float:
    """Return the most that nodes are worth in teams, by trying every first team."""
    best = 0.0
    for team in itertools.product(*(range(count + 1) for count in nodes)):
        if any(team):
            rest = tuple(a - b for a, b in zip(nodes, team, strict=True))
            best = max(best, worth[team] + _worth_of(rest, worth))
    return best


@pytest.mark.parametrize("nodes", [(1,), (5,), (2, 3), (1, 1, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_teams_are_the_best_of_all(nodes: Counts, seed: int) -> None:
    rng = random.Random(seed)
    teams = itertools.product(*(range(count + 1) for count in nodes))
    worth = {t: rng.choice([-1.0, 0.0, rng.uniform(0, sum(t))]) for t in teams}
    found = best_teams(nodes, worth.__getitem__, largest=9)
    for kind, most in enumerate(nodes):
        assert sum(team[kind] for team in found) <= most
    value = sum(worth[team] for team in found)
    assert value == pytest.approx(max(0.0, _worth_of(nodes, worth)))


def test_many_nodes_have_few_teams() -> None:
    teams = teams_of((64,), 100)
    assert {(1,), (2,), (3,), (48,), (64,)} <= set(teams) and len(teams) < 16
    # No team has more nodes than the model has layers.
    assert max(teams_of((64,), 61)) == (61,) and max(teams_of((3,), 2)) == (2,)
    two_kinds = teams_of((32, 16), 100)
    assert {(32, 16), (16, 8), (1, 0), (0, 16)} <= set(two_kinds)
    assert len(two_kinds) < MOST_TEAMS < math.prod((33, 17))


def test_many_nodes_are_divided_into_the_best_of_these() -> None:
    """A team of twelve is worth more for each node than any other."""
    found = best_teams((64,), lambda t: t[0] * (1.5 if t == (12,) else 1.0), largest=61)
    assert found.count((12,)) == 5
    assert sum(team[0] for team in found) == 64

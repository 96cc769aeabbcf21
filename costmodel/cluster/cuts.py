"""Where the layers of a model are cut into stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

# Up to so many cuts, all are tried; among more, single layers are moved from stage to stage.
MOST_CUTS = 256

Cut = tuple[int, ...]
# Seconds of a cut; infinity where some stage does not fit its node.
SecondsOf = Callable[[Cut], float]


def num_cuts(num_layers: int, num_stages: int) -> int:
    """Return the number of ways to cut layers into stages of one layer or more."""
    return math.comb(num_layers - 1, num_stages - 1)


def all_cuts(num_layers: int, num_stages: int) -> Iterator[Cut]:
    """Yield the layers of each stage, for each way to cut."""
    for ends in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, num_layers)))


def even_cut(num_layers: int, weights: Sequence[float]) -> Cut:
    """Return the cut whose stages have about as many layers as their weights say, at least one."""
    shares = [num_layers * weight / sum(weights) for weight in weights]
    counts = [max(1, math.floor(share)) for share in shares]
    while (rest := num_layers - sum(counts)) != 0:
        wanted = [share - count for share, count in zip(shares, counts, strict=True)]
        places = range(len(counts))
        if rest > 0:
            counts[max(places, key=lambda i: wanted[i])] += 1
        else:
            counts[min((i for i in places if counts[i] > 1), key=lambda i: wanted[i])] -= 1
    return tuple(counts)


def best_cut(start: Cut, seconds_of: SecondsOf) -> Cut:
    """Return the cut with the fewest seconds: of all cuts, or if they are too many, one that no
    move of a layer from a stage to another makes faster."""
    num_layers, num_stages = sum(start), len(start)
    if num_cuts(num_layers, num_stages) <= MOST_CUTS:
        return min(all_cuts(num_layers, num_stages), key=seconds_of)
    best, best_s = start, seconds_of(start)
    while True:
        moved = min(_moves(best), key=seconds_of, default=best)
        moved_s = seconds_of(moved)
        if not moved_s < best_s:
            return best
        best, best_s = moved, moved_s


def _moves(cut: Cut) -> Iterator[Cut]:
    """Yield the cuts that differ by one layer in two stages."""
    for source, target in itertools.permutations(range(len(cut)), 2):
        if cut[source] > 1:
            counts = list(cut)
            counts[source] -= 1
            counts[target] += 1
            yield tuple(counts)

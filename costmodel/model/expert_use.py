"""How often a router chooses each expert of a layer, from the most used to the least.

Real routers choose some experts much more often than others. Zipf's law describes that with one
number: the expert of rank ``r`` is chosen by a share ``c / r**skew`` of all tokens. A skew of zero
is uniform routing.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# No expert is chosen by a larger share of all tokens, unless all are.
MOST_CHOSEN = 0.45
MOST_SKEW = 3.0
# Share of all choices that chance may move to the rarest experts of a count.
SLACK = 0.005
# Skews that are tried to describe counts.
SKEWS = np.linspace(0.0, MOST_SKEW, 61)


@functools.lru_cache(maxsize=256)
def chances(num_experts: int, per_token: int, skew: float) -> FloatArray:
    """Return the share of all tokens that choose each expert, by rank, float64 [num_experts].

    The shares sum to ``per_token``. They are ``min(most, c / rank**skew)``.
    """
    most = max(MOST_CHOSEN, per_token / num_experts)
    law = np.arange(1, num_experts + 1) ** -skew
    found: FloatArray = np.full(num_experts, most)
    for capped in range(num_experts):
        scale = (per_token - capped * most) / law[capped:].sum()
        if scale * law[capped] <= most * (1 + 1e-12):
            found[capped:] = scale * law[capped:]
            break
    found.setflags(write=False)
    return found


@functools.lru_cache(maxsize=4096)
def needed_of_rarest(
    num_experts: int, per_token: int, skew: float, num_tokens: float, share: float
) -> float:
    """Return how many of the rarest experts some tokens need on average.

    ``share`` of all experts are the rarest ones. Tokens choose independently of each other, so
    that an expert with chance ``p`` is needed by ``n`` tokens with the chance ``1 - (1 - p)**n``.
    """
    of_each = 1 - (1 - chances(num_experts, per_token, skew)[::-1]) ** num_tokens
    sums = np.concatenate([[0.0], of_each.cumsum()])
    return float(np.interp(share * num_experts, np.arange(num_experts + 1), sums))


def skew_of(shares: FloatArray, per_token: int) -> float:
    """Return the largest skew whose law never has fewer choices of the rarest experts, but for
    ``SLACK``.

    The rarest ``m`` experts by the law are then needed at least as often as those that were
    counted, for every ``m`` and any number of tokens: ``1 - (1 - p)**n`` grows with ``p`` and is
    concave (the theorem of Tomić and Weyl on weak majorization). So bytes that are predicted with
    it are not too few.

    Parameters
    ----------
    shares
        Shares of all tokens that chose each expert, by rank, float64 [num_experts].
    """
    counted = shares[::-1].cumsum()
    for skew in SKEWS[::-1]:
        of_law = chances(len(shares), per_token, float(skew))[::-1].cumsum()
        if (of_law >= counted - SLACK * per_token).all():
            return float(skew)
    return 0.0

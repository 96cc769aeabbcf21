"""How much of what parameters allow is tried: enough of it, or with ``ALL_CASES=1`` all of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pytest
from allpairspy import AllPairs

# `make test-all` sets it.
ALL_CASES = os.environ.get("ALL_CASES") == "1"

Amount = TypeVar("Amount")


def at_most(few: Amount, every: Amount) -> Amount:
    """Return how many random cases to try: few, or with ``ALL_CASES=1`` all."""
    return every if ALL_CASES else few


def rows_covering(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which any two values of two parameters occur together."""
    if ALL_CASES or len(values) < 3:
        return list(itertools.product(*values))
    # By number, because values need not have an order.
    pairs = AllPairs([range(len(one)) for one in values])
    return [tuple(one[i] for one, i in zip(values, row, strict=True)) for row in pairs]


def covering(values: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by ``rows_covering``.

    ``values`` are those of each parameter. Where a key has several names, separated by commas, its
    values are tuples.
    """
    names = [name.split(", ") for name in values]
    rows = [
        tuple(
            itertools.chain.from_iterable(
                value if len(here) > 1 else (value,) for here, value in zip(names, row, strict=True)
            )
        )
        for row in rows_covering(*values.values())
    ]
    return pytest.mark.parametrize(tuple(itertools.chain.from_iterable(names)), rows)

"""Passes of a job as curves: groups keep the totals, and files keep the groups."""

from __future__ import annotations

import json

import numpy as np
import pytest

from costmodel.report.pass_series import MOST_POINTS, PassSeries
from profiles.errors import InputError
from profiles.files import from_json, to_json


def _series(size: int) -> tuple[PassSeries, dict[str, np.ndarray]]:
    rng = np.random.default_rng(size)
    columns = {name: rng.random(size) for name in ("seconds", "lanes", "waiting", "tokens")}
    starts = 7.0 + np.cumsum(columns["seconds"]) - columns["seconds"]
    return PassSeries.of(start_s=starts, **columns), columns


@pytest.mark.parametrize("size", [1, 3, MOST_POINTS, MOST_POINTS + 1, 1733])
def test_groups_of_passes_keep_the_totals(size: int) -> None:
    series, columns = _series(size)
    counts = np.diff(series.passes)
    assert counts.sum() == size and len(counts) == min(size, MOST_POINTS)
    assert counts.max() - counts.min() <= 1
    for name, values in columns.items():
        assert (np.array(getattr(series, name)) * counts).sum() == pytest.approx(values.sum())
    ends = np.array(series.start_s) + np.array(series.seconds) * counts
    assert series.start_s[0] == 0
    assert ends[:-1] == pytest.approx(np.array(series.start_s[1:]))


def test_a_file_keeps_them_and_broken_ones_are_refused() -> None:
    series, _ = _series(5)
    raw = json.loads(json.dumps(to_json(series)))
    assert from_json(PassSeries, raw, "passes") == series
    for broken in (
        raw | {"lanes": raw["lanes"][:-1]},
        raw | {"passes": [0, 1, 2, 2, 4, 5]},
        raw | {"passes": [1, 2, 3, 4, 5, 6]},
        raw | {"passes": [0]},
    ):
        with pytest.raises(InputError, match="passes"):
            from_json(PassSeries, broken, "passes")

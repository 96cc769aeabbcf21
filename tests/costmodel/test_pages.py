"""Pages of the cache: how many a sequence takes, by the rings of its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.plan.pages import PAGE, PoolSizes, pages_of, ring_tokens, rings_of
from costmodel.plan.policy import LanePolicy, Policy
from profiles.errors import InputError
from tests.executor.tiny_machines import make_policy
from tests.plain_models import plain_model


def test_pages_are_whole() -> None:
    assert [pages_of(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    assert ring_tokens(None) is None
    assert [ring_tokens(window) for window in (5, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


def test_a_sequence_takes_no_more_than_its_ring() -> None:
    model = plain_model(num_layers=2)
    (kind,) = model.layer_kinds
    small = replace(kind, attention=replace(kind.attention, window=PAGE + 1))
    model = replace(model, layer_kinds=(kind, small), layer_order=(0, 1))
    assert rings_of(model) == (None, 2 * PAGE)
    pool = PoolSizes.of(model, pool_tokens=10 * PAGE - 1, most_lanes=3)
    assert (pool.pages, pool.most_pages) == ((10, 6), (None, 2))
    assert pool.needed(PAGE) == (1, 1)
    assert pool.needed(4 * PAGE + 1) == (5, 2)


def test_layers_without_a_window_share_one_table() -> None:
    model = plain_model(num_layers=2)
    (kind,) = model.layer_kinds
    other = replace(kind, attention=replace(kind.attention, qkv_bias=True))
    assert rings_of(replace(model, layer_kinds=(kind, other), layer_order=(0, 1))) == (None,)


def test_lanes_of_a_policy_survive_its_file(tmp_path: Path) -> None:
    lanes = LanePolicy(pool_tokens=64, pass_rows=32, chunk_rows=16)
    policy = replace(make_policy(plain_model(), prompt_len=4, gen_len=3), lanes=lanes)
    path = tmp_path / "policy.json"
    policy.save(path)
    assert Policy.load(path) == policy
    with pytest.raises(InputError, match=r"policy\.lanes\.pool_tokens"):
        LanePolicy(pool_tokens=0, pass_rows=1)

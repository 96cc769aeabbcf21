"""Plans of clusters as text, and clusters of several sizes with their costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from costmodel.cli.cluster_plots import plot_scaling
from costmodel.cli.cluster_report import format_cluster_plan
from costmodel.cluster.nodes import NodeLink, equal_nodes
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.scaling import scale
from costmodel.cluster.search import ClusterSearch
from costmodel.plan.workload import Workload
from profiles import HardwareProfile, InputError
from profiles.files import to_json
from tests.costmodel.machines import make_compute, make_machine, make_model

WORK = Workload(prompt_len=16, gen_len=5, num_prompts=12)
LAN = NodeLink(bytes_per_s=1e9)


def _machine(disk: int = 10**12) -> HardwareProfile:
    return make_machine(cpu_memory=10**9, disk=disk, cpu=make_compute(flop=1e10))


def _search(workload: Workload) -> ClusterSearch:
    return ClusterSearch(
        ClusterQuestion(model=make_model(), workload=workload, only_runnable=False)
    )


def test_a_plan_is_told_by_nodes() -> None:
    search = _search(WORK)
    plan = search.run(equal_nodes(_machine(), 2, LAN), asks_one_more=True)
    text = format_cluster_plan(plan)
    assert "small on 2 nodes: 2 copies of the model" in text
    assert "copy 2: 50% of the prompts" in text
    assert "0 to 7" in text and "limited by node-0: cpu_compute" in text
    assert "another node like node-0" in text and "(1.50 x)" in text


def test_costs_are_those_of_the_nodes_hours() -> None:
    search = _search(replace(WORK, num_prompts=None))
    one, three = scale(search, _machine(), LAN, counts=(1, 3), price_per_hour=0.36)
    assert three.throughput_tok_per_s == pytest.approx(3 * one.throughput_tok_per_s)
    assert (one.team_sizes, three.team_sizes) == ({1: 1}, {1: 3})
    # A ten-thousandth of a dollar a second.
    assert one.cost_per_million == pytest.approx(1e-4 / one.throughput_tok_per_s * 1e6)
    with pytest.raises(InputError, match="price of a node"):
        scale(search, _machine(), LAN, counts=(1,), price_per_hour=0)


def test_a_model_without_room_has_no_costs_and_no_point() -> None:
    search = _search(WORK)
    small = make_machine(cpu_memory=10**6, disk=0)
    (found,) = scale(search, small, LAN, counts=(2,), price_per_hour=1.0)
    assert (found.throughput_tok_per_s, found.cost_per_million) == (0.0, None)
    (room,) = scale(search, _machine(), LAN, counts=(2,), price_per_hour=1.0)
    case = {"model": "small", "machine": "by hand", "points": [to_json(found), to_json(room)]}
    rates, _ = plot_scaling([case]).axes
    (line,) = rates.lines
    assert np.array(line.get_xydata()) == pytest.approx(np.array([[2, room.throughput_tok_per_s]]))

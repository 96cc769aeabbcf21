"""FlexGen's four machines, predicted from its runs on one machine.

The policies are those of the scripts ``bench_*_4x1.sh`` of FlexGen's repository: four T4 machines,
a stage each, four blocks in flight. The throughputs are the paper's (ICML 2023, section 6.1).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from costmodel.calibration.factors import calibrate
from costmodel.calibration.measured_runs import MeasuredRun, read_runs
from costmodel.cluster.estimate import estimate_pipeline
from costmodel.cluster.nodes import Cluster, NodeLink, equal_nodes
from costmodel.cluster.plan import CopyPrediction
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.search import ClusterSearch
from costmodel.cluster.stages import policies_of_stages
from profiles import recorded_profile

DATA = Path(__file__).parents[2] / "notebooks" / "data"
# 10 Gbit/s.
NETWORK = NodeLink(bytes_per_s=1.25e9, latency_s=1e-4)
NUM_MACHINES = 4


@cache
def _cluster() -> Cluster:
    """Four machines with the rates that the twelve runs on one of them tell."""
    machine = recorded_profile("t4-flexgen")
    alone = read_runs(DATA / "flexgen_paper.csv")
    fitted = calibrate(machine, alone, source="flexgen_paper.csv").hardware
    return equal_nodes(fitted, NUM_MACHINES, NETWORK)


def _runs() -> dict[str, MeasuredRun]:
    return {run.policy.model.name: run for run in read_runs(DATA / "flexgen_four_machines.csv")}


def _predicted(model: str) -> CopyPrediction:
    cluster = _cluster()
    policies = policies_of_stages(_runs()[model].policy, NUM_MACHINES)
    return estimate_pipeline(policies, cluster.nodes, cluster.links)


@pytest.mark.parametrize(
    ("model", "most"), [("opt-30b", 0.1), ("opt-175b", 0.1), ("opt-6.7b", 0.2)]
)
def test_the_paper_s_pipeline_is_predicted(model: str, most: float) -> None:
    """No run on four machines was seen by the fit."""
    measured = _runs()[model].throughput_tok_per_s
    assert _predicted(model).throughput_tok_per_s == pytest.approx(measured, rel=most)


@pytest.mark.parametrize("model", ["opt-30b", "opt-175b"])
def test_the_search_finds_a_plan_that_is_as_fast(model: str) -> None:
    """Within the memory that the profile grants; the paper's plan for OPT-175B needs more GPU."""
    policy = _runs()[model].policy
    question = ClusterQuestion(model=policy.model, workload=policy.workload, only_runnable=False)
    plan = ClusterSearch(question).run(_cluster())
    assert plan.predicted is not None
    assert plan.predicted.throughput_tok_per_s > _predicted(model).throughput_tok_per_s

"""Predict FlexGen's pipeline of four machines, and search a plan for the same machines.

The rates of a machine are fitted to the paper's runs on one machine.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from workload_run import BenchParser, say

from costmodel.calibration.factors import calibrate
from costmodel.calibration.measured_runs import read_runs
from costmodel.cluster.estimate import estimate_pipeline
from costmodel.cluster.nodes import NodeLink, equal_nodes
from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.search import ClusterSearch
from costmodel.cluster.stages import policies_of_stages
from profiles.command import run
from profiles.recorded import recorded_profile

DATA = Path(__file__).parents[2] / "notebooks" / "data"
# 10 Gbit/s.
LINK = NodeLink(bytes_per_s=1.25e9, latency_s=1e-4)
NUM_MACHINES = 4


def main(arguments: list[str]) -> None:
    """Print a line for each model."""
    BenchParser("cluster_paper.py", description=(__doc__ or "").strip(), example="").parse_args(
        arguments
    )
    alone = read_runs(DATA / "flexgen_paper.csv")
    machine = calibrate(recorded_profile("t4-flexgen"), alone, source="flexgen_paper.csv").hardware
    cluster = equal_nodes(machine, NUM_MACHINES, LINK)
    for measured in read_runs(DATA / "flexgen_four_machines.csv"):
        policy = measured.policy
        policies = policies_of_stages(policy, NUM_MACHINES)
        found = estimate_pipeline(policies, cluster.nodes, cluster.links)
        question = ClusterQuestion(
            model=policy.model, workload=policy.workload, only_runnable=False
        )
        plan = ClusterSearch(question).run(cluster)
        rate = found.throughput_tok_per_s
        error = rate / measured.throughput_tok_per_s - 1
        say(
            f"{policy.model.name}: {measured.throughput_tok_per_s} token/s measured,"
            f" {rate:.4g} predicted ({error:+.1%}, {found.limit}); own plan: {_told(plan)}"
        )


def _told(plan: ClusterPlan) -> str:
    assert plan.predicted is not None
    sizes = Counter(len(copy.stages) for copy in plan.copies)
    teams = " and ".join(f"{count} of {size} stages" for size, count in sizes.items())
    policy = plan.copies[0].stages[0].policy
    rate = plan.predicted.throughput_tok_per_s
    return (
        f"{rate:.4g} token/s, copies: {teams}, blocks of {policy.gpu_batch_size} x"
        f" {policy.num_gpu_batches}, {plan.predicted.limit}"
    )


if __name__ == "__main__":
    run(main)

"""Simulate clusters of 2 to 64 machines that run two large models: throughput, limits, costs.

Nothing is run: all figures are predictions for recorded machines.
"""

from __future__ import annotations

import time

from workload_run import BenchParser, circumstances, keep_result, say

from costmodel.cluster.nodes import NodeLink
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.scaling import scale
from costmodel.cluster.search import ClusterSearch
from costmodel.model.loading import load_model_spec
from costmodel.plan.workload import Workload
from profiles.command import run
from profiles.files import to_json
from profiles.recorded import recorded_profile

COUNTS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("llama-3.1-405b", "deepseek-v3")
# Dollars an hour: the purchase over three years, and power at 0.15 dollars a kWh. A PC for 3,000
# dollars and 550 W; a server for 9,000 dollars and 500 W.
PRICES = {"rtx4090-pc": 0.20, "epyc-server": 0.42}
WORKLOAD = Workload(prompt_len=512, gen_len=128)
# 10 Gbit/s, of which 9 % are overhead.
LINK = NodeLink(bytes_per_s=1.14e9, latency_s=1e-3)


def main(arguments: list[str]) -> None:
    """Search every cluster, and print a line for each."""
    parser = BenchParser(
        "cluster_scaling.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/cluster-scaling.json",
    )
    flags = parser.parse_args(arguments)
    cases = []
    for model in MODELS:
        search = ClusterSearch(
            ClusterQuestion(model=load_model_spec(model), workload=WORKLOAD, only_runnable=False)
        )
        for machine, price in PRICES.items():
            hardware = recorded_profile(machine)
            found = scale(search, hardware, LINK, counts=COUNTS, price_per_hour=price)
            for point in found:
                say(
                    f"{model:15} {point.num_nodes:3} x {machine:12}"
                    f" {point.throughput_tok_per_s:9.2f} token/s"
                    f" {point.cost_per_million or 0:8.2f} $/Mtoken  {point.limit}"
                )
            cases.append(
                {
                    "model": model,
                    "machine": machine,
                    "price_per_hour": price,
                    "points": [to_json(point) for point in found],
                }
            )
    result = {
        "benchmark": "simulated clusters",
        "workload": to_json(WORKLOAD),
        "link": to_json(LINK),
        "cpu_seconds": time.process_time(),
        "cases": cases,
        **circumstances("cluster_scaling.py", arguments),
    }
    keep_result(flags, result)


if __name__ == "__main__":
    run(main)

"""What ``zigzag cluster search`` does with the profiles of the nodes. No torch, no Ray."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from costmodel.cli.cluster_report import format_cluster_plan
from costmodel.cli.flags import add_search_flags, check_margin, choose_dtype, read_permitted
from costmodel.cli.work_flags import check_expected_len, read_workload
from costmodel.cluster.nodes import Cluster
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.search import ClusterSearch
from costmodel.gguf.paths import is_gguf
from costmodel.model.loading import load_model_spec
from profiles.command import Parser
from profiles.files import to_json
from profiles.output_checks import output_path


def add_cluster_search_flags(parser: Parser) -> None:
    """Add the flags of the search beside those that name the nodes."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="MODEL",
        help="preset, Hugging Face folder, config.json or GGUF file",
    )
    add(
        "--output",
        type=output_path,
        default=Path("plan.json"),
        metavar="FILE",
        help="plan to write (default: plan.json)",
    )
    add_search_flags(parser)
    add(
        "--json",
        action="store_true",
        help="print the plan as one line of JSON at the end",
    )


def check_cluster_search_flags(flags: argparse.Namespace) -> None:
    """Refuse numbers out of range, before any node is asked."""
    check_expected_len(flags.expected_len)
    check_margin(flags.margin)


def search_nodes(flags: argparse.Namespace, cluster: Cluster) -> None:
    """Search the plan of a cluster, write it to ``flags.output`` and print it.

    Raises
    ------
    InfeasibleError
        Where the model fits nowhere.
    """
    cluster = _with_budgets(cluster, flags)
    on_cpu = (n.hardware for n in cluster.nodes if n.hardware.gpu is None or n.hardware.is_emulated)
    # All nodes compute in one dtype, which the slowest of them must be good at.
    first = next(on_cpu, cluster.nodes[0].hardware)
    model = choose_dtype(load_model_spec(str(flags.model)), first, flags.dtype)
    with tqdm(desc="searching", unit=" policies", leave=False, disable=None, delay=1) as bar:
        question = ClusterQuestion(
            model=model,
            workload=read_workload(flags),
            permitted=read_permitted(flags),
            margin=flags.margin,
            # The executor cuts the layers of Hugging Face folders only.
            only_copies=is_gguf(flags.model),
            on_searched=bar.update,
        )
        plan = ClusterSearch(question).run(cluster, asks_one_more=True)
    plan.save(flags.output)
    print(format_cluster_plan(plan))
    if idle := [node.name for node in cluster.nodes if node.name not in plan.nodes]:
        print(f"without work: {', '.join(idle)}")
    print(f"\nplan written to {flags.output}")
    if flags.json:
        print(json.dumps(to_json(plan)))


def _with_budgets(cluster: Cluster, flags: argparse.Namespace) -> Cluster:
    """Return the nodes with the budgets of the flags, which every node has."""
    budgets = {"gpu_memory": flags.gpu_memory, "cpu_memory": flags.cpu_memory, "disk": flags.disk}
    nodes = (replace(n, hardware=n.hardware.with_budget(**budgets)) for n in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))

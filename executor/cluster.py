"""The command ``zigzag cluster``: choose what the machines of a Ray cluster run, and run it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from costmodel.cli.cluster_search import (
    OWN_FLAGS,
    add_cluster_search_flags,
    check_cluster_search_flags,
    search_nodes,
)
from costmodel.cli.flags import check_outputs
from costmodel.cluster.nodes import Cluster
from costmodel.cluster.plan import ClusterPlan
from costmodel.plan.policy import Policy
from executor.cli.run_command import read_job_options
from executor.generate import (
    add_generate_flags,
    check_generate_flags,
    early_end_told,
    read_job_flags,
    tell_lines,
    tell_nothing_left,
    tell_summary,
)
from executor.jobs.job_run import JobRun
from executor.nodes.copy_job import CopyJob
from executor.nodes.measuring import measure_cluster
from executor.nodes.pipeline_plan import whole_policy
from executor.nodes.ray_nodes import NodeActor, connected, folder_on, load_ray, ray_nodes
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.files import read_json
from profiles.output_checks import output_path
from profiles.units import format_figure, format_rate

DEFAULT_TIMEOUT_S = 300.0
# By action: the default of --output, and what else must be given.
OUTPUTS = {"search": Path("plan.json"), "generate": Path("outputs.jsonl")}
NEEDED = {"measure": ("cluster",), "search": ("model",), "generate": ("model", "prompts")}
OF_NODES = {"action", "ray", "nodes", "cluster", "offload_dir"}
# What searching reads beside those and its own flags.
OF_SEARCH = {
    *("model", "output", "gen_len", "expected_len", "dtype", "json"),
    *("gpu_memory", "cpu_memory", "disk"),
    *("weight_bits", "cache_bits", "group_size", "requantize", "sparsity"),
}


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.cluster",
        description="Choose what each machine of a Ray cluster runs, and run a job on them.",
        example="python -m executor.cluster measure --cluster cluster.json\n"
        "  python -m executor.cluster search --cluster cluster.json --model DIR"
        " --output plan.json\n"
        "  python -m executor.cluster generate --policy plan.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    parser.add_argument(
        "action",
        choices=tuple(NEEDED),
        help="measure the nodes, search a plan for them, or generate with a plan or without",
    )
    _add_node_flags(parser)
    add_generate_flags(
        parser,
        needs_job=False,
        output="file to write: JSON lines, or of search the plan (default: outputs.jsonl or"
        " plan.json)",
    )
    add_cluster_search_flags(parser)
    parser.set_defaults(output=None)
    return parser


def _add_node_flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--ray",
        default="auto",
        metavar="ADDRESS",
        help="HOST:PORT of a running cluster, auto for the one that this machine is part of, or"
        " local for this machine alone (default: auto)",
    )
    add("--nodes", metavar="NAMES", help="nodes to use, with commas between (default: all)")
    add(
        "--cluster",
        type=output_path,
        metavar="FILE",
        help="profiles of the nodes and links between them: measure writes it, search and generate"
        " read it (default: each node keeps its own profile)",
    )
    parser.add_seconds(
        "--node-timeout",
        default=DEFAULT_TIMEOUT_S,
        help="time without a step after which a node has failed (default: 300s)",
    )


def main(arguments: list[str]) -> None:
    """Do what is asked for."""
    read = parser()
    flags = read.parse_args(arguments)
    _check_flags(read, flags)
    if flags.action == "search":
        check_cluster_search_flags(flags)
        with check_outputs(flags, "output"):
            search_nodes(flags, _known_nodes(flags))
        return
    load_ray()
    if flags.action == "measure":
        with check_outputs(flags, "cluster"), connected(flags.ray):
            _measure(flags)
        return
    check_generate_flags(flags)
    if flags.report is not None:
        raise InputError("--report", got="a job on several nodes", allowed="with zigzag generate")
    with check_outputs(flags, "output", "errors", "trace"), connected(flags.ray):
        _generate(flags)


def _check_flags(read: Parser, flags: argparse.Namespace) -> None:
    """Refuse a job without its files, and flags that the action has no use for."""
    action = flags.action
    for name in NEEDED[action]:
        if getattr(flags, name) is None:
            told = f"a file or folder for zigzag cluster {action}"
            raise InputError(f"--{name}", got="nothing", allowed=told)
    used = OF_NODES
    if action == "search":
        used = OF_NODES | OF_SEARCH | set(OWN_FLAGS)
    elif action == "generate":
        used = set(vars(flags)) - set(OWN_FLAGS)
    for name, value in vars(flags).items():
        if name not in used and value != read.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            other = "search" if name in OWN_FLAGS else "generate"
            raise InputError(
                flag, got=f"{flag} of {action}", allowed=f"with zigzag cluster {other}"
            )
    if flags.output is None:
        flags.output = OUTPUTS.get(action)


def _names(flags: argparse.Namespace) -> tuple[str, ...]:
    return tuple(flags.nodes.split(",")) if flags.nodes else ()


def _known_nodes(flags: argparse.Namespace) -> Cluster:
    """Return the nodes of ``--cluster``, or else those that Ray knows."""
    if flags.cluster is not None:
        return Cluster.load(flags.cluster).only(_names(flags))
    load_ray()
    with connected(flags.ray):
        return _ask_nodes(flags)


def _ask_nodes(flags: argparse.Namespace) -> Cluster:
    """Ask each node for the profile that it keeps, and measure the links."""
    actors = [NodeActor(node) for node in ray_nodes(_names(flags))]
    try:
        folder = flags.offload_dir.absolute()
        return measure_cluster(actors, [folder_on(folder, actor.name) for actor in actors])
    finally:
        for actor in actors:
            actor.end()


def _measure(flags: argparse.Namespace) -> None:
    cluster = _ask_nodes(flags)
    cluster.save(flags.cluster)
    for node in cluster.nodes:
        print(f"{node.name}: {node.hardware.name}")
    for pair in cluster.links.pairs:
        rate = format_rate(pair.link.bytes_per_s)
        latency = format_figure(pair.link.latency_s * 1e3)
        print(f"{pair.source} to {pair.target}: {rate}, {latency} ms")


def _read_policy(flags: argparse.Namespace) -> tuple[Policy | None, ClusterPlan | None]:
    """Return the policy of a job, and the plan of a cluster where ``--policy`` holds one."""
    if flags.policy is None:
        return None, None
    if "copies" not in read_json(flags.policy, "policy"):
        return Policy.load(flags.policy), None
    plan = ClusterPlan.load(flags.policy)
    if flags.nodes is not None:
        raise InputError(
            "--nodes", got="--nodes together with a plan", allowed="the nodes of the plan"
        )
    # What every copy has made room for.
    return whole_policy(plan.copies[0], plan.model, plan.workload), plan


def _generate(flags: argparse.Namespace) -> None:
    policy, plan = _read_policy(flags)
    options = replace(read_job_options(flags, policy), shares_prefixes=not flags.no_shared_prefixes)
    known = Cluster.load(flags.cluster).nodes if flags.cluster else ()
    only = _names(flags) or (plan.nodes if plan else ())
    with (
        CopyJob(
            flags.model,
            only=only,
            timeout_s=flags.node_timeout,
            plan=plan,
            profiles={node.name: node.hardware for node in known},
            trace=flags.trace,
        ) as nodes,
        JobRun(read_job_flags(flags), nodes.options(options)) as job,
    ):
        if not job.prompts:
            tell_nothing_left(job, flags)
            return
        nodes.begin(job)
        print(nodes.describe_plan())
        print(job.sampling.describe(), end="\n\n", flush=True)
        job.sampling.warn()
        tell_lines(job, flags)
        with early_end_told(job):
            nodes.run(job)
        print(nodes.describe_run())
        tell_summary(job, flags)
        if flags.json:
            told = {"sampling": job.sampling.as_json(), "job": job.summary.as_json()}
            print(json.dumps(nodes.as_json() | told), flush=True)
        sys.stdout.flush()


if __name__ == "__main__":
    run(main)

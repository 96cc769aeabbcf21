"""The command ``zigzag cluster``: choose what the machines of a Ray cluster run, and run it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from costmodel.cli.cluster_search import (
    add_cluster_search_flags,
    check_cluster_search_flags,
    search_nodes,
)
from costmodel.cli.flags import check_outputs
from costmodel.cluster.nodes import Cluster
from costmodel.cluster.plan import ClusterPlan
from costmodel.plan.policy import Policy
from executor.cli.job_flags import read_job_options
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
Actions: TypeAlias = "argparse._SubParsersAction[Parser]"


def parser() -> Parser:
    """Return the parser of the command's flags, with one of each action."""
    parser = Parser(
        prog="executor.cluster",
        description="Choose what each machine of a Ray cluster runs, and run a job on them.",
        example="python -m executor.cluster measure --cluster cluster.json\n"
        "  python -m executor.cluster search --cluster cluster.json --model DIR"
        " --output plan.json\n"
        "  python -m executor.cluster generate --policy plan.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions, each with --help"
    )
    _add_measure(actions)
    _add_search(actions)
    _add_generate(actions)
    return parser


def _add_measure(actions: Actions) -> None:
    parser = actions.add_parser(
        "measure",
        prog="executor.cluster measure",
        help="measure the nodes and the links between them",
        description="Measure the nodes and the links between them, and write a file for search.",
        example="python -m executor.cluster measure --cluster cluster.json",
    )
    parser.add_argument(
        "--cluster",
        type=output_path,
        required=True,
        metavar="FILE",
        help="profiles of the nodes and the links between them, to write",
    )
    _add_nodes(parser)
    _add_offload_dir(parser)


def _add_search(actions: Actions) -> None:
    parser = actions.add_parser(
        "search",
        prog="executor.cluster search",
        help="search what each node runs",
        description="Search what each node runs: copies of the model, stages, or copies of stages.",
        example="python -m executor.cluster search --cluster cluster.json --model DIR"
        " --prompt-len 512 --gen-len 128 --num-prompts 1000 --output plan.json",
    )
    add_cluster_search_flags(parser)
    _add_cluster(parser)
    _add_nodes(parser)
    _add_offload_dir(parser)


def _add_generate(actions: Actions) -> None:
    parser = actions.add_parser(
        "generate",
        prog="executor.cluster generate",
        help="continue every prompt of a file",
        description="Continue every prompt of a file under the plan of search. Without a plan,"
        " every node runs a copy of the model.",
        example="python -m executor.cluster generate --policy plan.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    add_generate_flags(parser, on_nodes=True)
    _add_cluster(parser)
    _add_nodes(parser)
    parser.add_seconds(
        "--node-timeout",
        default=DEFAULT_TIMEOUT_S,
        help="time without a step after which a node has failed (default: 300s)",
    )


def _add_cluster(parser: Parser) -> None:
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="file that measure wrote (default: each node keeps its own profile)",
    )


def _add_nodes(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--ray",
        default="auto",
        metavar="ADDRESS",
        help="HOST:PORT of a running cluster, auto for the one that this machine is part of, or"
        " local for this machine alone (default: auto)",
    )
    add("--nodes", metavar="NAMES", help="nodes to use, with commas between (default: all)")


def _add_offload_dir(parser: Parser) -> None:
    parser.add_argument(
        "--offload-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder of each node whose disk is measured (default: the current folder)",
    )


def main(arguments: list[str]) -> None:
    """Do what is asked for."""
    read = parser()
    flags, unknown = read.parse_known_args(arguments)
    if unknown:
        told = f"the flags in {read.prog} {flags.action} --help"
        raise InputError("command line", got=" ".join(unknown), allowed=told)
    ACTIONS[flags.action](flags)


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
    load_ray()
    with check_outputs(flags, "cluster"), connected(flags.ray):
        cluster = _ask_nodes(flags)
        cluster.save(flags.cluster)
    for node in cluster.nodes:
        print(f"{node.name}: {node.hardware.name}")
    for pair in cluster.links.pairs:
        rate = format_rate(pair.link.bytes_per_s)
        latency, store = (format_figure(s * 1e3) for s in (pair.link.latency_s, pair.link.store_s))
        print(f"{pair.source} to {pair.target}: {rate}, {latency} ms, {store} ms if stored")


def _search(flags: argparse.Namespace) -> None:
    check_cluster_search_flags(flags)
    with check_outputs(flags, "output"):
        search_nodes(flags, _known_nodes(flags))


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
    load_ray()
    check_generate_flags(flags)
    with check_outputs(flags, "output", "errors", "trace"), connected(flags.ray):
        _run_job(flags)


def _run_job(flags: argparse.Namespace) -> None:
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


ACTIONS = {"measure": _measure, "search": _search, "generate": _generate}


if __name__ == "__main__":
    run(main)

"""The command ``zigzag cluster``: run a job on the machines of a Ray cluster."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

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


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.cluster",
        description="Run a job on the machines of a Ray cluster, or measure them.",
        example="python -m executor.cluster measure --cluster cluster.json\n"
        "  python -m executor.cluster generate --cluster cluster.json --model DIR"
        " --prompts prompts.jsonl --output outputs.jsonl",
    )
    add = parser.add_argument
    add("action", choices=("measure", "generate"), help="what to do")
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
        help="profiles of the nodes and links between them: measure writes it, generate reads it"
        " (default: each node keeps its own profile)",
    )
    parser.add_seconds(
        "--node-timeout",
        default=DEFAULT_TIMEOUT_S,
        help="time without a step after which a node has failed (default: 300s)",
    )
    add_generate_flags(parser, needs_job=False)
    return parser


def main(arguments: list[str]) -> None:
    """Do what is asked for."""
    flags = parser().parse_args(arguments)
    needed = ("cluster",) if flags.action == "measure" else ("model", "prompts")
    for name in needed:
        if getattr(flags, name) is None:
            told = f"a file or folder for zigzag cluster {flags.action}"
            raise InputError(f"--{name}", got="nothing", allowed=told)
    load_ray()
    if flags.action == "measure":
        with check_outputs(flags, "cluster"), connected(flags.ray):
            _measure(flags)
        return
    check_generate_flags(flags)
    _refuse_recordings(flags)
    with check_outputs(flags, "output", "errors"), connected(flags.ray):
        _generate(flags)


def _names(flags: argparse.Namespace) -> tuple[str, ...]:
    return tuple(flags.nodes.split(",")) if flags.nodes else ()


def _measure(flags: argparse.Namespace) -> None:
    actors = [NodeActor(node) for node in ray_nodes(_names(flags))]
    try:
        folder = flags.offload_dir.absolute()
        cluster = measure_cluster(actors, [folder_on(folder, actor.name) for actor in actors])
    finally:
        for actor in actors:
            actor.end()
    cluster.save(flags.cluster)
    for node in cluster.nodes:
        print(f"{node.name}: {node.hardware.name}")
    for pair in cluster.links.pairs:
        rate = format_rate(pair.link.bytes_per_s)
        latency = format_figure(pair.link.latency_s * 1e3)
        print(f"{pair.source} to {pair.target}: {rate}, {latency} ms")


def _read_policy(flags: argparse.Namespace) -> Policy | ClusterPlan | None:
    """Return what ``--policy`` holds: the policy of a machine, or the plan of a cluster."""
    if flags.policy is None:
        return None
    if "copies" in read_json(flags.policy, "policy"):
        return ClusterPlan.load(flags.policy)
    return Policy.load(flags.policy)


def _generate(flags: argparse.Namespace) -> None:
    given = _read_policy(flags)
    plan = given if isinstance(given, ClusterPlan) else None
    if isinstance(given, ClusterPlan):
        # What every copy has made room for.
        given = whole_policy(given.copies[0], given.model, given.workload)
    options = replace(read_job_options(flags, given), shares_prefixes=not flags.no_shared_prefixes)
    known = Cluster.load(flags.cluster).nodes if flags.cluster else ()
    only = _names(flags) or (plan.nodes if plan else ())
    with (
        CopyJob(
            flags.model,
            only=only,
            timeout_s=flags.node_timeout,
            plan=plan,
            profiles={node.name: node.hardware for node in known},
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


def _refuse_recordings(flags: argparse.Namespace) -> None:
    for name in ("trace", "report"):
        if getattr(flags, name) is not None:
            raise InputError(
                f"--{name}", got="a job on several nodes", allowed="with zigzag generate"
            )


if __name__ == "__main__":
    run(main)

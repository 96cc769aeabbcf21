"""Kills processes of a cluster at random moments, and compares the answers.

Jobs run on three nodes of a Ray cluster on this machine, in turn as copies and as two stages with a
spare node. At random moments the script kills the process of a node, a raylet, or the command, all
with SIGKILL. A killed command goes on with ``--resume``. Every prompt must be answered once, as
without a kill. One JSON line goes to stdout.

It runs on the test cluster of ``tests.executor``: set ``PYTHONPATH=.``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from workload_run import ROOT, BenchParser, circumstances, keep_result, say, work_folder

from costmodel.cluster.plan import ClusterPlan
from executor import generate
from executor.checkpoint.folder import Checkpoint
from profiles.command import run
from profiles.errors import RunError
from tests.executor.cluster_nodes import DISK_RATE, add_node, nodes_at_work, process_on
from tests.executor.job_desk import GEN_LEN, LANES, PROMPT_LEN, Desk, save_job_model
from tests.executor.killed_jobs import answers_of
from tests.executor.stage_plans import MODELS, staged_copy
from tests.executor.test_ray_copies import line_of
from tests.executor.tiny_machines import ON_DISK, make_hardware

KINDS = ("process", "raylet", "command")
NODES = ("a", "b", "c")
NUM_PROMPTS = 240
# Slow enough that a job without a kill takes half a minute.
DISK_RATE_OF_ALL = 1e6
# From a kill to the next; processes take seconds to start.
PAUSE_S = (1.0, 40.0)
# Commands that begin again for each kill, at most.
MOST_AGAIN = 2
# A job that takes longer after the last kill hangs.
LONGEST_S = 300.0
DRIVER = """\
import sys
from executor import cluster
from executor.nodes import ray_nodes
from profiles.command import run
from tests.executor.cluster_nodes import HeldNode
ray_nodes.NodeProcess = HeldNode
run(cluster.main)
"""


def main(arguments: list[str]) -> None:
    """Kill, compare, print."""
    parser = BenchParser(
        "cluster_kills.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/cluster-kills.json",
    )
    parser.add_argument("--kills", type=int, default=20, help="(20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (0)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="for the model and the runs")
    flags = parser.parse_args(arguments)
    with work_folder(flags) as folder, nodes_at_work({}) as cluster:
        jobs = _Jobs(folder, cluster, flags)
        while jobs.num_killed.total() < flags.kills:
            jobs.run(("copies", "stages")[jobs.num_jobs % 2])
    result = {
        "benchmark": "jobs on Ray whose processes are killed",
        "kills": jobs.num_killed,
        "jobs": jobs.num_jobs,
        "prompts_a_job": NUM_PROMPTS,
        "commands_begun_again": jobs.num_again,
        "jobs_with_other_answers": jobs.num_wrong,
    }
    keep_result(flags, result | circumstances("cluster_kills.py", arguments, "torch", "ray"))
    if jobs.num_wrong:
        raise RunError(f"{jobs.num_wrong} of {jobs.num_jobs} jobs had other answers")


class _Jobs:
    """The nodes, the files of the jobs, and what was killed so far."""

    def __init__(self, folder: Path, cluster: Any, flags: argparse.Namespace) -> None:
        self._cluster, self._most_kills = cluster, flags.kills
        self._draws = random.Random(flags.seed)
        self.num_killed: Counter[str] = Counter()
        self.num_jobs = self.num_again = self.num_wrong = 0
        self._env = {DISK_RATE: str(DISK_RATE_OF_ALL)}
        self._raylets = {node: add_node(cluster, node, self._env) for node in NODES}
        model = folder / "model"
        self._desk = Desk(save_job_model(model, **MODELS["dense"]), folder)
        self._desk.write(*map(line_of, range(NUM_PROMPTS)))
        self._log = folder / "commands.log"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            generate.main(self._desk.arguments())
        self._expected = sorted(answers_of(self._desk.output))

    def run(self, form: str) -> None:
        """Run one job to its end, and compare its answers."""
        self._desk.output.unlink()
        self._write_policy(form)
        command = self._begin()
        try:
            while (status := self._wait(command)) != 0 and not self._has_ended():
                if self.num_again > MOST_AGAIN * self._most_kills:
                    raise RunError(f"the command fails again and again, see {self._log}")
                say(f"  the command ended with status {status} and goes on")
                self.num_again += 1
                command = self._begin()
        finally:
            command.kill()
        is_same = sorted(answers_of(self._desk.output)) == self._expected
        say(f"job {self.num_jobs + 1}, {form}: {'the same' if is_same else 'OTHER'} answers")
        self.num_jobs += 1
        self.num_wrong += not is_same

    def _has_ended(self) -> bool:
        """Return whether a command has written all answers before it was killed."""
        journal = self._desk.output.with_name(self._desk.output.name + ".job")
        return self._desk.output.exists() and not journal.exists()

    def _write_policy(self, form: str) -> None:
        if form == "copies":
            self._desk.write_policy(lanes=LANES, weights=ON_DISK)
            return
        spec = Checkpoint.open(self._desk.model).spec
        copy = staged_copy(
            spec,
            (2, 3),
            (ON_DISK, ON_DISK),
            hardware=make_hardware(),
            prompt_len=PROMPT_LEN,
            gen_len=GEN_LEN,
        )
        workload = copy.stages[0].policy.workload
        ClusterPlan(model=spec, workload=workload, copies=(copy,)).save(self._desk.policy)

    def _begin(self) -> subprocess.Popen[bytes]:
        words = self._desk.arguments("--resume", "--node-timeout=60s")
        words = [f"{x}/{{node}}" if "offload-dir" in x else x for x in words]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    DRIVER,
                    "generate",
                    *words,
                    f"--ray={self._cluster.address}",
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def _wait(self, command: subprocess.Popen[bytes]) -> int:
        """Return the command's status when it ends; kills something from time to time."""
        while True:
            is_over = self.num_killed.total() >= self._most_kills
            try:
                return command.wait(LONGEST_S if is_over else self._draws.uniform(*PAUSE_S))
            except subprocess.TimeoutExpired:
                if is_over:
                    raise RunError(f"no end after {LONGEST_S:.0f} s, see {self._log}") from None
                self._kill_something(command)

    def _kill_something(self, command: subprocess.Popen[bytes]) -> None:
        kind, node = self._draws.choice(KINDS), self._draws.choice(NODES)
        if kind == "command":
            command.kill()
        elif kind == "raylet":
            self._cluster.remove_node(self._raylets[node], allow_graceful=False)
            self._raylets[node] = add_node(self._cluster, node, self._env)
        elif (process := process_on(self._cluster, node)) is not None:
            process.kill()
        else:
            return
        self.num_killed[kind] += 1
        output = self._desk.output
        count = output.read_bytes().count(b"\n") if output.exists() else 0
        what = "the command" if kind == "command" else f"a {kind} of node {node}"
        say(f"{self.num_killed.total()}: killed {what}, {count} answers")


if __name__ == "__main__":
    run(main)

"""Kills processes of a cluster at random moments, and compares the answers.

``python -m tests.bench.cluster_kills [--kills 20] [--seed 0]`` runs a job on three nodes on this
machine. Each time it kills the process of a node, a raylet, or the command, which then goes on with
``--resume``. Every prompt must be answered once, as without a kill.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from executor import generate
from tests.executor.cluster_nodes import DISK_RATE, add_node, nodes_at_work, process_on
from tests.executor.job_desk import LANES, Desk, save_job_model
from tests.executor.killed_jobs import answers_of
from tests.executor.test_ray_copies import line_of
from tests.executor.tiny_machines import ON_DISK

NUM_PROMPTS = 120
NODES = ("a", "b", "c")
# Slow enough that a job takes some seconds.
SLOW = {DISK_RATE: "3e6"}
DRIVER = """\
import sys
from executor import cluster
from executor.nodes import ray_nodes
from tests.executor.cluster_nodes import HeldNode
ray_nodes.NodeProcess = HeldNode
cluster.main(sys.argv[1:])
"""


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    draws = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as name, nodes_at_work({}) as cluster:
        desk = Desk(save_job_model(Path(name) / "model"), Path(name))
        desk.write_policy(lanes=LANES, weights=ON_DISK)
        desk.write(*map(line_of, range(NUM_PROMPTS)))
        generate.main(desk.arguments())
        expected = sorted(answers_of(desk.output))
        desk.output.unlink()
        raylets = {node: add_node(cluster, node, SLOW) for node in NODES}
        num_killed, failed = 0, 0
        while num_killed < flags.kills:
            process = _begin(desk, cluster.address)
            while num_killed < flags.kills and process.poll() is None:
                time.sleep(draws.uniform(0.5, 6))
                if process.poll() is None:
                    what = draws.choice(("process", "raylet", "command"))
                    _kill(what, draws.choice(NODES), process, cluster, raylets)
                    num_killed += 1
                    count = desk.output.read_bytes().count(b"\n") if desk.output.exists() else 0
                    print(f"{num_killed}: killed a {what}, {count} answers", flush=True)
            process.wait()
            while process.returncode:
                process = _begin(desk, cluster.address)
                process.wait()
            failed += sorted(answers_of(desk.output)) != expected
            desk.output.unlink()
    print(f"{num_killed} kills; {failed} jobs with other answers")
    sys.exit(bool(failed))


def _begin(desk: Desk, address: str) -> subprocess.Popen[bytes]:
    words = [f"{x}/{{node}}" if "offload-dir" in x else x for x in desk.arguments("--resume")]
    flags = [f"--ray={address}", "--node-timeout=60s", f"--nodes={','.join(NODES)}"]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "generate", *words, *flags], stdout=subprocess.DEVNULL
    )


def _kill(
    what: str,
    node: str,
    process: subprocess.Popen[bytes],
    cluster: Any,
    raylets: dict[str, Any],
) -> None:
    if what == "command":
        process.kill()
        process.wait()
    elif what == "process":
        found = process_on(cluster, node)
        if found is None:
            print(f"node {node} has no process now")
        else:
            found.kill()
    else:
        cluster.remove_node(raylets[node], allow_graceful=False)
        raylets[node] = add_node(cluster, node, SLOW)


if __name__ == "__main__":
    main()

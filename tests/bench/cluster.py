"""Two nodes of a Ray cluster on this machine against one, with disks that are held to a rate.

Two copies, whose weights are all on disk, against one such node. Two stages, which have their
layers in memory, against one node that has half of them on disk. The model is made small, so that
the disks bound the passes and not the cores that all nodes share here.

Decode is timed by the difference of two jobs that only differ in the length of their answers: what
both take for Ray, the weights and the prompts drops out. One JSON line goes to stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from workload_run import BenchParser, circumstances, keep_result, say, work_folder

from costmodel.cluster.plan import ClusterPlan, CopyPlan, StagePlan
from costmodel.cluster.stages import stages_of_counts
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import LanePolicy, Placement, Policy, placed_alike
from executor import cluster
from executor.checkpoint.folder import Checkpoint
from profiles.command import run
from profiles.hardware import HardwareProfile
from profiles.recorded import recorded_profile
from tests.executor.cluster_nodes import DISK_RATE, nodes_at_work
from tests.executor.tiny_machines import ON_CPU, ON_DISK, make_policy
from tests.executor.tiny_models import save_tiny_model

NUM_LAYERS, HIDDEN_SIZE = 8, 1024
PROMPT_LEN, SHORT, LONG = 16, 4, 12
LANES = 8
HALVES = Placement(cpu=0.5, disk=0.5)


def main(arguments: list[str]) -> None:
    """Make a model, run, compare, print."""
    parser = BenchParser(
        "cluster.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/cluster.json",
    )
    parser.add_argument("--disk-rate", type=float, default=0.3e9, help="bytes/s (0.3e9)")
    parser.add_argument("--rounds", type=int, default=2, help="(2)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="for the model and the runs")
    flags = parser.parse_args(arguments)
    env = {DISK_RATE: str(flags.disk_rate)}
    with work_folder(flags) as folder, nodes_at_work({"a": env, "b": env}):
        bench = _Bench(folder)
        plans = {
            "one node, weights on disk": bench.copies("a", placement=ON_DISK),
            "two copies, weights on disk": bench.copies("a", "b", placement=ON_DISK),
            "one node, half on disk": bench.copies("a", placement=HALVES),
            "two stages, in memory": bench.stages(),
        }
        rates: dict[str, list[float]] = {name: [] for name in plans}
        for number in range(flags.rounds):
            for name, plan in plans.items():
                rates[name].append(bench.decode_rate(plan))
                say(f"round {number + 1}, {name}: {rates[name][-1]:.2f} token/s in decode")
    best = {name: max(found) for name, found in rates.items()}
    one, two, half, stages = best.values()
    told: dict[str, Any] = {
        "decode_tok_per_s": rates,
        "copies_speedup": two / one,
        "stages_speedup": stages / half,
        "disk_bytes_per_s": flags.disk_rate,
    }
    keep_result(flags, told | circumstances("cluster.py", arguments, "torch", "ray"))


class _Bench:
    """The model, the prompts, and the plans of its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        say("making the model")
        save_tiny_model(
            self.model,
            "llama",
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=4 * HIDDEN_SIZE,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
        )
        self.spec = Checkpoint.open(self.model).spec
        self._output = folder / "out.jsonl"

    def copies(self, *nodes: str, placement: Placement) -> ClusterPlan:
        """Return a plan of copies with all weights in one place."""
        policy = self._policy(self.spec, placement)
        pages = -(-(PROMPT_LEN + LONG) // 32) * 32
        lanes = LanePolicy(pool_tokens=LANES * pages, pass_rows=LANES * PROMPT_LEN)
        policy = replace(policy, lanes=lanes)
        share = 1 / len(nodes)
        made = (CopyPlan(stages=(StagePlan(node=n, policy=policy),), share=share) for n in nodes)
        return ClusterPlan(model=self.spec, workload=policy.workload, copies=tuple(made))

    def stages(self) -> ClusterPlan:
        """Return a plan of two stages in memory."""
        half = NUM_LAYERS // 2
        stages = [
            StagePlan(node=node, policy=replace(self._policy(part, ON_CPU), blocks_in_flight=2))
            for node, part in zip("ab", stages_of_counts(self.spec, (half, half)), strict=True)
        ]
        copies = (CopyPlan(stages=tuple(stages), share=1.0),)
        workload = stages[0].policy.workload
        return ClusterPlan(model=self.spec, workload=workload, copies=copies)

    def _policy(self, model: ModelSpec, placement: Placement) -> Policy:
        base = make_policy(model, prompt_len=PROMPT_LEN, gen_len=LONG)
        return replace(
            base,
            gpu_batch_size=LANES,
            num_gpu_batches=1,
            prefill_batch_size=LANES,
            weights=placed_alike(model, placement),
            hardware=_hardware(),
        )

    def decode_rate(self, plan: ClusterPlan) -> float:
        """Return the tokens a second by which a longer job takes longer."""
        lanes = LANES * len(plan.nodes)
        short_s, long_s = (self._seconds(plan, lanes, length) for length in (SHORT, LONG))
        return lanes * (LONG - SHORT) / (long_s - short_s)

    def _seconds(self, plan: ClusterPlan, num_prompts: int, gen_len: int) -> float:
        prompts, policy = self.folder / "in.jsonl", self.folder / "plan.json"
        lines = [
            {
                "prompt_ids": [(7 * i + j * j) % 170 for j in range(PROMPT_LEN)],
                "max_tokens": gen_len,
            }
            for i in range(num_prompts)
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plan.save(policy)
        self._output.unlink(missing_ok=True)
        flags = {"model": self.model, "prompts": prompts, "output": self._output, "policy": policy}
        flags |= {"offload-dir": self.folder / "{node}"}
        start_s = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as told:
            words = [f"--{key}={value}" for key, value in flags.items()]
            cluster.main(["generate", "--json", "--ignore-eos", *words])
        say(f"  {time.perf_counter() - start_s:.1f} s with Ray's processes")
        found: float = json.loads(told.getvalue().splitlines()[-1])["seconds"]
        return found


def _hardware() -> HardwareProfile:
    return recorded_profile("cpu-2core")


if __name__ == "__main__":
    run(main)

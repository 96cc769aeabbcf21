"""Two nodes of a Ray cluster on this machine against one, with disks that are held to a rate.

Two copies, whose weights are all on disk, against one such node. Two stages, which have their
layers in memory, against one node whose memory has room for half of the weights. The model is small
and each node has one core, so that the disks bound the nodes that read them, and not the two cores.
The stages read no disk: what bounds them is the memory, beside Ray's calls.

The nodes measure themselves first, both at once, as ``zigzag cluster measure`` does. Decode is
timed by the difference of two jobs that only differ in the length of their answers. So the start of
the processes, the weights and the prompts drop out. The prediction is the same difference.

It runs on the test cluster of ``tests.executor``: set ``PYTHONPATH=.``.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workload_run import BenchParser, circumstances, keep_result, say, work_folder

from costmodel.cluster.estimate import estimate_pipeline
from costmodel.cluster.nodes import Cluster, Node
from costmodel.cluster.plan import ClusterPlan, CopyPlan, StagePlan
from costmodel.cluster.stages import stages_of_counts
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, placed_alike
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from executor import cluster
from executor.checkpoint.folder import Checkpoint
from profiles.command import run
from tests.executor.cluster_nodes import DISK_RATE, MEASURED, nodes_at_work
from tests.executor.tiny_machines import ON_CPU, ON_DISK, make_policy
from tests.executor.tiny_models import save_tiny_model

NODES = ("a", "b")
NUM_LAYERS, HIDDEN_SIZE = 8, 1024
PROMPT_LEN, BLOCK_SIZE = 16, 64
# Tokens of the longest answers.
LONGEST = 80
HALVES = Placement(cpu=0.5, disk=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What runs, the lengths of the answers of its two jobs, and how often the pair runs."""

    name: str
    plan: ClusterPlan
    lengths: tuple[int, int]

    @property
    def num_prompts(self) -> int:
        """A block for each node."""
        return BLOCK_SIZE * len(self.plan.nodes)

    def rate(self, seconds: Sequence[float]) -> float:
        """Return the token/s in decode, from the seconds of the two jobs."""
        short, long = self.lengths
        return self.num_prompts * (long - short) / (seconds[1] - seconds[0])


def main(arguments: list[str]) -> None:
    """Make a model, run, compare, print."""
    parser = BenchParser(
        "cluster.py",
        description=(__doc__ or "").strip(),
        example="--result tests/bench/results/cluster-2core.json",
    )
    parser.add_argument("--disk-rate", type=float, default=0.3e9, help="bytes/s (0.3e9)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="for the model and the runs")
    flags = parser.parse_args(arguments)
    with work_folder(flags) as folder:
        env = {DISK_RATE: str(flags.disk_rate), MEASURED: "1"}
        # A profile that a node kept may be of a busy machine.
        env["XDG_CACHE_HOME"] = str(folder.resolve() / "cache")
        with nodes_at_work(dict.fromkeys(NODES, env)):
            bench = _Bench(folder)
            told = bench.compare(flags.rounds)
    for each in told:
        prediction = f"{each['predicted']:.2f} predicted ({each['error']:+.1%})"
        say(f"{each['name']}: {each['median']:.2f} token/s in decode, {prediction}")
    one, copies, half, stages = (each["median"] for each in told)
    say(f"two copies: {copies / one:.2f} times one; two stages: {stages / half:.1f} times one node")
    result = {
        "benchmark": "two nodes on Ray against one",
        "disk_bytes_per_s": flags.disk_rate,
        "weight_bytes": bench.weight_bytes,
        "cases": told,
        "copies_speedup": copies / one,
        "stages_speedup": stages / half,
    }
    keep_result(flags, result | circumstances("cluster.py", arguments, "torch", "ray"))


class _Bench:
    """The model, the measured nodes, and the plans of the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        if not self.model.exists():
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
                max_position_embeddings=1024,
            )
        self.spec = Checkpoint.open(self.model).spec
        self.weight_bytes = sum(path.stat().st_size for path in self.model.glob("*.safetensors"))
        found = self._measured()
        self.nodes = replace(found, nodes=tuple(map(self._with_room_for_half, found.nodes)))

    def _with_room_for_half(self, node: Node) -> Node:
        """Return a node with memory for half of the weights, what is staged, and no more."""
        policy = self._policy(node, self.spec, HALVES)
        longest = replace(policy, workload=Workload(prompt_len=PROMPT_LEN, gen_len=LONGEST))
        peak = estimate(longest, node.hardware).peak_bytes["cpu"]
        return replace(node, hardware=node.hardware.with_budget(cpu_memory=peak))

    def _measured(self) -> Cluster:
        path = self.folder / "cluster.json"
        if not path.exists():
            say("measuring the nodes")
            with contextlib.redirect_stdout(io.StringIO()):
                folder = self.folder / "{node}"
                cluster.main(["measure", f"--cluster={path}", f"--offload-dir={folder}"])
        return Cluster.load(path)

    def cases(self) -> list[Case]:
        """Return what runs, in pairs: alone, and on two nodes."""
        disk, memory = (4, 16), (16, LONGEST)
        return [
            Case(name="one copy on disk", plan=self._copies("a", placement=ON_DISK), lengths=disk),
            Case(
                name="two copies on disk",
                plan=self._copies(*NODES, placement=ON_DISK),
                lengths=disk,
            ),
            Case(
                name="one node, half on disk",
                plan=self._copies("a", placement=HALVES),
                lengths=disk,
            ),
            Case(name="two stages in memory", plan=self._stages(), lengths=memory),
        ]

    def _copies(self, *nodes: str, placement: Placement) -> ClusterPlan:
        stages = [
            StagePlan(node=node, policy=self._policy(self.nodes.node(node), self.spec, placement))
            for node in nodes
        ]
        copies = [CopyPlan(stages=(stage,), share=1 / len(nodes)) for stage in stages]
        return self._plan(copies)

    def _stages(self) -> ClusterPlan:
        half = NUM_LAYERS // len(NODES)
        parts = stages_of_counts(self.spec, (half, half))
        stages = [
            StagePlan(
                node=node,
                policy=replace(
                    self._policy(self.nodes.node(node), part, ON_CPU), blocks_in_flight=len(NODES)
                ),
            )
            for node, part in zip(NODES, parts, strict=True)
        ]
        return self._plan([CopyPlan(stages=tuple(stages), share=1.0)])

    def _plan(self, copies: Sequence[CopyPlan]) -> ClusterPlan:
        workload = copies[0].stages[0].policy.workload
        return ClusterPlan(model=self.spec, workload=workload, copies=tuple(copies))

    def _policy(self, node: Node, model: ModelSpec, placement: Placement) -> Policy:
        base = make_policy(model, prompt_len=PROMPT_LEN, gen_len=2)
        return replace(
            base,
            gpu_batch_size=BLOCK_SIZE,
            num_gpu_batches=1,
            prefill_batch_size=BLOCK_SIZE,
            weights=placed_alike(model, placement),
            hardware=node.hardware,
        )

    def compare(self, num_rounds: int) -> list[dict[str, Any]]:
        """Run each case in each round; returns what each reached, and its prediction."""
        cases = self.cases()
        predicted = [case.rate([self.predict(case, n) for n in case.lengths]) for case in cases]
        found: list[list[float]] = [[] for _ in cases]
        for number in range(num_rounds):
            for case, rates in zip(cases, found, strict=True):
                rates.append(case.rate([self.run(case, n) for n in case.lengths]))
                say(f"round {number + 1}, {case.name}: {rates[-1]:.2f} token/s in decode")
        return [
            {
                "name": case.name,
                "decode_tok_per_s": rates,
                "median": statistics.median(rates),
                "predicted": rate,
                "error": rate / statistics.median(rates) - 1,
            }
            for case, rates, rate in zip(cases, found, predicted, strict=True)
        ]

    def predict(self, case: Case, gen_len: int) -> float:
        """Return the predicted seconds of a job in which every node has one block."""
        plan = with_length(case.plan, gen_len)
        return max(self._predict_copy(copy) for copy in plan.copies)

    def _predict_copy(self, copy: CopyPlan) -> float:
        policies = [stage.policy for stage in copy.stages]
        nodes = [self.nodes.node(stage.node) for stage in copy.stages]
        if len(policies) == 1:
            return estimate(policies[0], nodes[0].hardware).latency_s
        found = estimate_pipeline(policies, nodes, self.nodes.links)
        return found.prefill_s + found.decode_s

    def run(self, case: Case, gen_len: int) -> float:
        """Return the seconds of a job from its start on the nodes."""
        prompts, policy = self.folder / "in.jsonl", self.folder / "plan.json"
        lines = [
            {"prompt_ids": [(7 * i + j * j) % 170 for j in range(PROMPT_LEN)]}
            for i in range(case.num_prompts)
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with_length(case.plan, gen_len).save(policy)
        output = self.folder / "out.jsonl"
        output.unlink(missing_ok=True)
        flags = {"model": self.model, "prompts": prompts, "output": output, "policy": policy}
        flags |= {"offload-dir": self.folder / "{node}"}
        words = [f"--{key}={value}" for key, value in flags.items()]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            cluster.main(["generate", "--json", "--ignore-eos", *words])
        found: float = json.loads(told.getvalue().splitlines()[-1])["seconds"]
        return found


def with_length(plan: ClusterPlan, gen_len: int) -> ClusterPlan:
    """Return a plan for answers of another length."""
    workload = Workload(prompt_len=PROMPT_LEN, gen_len=gen_len)
    copies = tuple(
        replace(
            copy,
            stages=tuple(
                replace(stage, policy=replace(stage.policy, workload=workload))
                for stage in copy.stages
            ),
        )
        for copy in plan.copies
    )
    return replace(plan, workload=workload, copies=copies)


if __name__ == "__main__":
    run(main)

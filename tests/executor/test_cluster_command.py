"""``zigzag cluster search``: from files to a plan that nodes run, without Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.question import ClusterQuestion
from costmodel.cluster.stage_search import stage_policies
from costmodel.cluster.stages import stage_model
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Pipeline
from costmodel.plan.workload import Workload
from costmodel.pricing.price import policy_peaks
from executor import cluster
from executor.checkpoint.folder import Checkpoint
from executor.cli.job_options import JobOptions
from executor.nodes.copy_plan import CopyPlanner
from profiles import recorded_profile
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import save_job_model
from tests.executor.nodes_without_ray import (
    GEN_LEN,
    LIMITS,
    PROMPTS,
    answers,
    pipeline_engine_of,
)
from tests.executor.nodes_without_ray import without_ray as without_ray
from tests.executor.reference import ReferenceModel

Run = Callable[..., Ended]
LINKS = {"default": {"bytes_per_s": 1.25e9, "latency_s": 1e-4}}
WORK = ("--prompt-len=8", "--gen-len=5", "--num-prompts=6")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command where there is no Ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    return lambda *arguments: end_command(cluster.main, arguments, monkeypatch, capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are more than the workspaces of its stages differ by."""
    sizes = {"num_layers": 6, "hidden_size": 256, "intermediate_size": 1024}
    return save_job_model(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A cluster that was written by hand."""
    nodes = [{"name": name, "hardware": "cpu-2core"} for name in ("a", "b")]
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"nodes": nodes, "links": LINKS}))
    return path


def _search(path: Path, model: Path, *more: str) -> tuple[str, ...]:
    return "search", f"--cluster={path}", f"--model={model}", *more


def test_described_nodes_are_searched_without_ray(run: Run, model: Path, described: Path) -> None:
    output = described.with_name("plan.json")
    ended = run(*_search(described, model, f"--output={output}", "--json", *WORK))
    assert ended.status == 0, ended.err
    plan = ClusterPlan.load(output)
    assert plan.nodes == ("a", "b") and plan.links is not None
    assert plan.predicted is not None and plan.predicted.one_more[0].like == "a"
    assert "2 copies of the model" in ended.out and "another node like a" in ended.out
    assert f"plan written to {output}" in ended.out
    assert json.loads(ended.out.splitlines()[-1])["copies"][0]["share"] == 0.5


@pytest.mark.usefixtures("without_ray")
def test_the_stages_of_a_plan_make_the_tokens_of_one_machine(
    run: Run, model: Path, described: Path, tmp_path: Path
) -> None:
    """Each node has room for half of the layers."""
    output, spec = tmp_path / "plan.json", Checkpoint.open(model).spec
    budget = _room_for_half(spec)
    flags = (f"--cpu-memory={budget}B", "--disk=0", "--margin=0", f"--output={output}")
    ended = run(*_search(described, model, *flags, *WORK))
    assert ended.status == 0, ended.err
    plan = ClusterPlan.load(output)
    (copy,) = plan.copies
    assert [stage.policy.model.num_layers for stage in copy.stages] == [3, 3]
    told = copy.predicted
    assert told is not None
    # A plan without a prediction is priced for the job, and never by its share.
    bare = replace(copy, predicted=None)
    planner = CopyPlanner([], model, {}, {}, [bare], plan.links)
    planned = planner.plan(JobOptions(), spec, plan.workload).predicted
    assert planned.throughput_tok_per_s == pytest.approx(told.throughput_tok_per_s)
    engine = pipeline_engine_of(copy, spec, plan.workload, model, tmp_path)
    expected = ReferenceModel(Checkpoint.open(model)).generate(PROMPTS, GEN_LEN)
    limited = [ids[:limit] for ids, limit in zip(expected, LIMITS, strict=True)]
    assert answers(engine) == limited


def _room_for_half(spec: ModelSpec) -> int:
    """Return the bytes that half of the layers need beside a block of two sequences."""
    hardware = recorded_profile("cpu-2core")
    work = Workload(prompt_len=8, gen_len=5, num_prompts=6)
    pipeline = Pipeline(num_stages=2, block_size=2)
    halves = (stage_model(spec, first, 3) for first in (0, 3))
    question = ClusterQuestion(model=spec, workload=work, margin=0.0)
    policies = (next(stage_policies(hardware, half, pipeline, question)) for half in halves)
    return max(policy_peaks(policy, hardware)["cpu"] for policy in policies) + 2**20


def test_a_node_of_an_unknown_machine_is_named(run: Run, model: Path, described: Path) -> None:
    described.write_text(described.read_text().replace("cpu-2core", "cpu-3core"))
    ended = run(*_search(described, model))
    assert ended.status == 2
    assert f"cluster {described}.nodes[0]: profile cpu-3core: got no such file" in ended.err


def test_budgets_are_those_of_every_node(run: Run, model: Path, described: Path) -> None:
    ended = run(*_search(described, model, "--cpu-memory=1MiB", "--disk=0", *WORK))
    assert ended.status == 3
    assert "does not fit on the 2 nodes, neither on one of them nor in stages" in ended.err


def test_some_of_the_nodes_may_be_named(
    run: Run, model: Path, described: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    assert run(*_search(described, model, "--nodes=b", f"--output={output}", *WORK)).status == 0
    assert ClusterPlan.load(output).nodes == ("b",)
    ended = run(*_search(described, model, "--nodes=b,c"))
    assert (ended.status, "got 'c'; allowed: a, b" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("search", "--model=opt-125m", "--top-k=5"), "got --top-k=5; allowed: the flags in "),
        (("measure", "--cluster=x.json", "--num-prompts=5"), "executor.cluster measure --help"),
        (("generate", "--model=x", "--prompts=y", "--report=z"), "cluster generate --help"),
        (("search", "--cluster=x.json"), "required: --model"),
        (("serch",), "choose from 'measure', 'search', 'generate'"),
        ((), "required: ACTION"),
        (("search", "--model=opt-125m"), "zigzag cluster: got no Ray"),
        (("search", "--model=opt-125m", "--cluster=none.json"), "cluster none.json"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    ended = run(*arguments)
    assert ended.status == 2
    assert said in ended.err and ended.err.count("\n") == 1


def test_a_margin_and_a_table_are_read_as_for_one_machine(
    run: Run, model: Path, described: Path, tmp_path: Path
) -> None:
    ended = run(*_search(described, model, "--margin=1.5"))
    assert "--margin: got 1.5; allowed: a share in [0, 1)" in ended.err
    table = tmp_path / "lengths.csv"
    table.write_text("prompt_len,gen_len,count\n20,5,30\n9,8,10\n")
    output = tmp_path / "plan.json"
    ended = run(*_search(described, model, f"--lengths={table}", f"--output={output}", "--nodes=a"))
    assert ended.status == 0, ended.err
    ((stage,),) = (copy.stages for copy in ClusterPlan.load(output).copies)
    assert stage.policy.lanes is not None and stage.policy.workload.num_prompts == 40

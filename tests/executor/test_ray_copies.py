"""Jobs of copies on a real Ray cluster: the answers of one machine, whoever fails."""

from __future__ import annotations

import json
import os
import runpy
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest

pytest.importorskip("ray")

from costmodel.cluster.nodes import Cluster
from costmodel.cluster.plan import ClusterPlan, CopyPlan, StagePlan
from costmodel.plan.policy import Policy
from executor import LLM, SamplingParams, cluster, generate
from executor.cli.cluster_bar import ClusterBar
from executor.nodes import ray_nodes
from profiles.rate_curve import RateCurve
from tests.executor.cluster_nodes import (
    DISK_RATE,
    ROOT,
    SLOW_RATE,
    add_node,
    strike,
    wait_for,
)
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import LANES, Desk, request, save_job_model
from tests.executor.killed_jobs import CONTEXT, answers_of
from tests.executor.stage_plans import HALVES
from tests.executor.tiny_machines import ON_CPU, ON_DISK, change_policy, make_hardware
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE

NUM_PROMPTS = 24
PLACEMENTS = {"a": ON_CPU, "b": HALVES, "c": ON_DISK}
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    options: dict[str, dict[str, Any]] = {"dense": {}, "mixture": MIXTURES["mixtral"]}
    return {
        name: save_job_model(tmp_path_factory.mktemp(name), **each)
        for name, each in options.items()
    }


@pytest.fixture
def desk(models: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Desk:
    made = Desk(models[getattr(request, "param", "dense")], tmp_path)
    made.write_policy(lanes=LANES)
    made.write(*map(line_of, range(NUM_PROMPTS)))
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda main, arguments: end_command(main, arguments, monkeypatch, capfd)


def line_of(number: int) -> dict[str, Any]:
    prompt = [(7 * number + i * i) % VOCAB_SIZE for i in range(1 + number % 8)]
    body: dict[str, Any] = {"max_tokens": 1 + number % 6}
    if number % 3 == 0:
        body |= {"temperature": 0.8, "seed": number}
    if number % 5 == 0:
        body |= {"stop": ["w1"]}
    return request(number, prompt, **body)


def on_nodes(desk: Desk, *more: object) -> list[str]:
    """Return the arguments of a job on nodes, each with an offload folder of its own."""
    flags = desk.arguments("--node-timeout=60s", *more)
    return ["generate", *(f"{x}/{{node}}" if "offload-dir" in x else x for x in flags)]


def answers_alone(desk: Desk, run: Run) -> list[str]:
    """Return the answers of one machine."""
    assert run(generate.main, desk.arguments()).status == 0
    answers = sorted(answers_of(desk.output))
    desk.output.unlink()
    return answers


def write_uneven(desk: Desk) -> None:
    """Give every node a policy of its own: another placement, and fewer lanes."""
    base = Policy.load(desk.policy)
    policies = {
        name: change_policy(base, weights=placement, num_gpu_batches=count)
        for count, (name, placement) in zip((2, 1, 2), PLACEMENTS.items(), strict=True)
    }
    copies = (
        CopyPlan(stages=(StagePlan(node=name, policy=policy),), share=1 / len(policies))
        for name, policy in policies.items()
    )
    plan = ClusterPlan(model=base.model, workload=base.workload, copies=tuple(copies))
    plan.save(desk.policy)


# Dense ones are those of the next test.
@pytest.mark.parametrize("desk", ["mixture"], indirect=True)
def test_uneven_copies_give_the_answers_of_one_machine(
    nodes: Any, desk: Desk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers_alone(desk, run)
    write_uneven(desk)
    wait_for("abc", monkeypatch)
    ended = run(cluster.main, on_nodes(desk, "--json"))
    assert (ended.status, ended.err) == (0, "")
    assert sorted(answers_of(desk.output)) == expected
    told = json.loads(ended.out.splitlines()[-1])
    assert sum(node["answered"] for node in told["nodes"]) == NUM_PROMPTS
    # None gets requests a second time before all have answered.
    assert all(node["answered"] > 0 for node in told["nodes"])


def at_first_answer(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something when the first answers are written."""
    ended = ClusterBar.ended
    acted: list[bool] = []

    def told(self: ClusterBar, finished: Any) -> None:
        ended(self, finished)
        if not acted:
            acted.append(True)
            act()

    monkeypatch.setattr(ClusterBar, "ended", told)


def test_others_go_on_when_a_process_is_killed_and_another_one_hangs(
    nodes: Any,
    desk: Desk,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers_alone(desk, run)
    write_uneven(desk)
    strike(nodes, "a", signal.SIGKILL)
    strike(nodes, "c", signal.SIGSTOP)
    wait_for("ac", monkeypatch)
    ended = run(cluster.main, [*on_nodes(desk), "--node-timeout=8s"])
    assert ended.status == 0
    assert sorted(answers_of(desk.output)) == expected
    assert "node a: The actor died" in caplog.text
    assert "node c: no step for 8 s; its " in caplog.text


def test_a_node_that_is_killed_is_left_out(
    nodes: Any, desk: Desk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers_alone(desk, run)
    desk.write_policy(lanes=LANES, weights=ON_DISK)
    lost = add_node(nodes, "lost", {DISK_RATE: "1e6"})
    at_first_answer(monkeypatch, lambda: nodes.remove_node(lost, allow_graceful=False))
    ended = run(cluster.main, on_nodes(desk, "--nodes=a,lost"))
    assert ended.status == 0
    assert sorted(answers_of(desk.output)) == expected


def _drive(address: str, arguments: list[str], num_answers: int) -> None:
    """Run a job in a process that kills itself after some answers."""
    left = num_answers
    ended = ClusterBar.ended

    def told(self: ClusterBar, finished: Any) -> None:
        nonlocal left
        ended(self, finished)
        left -= len(finished)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ClusterBar.ended = told  # type: ignore[method-assign]
    cluster.main([*arguments, f"--ray={address}"])


def test_a_killed_driver_goes_on_with_resume(nodes: Any, desk: Desk, run: Run) -> None:
    expected = answers_alone(desk, run)
    arguments = on_nodes(desk, "--nodes=a", "--resume")
    process = CONTEXT.Process(target=_drive, args=(nodes.address, arguments, 5))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = desk.output.read_bytes().count(b"\n")
    assert 5 <= before < NUM_PROMPTS
    ended = run(cluster.main, arguments)
    assert ended.status == 0
    assert f"{before} of {NUM_PROMPTS} prompts are answered already" in ended.err
    assert sorted(answers_of(desk.output)) == expected


def test_jobs_are_planned_by_what_was_measured(
    nodes: Any, desk: Desk, run: Run, tmp_path: Path
) -> None:
    expected, measured = answers_alone(desk, run), tmp_path / "cluster.json"
    flags = [f"--cluster={measured}", "--nodes=a,b"]
    ended = run(cluster.main, ["measure", *flags, f"--offload-dir={tmp_path}/{{node}}"])
    assert (ended.status, ended.err) == (0, "")
    assert "a: tiny\nb: tiny\na to b: " in ended.out
    found = Cluster.load(measured)
    assert found.node("a").hardware.disk.read == RateCurve.constant(SLOW_RATE)
    assert {(p.source, p.target) for p in found.links.pairs} == {("a", "b"), ("b", "a")}
    # Without a policy, the nodes search one.
    words = [word for word in on_nodes(desk, *flags) if not word.startswith("--policy")]
    ended = run(cluster.main, [*words, "--nodes=b"])
    assert (ended.status, ended.err) == (0, "")
    assert sorted(answers_of(desk.output)) == expected


def test_unknown_nodes_are_refused_by_name(nodes: Any, desk: Desk, run: Run) -> None:
    ended = run(cluster.main, on_nodes(desk, "--nodes=a,none"))
    assert ended.status == 2
    assert "got none; allowed: a, b, c" in ended.err


def test_without_memory_a_job_is_refused_before_it_runs(nodes: Any, desk: Desk, run: Run) -> None:
    policy = Policy.load(desk.policy)
    assert policy.hardware is not None
    cpu = replace(policy.hardware.cpu, memory_bytes=2**20)
    replace(policy, hardware=replace(policy.hardware, cpu=cpu)).save(desk.policy)
    ended = run(cluster.main, on_nodes(desk, "--nodes=b"))
    assert ended.status == 3
    assert "node b: the policy does not fit: cpu is short by" in ended.err


def test_without_ray_the_command_says_what_to_install(
    desk: Desk, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    ended = run(cluster.main, on_nodes(desk))
    assert ended.status == 2
    assert f"try: {ray_nodes.INSTALL}" in ended.err


def test_the_example_reads_and_writes_parquet(
    nodes: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    prompts = ["w5 w9 w3", "w12", "w8 w8"]
    (tmp_path / "prompts").mkdir()
    pandas.DataFrame({"prompt": prompts}).to_parquet(tmp_path / "prompts" / "part.parquet")
    example = runpy.run_path(str(ROOT / "examples" / "ray_data.py"))
    # Otherwise the actor and this process would each measure the machine first.
    on_known = partial(LLM, hardware=make_hardware())
    example["main"].__globals__["LLM"] = on_known
    example["main"](tmp_path / "prompts", tmp_path / "answers", models["dense"])
    found = pandas.read_parquet(tmp_path / "answers")
    with on_known(models["dense"], offload_dir=tmp_path, progress=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    expected = {output.prompt: output.outputs[0].text for output in outputs}
    assert dict(zip(found["prompt"], found["answer"], strict=True)) == expected

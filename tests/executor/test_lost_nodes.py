"""Nodes that fail or differ before a job begins, with a stand-in for Ray in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from costmodel.cluster.plan import ClusterPlan
from executor import cluster, generate
from executor.checkpoint.folder import Checkpoint
from executor.nodes.facts import NodeFacts, own_facts
from executor.nodes.node import NodeProcess
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import (
    GEN_LEN,
    LANES,
    PROMPT_LEN,
    PROMPTS,
    Desk,
    request,
    save_job_model,
)
from tests.executor.killed_jobs import answers_of
from tests.executor.stage_plans import TWO_DENSE, staged_copy
from tests.executor.tiny_machines import make_hardware

Run = Callable[..., Ended]


class Failure(Exception):
    """What Ray raises for an actor that has died."""


class Call:
    """A call of a method that has returned; of "dies" and "hangs" one that never will."""

    def __init__(self, method: Any, given: Sequence[Any]) -> None:
        self.hangs = method == "hangs"
        self.error = Failure("The actor died") if method == "dies" else None
        self.value = method(*given) if callable(method) else None


class Handle:
    """An actor's handle: its process is an object of this process, but for some methods."""

    def __init__(self, process: Any, instead: Mapping[str, Any]) -> None:
        self._process, self._instead = process, instead

    def __getattr__(self, name: str) -> Any:
        method = self._instead.get(name) or getattr(self._process, name)
        return SimpleNamespace(remote=lambda *given: Call(method, given))


def _wait(
    calls: Sequence[Call], num_returns: int, timeout: float
) -> tuple[Sequence[Call], Sequence[Call]]:
    ready = [call for call in calls if not call.hangs][:num_returns]
    return ready, [call for call in calls if call not in ready]


def _get(call: Call) -> Any:
    assert not call.hangs
    if call.error is not None:
        raise call.error
    return call.value


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what starts a stand-in for Ray, with nodes of these names and methods of theirs."""

    def started(**instead: Mapping[str, Any]) -> None:
        nodes = [
            {"NodeID": name, "NodeName": name, "Alive": True, "Resources": {"CPU": 1.0}}
            for name in instead
        ]
        ray: Any = ModuleType("ray")
        vars(ray).update(
            is_initialized=lambda: True,
            nodes=lambda: nodes,
            # Tests on a real cluster have put another class in its place.
            remote=lambda _: SimpleNamespace(
                options=lambda scheduling_strategy, **_: SimpleNamespace(
                    remote=lambda: Handle(NodeProcess(), instead[scheduling_strategy])
                )
            ),
            kill=lambda handle: None,
            wait=_wait,
            get=_get,
            exceptions=SimpleNamespace(RayError=Failure),
        )
        strategies: Any = ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda node_id, soft: node_id
        for module in (ray, ModuleType("ray.util"), strategies):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_job_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk(model: Path, tmp_path: Path) -> Desk:
    made = Desk(model, tmp_path)
    made.write_policy(lanes=LANES)
    made.write(*(request(i, prompt) for i, prompt in enumerate(PROMPTS)))
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda main, arguments: end_command(main, arguments, monkeypatch, capfd)


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("call", ["facts", "plan"])
def test_others_run_the_job(
    start: Callable[..., None],
    desk: Desk,
    run: Run,
    caplog: pytest.LogCaptureFixture,
    call: str,
    fault: str,
) -> None:
    assert run(generate.main, desk.arguments()).status == 0
    expected = sorted(answers_of(desk.output))
    desk.output.unlink()
    start(a={}, b={call: fault})
    ended = run(
        cluster.main, ["generate", *desk.arguments(f"--trace={desk.folder / 'trace.json'}")]
    )
    assert ended.status == 0, ended.err
    assert sorted(answers_of(desk.output)) == expected
    told = {"dies": "The actor died", "hangs": "no answer for "}[fault]
    assert f"node b: {told}" in caplog.text and "; it is left out" in caplog.text


@pytest.mark.parametrize("call", ["facts", "plan"])
def test_the_last_node_ends_the_job(
    start: Callable[..., None], desk: Desk, run: Run, call: str
) -> None:
    start(a={call: "dies"})
    ended = run(cluster.main, ["generate", *desk.arguments()])
    assert ended.status == 1
    assert "node a: The actor died" in ended.err and ended.err.count("\n") == 1


def test_a_node_with_a_stage_is_named_with_what_to_do(
    start: Callable[..., None], desk: Desk, run: Run
) -> None:
    spec = Checkpoint.open(desk.model).spec
    copy = staged_copy(
        spec, (2, 1), TWO_DENSE[2], hardware=make_hardware(), prompt_len=PROMPT_LEN, gen_len=GEN_LEN
    )
    workload = copy.stages[0].policy.workload
    ClusterPlan(model=spec, workload=workload, copies=(copy,)).save(desk.policy)
    start(a={}, b={"facts": "hangs"})
    ended = run(cluster.main, ["generate", *desk.arguments()])
    assert ended.status == 1
    assert "node b: no answer for " in ended.err and "then --resume" in ended.err


def test_mixed_versions_are_refused_by_name(
    start: Callable[..., None], desk: Desk, run: Run
) -> None:
    def facts(model: Path) -> NodeFacts:
        found = own_facts(model)
        return replace(found, versions=found.versions | {"zigzag": "0"})

    start(a={}, b={"facts": facts})
    ended = run(cluster.main, ["generate", *desk.arguments()])
    assert ended.status == 2
    assert "node b: got zigzag 0; allowed: zigzag" in ended.err

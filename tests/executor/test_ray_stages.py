"""Pipelines on a real Ray cluster: layers cut over nodes give the answers of one machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from costmodel.cluster.plan import ClusterPlan
from costmodel.cluster.stages import stages_of_counts
from costmodel.model.layout import model_layers
from costmodel.plan.policy import Placement
from executor import cluster, generate
from executor.checkpoint.folder import Checkpoint
from tests.executor.cluster_nodes import strike
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import GEN_LEN, PROMPT_LEN, Desk, save_job_model
from tests.executor.killed_jobs import answers_of
from tests.executor.stage_plans import MODELS, THREE_MIXTURE, TWO_DENSE, staged_copy
from tests.executor.test_ray_copies import line_of, on_nodes
from tests.executor.tiny_machines import make_hardware

NUM_PROMPTS = 20
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_job_model(tmp_path_factory.mktemp(name), **options)
        for name, options in MODELS.items()
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda main, arguments: end_command(main, arguments, monkeypatch, capfd)


def make_desk(model: Path, folder: Path, run: Run) -> tuple[Desk, list[str]]:
    """Return a job, and the answers of one machine."""
    desk = Desk(model, folder)
    desk.write(*map(line_of, range(NUM_PROMPTS)))
    assert run(generate.main, desk.arguments()).status == 0
    answers = sorted(answers_of(desk.output))
    desk.output.unlink()
    return desk, answers


def write_plan(desk: Desk, counts: Sequence[int], placements: Sequence[Placement]) -> None:
    """Cut the layers over nodes a, b, c; each has its own placement and batches."""
    spec = Checkpoint.open(desk.model).spec
    copy = staged_copy(
        spec,
        counts,
        placements,
        hardware=make_hardware(),
        prompt_len=PROMPT_LEN,
        gen_len=GEN_LEN,
    )
    workload = copy.stages[0].policy.workload
    ClusterPlan(model=spec, workload=workload, copies=(copy,)).save(desk.policy)


# More of them run without Ray, in ``test_node_engines``.
def test_stages_give_the_answers_of_one_machine(
    nodes: Any, models: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    model, counts, placements = THREE_MIXTURE
    desk, expected = make_desk(models[model], tmp_path, run)
    write_plan(desk, counts, placements)
    trace = tmp_path / "trace.json"
    ended = run(cluster.main, on_nodes(desk, f"--trace={trace}"))
    assert (ended.status, ended.err) == (0, "")
    assert sorted(answers_of(desk.output)) == expected
    stages = stages_of_counts(Checkpoint.open(desk.model).spec, counts)
    layers = [len(model_layers(stage)) for stage in stages]
    assert computed_layers(trace) == dict(zip("abc", layers, strict=False))


def computed_layers(trace: Path) -> dict[str, int]:
    """Return the number of layers that each node of a timeline has computed in its first pass,
    after the job began."""
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, set[int]] = {name: set() for name in names.values()}
    for event in events:
        told = event.get("args", {})
        if event["name"].startswith("compute") and told["token"] == 0 and event["ts"] > 0:
            found[names[event["pid"]]].add(told["layer"])
    return {name: len(layers) for name, layers in found.items()}


def test_a_stage_that_is_killed_starts_again(
    nodes: Any,
    models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, counts, placements = TWO_DENSE
    desk, expected = make_desk(models[model], tmp_path, run)
    write_plan(desk, counts, placements)
    strike(nodes, "b", signal.SIGKILL, num_before=3)
    ended = run(cluster.main, on_nodes(desk))
    assert ended.status == 0
    assert "it starts again" in caplog.text
    assert sorted(answers_of(desk.output)) == expected

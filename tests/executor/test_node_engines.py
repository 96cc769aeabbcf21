"""The engines of nodes in one process, without Ray: the tokens of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from costmodel.plan.lengths import Lengths
from costmodel.plan.pages import PAGE
from costmodel.plan.policy import LanePolicy, Placement
from costmodel.schedule.admission import Admission
from costmodel.schedule.pass_lanes import PassLanes
from executor.checkpoint.folder import Checkpoint
from executor.jobs.params import RowParams
from executor.nodes import pipeline_actors, pipeline_engine, stage_engine
from executor.nodes.copy_engine import CopyEngine
from executor.nodes.pipeline_actors import PipelineActors
from executor.nodes.pipeline_engine import PipelineEngine
from executor.nodes.pipeline_plan import check_pipeline
from executor.nodes.ray_nodes import RayNode
from executor.nodes.share import Handed
from profiles.errors import InputError, RunError
from tests.executor.job_desk import LANES
from tests.executor.nodes_without_ray import (
    GEN_LEN,
    LIMITS,
    PROMPT_LEN,
    PROMPTS,
    Call,
    answers,
    job_of,
    pipeline_engine_of,
)
from tests.executor.nodes_without_ray import without_ray as without_ray
from tests.executor.reference import ReferenceModel
from tests.executor.stage_plans import (
    HALVES,
    MODELS,
    THREE_DENSE,
    THREE_MIXTURE,
    TWO_DENSE,
    TWO_MIXTURE,
    staged_copy,
)
from tests.executor.tiny_machines import ON_DISK, change_policy, make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, options in MODELS.items():
        save_tiny_model(folders[name], **options)
    return folders


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The likeliest tokens of each prompt alone, up to its limit."""
    found = {}
    for name, folder in models.items():
        whole = ReferenceModel(Checkpoint.open(folder)).generate(PROMPTS, GEN_LEN)
        found[name] = [ids[:limit] for ids, limit in zip(whole, LIMITS, strict=True)]
    return found


@pytest.mark.parametrize("lanes", [LANES, None])
def test_a_copy_answers_what_is_handed_out(
    models: dict[str, Path], expected: dict[str, list[list[int]]], tmp_path: Path, lanes: Any
) -> None:
    spec = Checkpoint.open(models["dense"]).spec
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN, weights=HALVES)
    policy = change_policy(base, lanes=lanes, hardware=make_hardware())
    assert answers(CopyEngine(job_of(tmp_path, models["dense"], policy))) == expected["dense"]


def test_a_copy_that_was_full_wants_more_when_all_have_ended(
    models: dict[str, Path], tmp_path: Path
) -> None:
    spec = Checkpoint.open(models["dense"]).spec
    base = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    policy = change_policy(base, lanes=LANES, hardware=make_hardware())
    count = policy.block_size + 1
    lengths = Lengths([1] * count, [1] * count)
    engine = CopyEngine(replace(job_of(tmp_path, models["dense"], policy), lengths=lengths))
    engine.start()
    handed = [
        Handed(request=i, prompt_ids=(i,), params=RowParams(max_tokens=1), identity=i)
        for i in range(count)
    ]
    # One waits while all others end, and then ends alone.
    news = engine.exchange(handed, 60)
    num_ended = len(news.finished)
    while num_ended < count:
        news = engine.exchange([], 60)
        num_ended += len(news.finished)
    if not news.wanted:
        news = engine.exchange([], 20)
    engine.close()
    assert news.wanted


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("model", "counts", "placements"),
    [TWO_DENSE, THREE_DENSE, TWO_MIXTURE, THREE_MIXTURE],
)
def test_stages_make_the_tokens_of_one_machine(
    models: dict[str, Path],
    expected: dict[str, list[list[int]]],
    tmp_path: Path,
    model: str,
    counts: Sequence[int],
    placements: Sequence[Placement],
) -> None:
    spec = Checkpoint.open(models[model]).spec
    copy = staged_copy(
        spec, counts, placements, hardware=make_hardware(), prompt_len=PROMPT_LEN, gen_len=GEN_LEN
    )
    workload = copy.stages[0].policy.workload
    engine = pipeline_engine_of(copy, spec, workload, models[model], tmp_path)
    assert answers(engine) == expected[model]


@pytest.mark.usefixtures("without_ray")
def test_lanes_wait_where_answers_are_longer_than_expected(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block has three pages for up to four sequences, which end on two of them."""
    prompts = [[(5 * n + i * i) % VOCAB_SIZE for i in range(PAGE - 1)] for n in range(8)]
    limits = [5] * len(prompts)
    source = Checkpoint.open(models["mixture"])
    _, counts, placements = TWO_MIXTURE
    copy = staged_copy(
        source.spec,
        counts,
        placements,
        hardware=make_hardware(),
        prompt_len=PAGE - 1,
        gen_len=5,
    )
    lanes = LanePolicy(pool_tokens=len(counts) * 3 * PAGE, pass_rows=4 * PAGE, chunk_rows=16)
    stages = tuple(
        replace(stage, policy=replace(stage.policy, lanes=lanes)) for stage in copy.stages
    )
    num_waiting = []
    plan = Admission.plan

    def planned(self: Admission) -> PassLanes | None:
        lanes = plan(self)
        num_waiting.append(0 if lanes is None else len(lanes.waiting))
        return lanes

    monkeypatch.setattr(Admission, "plan", planned)
    engine = pipeline_engine_of(
        replace(copy, stages=stages),
        source.spec,
        copy.stages[0].policy.workload,
        models["mixture"],
        tmp_path,
        Lengths([PAGE - 1] * len(prompts), [2] * len(prompts), limits),
    )
    assert answers(engine, prompts, limits) == ReferenceModel(source).generate(prompts, 5)
    assert sum(num_waiting) > 0


def test_pipelines_are_refused_what_stages_cannot_run(
    models: dict[str, Path], tmp_path: Path
) -> None:
    _, counts, placements = TWO_DENSE
    spec = Checkpoint.open(models["dense"]).spec
    copy = staged_copy(
        spec, counts, placements, hardware=make_hardware(), prompt_len=PROMPT_LEN, gen_len=GEN_LEN
    )
    check_pipeline(copy, models["dense"])
    with pytest.raises(InputError, match="got a GGUF file over several stages; allowed: a Hugging"):
        check_pipeline(copy, tmp_path / "model.gguf")
    first, last = copy.stages
    faster = replace(last, policy=change_policy(last.policy, hardware=make_hardware(gpu=True)))
    with pytest.raises(InputError, match="policy of node b: got a GPU; allowed: CPU memory and"):
        check_pipeline(replace(copy, stages=(first, faster)), models["dense"])
    spilled = replace(last, policy=change_policy(last.policy, cache=ON_DISK))
    with pytest.raises(InputError, match="policy of node b: got a cache or hidden states outside"):
        check_pipeline(replace(copy, stages=(first, spilled)), models["dense"])


def test_a_node_without_work_replaces_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {name: RayNode(name=name, node_id=name, num_cpus=1, num_gpus=0) for name in "abcd"}
    alive = {"b", "c", "d"}

    class Actor:
        def __init__(self, name: str) -> None:
            self.node, self.name = nodes[name], name

        def find_node(self) -> bool:
            return self.node.name in alive

    actors: Any = [Actor("a"), Actor("b"), Actor("c")]
    monkeypatch.setattr(pipeline_actors, "ray_nodes", lambda: [nodes[x] for x in sorted(alive)])
    pipeline = PipelineActors(actors[:2], [], actors)
    assert pipeline.find_node()
    assert [actor.node.name for actor in actors] == ["d", "b", "c"]
    alive.remove("b")
    assert not pipeline.find_node()


@pytest.mark.usefixtures("without_ray")
def test_a_stage_that_cannot_load_ends_the_pipeline_in_one_line(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], tmp_path: Path
) -> None:
    def broken(*given: Any) -> None:
        raise RunError("the disk is gone")

    monkeypatch.setattr(stage_engine, "StageEngine", broken)
    model, counts, cuts = TWO_DENSE
    spec = Checkpoint.open(models[model]).spec
    lengths = {"prompt_len": PROMPT_LEN, "gen_len": GEN_LEN}
    copy = staged_copy(spec, counts, cuts, hardware=make_hardware(), **lengths)
    workload = copy.stages[0].policy.workload
    engine = pipeline_engine_of(copy, spec, workload, models[model], tmp_path)
    engine.start()
    news = engine.exchange([], 60)
    while news.error is None:
        news = engine.exchange([], 60)
    assert news.error == "the disk is gone"


@pytest.mark.usefixtures("without_ray")
def test_a_pipeline_steps_only_where_a_stage_has_loaded_more(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline_engine, "LOADING_S", 0.0)
    told = [iter([0, 0, 0, 1, None]), iter([0, 0, None])]
    stages = [
        SimpleNamespace(
            open_stage=SimpleNamespace(remote=Call),
            loading_beats=SimpleNamespace(remote=lambda beats=beats: Call(next(beats))),
        )
        for beats in told
    ]
    spec = Checkpoint.open(models["dense"]).spec
    policy = make_policy(spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    jobs: list[Any] = [None, None]
    engine = PipelineEngine(job_of(tmp_path, models["dense"], policy), stages, jobs)
    engine._open()
    # The first look, the second stage, a piece, the first stage.
    assert engine._beats == 4

"""The engines of nodes in one process, without Ray: the tokens of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Placement, Prediction
from executor.checkpoint.folder import Checkpoint
from executor.jobs.params import RowParams
from executor.nodes import pipeline_actors, pipeline_engine
from executor.nodes.copy_engine import CopyEngine
from executor.nodes.facts import own_facts
from executor.nodes.hand_out import HandOut
from executor.nodes.node import NodeProcess
from executor.nodes.pipeline_actors import PipelineActors
from executor.nodes.pipeline_engine import PipelineEngine
from executor.nodes.pipeline_plan import check_pipeline, stage_policy, whole_policy
from executor.nodes.ray_nodes import RayNode
from executor.nodes.share import Handed, NodeJob, NodePlan, StageJob
from profiles.errors import InputError
from tests.executor.job_desk import LANES
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

PROMPT_LEN, GEN_LEN, NUM_PROMPTS = 8, 5, 14
PROMPTS = [
    [(7 * n + i * i) % VOCAB_SIZE for i in range(1 + n % PROMPT_LEN)] for n in range(NUM_PROMPTS)
]
LIMITS = [1 + n % GEN_LEN for n in range(NUM_PROMPTS)]
NO_PREDICTION = Prediction(
    throughput_tok_per_s=1.0,
    latency_s=0.0,
    prefill_s=0.0,
    decode_s=0.0,
    lower_bound_s=0.0,
    bottleneck="",
    channel_s={},
    peak_bytes={},
)


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


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of actors return their results at once."""

    class Failure(Exception):
        pass

    fake = SimpleNamespace(
        get=lambda call: [each.value for each in call] if isinstance(call, list) else call.value,
        wait=lambda calls, num_returns, timeout=None: (calls[:num_returns], calls[num_returns:]),
        exceptions=SimpleNamespace(RayError=Failure),
    )
    monkeypatch.setattr(pipeline_engine, "load_ray", lambda: fake)


class Call:
    """A call that has returned; each is another key."""

    def __init__(self, value: Any) -> None:
        self.value = value


def actor_of(node: NodeProcess) -> Any:
    """Return what looks like an actor's handle."""

    def method(name: str) -> Any:
        def call(*given: Any) -> Call:
            values = [each.value if isinstance(each, Call) else each for each in given]
            return Call(getattr(node, name)(*values))

        return SimpleNamespace(remote=call)

    return SimpleNamespace(open_stage=method("open_stage"), stage_pass=method("stage_pass"))


def answers(engine: CopyEngine) -> list[list[int]]:
    """Hand all requests out as the engine has room, and return their tokens."""
    hand_out, found = HandOut(range(NUM_PROMPTS)), {}
    engine.start()
    handed: list[Handed] = []
    while hand_out.num_left:
        news = engine.exchange(handed, 60)
        assert news.error is None
        for done in news.finished:
            assert hand_out.answered("a", done.request)
            found[done.request] = list(done.ids)
        handed = [
            Handed(
                request=request,
                prompt_ids=tuple(PROMPTS[request]),
                params=RowParams(max_tokens=LIMITS[request]),
                identity=request,
            )
            for request in hand_out.take("a", min(3, news.wanted))
        ]
    engine.close()
    return [found[request] for request in range(NUM_PROMPTS)]


def job_of(folder: Path, model: Path, policy: Any) -> NodeJob:
    return NodeJob(
        model=model,
        plan=NodePlan(policy=policy, hardware=make_hardware(), predicted=NO_PREDICTION),
        offload_dir=folder,
        lengths=Lengths(np.array([len(p) for p in PROMPTS]), LIMITS),
    )


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
    hardware = make_hardware()
    copy = staged_copy(
        spec, counts, placements, hardware=hardware, prompt_len=PROMPT_LEN, gen_len=GEN_LEN
    )
    workload = copy.stages[0].policy.workload
    jobs = [
        StageJob(
            model=models[model],
            policy=stage_policy(copy, place, workload),
            hardware=hardware,
            offload_dir=tmp_path / str(place),
            facts=own_facts(models[model]),
        )
        for place in range(len(counts))
    ]
    whole = job_of(tmp_path, models[model], whole_policy(copy, spec, workload))
    nodes = [NodeProcess() for _ in counts]
    engine = PipelineEngine(whole, [actor_of(node) for node in nodes], jobs)
    assert answers(engine) == expected[model]


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

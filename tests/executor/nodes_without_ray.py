"""Engines of nodes in one process, whose calls of actors return at once, and a job for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from costmodel.cluster.plan import CopyPlan
from costmodel.model.spec import ModelSpec
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Prediction
from costmodel.plan.workload import Workload
from executor.jobs.params import RowParams
from executor.nodes import pipeline_engine
from executor.nodes.copy_engine import CopyEngine
from executor.nodes.facts import own_facts
from executor.nodes.hand_out import HandOut
from executor.nodes.node import NodeProcess
from executor.nodes.pipeline_engine import PipelineEngine
from executor.nodes.pipeline_plan import stage_policy, whole_policy
from executor.nodes.share import Handed, NodeJob, NodePlan, StageJob
from tests.executor.tiny_machines import make_hardware
from tests.executor.tiny_models import VOCAB_SIZE

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

    names = ("open_stage", "loading_beats", "stage_pass", "close_stage")
    return SimpleNamespace(**{name: method(name) for name in names})


def answers(
    engine: CopyEngine,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    limits: Sequence[int] = LIMITS,
) -> list[list[int]]:
    """Hand all requests out as the engine has room, and return their tokens."""
    hand_out, found = HandOut(range(len(prompts))), {}
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
                prompt_ids=tuple(prompts[request]),
                params=RowParams(max_tokens=limits[request]),
                identity=request,
            )
            for request in hand_out.take("a", min(3, news.wanted))
        ]
    engine.close()
    return [found[request] for request in range(len(prompts))]


def job_of(folder: Path, model: Path, policy: Any, lengths: Lengths | None = None) -> NodeJob:
    return NodeJob(
        model=model,
        plan=NodePlan(policy=policy, hardware=make_hardware(), predicted=NO_PREDICTION),
        offload_dir=folder,
        lengths=lengths or Lengths([len(prompt) for prompt in PROMPTS], LIMITS),
    )


def pipeline_engine_of(
    copy: CopyPlan,
    spec: ModelSpec,
    workload: Workload,
    model: Path,
    folder: Path,
    lengths: Lengths | None = None,
) -> PipelineEngine:
    """Return the engine of a pipeline whose stages are in this process."""
    jobs = [
        StageJob(
            model=model,
            policy=stage_policy(copy, place, workload),
            hardware=make_hardware(),
            offload_dir=folder / stage.node,
            facts=own_facts(model),
        )
        for place, stage in enumerate(copy.stages)
    ]
    whole = job_of(folder, model, whole_policy(copy, spec, workload), lengths)
    return PipelineEngine(whole, [actor_of(NodeProcess()) for _ in jobs], jobs)

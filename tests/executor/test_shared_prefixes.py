"""What prompts begin with in common is computed once, and changes no token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.plan.pages import PAGE, pages_of
from costmodel.plan.policy import LanePolicy, Policy
from costmodel.plan.prefixes import Prefixes
from executor.generate import main
from executor.run.lane_block import LaneBlock
from executor.run.lanes import LaneRequest
from executor.run.pass_plan import PassPlan
from executor.run.runner import Runner
from tests.executor.job_desk import Desk, request, save_job_model
from tests.executor.lane_models import (
    HALVES,
    MACHINE,
    MODELS,
    LaneModel,
    LaneModels,
    lane_models,
    poison_freed_pages,
)
from tests.executor.tiny_machines import ON_CPU, change_policy, make_policy
from tests.executor.tiny_models import VOCAB_SIZE

LONGEST, GEN_LEN = 220, 9
# The last bits of their GELU depend on how many rows there are.
BY_TOKENS = {"alibi", "two windows"}
KINDS = ("one", "several", "equal")
# Of each prompt: the tokens, with their log-probabilities in all bits.
Answers = list[list[tuple[int, float]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> LaneModels:
    """Make each model once."""
    return lane_models(tmp_path_factory, max_position_embeddings=256)


def _draw_job(rng: random.Random, kind: str) -> list[LaneRequest]:
    """Draw prompts that begin with none, one or several prefixes, with prefixes of prefixes, or
    prompts that are equal."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(count)]

    first, second = tokens(rng.randint(64, 110)), tokens(rng.randint(64, 130))
    longer = first + tokens(rng.randint(32, 70))
    kinds: dict[str, list[list[int]]] = {
        "none": [[]],
        "one": [first],
        "several": [first, second, []],
        "nested": [first, longer, longer],
        "equal": [first],
    }
    prompts = [
        rng.choice(kinds[kind]) + tokens(0 if kind == "equal" else rng.randint(1, 40))
        for _ in range(7)
    ]
    return [
        LaneRequest(prompt_ids=prompt, max_tokens=rng.choice([1, 2, 5, GEN_LEN]))
        for prompt in prompts
    ]


def _policy(model: LaneModel, **changes: Any) -> Policy:
    base = make_policy(model.source.spec, prompt_len=LONGEST, gen_len=GEN_LEN)
    lanes = LanePolicy(pool_tokens=4 * PAGE * pages_of(LONGEST + GEN_LEN), pass_rows=2000)
    work = replace(base.workload, logprobs=0)
    return change_policy(base, **({"lanes": lanes, "workload": work} | changes))


def _run(
    model: LaneModel, policy: Policy, requests: Sequence[LaneRequest], *, shares: bool = True
) -> Answers:
    found: dict[int, list[tuple[int, float]]] = {}
    none = None if shares else Prefixes.none(len(requests))
    with Runner(policy, MACHINE, model.source, model.folder) as runner:
        for result in runner.run_requests(requests, prefixes=none):
            for index, ids in result.output_ids.items():
                scores = result.output_scores[index].log_probs.tolist()
                found[index] = list(zip(ids, scores, strict=True))
    return [found[i] for i in range(len(requests))]


# Of prefixes, one window is narrower than all and one is wider than some.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"window", "tied", "mixed experts"}))
def test_sharing_changes_no_token(
    models: LaneModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = models(name), random.Random(name)
    jobs = [_draw_job(rng, kind) for kind in ("nested", KINDS[len(name) % 3])]
    expected = [_run(model, _policy(model), job, shares=False) for job in jobs]
    poison_freed_pages(monkeypatch)
    rows = _count_rows(monkeypatch)
    for job, answers in zip(jobs, expected, strict=True):
        most = pages_of(LONGEST + GEN_LEN)
        sizes = {"gpu_batch_size": rng.randint(1, 4), "num_gpu_batches": rng.randint(1, 3)}
        policy = _policy(model, prefill_batch_size=1, weights=rng.choice([ON_CPU, HALVES]), **sizes)
        lanes = LanePolicy(
            pool_tokens=PAGE * rng.randint(most, most * policy.block_size),
            pass_rows=LONGEST + policy.block_size + rng.randint(0, 300),
            chunk_rows=rng.choice([1, 16, 512]),
        )
        rows.clear()
        found = _run(model, replace(policy, lanes=lanes), job)
        if name in BY_TOKENS:
            found, answers = _tokens(found), _tokens(answers)
        assert found == answers, (policy, lanes)
        whole = sum(len(r.prompt_ids) + r.max_tokens - 1 for r in job)
        assert sum(rows) <= whole


def test_prefixes_are_computed_once(models: LaneModels, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = models("plain"), random.Random(5)
    rows = _count_rows(monkeypatch)
    for kind in ("none", "one", "equal"):
        job = _draw_job(rng, kind)
        whole = sum(len(r.prompt_ids) + r.max_tokens - 1 for r in job)
        lengths = [len(r.prompt_ids) for r in job]
        shared = {"none": 0, "one": 64, "equal": (lengths[0] - 1) // PAGE * PAGE}[kind]
        if kind == "one":
            # Seven prompts share what is cut to whole pages.
            common = next(
                i
                for i, ids in enumerate(zip(*(r.prompt_ids for r in job), strict=False))
                if len(set(ids)) > 1
            )
            shared = common // PAGE * PAGE
        for shares in (False, True):
            rows.clear()
            _run(model, _policy(model), job, shares=shares)
            assert sum(rows) == whole - (6 * shared if shares else 0)


def test_prompts_share_memory(models: LaneModels) -> None:
    """Four lanes of 104 tokens take 16 pages, or 3 and 4 of their own."""
    model, rng = models("plain"), random.Random(6)
    first = [rng.randrange(VOCAB_SIZE) for _ in range(96)]
    job = [LaneRequest(prompt_ids=[*first, i], max_tokens=8) for i in range(4)]
    policy = _policy(model, lanes=LanePolicy(pool_tokens=7 * PAGE, pass_rows=200))
    passes = []
    for shares in (False, True):
        with Runner(policy, MACHINE, model.source, model.folder) as runner:
            none = None if shares else Prefixes.none(len(job))
            # The second job finds all pages free again.
            for _ in range(2):
                results = list(runner.run_requests(job, prefixes=none))
            assert isinstance(runner.block, LaneBlock) and not runner.block.table.prefixes
        passes.append(sum(result.num_tokens for result in results))
    # In room for one at a time, and for all of them.
    assert passes == [4 * 8, 8]


@pytest.mark.parametrize("what", ["packed cache", "prompt scores"])
def test_what_cannot_share_does_not(
    models: LaneModels, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = models("plain"), random.Random(7)
    job = _draw_job(rng, "one")
    policy = _policy(model)
    if what == "packed cache":
        policy = _policy(model, cache_bits=4, group_size=32)
    else:
        policy = replace(policy, workload=replace(policy.workload, prompt_logprobs=0))
    rows = _count_rows(monkeypatch)
    assert _run(model, policy, job) == _run(model, policy, job, shares=False)
    assert sum(rows) == 2 * sum(len(r.prompt_ids) + r.max_tokens - 1 for r in job)


def _tokens(answers: Answers) -> Answers:
    return [[(token, 0.0) for token, _ in answer] for answer in answers]


def _count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the rows of every pass."""
    rows: list[int] = []
    begin = LaneBlock.begin_pass

    def counted(block: LaneBlock, plan: PassPlan) -> None:
        rows.append(plan.first_rows[-1])
        begin(block, plan)

    monkeypatch.setattr(LaneBlock, "begin_pass", counted)
    return rows


def test_jobs_share_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(save_job_model(tmp_path / "model"), tmp_path)
    rows, shared = _count_rows(monkeypatch), list(range(70))
    lanes = LanePolicy(pool_tokens=32 * PAGE, pass_rows=400)
    desk.write_policy(prompt_len=72, gen_len=4, lanes=lanes)
    # Two answers of one prompt share all but its last token.
    desk.write(request(0, [*shared, 7, 8], max_tokens=4, n=2), request(1, [*shared, 9]))
    found = []
    for flags in ([], ["--no-shared-prefixes"]):
        rows.clear()
        main(desk.arguments("--errors", tmp_path / "errors.jsonl", *flags))
        answers = {name: body["choices"] for name, body in desk.answers().items()}
        found.append((sum(rows), answers))
        desk.output.unlink()
    assert found[0][1] == found[1][1] and len(found[0][1]) == 2
    assert found[1][0] - found[0][0] == 2 * 64

"""``LLM`` with parameters of each prompt, over lanes and over blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costmodel.plan.policy import LanePolicy
from executor import LLM, CompletionOutput, SamplingParams
from executor.checkpoint.folder import Checkpoint
from profiles.errors import InputError
from tests.executor.job_desk import GEN_LEN, LANES, PROMPT_LEN, PROMPTS, save_job_model, words
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy

TEXTS = [words(ids).strip() for ids in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_job_model(tmp_path_factory.mktemp("llm-params"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """The likeliest tokens of each prompt alone."""
    return ReferenceModel(Checkpoint.open(model)).generate(PROMPTS, GEN_LEN)


@pytest.fixture(params=[None, LANES], ids=["blocks", "lanes"])
def llm(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> LLM:
    return open_llm(model, tmp_path, lanes=request.param)


def open_llm(model: Path, folder: Path, **changes: Any) -> LLM:
    base = make_policy(Checkpoint.open(model).spec, prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    policy = change_policy(base, hardware=make_hardware(), **changes)
    return LLM(model, policy=policy, offload_dir=folder)


def facts(output: CompletionOutput) -> tuple[list[int], str, str, object]:
    return output.token_ids, output.text, output.finish_reason, output.stop_reason


def test_each_prompt_has_its_own(llm: LLM, expected: list[list[int]]) -> None:
    stop = f"w{expected[3][2]}"
    params = [
        SamplingParams(max_tokens=2),
        SamplingParams(stop_token_ids=[expected[1][3]]),
        SamplingParams(logprobs=1),
        SamplingParams(stop=[stop, "w-1"], prompt_logprobs=0),
        SamplingParams(stop=stop, include_stop_str_in_output=True, n=2),
    ]
    prompts = [*TEXTS[:4], TEXTS[3]]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    first = [output.outputs[0] for output in outputs]
    assert facts(first[0]) == (expected[0][:2], words(expected[0][:2]), "length", None)
    assert facts(first[1]) == (expected[1][:3], words(expected[1][:3]), "stop", expected[1][3])
    assert facts(first[2]) == (expected[2], words(expected[2]), "length", None)
    ids = expected[3][:3]
    assert facts(first[3]) == (ids, words(ids).removesuffix(stop), "stop", stop)
    for index, each in enumerate(outputs[4].outputs):
        assert each.index == index
        assert facts(each) == (ids, words(ids), "stop", stop)
    assert [len(output.outputs) for output in outputs] == [1, 1, 1, 1, 2]
    assert first[2].logprobs is not None
    assert [next(iter(each)) for each in first[2].logprobs] == expected[2]
    assert all(each.logprobs is None for i, each in enumerate(first) if i != 2)
    assert [output.prompt_logprobs is not None for output in outputs] == [False] * 3 + [True, False]


def test_draws_are_those_of_the_prompt(model: Path, tmp_path: Path) -> None:
    """Whatever the schedule, and whatever else is in the call."""
    params = [
        SamplingParams(temperature=1.5, seed=number % 2, n=number % 3 + 1, max_tokens=4)
        for number in range(len(PROMPTS))
    ]
    one = LanePolicy(pool_tokens=32, pass_rows=PROMPT_LEN)
    alone = {"gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_batch_size": 1, "lanes": one}
    found = []
    for changes in ({}, {"lanes": LANES}, alone):
        outputs = open_llm(model, tmp_path, **changes).generate(PROMPTS, params)
        found.append([[each.token_ids for each in output.outputs] for output in outputs])
    assert found[0] == found[1] == found[2]
    assert len({tuple(ids) for row in found[0] for ids in row}) > 7
    part = open_llm(model, tmp_path, lanes=LANES).generate(PROMPTS[3:0:-1], params[3:0:-1])
    assert [[each.token_ids for each in output.outputs] for output in part] == found[0][3:0:-1]
    # One object for all prompts, as a list of equal ones.
    llm = open_llm(model, tmp_path, lanes=LANES)
    same = replace(params[0], n=2)
    assert llm.generate(PROMPTS, same) == llm.generate(PROMPTS, [same] * len(PROMPTS))


def test_outputs_come_as_they_end(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1 + 5 * (i == 1), n=1 + i % 2) for i in range(len(PROMPTS))]
    outputs = list(llm.iter_outputs(PROMPTS, params))
    assert sorted(output.index for output in outputs) == list(range(len(PROMPTS)))
    blocks = list(llm.iter_blocks(PROMPTS, params))
    assert [output for block in blocks for output in block] == outputs and all(blocks)
    assert sorted(outputs, key=lambda output: output.index) == llm.generate(PROMPTS, params)
    run = llm.iter_outputs(PROMPTS, params)
    assert next(run) == outputs[0]
    llm.close()
    assert list(run) == []


def test_over_lanes_short_ones_do_not_wait(model: Path, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path, lanes=LANES)
    params = [SamplingParams(max_tokens=6 if i == 2 else 2) for i in range(len(PROMPTS))]
    assert [output.index for output in llm.iter_outputs(PROMPTS, params)][-1] == 2


def test_bad_params_are_refused_in_one_line(llm: LLM) -> None:
    def refusal(**settings: Any) -> str:
        with pytest.raises(InputError) as error:
            llm.generate(PROMPTS, SamplingParams(**settings))
        return str(error.value)

    assert refusal(n=0).startswith("n: got 0; allowed: 1 or more")
    assert refusal(stop=[""]).startswith("stop: got ['']; allowed: text or a list of text")
    assert refusal(stop_token_ids=[-1]).startswith("stop_token_ids: got [-1]; allowed: a list")
    assert refusal(stop_token_ids=3).startswith("stop_token_ids: got 3; allowed")
    with pytest.raises(InputError, match=r"params: got 2 for 5 prompts; allowed: .* each prompt"):
        llm.generate(PROMPTS, [SamplingParams()] * 2)
    with pytest.raises(InputError, match="params: got 3; allowed: SamplingParams"):
        llm.generate(PROMPTS, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="params: got 'x'; allowed: SamplingParams"):
        llm.generate(PROMPTS, ["x"] * 5)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"prompt 1: got 9 tokens; allowed: 8"):
        llm.generate([[1] * 9])


def test_a_prompt_without_room_is_told(model: Path, tmp_path: Path) -> None:
    lanes = LanePolicy(pool_tokens=32, pass_rows=9)
    llm = open_llm(model, tmp_path, lanes=lanes)
    with pytest.raises(InputError, match="prompt 2: got 7 tokens; allowed: 6, the longest prompt"):
        llm.generate([[1], [2] * 7], SamplingParams(n=2))

"""Jobs through the engine: each request ends where it alone would, and jobs go on after a kill."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from costmodel.plan.policy import LanePolicy
from executor import generate
from executor.checkpoint.folder import Checkpoint
from executor.jobs.journal import journal_path
from executor.run.block import Block
from executor.run.lane_block import LaneBlock
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import GEN_LEN, LANES, PROMPTS, Desk, save_job_model, words
from tests.executor.job_desk import request as line_of
from tests.executor.killed_jobs import run_until
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import ON_DISK, make_hardware
from tests.executor.tiny_models import save_tiny_model

Run = Callable[..., Ended]
ALONE = {"gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_batch_size": 1}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_job_model(tmp_path_factory.mktemp("job-model"))


@pytest.fixture(scope="session")
def expected(model: Path) -> list[list[int]]:
    """The likeliest tokens of each prompt alone."""
    return ReferenceModel(Checkpoint.open(model)).generate(PROMPTS, GEN_LEN)


@pytest.fixture
def desk(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Desk:
    made = Desk(model, tmp_path)
    made.write_policy(lanes=getattr(request, "param", None))
    return made


in_blocks_and_lanes = pytest.mark.parametrize("desk", [None, LANES], indirect=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda arguments: end_command(generate.main, arguments, monkeypatch, capfd)


@in_blocks_and_lanes
def test_each_line_ends_at_its_own_limits(desk: Desk, run: Run, expected: list[list[int]]) -> None:
    stop = f"w{expected[3][2]}"
    desk.write(
        line_of(0, max_tokens=2),
        line_of(1, stop_token_ids=[expected[1][3]]),
        line_of(2),
        line_of(3, stop=[stop, "w-1"]),
        line_of(4, max_tokens=5, logprobs=1, n=2),
    )
    ended = run(desk.arguments("--json"))
    assert (ended.status, ended.err) == (0, "")
    found = desk.answers()
    ids = [expected[0][:2], expected[1][:3], expected[2], expected[3][:2], expected[4][:5]]
    reasons = ["length", "stop", "length", "stop", "length"]
    for number, (wanted, reason) in enumerate(zip(ids, reasons, strict=True)):
        for choice in found[f"r{number}"]["choices"]:
            assert choice["text"].rstrip() == words(wanted), number
            assert choice["finish_reason"] == reason
    counts = [found[f"r{number}"]["usage"]["completion_tokens"] for number in range(5)]
    assert counts == [2, 4, GEN_LEN, 3, 10]
    assert len(found["r4"]["choices"]) == 2
    tokens = found["r4"]["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"w{i}" for i in expected[4][:5]]
    figures = json.loads(ended.out.splitlines()[-1])
    # Without end tokens.
    assert figures["generated_tokens"] == 2 + 3 + GEN_LEN + 3 + 10
    assert {path.name for path in desk.folder.iterdir()} == {"in.jsonl", "out.jsonl", "policy.json"}


@in_blocks_and_lanes
def test_sampled_tokens_depend_on_no_other_line(desk: Desk, run: Run) -> None:
    lines = [
        line_of(number, temperature=0.5 + 0.5 * number, seed=number % 2, n=2, max_tokens=4)
        for number in range(5)
    ]
    desk.write(*lines)
    assert run(desk.arguments()).status == 0
    together = {name: body["choices"] for name, body in desk.answers().items()}
    texts = [choice["text"] for choices in together.values() for choice in choices]
    assert len(set(texts)) > 5
    desk.write(*reversed(lines[1:4]))
    desk.write_policy(**ALONE | {"num_gpu_batches": 2})
    assert run(desk.arguments()).status == 0
    found = {name: body["choices"] for name, body in desk.answers().items()}
    assert found == {name: together[name] for name in ("r1", "r2", "r3")}


@in_blocks_and_lanes
def test_bad_lines_go_to_the_error_file(
    desk: Desk, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    desk.write(
        line_of(0),
        "{",
        line_of(1) | {"body": {"prompt": [1] * 9}},
        line_of(2) | {"body": {"prompt": [1], "max_tokens": GEN_LEN + 1}},
        line_of(3, frequency_penalty=1),
        line_of(4),
    )
    ended = run(desk.arguments())
    assert ended.status == 0
    (told_of,) = caplog.messages
    assert told_of.startswith(f"4 of 6 lines cannot be run, see {desk.errors}; first: line 2 of")
    assert set(desk.answers()) == {"r0", "r4"}
    told = [json.loads(line) for line in desk.errors.read_text().splitlines()]
    assert [each["custom_id"] for each in told] == [None, "r1", "r2", "r3"]
    for each, said in zip(told, ("not JSON", "9 tokens", "7 tokens", "frequency"), strict=True):
        assert said in each["error"]["message"]
    desk.output.unlink()
    ended = run(desk.arguments("--strict"))
    assert ended.status == 2 and ended.err.startswith("error: line 2 of in.jsonl: ")
    assert not desk.output.exists()
    desk.write(line_of(0))
    assert run(desk.arguments()).status == 0 and not desk.errors.exists()


def test_compressed_input(desk: Desk, run: Run, expected: list[list[int]]) -> None:
    desk.write(*({"prompt_ids": ids} for ids in PROMPTS))
    desk.prompts.write_bytes(gzip.compress(desk.prompts.read_bytes()))
    assert run(desk.arguments()).status == 0
    told = [json.loads(line) for line in desk.output.read_text().splitlines()]
    assert [each["output_ids"] for each in told] == expected
    desk.prompts.write_bytes(desk.prompts.read_bytes()[:-9])
    ended = run(desk.arguments())
    assert ended.status == 2 and "broken compressed text" in ended.err


def interrupt(desk: Desk, run: Run, monkeypatch: pytest.MonkeyPatch, num_prompts: int) -> None:
    """Leave a job after some prompts, which run one by one."""
    start_block, begin_pass = Block.start, LaneBlock.begin_pass
    begun: list[Any] = []

    def start(block: Block, batches: Any) -> None:
        if len(begun) == num_prompts * GEN_LEN:
            raise KeyboardInterrupt
        begun.extend([block] * GEN_LEN)
        start_block(block, batches)

    def begin(block: LaneBlock, plan: Any) -> None:
        if len(begun) == num_prompts * GEN_LEN:
            raise KeyboardInterrupt
        begun.append(block)
        begin_pass(block, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "start", start)
        patch.setattr(LaneBlock, "begin_pass", begin)
        ended = run(desk.arguments())
    assert ended.status == 130 and journal_path(desk.output).exists()


@pytest.fixture(params=[None, LANES], ids=["blocks", "lanes"])
def left(
    desk: Desk, run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Desk:
    """A job that was ended early, with two of five answers."""
    desk.write_policy(**ALONE, lanes=request.param)
    desk.write(*map(line_of, range(5)))
    interrupt(desk, run, monkeypatch, 2)
    assert len(desk.answers()) == 2
    return desk


def check_whole(desk: Desk, expected: list[list[int]]) -> None:
    texts = {name: body["choices"][0]["text"] for name, body in desk.answers().items()}
    assert texts == {f"r{number}": words(ids) for number, ids in enumerate(expected)}
    assert not journal_path(desk.output).exists()


def test_a_job_goes_on(left: Desk, run: Run, expected: list[list[int]]) -> None:
    before = left.output.read_bytes()
    ended = run(left.arguments())
    assert ended.status == 2 and "--resume to go on" in ended.err
    ended = run(left.arguments("--resume"))
    assert (ended.status, ended.err) == (0, "2 of 5 prompts are answered already\n")
    assert left.output.read_bytes().startswith(before)
    check_whole(left, expected)
    ended = run(left.arguments("--resume"))
    assert ended.status == 2 and "No such file" in ended.err


def test_lines_may_be_added_and_not_changed(
    left: Desk, run: Run, expected: list[list[int]]
) -> None:
    before = left.output.read_bytes(), journal_path(left.output).read_bytes()
    text = left.prompts.read_text()
    left.prompts.write_text(text.replace("[12]", "[13]"))
    ended = run(left.arguments("--resume"))
    assert ended.status == 2 and "prompts that have changed" in ended.err
    assert len(ended.err.splitlines()) == 1
    left.prompts.write_text("".join(text.splitlines(keepends=True)[:4]))
    assert "prompts that have changed" in run(left.arguments("--resume")).err
    assert before == (left.output.read_bytes(), journal_path(left.output).read_bytes())
    more = json.dumps(line_of(0) | {"custom_id": "r5"})
    left.prompts.write_text(text + more + "\n")
    assert run(left.arguments("--resume")).status == 0
    check_whole(left, [*expected, expected[0]])


def test_another_job_does_not_go_on(left: Desk, run: Run, tmp_path: Path) -> None:
    for flag in ("--temperature=0.5", "--seed=1", "--repetition-penalty=1.1"):
        ended = run(left.arguments("--resume", flag))
        assert ended.status == 2 and "other settings of sampling" in ended.err
    other = tmp_path / "other"
    shutil.copytree(left.model, other)
    save_tiny_model(other, "llama", num_layers=3, seed=1)
    ended = run([*left.arguments("--resume"), f"--model={other}"])
    assert ended.status == 2 and "another model" in ended.err
    left.write_policy(**ALONE, cache_bits=8)
    ended = run(left.arguments("--resume"))
    assert ended.status == 2 and "other approximations" in ended.err


def test_deleted_answers_are_told_and_made_again(
    left: Desk, run: Run, expected: list[list[int]]
) -> None:
    left.output.unlink()
    ended = run(left.arguments("--resume"))
    told = f"0 of 5 prompts are answered already; 2 more were, and are gone from {left.output}"
    assert (ended.status, ended.err) == (0, told + "\n")
    check_whole(left, expected)


def test_a_first_run_may_ask_to_go_on(desk: Desk, run: Run, expected: list[list[int]]) -> None:
    desk.write(*map(line_of, range(5)))
    assert run(desk.arguments("--resume")).status == 0
    check_whole(desk, expected)
    ended = run(desk.arguments("--resume", "--output", "-"))
    assert ended.status == 2 and "a pipe or a device" in ended.err


@pytest.mark.parametrize("lanes", [None, LANES], ids=["blocks", "lanes"])
def test_killed_processes_go_on(
    desk: Desk, expected: list[list[int]], lanes: LanePolicy | None
) -> None:
    """With cache and weights on disk; blocks beside an emulated GPU."""
    hardware = make_hardware(gpu=lanes is None)
    desk.write_policy(hardware=hardware, **ALONE, weights=ON_DISK, cache=ON_DISK, lanes=lanes)
    desk.write(*map(line_of, range(len(PROMPTS))))
    draws, done = random.Random(0), ""
    # A pass over lanes takes fewer tasks, and all of the job is to outlast any of these.
    most_events = 500 if lanes is None else 250
    for _ in range(5):
        status = run_until(desk.arguments("--resume"), draws.randint(1, most_events))
        assert status in (0, -signal.SIGKILL)
        text = desk.output.read_text() if desk.output.exists() else ""
        # Nothing that was answered is lost.
        assert text.startswith(done)
        done = text[: text.rfind("\n") + 1]
    assert done
    if journal_path(desk.output).exists():
        assert run_until(desk.arguments("--resume"), None) == 0
    check_whole(desk, expected)

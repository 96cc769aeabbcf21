"""Jobs over lanes: the answers of the same job over blocks, and of each request alone."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodel.plan.lengths import IntArray
from costmodel.plan.pages import PAGE, pages_of
from costmodel.plan.policy import LanePolicy, Placement
from costmodel.plan.workload import Workload
from executor import generate
from executor.checkpoint.opening import OpenedCheckpoint
from executor.cli.job_options import JobOptions
from executor.jobs.journal import journal_path
from executor.jobs.params import RowParams
from executor.jobs.planning import lengths_of
from executor.jobs.row_plan import plan_within_memory
from executor.jobs.table import JobTable, ParsedLine
from profiles.errors import InfeasibleError
from profiles.recorded import recorded_profile
from tests.covering import at_most
from tests.executor.commands import Ended, end_command
from tests.executor.job_desk import LANES, Desk, request, save_job_model
from tests.executor.killed_jobs import answers_of, run_until
from tests.executor.tiny_machines import ON_CPU, ON_DISK
from tests.executor.tiny_models import MIXTURES, VOCAB_SIZE

NUM_JOBS = at_most(40, 300)
# A plain one, windows, a mixture of experts, latent attention.
MODELS: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "gemma3_text", "num_layers": 3},
    MIXTURES["mixtral"],
    {"family": "deepseek_v3"},
]
# Nothing packed; weights in 4 bits; cache in 4 bits.
BITS: list[dict[str, int]] = [{}, {"weight_bits": 4}, {"cache_bits": 4}]
PROMPT_LEN, GEN_LEN = 40, 9
HALVES = Placement(cpu=0.5, disk=0.5)
ALONE = {"gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_batch_size": 1}
Run = Callable[..., Ended]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_job_model(tmp_path_factory.mktemp("lane-job"), **each) for each in MODELS]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda arguments: end_command(generate.main, arguments, monkeypatch, capfd)


def draw_ids(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, most))]


def draw_line(rng: random.Random, number: int) -> dict[str, Any]:
    """Draw a request with parameters of its own."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, GEN_LEN), "n": rng.choice([1, 1, 1, 3])}
    if rng.random() < 0.5:
        body |= {"temperature": rng.uniform(0.5, 1.5), "seed": rng.randrange(3)}
        body |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.01}])
    if rng.random() < 0.4:
        # Words of several tokens, which begin in many.
        body["stop"] = rng.choice(["w1", ["w16", "7 w1"], "4 w"])
    if rng.random() < 0.4:
        body["stop_token_ids"] = rng.sample(range(VOCAB_SIZE), 20)
    if rng.random() < 0.3:
        body["logprobs"] = rng.randint(0, 3)
    if rng.random() < 0.2:
        body["repetition_penalty"] = 1.3
    prompts = [draw_ids(rng, PROMPT_LEN) for _ in range(rng.choice([1, 1, 1, 2]))]
    return request(number, prompts if len(prompts) > 1 else prompts[0], **body)


def draw_policy(rng: random.Random) -> dict[str, Any]:
    size, count = rng.randint(1, 4), rng.randint(1, 3)
    most = pages_of(PROMPT_LEN + GEN_LEN)
    lanes = LanePolicy(
        pool_tokens=PAGE * rng.randint(most, most * size * count),
        pass_rows=PROMPT_LEN + size * count + rng.randint(0, 60),
        chunk_rows=rng.choice([1, 16, 512]),
    )
    return {
        "gpu_batch_size": size,
        "num_gpu_batches": count,
        "prefill_batch_size": 1,
        "weights": rng.choice([ON_CPU, HALVES, ON_DISK]),
        "lanes": lanes,
    }


@pytest.mark.parametrize("seed", range(NUM_JOBS))
def test_lanes_blocks_and_each_alone(
    models: list[Path], tmp_path: Path, run: Run, seed: int
) -> None:
    rng = random.Random(seed)
    desk = Desk(models[seed % len(models)], tmp_path)
    lines = [draw_line(rng, number) for number in range(rng.randint(3, 6))]

    bits = rng.choice(BITS)

    def answers(**changes: Any) -> dict[str, Any]:
        desk.write_policy(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, **bits, **changes)
        ended = run(desk.arguments())
        assert (ended.status, ended.err) == (0, ""), ended.err
        return {name: body["choices"] for name, body in sorted(desk.answers().items())}

    desk.write(*lines)
    one_lane = LanePolicy(pool_tokens=PAGE * 2, pass_rows=PROMPT_LEN)
    # Over blocks, padding of a packed cache may change last bits.
    is_alone = seed // len(models) % 2 == 0 or "cache_bits" in bits
    expected = answers(**(ALONE | {"lanes": one_lane} if is_alone else {}))
    assert len(expected) == len(lines)
    rng.shuffle(lines)
    desk.write(*lines)
    check_equal(answers(**draw_policy(rng)), expected)


def check_equal(found: Any, expected: Any) -> None:
    """Compare all but the last bits of log-probabilities."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


@pytest.mark.parametrize("weights", [ON_CPU, ON_DISK], ids=["memory", "disk"])
def test_killed_jobs_go_on(
    models: list[Path], tmp_path: Path, run: Run, weights: Placement
) -> None:
    rng = random.Random(str(weights))
    desk = Desk(models[0], tmp_path)
    desk.write(*(draw_line(rng, number) for number in range(16)))
    lanes = LanePolicy(pool_tokens=4 * PAGE, pass_rows=PROMPT_LEN + 4)
    desk.write_policy(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, weights=weights, lanes=lanes)
    assert run(desk.arguments()).status == 0
    expected = sorted(answers_of(desk.output))
    desk.output.unlink()
    done: list[str] = []
    num_killed = 0
    for _ in range(6):
        status = run_until(desk.arguments("--resume"), rng.randint(1, 400))
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        num_killed += 1
        if desk.output.exists():
            text = desk.output.read_text()
            # Nothing that was answered is lost, and at most one line is torn.
            assert text.startswith("".join(done))
            done = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert num_killed >= 3
    if journal_path(desk.output).exists() or not done:
        assert run_until(desk.arguments("--resume"), None) == 0
    assert not journal_path(desk.output).exists()
    assert sorted(answers_of(desk.output)) == expected


def test_requests_without_room(
    models: list[Path], tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """They are told before the run, each by its line, and the others run."""
    desk = Desk(models[0], tmp_path)
    # Two pages of cache, and 27 rows beside the other three lanes.
    lanes = LanePolicy(pool_tokens=2 * PAGE, pass_rows=30)
    desk.write_policy(prompt_len=PROMPT_LEN, gen_len=60, lanes=lanes)
    desk.write(
        request(0, max_tokens=3),
        "",
        request(1, list(range(28)), max_tokens=2),
        request(2, list(range(27)), max_tokens=2),
        request(3, [[1], list(range(10))], max_tokens=60),
        "{",
        request(4, [7] * 6, max_tokens=59),
    )
    ended = run(desk.arguments())
    assert ended.status == 0
    assert set(desk.answers()) == {"r0", "r2", "r4"}
    told = [json.loads(line) for line in desk.errors.read_text().splitlines()]
    assert [(each["error"]["line"], each["custom_id"]) for each in told] == [
        (3, "r1"),
        (5, "r3"),
        (6, None),
    ]
    first, second, _ = (each["error"]["message"] for each in told)
    assert "got 28 tokens; allowed: 27, the longest prompt of a pass" in first
    assert "got 10 tokens + 60 generated; allowed: 64 tokens of the KV cache" in second
    assert caplog.messages[0].startswith("3 of 6 lines cannot be run")
    desk.output.unlink()
    ended = run(desk.arguments("--strict"))
    assert ended.status == 2 and ended.err.startswith("error: line 6 of in.jsonl: ")
    desk.write(request(1, list(range(28)), max_tokens=2))
    for more in ("--strict", "--resume"):
        ended = run(desk.arguments(more))
        assert ended.status == 2 and ended.err.startswith("error: line 1 of in.jsonl: got 28")
        assert not desk.output.exists() and not journal_path(desk.output).exists()


@pytest.mark.parametrize("number", [3, 6, 9])
def test_a_full_disk_loses_nothing(
    models: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    desk = Desk(models[0], tmp_path)
    desk.write(*(request(line, max_tokens=line + 1) for line in range(5)))
    desk.write_policy(lanes=LANES)
    assert run(desk.arguments()).status == 0
    expected = sorted(answers_of(desk.output))
    desk.output.unlink()
    original, calls = os.write, []

    def write(descriptor: int, data: Any) -> int:
        calls.append(descriptor)
        if len(calls) >= number:
            original(descriptor, data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr("executor.jobs.journal.os.write", write)
        ended = run(desk.arguments())
    kept, error = ended.err.splitlines()
    assert ended.status == 1 and "No space left on device" in error
    count = len(desk.answers()) if desk.output.exists() else 0
    told = f", kept in {desk.output}; --resume goes on" if count else ""
    assert kept == f"{count} of 5 prompts were finished{told}"
    ended = run(desk.arguments("--resume", "--expected-len=2"))
    assert (ended.status, ended.err) == (0, f"{count} of 5 prompts are answered already\n")
    assert sorted(answers_of(desk.output)) == expected


def test_lengths_of_a_job() -> None:
    """The limit, or what is expected of answers that something else may end."""
    table = JobTable()
    ends = RowParams(max_tokens=9, end_ids=frozenset({1}))
    for params, ids in ((RowParams(max_tokens=7), [1, 2]), (ends, [3]), (ends, [4, 5, 6])):
        table.add(0, 1, ParsedLine(prompts=[ids], params=params, identities=[0]))
    for expected_len, outputs in ((None, [9, 7, 9]), (4, [4, 7, 4]), (99, [9, 7, 9])):
        found = lengths_of(table, [2, 0, 1], None, expected_len)
        assert found is not None
        assert found.prompts.tolist() == [3, 2, 1]
        assert found.outputs.tolist() == outputs and found.limits.tolist() == [9, 7, 9]
    assert lengths_of(table, [], None, None) is None


def test_a_search_gives_lanes(models: list[Path], tmp_path: Path, run: Run) -> None:
    """To a job of which one answer is much longer than the others."""
    desk = Desk(models[0], tmp_path)
    desk.write(*(request(n, [n + 1] * (n + 1), max_tokens=40 if n == 1 else 2) for n in range(12)))
    searched = [each for each in desk.arguments() if not each.startswith("--policy")]
    # The planning of passes would be all that a job of so small a model takes.
    machine, hardware = recorded_profile("cpu-2core"), tmp_path / "machine.json"
    compute = replace(machine.cpu.compute, task_overhead_s=0.0)
    replace(machine, cpu=replace(machine.cpu, compute=compute)).save(hardware)
    ended = run([*searched, f"--hardware={hardware}", "--cpu-memory=1GiB", "--json"])
    assert (ended.status, ended.err) == (0, "")
    assert "12 lanes, filled again as sequences end" in ended.out
    found = {name: body["choices"] for name, body in desk.answers().items()}
    desk.write_policy(prompt_len=12, gen_len=40)
    assert run(desk.arguments()).status == 0
    assert {name: body["choices"] for name, body in desk.answers().items()} == found


@pytest.mark.parametrize("size", [3, 7, 8, 40, 41, 90])
def test_as_many_as_fit_are_planned(size: int) -> None:
    sizes = np.array([40, 3, 90, 7, 7, 41, 3])
    tried = []

    def plan(places: IntArray) -> int:
        tried.append(len(places))
        if sizes[places].max() > size:
            raise InfeasibleError(f"{len(places)} do not fit")
        return len(places)

    count, places = plan_within_memory(plan, sizes)
    assert sizes[places].max() <= size < min([*sizes[sizes > size], 100])
    assert places.tolist() == np.flatnonzero(sizes <= size).tolist() and count == len(places)
    assert len(tried) <= 5 and (size < 90 or tried == [7])
    size = 2
    tried.clear()
    with pytest.raises(InfeasibleError, match="7 do not fit"):
        plan_within_memory(plan, sizes)
    assert tried == [7, 2]


def test_lines_without_memory(
    models: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no policy is found for a line, the others run."""
    desk = Desk(models[0], tmp_path)
    desk.write(*(request(n, [n + 1] * (n + 1), max_tokens=3) for n in range(6)))
    original = JobOptions.choose_policy

    def choose(options: JobOptions, source: OpenedCheckpoint, workload: Workload) -> Any:
        if workload.prompt_len > 4:
            raise InfeasibleError("the memory is short")
        return original(options, source, workload)

    monkeypatch.setattr(JobOptions, "choose_policy", choose)
    desk.write_policy(lanes=LANES)
    assert run(desk.arguments()).status == 0
    assert set(desk.answers()) == {"r0", "r1", "r2", "r3"}
    told = [json.loads(line)["error"]["message"] for line in desk.errors.read_text().splitlines()]
    assert [each.partition(";")[0] for each in told] == [
        f"line {n} of in.jsonl: got {n} tokens + 3 generated" for n in (5, 6)
    ]
    assert "allowed: what fits in the memory, such as 4 + 3; try: more memory" in told[0]
    ended = run(desk.arguments("--strict"))
    assert ended.status == 2 and ended.err.startswith("error: line 5 of in.jsonl: got 5 tokens")

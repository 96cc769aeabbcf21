"""Every command and every file that it writes: refused before any work, or written through."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from costmodel import calibrate, frontier, search, simulate
from costmodel.calibration.measured_runs import MeasuredRun, read_runs, row_of
from costmodel.plan.policy import Policy
from executor import bench, evaluate, generate
from executor.checkpoint.folder import Checkpoint
from executor.jobs.journal import journal_path
from executor.run.block import Block
from profiles import HardwareProfile, measure, recorded_profile
from profiles.errors import InputError
from profiles.output_checks import output_path
from tests.costmodel.run_tables import write_rows
from tests.executor.commands import Ended, end_command
from tests.executor.tiny_machines import make_hardware, make_policy
from tests.executor.tiny_models import save_tiny_model

PROMPTS = [[5, 9, 170, 3], [12], [88, 1, 2]]
GEN_LEN = 3
SHORT = {"--prompt-len": "8", "--gen-len": "4", "--num-prompts": "4"}
# The flags of each command for which a file is written, and what it cannot do without.
COMMANDS: dict[ModuleType, tuple[set[str], dict[str, str]]] = {
    measure: ({"--output"}, {}),
    search: (
        {"--output", "--plot", "--report"},
        {"--hardware": "profile.json", "--model": "model"} | SHORT,
    ),
    simulate: ({"--output"}, {"--hardware": "profile.json", "--policy": "policy.json"}),
    calibrate: ({"--output"}, {"--hardware": "profile.json", "--runs": "runs.csv"}),
    frontier: ({"--plot"}, {"--hardware": "profile.json", "--model": "model"} | SHORT),
    generate: (
        {"--output", "--errors", "--trace", "--report"},
        {"--model": "model", "--prompts": "prompts.jsonl", "--policy": "policy.json"},
    ),
    bench: ({"--runs", "--trace", "--report"}, {"--model": "model", "--policy": "policy.json"}),
    evaluate: (
        {"--trace", "--report"},
        {"--model": "model", "--text": "text.txt", "--policy": "policy.json"},
    ),
}
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read; each prompt is a block of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model", "llama", num_layers=2)
    lines = [{"prompt_ids": ids, "id": number} for number, ids in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = Checkpoint.open(folder / "model").spec
    policy = replace(
        make_policy(spec, prompt_len=4, gen_len=GEN_LEN),
        gpu_batch_size=1,
        num_gpu_batches=1,
        prefill_batch_size=1,
        hardware=make_hardware(),
    )
    policy.save(folder / "policy.json")
    make_hardware().save(folder / "profile.json")
    (folder / "text.txt").write_text("w1 w2")
    run = MeasuredRun(policy=policy, throughput_tok_per_s=1000.0)
    write_rows(folder / "runs.csv", [row_of(run, model=str(folder / "model"))])
    return folder


def needed_by(module: ModuleType, folder: Path) -> list[str]:
    """Return the flags that a command cannot do without."""
    needed = COMMANDS[module][1].items()
    files = [(flag, folder / value) for flag, value in needed]
    return [f"{flag}={path if path.exists() else path.name}" for flag, path in files]


@pytest.fixture
def run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Run a command on the inputs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(module: ModuleType, *flags: object) -> Ended:
        return end_command(module.main, [*needed_by(module, folder), *flags], monkeypatch, capfd)

    return call


@contextmanager
def collecting(path: Path) -> Iterator[str]:
    """Yield a name for a descriptor, as a shell's process substitution does."""
    with path.open("w") as handle:
        yield f"/dev/fd/{handle.fileno()}"


def check_outputs_of(lines: list[str]) -> None:
    found = [json.loads(line) for line in lines]
    assert [line["prompt_ids"] for line in found] == PROMPTS
    assert [len(line["output_ids"]) for line in found] == [GEN_LEN] * len(PROMPTS)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_files_that_would_be_lost_are_refused(
    module: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, needed = COMMANDS[module]
    parser = module.parser()
    assert written == {
        action.option_strings[0] for action in parser._actions if action.type is output_path
    }
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "model.png").symlink_to(folder / "model" / "model.safetensors")
    refused = {tmp_path / "pipe.png": "nobody reads", folder: "a folder"}
    if "--model" in needed:
        refused[tmp_path / "model.png"] = "a file of --model"
    for name in ("prompts.jsonl", "policy.json", "profile.json", "runs.csv", "text.txt"):
        if name in needed.values():
            (tmp_path / f"{name}.png").hardlink_to(folder / name)
            refused[tmp_path / f"{name}.png"] = "a file of --"
    monkeypatch.setattr(measure, "measure_profile", lambda **_: pytest.fail("it works already"))
    flags = needed_by(module, folder)
    for flag in written:
        for path, words in refused.items():
            if path.suffix or flag != "--plot":
                with pytest.raises(InputError, match=f"^{flag} .*{words}"):
                    module.main([*flags, flag, str(path)])
    for pair in itertools.combinations(sorted(written), 2):
        both = [word for flag in pair for word in (flag, str(tmp_path / "new.png"))]
        with pytest.raises(InputError, match="allowed: another file"):
            module.main([*flags, *both])


def test_planning_commands_write_through(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = recorded_profile("cpu-2core")
    monkeypatch.setattr(measure, "measure_profile", lambda **_: machine)
    file = tmp_path / "file"
    for module in (measure, search, calibrate, simulate):
        with collecting(file) as name:
            ended = run(module, "--output", name)
        assert ended.status == 0, ended.err
        if module is search:
            assert Policy.load(file).model.name == "model"
        elif module is simulate:
            assert json.loads(file.read_text())["traceEvents"]
        else:
            assert HardwareProfile.load(file).name == (
                "tiny" if module is calibrate else machine.name
            )
    ended = run(search, "--output=-")
    assert json.loads(ended.out)["model"]["name"] == "model" and "token/s" in ended.err


def test_a_plot_goes_where_a_link_leads(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link.svg").symlink_to("picture")
    assert run(frontier, "--plot", tmp_path / "link.svg", "--points", "2").status == 0
    assert (tmp_path / "link.svg").is_symlink() and b"<svg" in (tmp_path / "picture").read_bytes()


def test_continuations_come_once_and_in_order(run: Run, tmp_path: Path) -> None:
    with collecting(tmp_path / "out") as out, collecting(tmp_path / "trace") as trace:
        ended = run(generate, "--output", out, "--trace", trace)
    assert (ended.status, ended.err) == (0, "") and "throughput" in ended.out
    check_outputs_of((tmp_path / "out").read_text().splitlines())
    assert {e["pid"] for e in json.loads((tmp_path / "trace").read_text())["traceEvents"]} == {1, 2}


def test_standard_output_holds_the_continuations_alone(run: Run, tmp_path: Path) -> None:
    ended = run(generate, "--output", "-", "--json")
    check_outputs_of(ended.out.splitlines())
    assert ended.status == 0 and "throughput" in ended.err
    assert json.loads(ended.err.splitlines()[-1])["generated_tokens"] == GEN_LEN * len(PROMPTS)


def test_what_was_finished_comes_when_a_run_ends_early(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, blocks = Block.start, []

    def start(block: Block, batches: Any) -> None:
        blocks.append(batches)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        original(block, batches)

    monkeypatch.setattr(Block, "start", start)
    with collecting(tmp_path / "out") as out:
        ended = run(generate, "--output", out)
    assert ended.status == 130
    note = f"2 of 3 prompts were finished, kept in {out}"
    assert ended.err.splitlines() == [note, "error: interrupted"]
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 2]


def test_a_full_disk_loses_no_continuation(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full when the second block ends, in the middle of its answer."""
    original, calls = os.write, list[int]()

    def write(descriptor: int, data: memoryview) -> int:
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data[:30] if len(calls) == 4 else data)

    out = tmp_path / "out"
    monkeypatch.setattr("executor.jobs.journal.os.write", write)
    ended = run(generate, "--output", out)
    assert ended.status == 1
    assert ended.err.splitlines() == [
        f"1 of 3 prompts were finished, kept in {out}; --resume goes on",
        f"error: write of {out}: No space left on device",
    ]
    assert len(out.read_text().splitlines()) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(generate, "--output", out, "--resume").status == 0
    check_outputs_of(out.read_text().splitlines())
    assert not journal_path(out).exists()


def test_a_trace_that_cannot_be_written_costs_nothing_else(run: Run, tmp_path: Path) -> None:
    flags = ("--trace", "/dev/full")
    ended = run(generate, "--output", tmp_path / "out", *flags)
    check_outputs_of((tmp_path / "out").read_text().splitlines())
    ended_bench = run(bench, *flags)
    assert json.loads(ended_bench.out)["generated_tokens"] > 0
    for each in (ended, ended_bench):
        line = each.err.splitlines()[-1]
        assert each.status == 1 and line.startswith("error: write of /dev/full: No space left")
        rescue = tmp_path / line.rpartition(" ")[2]
        assert json.loads(rescue.read_text())["traceEvents"]


def test_a_trace_for_which_there_is_no_room_costs_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executor.run.recorder.spare_folders", lambda path: [tmp_path / "absent"])
    monkeypatch.setattr("profiles.spool.PIECE_CHARS", 1000)
    monkeypatch.setattr("executor.run.recorder.HELD_SPANS", 4)
    ended = run(generate, "--output", "out", "--trace", "trace")
    assert ended.status == 1 and "throughput" in ended.out
    assert ended.err == "error: trace trace: no folder has room for it\n"
    check_outputs_of((tmp_path / "out").read_text().splitlines())
    assert not (tmp_path / "trace").exists()


def test_a_run_that_cannot_be_told_keeps_its_trace(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind ``| head``."""

    def fail(report: object) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(generate, "format_report", fail)
    assert run(generate, "--output", "out", "--trace", "trace").status == 141
    check_outputs_of((tmp_path / "out").read_text().splitlines())
    assert json.loads((tmp_path / "trace").read_text())["traceEvents"]


def test_a_table_of_runs_is_read_before_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.csv").write_text('model,"\n')
    (tmp_path / "link.csv").symlink_to("table.csv")
    monkeypatch.setattr(Block, "start", lambda *_: pytest.fail("it runs already"))
    ended = run(bench, "--runs", tmp_path / "broken.csv")
    assert ended.status == 2 and "broken.csv" in ended.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(bench, "--runs", tmp_path / "link.csv").status == 0
    assert len(read_runs(tmp_path / "table.csv")) == 2 and (tmp_path / "link.csv").is_symlink()

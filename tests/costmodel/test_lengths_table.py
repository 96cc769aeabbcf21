"""A job planned and simulated by a table of its lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from costmodel import search as search_command
from costmodel import simulate as simulate_command
from costmodel.cli.flags import read_question
from costmodel.plan.lengths import Lengths
from costmodel.plan.lengths_table import read_lengths
from costmodel.plan.policy import LanePolicy, Policy
from costmodel.plan.workload import Workload
from costmodel.schedule.job_simulation import simulate_job
from profiles.errors import InputError
from profiles.recorded import find_profile
from tests.costmodel.lane_policies import lane_policy
from tests.costmodel.machines import make_model

TABLE = "prompt_len,gen_len,max_tokens,count,note\n12,30,40,3,x\n7,5,,,\n90,2,2,2,\n"


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_row_is_as_many_prompts_as_it_says(tmp_path: Path) -> None:
    lengths = read_lengths(_write(tmp_path / "lengths.csv", TABLE))
    assert lengths.prompts.tolist() == [12] * 3 + [7] + [90] * 2
    assert lengths.outputs.tolist() == [30] * 3 + [5] + [2] * 2
    assert lengths.limits.tolist() == [40] * 3 + [5] + [2] * 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt_len\n3\n", "no column 'gen_len'"),
        ("prompt_len,gen_len\n", "no rows"),
        ("prompt_len,gen_len\n3,4\n3,x\n", "row 3: gen_len: got x"),
        ("prompt_len,gen_len\n3,\n", "row 2: gen_len: got nothing"),
        ("prompt_len,gen_len,count\n3,4,0\n", "row 2: count: got 0"),
        ("prompt_len,gen_len,count\n3,4,20000000\n", "20000000 prompts"),
        ('prompt_len,gen_len\n"3,4\n', "lengths"),
    ],
)
def test_a_broken_table_is_told_with_its_row(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as raised:
        read_lengths(_write(tmp_path / "lengths.csv", text))
    assert told in str(raised.value) and "lengths.csv" in str(raised.value)
    with pytest.raises(InputError, match="no such file"):
        read_lengths(tmp_path / "none.csv")


def _workload(*words: str) -> Workload:
    flags = search_command.parser().parse_args(
        ["--hardware=cpu-2core", "--model=llama-3.2-1b", *words]
    )
    return read_question(flags).workload


def test_flags_tell_the_lengths_of_a_job(tmp_path: Path) -> None:
    path = _write(tmp_path / "lengths.csv", TABLE)
    table = _workload(f"--lengths={path}")
    assert (table.prompt_len, table.gen_len, table.num_prompts) == (90, 40, 6)
    assert table.lengths == read_lengths(path).sketch()
    plain = _workload()
    assert (plain.prompt_len, plain.gen_len, plain.num_prompts, plain.lengths) == (
        512,
        32,
        None,
        None,
    )
    expected = _workload("--gen-len=100", "--expected-len=25", "--num-prompts=40")
    assert expected.lengths is not None and expected.num_prompts == 40
    found = expected.lengths.lengths()
    assert (found.outputs == 25).all() and (found.limits == 100).all() and len(found) == 40
    assert _workload("--gen-len=100", "--expected-len=100").lengths is None


@pytest.mark.parametrize("flag", ["--prompt-len", "--gen-len", "--num-prompts", "--expected-len"])
def test_a_table_stands_instead_of_other_lengths(tmp_path: Path, flag: str) -> None:
    path = _write(tmp_path / "lengths.csv", TABLE)
    with pytest.raises(InputError, match=f"{flag} together with --lengths"):
        _workload(f"--lengths={path}", f"{flag}=3")
    with pytest.raises(InputError, match="--expected-len"):
        _workload("--expected-len=0")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    lanes = LanePolicy(pool_tokens=192, pass_rows=128, chunk_rows=64)
    work = Workload(prompt_len=90, gen_len=40, num_prompts=6)
    made = lane_policy(make_model(), num_gpu_batches=1, workload=work, lanes=lanes)
    made.save(tmp_path / "policy.json")
    return tmp_path / "policy.json"


def test_a_job_over_lanes_is_simulated_pass_by_pass(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = _write(tmp_path / "lengths.csv", TABLE), tmp_path / "timeline.json"
    words = ["--hardware=cpu-2core", f"--policy={policy}", f"--lengths={table}"]
    simulate_command.main([*words, f"--output={output}", "--json"])
    *_, line = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    lengths = read_lengths(table)
    job = simulate_job(Policy.load(policy), find_profile("cpu-2core"), lengths)
    assert figures["simulated_s"] == pytest.approx(job.total_s)
    assert figures["generated_tokens"] == int(lengths.outputs.sum())
    assert figures["passes"] == job.trace.num_passes
    events = json.loads(output.read_text())["traceEvents"]
    passes = [event for event in events if event["ph"] == "X"]
    assert len(passes) == job.trace.num_passes
    assert sum(event["dur"] for event in passes) == pytest.approx(job.total_s * 1e6)
    lanes = [event["args"]["lanes"] for event in passes]
    assert lanes == (job.counts.decoding + job.counts.newcomers).tolist()
    curves = {event["name"] for event in events if event["ph"] == "C"}
    assert curves == {"lanes", "waiting", "tokens"}


def test_without_a_table_it_is_the_job_of_the_policy(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_command.main(["--hardware=cpu-2core", f"--policy={policy}", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["generated_tokens"] == 6 * 40
    lengths = Lengths([12, 7], [30, 5])
    made = Policy.load(policy)
    work = replace(made.workload, prompt_len=12, gen_len=30, num_prompts=2)
    replace(made, workload=replace(work, lengths=lengths.sketch())).save(policy)
    simulate_command.main(["--hardware=cpu-2core", f"--policy={policy}", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generated_tokens"] == 35


def test_what_a_simulation_cannot_do_is_told_in_a_line(tmp_path: Path, policy: Path) -> None:
    table = _write(tmp_path / "lengths.csv", TABLE)
    words = ["--hardware=cpu-2core", f"--policy={policy}"]
    with pytest.raises(InputError, match="--passes"):
        simulate_command.main([*words, "--passes=2"])
    replace(Policy.load(policy), lanes=None).save(policy)
    with pytest.raises(InputError, match="without lanes"):
        simulate_command.main([*words, f"--lengths={table}"])

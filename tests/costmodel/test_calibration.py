"""Calibration: known factors are found again, the paper's runs are predicted, records are kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibration import factors as calibration
from costmodel.calibration.factors import Fit, calibrate, errors_of, leave_one_out, mean_error
from costmodel.calibration.measured_runs import MeasuredRun, append_row, read_runs, row_of
from costmodel.calibration.run_lengths import RunLengths
from costmodel.model.loading import load_model_spec
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import LanePolicy, Placement, Policy, placed_alike
from costmodel.plan.rounding import overall_weights
from costmodel.plan.workload import Workload
from costmodel.pricing.price import estimate
from costmodel.pricing.rates import RATES
from costmodel.schedule.job_simulation import simulate_job
from profiles import HardwareProfile, InputError, recorded_profile
from profiles.emulate import EmulatedGpu
from profiles.units import GIB
from tests.costmodel.run_tables import write_rows

PAPER = Path(__file__).parents[2] / "notebooks" / "data" / "flexgen_paper.csv"


def _measured_on(machine: HardwareProfile, runs: list[MeasuredRun]) -> list[MeasuredRun]:
    return [
        replace(run, throughput_tok_per_s=estimate(run.policy, machine).throughput_tok_per_s)
        for run in runs
    ]


def test_factors_that_made_the_runs_are_found_again() -> None:
    """Runs of a machine whose disk and CPU differ from its profile: the profile is mended."""
    profile = recorded_profile("t4-flexgen")
    truth = replace(profile, unhidden_share=0.3)
    for rate, factor in (("disk_read", 0.6), ("disk_write", 0.6), ("cpu_attention", 0.5)):
        truth = RATES[rate].scale(truth, factor)
    runs = _measured_on(truth, read_runs(PAPER))
    fit = calibrate(profile, runs, source="made up")
    assert mean_error(fit.errors_before) > 0.2
    assert mean_error(fit.errors_after) < 0.03
    # Trust in the profile holds every factor back a little.
    assert fit.factors["disk"] == pytest.approx(0.6, rel=0.12)
    assert fit.factors["cpu_attention"] == pytest.approx(0.5, rel=0.2)
    assert fit.factors["unhidden_share"] == pytest.approx(0.3, abs=0.1)
    assert fit.factors["gpu_matmul"] == pytest.approx(1.0, rel=0.1)


def test_phases_measured_apart_are_both_mended() -> None:
    """A machine that multiplies more slowly than its profile and reads its disk faster: prefill and
    decode tell it, of which the whole hides a part; behind an emulated GPU, too."""
    profile = recorded_profile("cpu-2core")
    truth = RATES["disk_read"].scale(RATES["cpu_matmul"].scale(profile, 0.7), 1.6)
    model = load_model_spec("opt-1.3b").with_dtype("bfloat16")
    policy = Policy(
        model=model,
        workload=Workload(prompt_len=512, gen_len=24),
        gpu_batch_size=8,
        num_gpu_batches=1,
        prefill_batch_size=4,
        weights=placed_alike(model, Placement(disk=1)),
        cache=Placement(cpu=1),
        activations=Placement(cpu=1),
    )
    runs = []
    for emulated in (None, EmulatedGpu(memory_bytes=4 * GIB, link_bytes_per_s=1e12)):
        run = MeasuredRun(policy=policy, throughput_tok_per_s=1.0, emulated=emulated)
        found = estimate(policy, run.machine(truth))
        run = replace(run, throughput_tok_per_s=found.throughput_tok_per_s)
        runs.append(replace(run, prefill_s=found.prefill_s, decode_s=found.decode_s))
    fit = calibrate(profile, runs, source="made up")
    assert fit.factors["cpu_matmul"] == pytest.approx(0.7, rel=0.1)
    assert fit.factors["disk"] == pytest.approx(1.6, rel=0.1)
    whole = [replace(run, prefill_s=0.0, decode_s=0.0) for run in runs]
    blurred = calibrate(profile, whole, source="made up").factors
    assert abs(blurred["disk"] - 1.6) > 2 * abs(fit.factors["disk"] - 1.6)


def test_what_a_task_costs_beside_its_arithmetic_is_told_by_small_models() -> None:
    """Decode of a small model for few sequences, beside a large one's, which hardly has it."""
    profile = recorded_profile("cpu-2core")
    truth = RATES["cpu_tasks"].scale(profile, 0.2)
    runs = []
    for name, size in (
        ("opt-125m", 1),
        ("opt-125m", 2),
        ("opt-125m", 4),
        ("opt-1.3b", 8),
        ("opt-1.3b", 64),
    ):
        model = load_model_spec(name).with_dtype("bfloat16")
        policy = Policy(
            model=model,
            workload=Workload(prompt_len=256, gen_len=64),
            gpu_batch_size=size,
            num_gpu_batches=1,
            prefill_batch_size=size,
            weights=placed_alike(model, Placement(cpu=1)),
            cache=Placement(cpu=1),
            activations=Placement(cpu=1),
        )
        found = estimate(policy, truth)
        runs.append(
            MeasuredRun(
                policy=policy,
                throughput_tok_per_s=found.throughput_tok_per_s,
                prefill_s=found.prefill_s,
                decode_s=found.decode_s,
            )
        )
    fit = calibrate(profile, runs, source="made up")
    # Five runs do not outweigh the trust in the profile altogether.
    assert fit.factors["cpu_tasks"] == pytest.approx(0.2, rel=0.4)
    assert fit.factors["cpu_matmul"] == pytest.approx(1.0, rel=0.1)
    assert mean_error(fit.errors_after) < mean_error(fit.errors_before) / 4


def test_a_run_survives_its_table(tmp_path: Path) -> None:
    model = load_model_spec("opt-125m").with_dtype("bfloat16")
    policy = Policy(
        model=model,
        workload=Workload(prompt_len=20, gen_len=4),
        gpu_batch_size=6,
        num_gpu_batches=2,
        prefill_batch_size=3,
        weights=placed_alike(model, Placement(gpu=0.25, cpu=0.5, disk=0.25)),
        cache=Placement(cpu=0.3, disk=0.7),
        activations=Placement(gpu=1),
        cpu_attention=0.5,
        weight_bits=4,
        cache_bits=8,
        group_size=32,
        attention_sparsity=0.1,
    )
    emulated = EmulatedGpu(memory_bytes=2 * GIB, link_bytes_per_s=2.5e9)
    runs = [
        MeasuredRun(policy=policy, throughput_tok_per_s=12.8, prefill_s=1.5, decode_s=2.25),
        MeasuredRun(policy=policy, throughput_tok_per_s=7.0, emulated=emulated),
    ]
    write_rows(tmp_path / "runs.csv", [row_of(run) for run in runs])
    assert read_runs(tmp_path / "runs.csv") == runs


def test_a_run_of_a_mixture_survives_its_table(tmp_path: Path) -> None:
    model = load_model_spec("mixtral-8x7b")
    weights = placed_alike(model, Placement(cpu=1)) | {"experts": Placement(gpu=0.25, cpu=0.75)}
    policy = Policy(
        model=model,
        workload=Workload(prompt_len=20, gen_len=4),
        gpu_batch_size=6,
        num_gpu_batches=2,
        prefill_batch_size=6,
        weights=weights,
        cache=Placement(cpu=1),
        activations=Placement(gpu=1),
        cpu_experts=0.5,
        loads_on_demand=True,
    )
    runs = [MeasuredRun(policy=policy, throughput_tok_per_s=12.8)]
    write_rows(tmp_path / "runs.csv", [row_of(run) for run in runs])
    assert read_runs(tmp_path / "runs.csv") == runs


def test_a_throughput_that_its_seconds_belie_is_refused() -> None:
    policy = read_runs(PAPER)[0].policy
    tokens = policy.block_size * policy.workload.gen_len
    with pytest.raises(InputError, match="throughput_tok_per_s"):
        MeasuredRun(
            policy=policy, throughput_tok_per_s=1.2 * tokens / 5, prefill_s=3.0, decode_s=2.0
        )


def test_what_no_run_depends_on_stays() -> None:
    """Without quantized runs nothing is said of unpacking."""
    plain = [run for run in read_runs(PAPER) if run.policy.weight_bits == run.policy.cache_bits > 8]
    fit = calibrate(recorded_profile("t4-flexgen"), plain, source="paper")
    assert fit.factors["gpu_unpack"] == pytest.approx(1.0, abs=1e-3)
    assert fit.factors["cpu_matmul"] == pytest.approx(1.0, abs=1e-3)


def test_the_profile_keeps_a_dated_record(tmp_path: Path) -> None:
    profile = recorded_profile("t4-flexgen")
    fit = calibrate(profile, read_runs(PAPER)[:3], source="runs.csv")
    again = calibrate(fit.hardware, read_runs(PAPER)[:3], source="more.csv").hardware
    again.save(tmp_path / "profile.json")
    loaded = HardwareProfile.load(tmp_path / "profile.json")
    assert loaded == again
    assert [record.source for record in loaded.calibrations] == ["runs.csv", "more.csv"]
    assert loaded.calibrations[0].factors == fit.factors
    factor = fit.factors["link"]
    assert fit.hardware.gpu is not None and profile.gpu is not None
    assert fit.hardware.gpu.h2d.pinned_bytes_per_s == pytest.approx(
        profile.gpu.h2d.pinned_bytes_per_s * factor
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gpu_batch_size", "batch", "no column 'gpu_batch_size'"),
        ("opt-6.7b,512,32,2,1,1.0", "opt-6.7b,512,32,2.5,1,1.0", "line 2: gpu_batch_size"),
        ("opt-6.7b,512,32,2,1,1.0", "opt-9b,512,32,2,1,1.0", "line 2: model"),
        ("opt-6.7b,512,32,2,1,1.0,0.0", "opt-6.7b,512,32,2,1,1.0,0.4", "line 2: placement"),
        (",25.26,", ",-1,", "line 2: throughput_tok_per_s"),
        (",25.26,", ",fast,", "line 2: throughput_tok_per_s: got fast"),
        (",25.26,", ",,", "line 2"),
    ],
)
def test_mistakes_in_a_table_name_their_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    text = PAPER.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_runs(path)


def test_broken_lines_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    """Cut, with bytes that are no text, with an open quote, of another machine; after a blank."""
    lines = PAPER.read_text(encoding="utf-8").splitlines()
    runs = read_runs(PAPER)
    good = len(lines) - 1
    lines[3] = lines[3][:40]
    lines[5] = f'"{lines[5]}'
    lines[7] = lines[7].replace("opt", "\udcff", 1)
    lines.insert(9, "")
    lines.append(f"{lines[-1]},7")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    errors: list[InputError] = []
    on_disk = [run for run in runs if overall_weights(run.policy).disk > 0]

    def refuse_disk(run: MeasuredRun) -> None:
        if run == on_disk[-1]:
            raise InputError("disk", got="some", allowed="none")

    found = read_runs(path, check=refuse_disk, skip=errors.append)
    assert len(found) == good - 4 and on_disk[-1] not in found
    numbers = [re.search(r"runs\.csv, line (\d+): ", str(error)) for error in errors]
    broken = [int(match[1]) for match in numbers if match]
    assert {4, 6, 8, len(lines)} < set(broken) and len(broken) == 5
    with pytest.raises(InputError, match="line 4: cells: got"):
        read_runs(path)


def test_appending_keeps_lines_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = [row_of(run) for run in read_runs(PAPER)[:3]]
    for row in rows[:2]:
        append_row(path, row, most=3)
    with path.open("a", encoding="utf-8") as handle:
        handle.write("half,a,li")
    append_row(path, rows[2] | {"more": 5}, most=3)
    errors: list[InputError] = []
    assert read_runs(path, skip=errors.append) == read_runs(PAPER)[1:3]
    assert len(errors) == 1 and "line 3: " in str(errors[0])
    assert path.read_text(encoding="utf-8").splitlines()[0].endswith(",more")


def test_leaving_one_out_tells_of_each_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, runs = recorded_profile("t4-flexgen"), read_runs(PAPER)[:3]
    told: list[object] = []

    def fit(hardware: HardwareProfile, fitted: list[MeasuredRun], *, source: str) -> Fit:
        told.append(fitted)
        return Fit(hardware=hardware, factors={}, errors_before=(), errors_after=())

    monkeypatch.setattr(calibration, "calibrate", fit)
    errors = leave_one_out(profile, runs, source="x", on_fit=lambda: told.append("told"))
    others = [runs[1:], [runs[0], runs[2]], runs[:2]]
    assert told == [item for fitted in others for item in (fitted, "told")]
    assert errors == errors_of(profile, runs)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"empty\.csv"):
        read_runs(tmp_path / "empty.csv")
    header = PAPER.read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "header.csv").write_text(header + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="no rows"):
        read_runs(tmp_path / "header.csv")


def test_runs_over_lanes_tell_the_factors_of_their_machine(tmp_path: Path) -> None:
    """Jobs of many lengths on a machine with another disk and slower products: one that waits for
    its disk, and one that computes, whose answers were guessed wrong."""
    profile = recorded_profile("cpu-2core")
    truth = RATES["disk_read"].scale(RATES["cpu_matmul"].scale(profile, 0.7), 1.6)
    model = load_model_spec("llama-3.2-1b")
    rng = np.random.default_rng(4)
    runs = []
    for on_disk, wrong in ((1.0, 1), (0.0, 2)):
        prompts, answers = rng.integers(5, 200, 30), rng.integers(1, 60, 30)
        lengths = Lengths(prompts, answers * wrong, np.full(30, 128))
        policy = Policy(
            model=model,
            workload=Workload(prompt_len=200, gen_len=128),
            gpu_batch_size=4,
            num_gpu_batches=1,
            prefill_batch_size=4,
            weights=placed_alike(model, Placement(cpu=1 - on_disk, disk=on_disk)),
            cache=Placement(cpu=1),
            activations=Placement(cpu=1),
            lanes=LanePolicy(pool_tokens=1000, pass_rows=400, chunk_rows=8),
        )
        job = simulate_job(policy, truth, lengths, answers=answers)
        runs.append(
            MeasuredRun(
                policy=policy,
                throughput_tok_per_s=job.throughput_tok_per_s,
                lengths=RunLengths.of(lengths, answers),
            )
        )
    write_rows(tmp_path / "runs.csv", [row_of(run) for run in runs])
    kept = read_runs(tmp_path / "runs.csv")
    assert [run.lengths for run in kept] == [run.lengths for run in runs]
    assert [run.policy.lanes for run in kept] == [run.policy.lanes for run in runs]
    fit = calibrate(profile, kept, source="made up")
    assert mean_error(fit.errors_before) > 0.2 and mean_error(fit.errors_after) < 0.03
    assert fit.factors["disk"] == pytest.approx(1.6, rel=0.1)
    assert fit.factors["cpu_matmul"] == pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize(
    "text", ["", "3:4:5:6", "3:4:5:6*1", "3:0:5:4*1", "3:4:5:x*1", "3:4:5:4*0", "3:4:5*2"]
)
def test_a_broken_cell_of_lengths_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="lengths"):
        RunLengths.read(text)

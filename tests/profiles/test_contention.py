"""Channels beside each other, and 4-bit groups, against independent references."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles import ComputeRates, RateCurve
from profiles.compute import measure_compute
from profiles.compute_plan import ComputePlan
from profiles.contention import LEAST_KEPT, BackgroundWork, measure_contention, rates_together
from profiles.disk import DiskPlan
from profiles.repeats import Effort, Repeater
from profiles.units import MIB

EFFORT = Effort(num_samples=3, sample_s=1e-4, figure_s=1.0, total_s=0.0, window_s=0.02)
PLAN = ComputePlan(rows=(1,), out_features=256, in_features=256)
RATES = ComputeRates(
    matmul={"bfloat16": RateCurve.constant(1e11)},
    attention_prefill={"bfloat16": 1e11},
    attention_decode={"bfloat16": 1e9},
)


@pytest.fixture(autouse=True)
def _small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DiskPlan(file_bytes=4 * MIB, chunk_bytes=MIB, request_bytes=(MIB,), depths=(1,))
    monkeypatch.setattr("profiles.contention.DISK_PLAN", plan)
    monkeypatch.setattr("profiles.compute.COLD_BYTES", MIB)


def test_contention_of_this_machine_keeps_samples_and_removes_its_file(tmp_path: Path) -> None:
    repeater = Repeater(EFFORT, lambda name: None)
    pairs = measure_contention(tmp_path, PLAN, RATES, False, repeater)
    assert [(p.first, p.second) for p in pairs] == [
        ("disk_read", "cpu_compute"),
        ("disk_write", "cpu_compute"),
    ]
    for pair in pairs:
        assert LEAST_KEPT <= pair.first_keeps <= 1 and LEAST_KEPT <= pair.second_keeps <= 1
    samples = {m.name: m for m in repeater.measurements}
    assert set(samples) == {
        "contention.cpu_compute.alone",
        "contention.disk_read.alone",
        "contention.disk_read.beside_cpu_compute",
        "contention.cpu_compute.beside_disk_read",
        "contention.disk_write.alone",
        "contention.disk_write.beside_cpu_compute",
        "contention.cpu_compute.beside_disk_write",
    }
    assert all(len(m.samples) == 3 for m in repeater.measurements)
    assert samples["contention.disk_read.alone"].unit == "bytes_per_s"
    assert samples["contention.cpu_compute.alone"].unit == "flop_per_s"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failing_contention_removes_its_file(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def fail(*arguments: object) -> None:
        seen.extend(tmp_path.iterdir())
        raise error

    monkeypatch.setattr("profiles.contention._run_round", fail)
    with pytest.raises(error):
        measure_contention(tmp_path, PLAN, RATES, False, Repeater(EFFORT, lambda name: None))
    assert len(seen) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first_rates", "second_rates", "expected"),
    [
        # Medians of three ratios of a round: 0.5, 0.25, 0.75; and all 1.2, cut at 1.
        ([(100.0, 50.0), (80.0, 20.0), (40.0, 30.0)], [(10.0, 12.0)] * 3, (0.5, 1.0)),
        ([(100.0, 1.0)] * 3, [(8.0, 2.0)] * 3, (LEAST_KEPT, 0.25)),
    ],
)
def test_shares_are_medians_over_rounds(
    first_rates: list[tuple[float, float]],
    second_rates: list[tuple[float, float]],
    expected: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer() -> Iterator[list[float]]:
        for first, second in zip(first_rates, second_rates, strict=True):
            yield [second[0]]
            for _ in range(2):
                yield [first[0]]
                yield [first[1], second[1]]

    answers = answer()
    monkeypatch.setattr("profiles.contention.rates_together", lambda *_: next(answers))
    repeater = Repeater(EFFORT, lambda name: None)
    for pair in measure_contention(tmp_path, PLAN, RATES, False, repeater):
        assert (pair.first_keeps, pair.second_keeps) == expected


def test_works_in_lockstep_have_rates_like_their_amounts() -> None:
    # Neither can be ahead of the other, until one has ended and the other waits in vain.
    barrier = threading.Barrier(2, timeout=0.1)

    def meet() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()

    works = [
        BackgroundWork(channel=channel, unit="bytes_per_s", amount=amount, call=meet)
        for channel, amount in (("disk_read", 3.0), ("cpu_compute", 1.0))
    ]
    first, second = rates_together(works, 0.5)
    assert first / second == pytest.approx(3, rel=0.3)


def test_failing_work_ends_the_others() -> None:
    def fail() -> None:
        raise RuntimeError("no more disk")

    works = [
        BackgroundWork(channel=channel, unit="bytes_per_s", amount=1.0, call=call)
        for channel, call in (("cpu_compute", lambda: None), ("disk_read", fail))
    ]
    with pytest.raises(RuntimeError, match="no more disk"):
        rates_together(works, 60.0)


def test_unpacking_is_measured_in_bytes_of_output(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 2.0
    monkeypatch.setattr(
        "profiles.repeats.seconds_of", lambda work, repeats, warmups: [seconds] * repeats
    )
    repeater = Repeater(EFFORT, lambda name: None)
    rates = measure_compute("cpu", PLAN, repeater)
    # A matrix of 256 x 256 in 16 bits.
    assert rates.unpack_bytes_per_s == pytest.approx(256 * 256 * 2 / seconds)
    assert rates.packed_attention_bytes_per_s == pytest.approx(rates.attention_decode["bfloat16"])
    names = {m.name for m in repeater.measurements}
    assert {"cpu.unpack.4bit", "cpu.attention_decode.4bit"} <= names

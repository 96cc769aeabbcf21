"""Profiles as JSON: exact round trips, and every malformed file named in one line."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import (
    Calibration,
    Contention,
    Cpu,
    Gpu,
    HardwareProfile,
    InputError,
    Measurement,
    RateCurve,
    recorded_names,
    recorded_profile,
    with_emulated_gpu,
)
from profiles.emulate import LEAST_LEFT
from profiles.files import from_json, to_json
from profiles.table import format_profile

MACHINES = (
    "cpu-2core",
    "epyc-server",
    "t4-flexgen",
    "rtx3090-pc",
    "rtx4090-pc",
    "a100-80gb",
    "h100-80gb",
    "h200-141gb",
)


@pytest.fixture(scope="module")
def t4_json() -> dict[str, Any]:
    value: dict[str, Any] = to_json(recorded_profile("t4-flexgen"))
    return value


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_profile_round_trips(name: str, tmp_path: Path) -> None:
    profile = recorded_profile(name)
    assert profile.name == name
    profile.save(tmp_path / "profile.json")
    assert HardwareProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_profile_is_physical(name: str) -> None:
    profile = recorded_profile(name)
    assert len(profile.source) > 20
    devices: list[Cpu | Gpu] = [profile.cpu]
    if profile.gpu is not None:
        devices.append(profile.gpu)
    for device in devices:
        for curve in device.compute.matmul.values():
            # One row reads each weight of 2 or 4 bytes for 2 FLOP: memory bounds the rate.
            assert curve.rates[0] <= 1.1 * device.memory_bytes_per_s
            assert curve.rates[0] < curve.peak
        for rate in device.compute.attention_decode.values():
            assert rate <= device.memory_bytes_per_s


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_machine_unpacks_slower_than_its_memory(name: str) -> None:
    profile = recorded_profile(name)
    assert profile.knows_unpacking
    rates = [(profile.cpu.compute.unpack_bytes_per_s, profile.cpu.memory_bytes_per_s)]
    if profile.gpu is not None:
        rates.append((profile.gpu.compute.unpack_bytes_per_s, profile.gpu.memory_bytes_per_s))
    for unpack, memory in rates:
        # Its output is written at least once, a quarter of that is read, and scale and zero.
        # Caches may help by a tenth.
        assert 1.28 * unpack < 1.1 * memory


def test_recorded_names_are_all_known() -> None:
    assert set(recorded_names()) == set(MACHINES)
    with pytest.raises(InputError, match=r"t5.*t4-flexgen"):
        recorded_profile("t5")


def _set(path: str, value: object) -> Any:
    def change(profile: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            profile = profile[parent]
        profile[last] = value

    return change


def _drop(path: str) -> Any:
    def change(profile: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            profile = profile[parent]
        del profile[last]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("cpu"), ["'cpu'"]),
        (_drop("cpu.memory_bytes"), ["cpu", "'memory_bytes'"]),
        (_drop("gpu.h2d.opposed_bytes_per_s"), ["gpu.h2d", "'opposed_bytes_per_s'"]),
        (_drop("cpu.compute.attention_decode.float16"), ["cpu.compute", "attention_decode"]),
        (_set("cpu.memory_bytes", -1), ["cpu", "memory_bytes", "-1"]),
        (_set("cpu.memory_bytes", 1.5), ["cpu.memory_bytes", "1.5"]),
        (_set("cpu.memory_bytes_per_s", 0.0), ["cpu", "memory_bytes_per_s", "0.0"]),
        (_set("cpu.memory_bytes_per_s", float("nan")), ["NaN"]),
        (_set("cpu.memory_bytes_per_s", float("inf")), ["Infinity"]),
        (_set("gpu.h2d.pinned_bytes_per_s", -5.0), ["gpu.h2d", "pinned_bytes_per_s", "-5.0"]),
        (_set("disk.read.rates", [0.0]), ["disk.read", "0.0"]),
        (_set("disk.read.sizes", [1.0, 2.0]), ["disk.read", "2 sizes and 1 rates"]),
        (_set("disk.free_bytes", "lots"), ["disk.free_bytes", "lots"]),
        (_set("disk.write", None), ["disk.write", "null"]),
        (_set("gpu.emulated", 1), ["gpu.emulated", "1"]),
        (_set("speed", 1), ["'speed'"]),
        (_set("gpu.h2d.lanes", 16), ["gpu.h2d", "'lanes'"]),
        (_set("schema_version", 99), ["schema_version", "99"]),
        (_set("gpu.compute.unpack_bytes_per_s", -1.0), ["gpu.compute", "unpack_bytes_per_s"]),
        (_set("unhidden_share", 1.5), ["unhidden_share", "1.5"]),
        (_set("contention", [{"first": "h2d", "second": "d2h"}]), ["contention[0]", "keeps"]),
        (_set("measurements", [{"name": "a", "unit": "s", "samples": []}]), ["measurements[0]"]),
    ],
)
def test_malformed_profile_names_file_and_key(
    change: Any, words: list[str], t4_json: dict[str, Any], tmp_path: Path
) -> None:
    broken = copy.deepcopy(t4_json)
    change(broken)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError) as caught:
        HardwareProfile.load(path)
    message = str(caught.value)
    assert "broken.json" in message and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ('{"name": "a", "cpu": {', "not JSON"),
        ("hello", "not JSON"),
        ("[1, 2]", "JSON list"),
        ("{}", "no key"),
    ],
)
def test_file_that_is_no_profile(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        HardwareProfile.load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        HardwareProfile.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="p"):
        HardwareProfile.load(tmp_path)


def test_rate_curve_meets_its_points_and_halves_in_log_space() -> None:
    curve = RateCurve(sizes=(1.0, 16.0, 256.0), rates=(10.0, 40.0, 40.0))
    assert [curve.at(s) for s in (1, 16, 256)] == pytest.approx([10, 40, 40])
    # Half-way in log size between 1 and 16 is 4; half-way in log rate between 10 and 40 is 20.
    assert curve.at(4) == pytest.approx(20)
    assert curve.at(0.1) == 10 and curve.at(1e9) == 40
    assert curve.peak == 40


@given(
    st.lists(st.floats(1, 1e15), min_size=2, max_size=6),
    st.floats(0.1, 1e4),
)
def test_rate_curve_stays_between_its_neighbours(rates: list[float], size: float) -> None:
    sizes = tuple(4.0**i for i in range(len(rates)))
    rate = RateCurve(sizes=sizes, rates=tuple(rates)).at(size)
    assert min(rates) * (1 - 1e-9) <= rate <= max(rates) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sizes", "rates"), [((), ()), ((1.0, 1.0), (2.0, 2.0)), ((2.0, 1.0), (1.0, 1.0))]
)
def test_rate_curve_refuses(sizes: tuple[float, ...], rates: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="rate curve"):
        RateCurve(sizes=sizes, rates=rates)


def test_budget_replaces_capacities_only() -> None:
    profile = recorded_profile("t4-flexgen")
    assert profile.with_budget(gpu_memory=0).gpu is None
    smaller = profile.with_budget(gpu_memory=5, cpu_memory=7, disk=9)
    assert smaller.gpu is not None and profile.gpu is not None
    assert (smaller.gpu.memory_bytes, smaller.cpu.memory_bytes, smaller.disk.free_bytes) == (
        5,
        7,
        9,
    )
    assert smaller.gpu.compute == profile.gpu.compute
    assert profile.with_budget() == profile
    with pytest.raises(InputError, match="--gpu-memory"):
        recorded_profile("cpu-2core").with_budget(gpu_memory=1)


def test_emulated_gpu_takes_its_memory_from_the_cpu() -> None:
    profile = recorded_profile("cpu-2core")
    emulated = with_emulated_gpu(profile, memory_bytes=2 * 2**30, link_bytes_per_s=8e9)
    assert emulated.is_emulated and emulated.gpu is not None
    assert "emulated" in emulated.gpu.name and "emulated" in emulated.name
    assert emulated.cpu.memory_bytes + emulated.gpu.memory_bytes == profile.cpu.memory_bytes
    assert emulated.gpu.h2d.pinned_bytes_per_s == 8e9
    assert emulated.compute == profile.cpu.compute.over_tokens()
    with pytest.raises(InputError, match="--emulate-gpu"):
        with_emulated_gpu(emulated, memory_bytes=1, link_bytes_per_s=8e9)
    with pytest.raises(InputError, match="less than the CPU memory"):
        with_emulated_gpu(profile, memory_bytes=2**60, link_bytes_per_s=8e9)


def test_measurement_median_and_spread() -> None:
    figure = Measurement(name="a", unit="s", samples=(1.0, 4.0, 2.0))
    assert (figure.median, figure.spread) == (2.0, 0.75)
    assert from_json(Measurement, to_json(figure), "m") == figure
    for bad in ((), (0.0,), (float("nan"),)):
        with pytest.raises(InputError, match="measurement a"):
            Measurement(name="a", unit="s", samples=bad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": "cpu_compute"}, ["cpu_compute and cpu_compute", "disk_read"]),
        ({"first": "disk"}, ["disk and cpu_compute", "disk_read"]),
        ({"second": "gpu"}, ["disk_read and gpu"]),
        ({"first_keeps": 0.0}, ["first_keeps", "0.0"]),
        ({"second_keeps": 1.01}, ["second_keeps", "1.01"]),
        ({"second_keeps": float("nan")}, ["second_keeps", "nan"]),
    ],
)
def test_contention_refuses(change: dict[str, Any], words: list[str]) -> None:
    pair = Contention(first="disk_read", second="cpu_compute", first_keeps=1.0, second_keeps=0.01)
    with pytest.raises(InputError) as caught:
        replace(pair, **change)
    for word in words:
        assert word in str(caught.value)


def _profile_with_fits() -> HardwareProfile:
    pairs = tuple(
        Contention(first=f, second="cpu_compute", first_keeps=0.5, second_keeps=0.875)
        for f in ("disk_read", "disk_write")
    )
    fit = Calibration(date="2030-01-02", source="runs.csv", factors={"matmul": 0.8, "h2d": 1.25})
    return replace(
        recorded_profile("t4-flexgen"),
        contention=pairs,
        calibrations=(fit, replace(fit, date="2030-02-03", factors={})),
        unhidden_share=0.125,
    )


def test_profile_with_contention_and_calibrations_round_trips(tmp_path: Path) -> None:
    profile = _profile_with_fits()
    profile.save(tmp_path / "profile.json")
    loaded = HardwareProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert loaded.contention[1].second_keeps == 0.875
    assert loaded.calibrations[0].factors == {"matmul": 0.8, "h2d": 1.25}


def test_profile_without_contention_still_loads(t4_json: dict[str, Any], tmp_path: Path) -> None:
    older = copy.deepcopy(t4_json)
    for key in ("contention", "calibrations", "unhidden_share"):
        older.pop(key, None)
    older["cpu"]["compute"].pop("unpack_bytes_per_s", None)
    (tmp_path / "p.json").write_text(json.dumps(older))
    profile = HardwareProfile.load(tmp_path / "p.json")
    assert profile.contention == () and not profile.knows_unpacking
    assert "unpack 4 bits" in format_profile(recorded_profile("t4-flexgen"))
    assert format_profile(profile).count("unpack 4 bits") == 1


def test_an_emulated_gpu_contends_as_the_cpu_does_and_with_it() -> None:
    profile = replace(recorded_profile("cpu-2core"), contention=_profile_with_fits().contention)
    emulated = with_emulated_gpu(profile, memory_bytes=2**30, link_bytes_per_s=8e9)
    own = [pair for pair in profile.contention if "cpu_compute" in (pair.first, pair.second)]
    assert own
    assert emulated.contention[: len(profile.contention)] == profile.contention
    *copied, shared, up, down = emulated.contention[len(profile.contention) :]
    assert [(pair.first_keeps, pair.second_keeps) for pair in copied] == [
        (pair.first_keeps, pair.second_keeps) for pair in own
    ]
    assert all("gpu_compute" in (pair.first, pair.second) for pair in copied)
    assert {shared.first, shared.second} == {"gpu_compute", "cpu_compute"}
    assert shared.first_keeps == shared.second_keeps == 0.5
    # What passes the link is read and written by the memory that all compute from.
    left = 1 - 2 * 8e9 / profile.cpu.memory_bytes_per_s
    for pair, name in ((up, "h2d"), (down, "d2h")):
        assert (pair.first, pair.second) == ("gpu_compute", name)
        assert pair.first_keeps == pytest.approx(left) and pair.second_keeps == 1
    fast = with_emulated_gpu(profile, memory_bytes=2**30, link_bytes_per_s=1e12)
    assert fast.contention[-1].first_keeps == LEAST_LEFT


def test_table_shows_contention_and_fits() -> None:
    text = format_profile(_profile_with_fits())
    assert "disk_write beside cpu_compute: they keep 50% and 88% of their rates" in text
    assert "2030-01-02, runs.csv: matmul x 0.800, h2d x 1.250" in text
    assert "12.5% of the other channels' time is not hidden" in text
    plain = format_profile(replace(_profile_with_fits(), calibrations=(), unhidden_share=0.0))
    assert "fitted" not in plain


@pytest.mark.parametrize("name", MACHINES)
def test_table_writes_plain_digits(name: str) -> None:
    assert not re.search(r"\de[+-]?\d", format_profile(recorded_profile(name)))

"""Lengths of earlier answers as a file: kept by model, bounded, and ignored where it is broken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from costmodel.model.spec import ModelSpec
from costmodel.plan.answer_lengths import LEAST_ENDED
from executor import length_history
from executor.length_history import expected_outputs, history_path, record_outputs
from profiles.files import from_json, to_json
from tests.plain_models import plain_model

MODEL = plain_model(num_kv_heads=2)
MANY = LEAST_ENDED
LIMITS = [50, 8]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _record(length: int = 12) -> Path:
    record_outputs(MODEL, [6] * MANY, [length] * MANY, [False] * MANY)
    path = history_path(MODEL)
    assert path is not None
    return path


def test_answers_of_earlier_runs_are_expected_of_their_model() -> None:
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == LIMITS
    path = _record()
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == [12, 8]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # Half of them ended at 12 tokens, half at 20.
    _record(20)
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == [16, 8]
    assert expected_outputs(MODEL.with_dtype("bfloat16"), [5], [50]).tolist() == [16]
    other = plain_model(num_kv_heads=1)
    assert expected_outputs(other, [5, 5], LIMITS).tolist() == LIMITS


def test_a_model_has_one_file_whether_read_from_its_config_or_from_a_policy() -> None:
    again = from_json(ModelSpec, json.loads(json.dumps(to_json(MODEL))), "model")
    assert to_json(again) == to_json(MODEL)
    # A whole number has become a float.
    assert json.dumps(to_json(again)) != json.dumps(to_json(MODEL))
    assert history_path(again) == history_path(MODEL)


def test_what_the_user_expects_comes_first() -> None:
    _record()
    assert expected_outputs(MODEL, [5, 5], LIMITS, expected_len=30).tolist() == [30, 8]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 7, "kinds": {}}',
        '{"version": 1}',
        '{"version": 1, "kinds": {"2": {"ended": {"0": 3}, "cut": {}}}}',
        '{"version": 1, "kinds": {"2": {"ended": {"9": -3}, "cut": {}}}}',
        '{"version": 1, "kinds": {"2": {"ended": {"9": "x"}, "cut": {}}}}',
        '{"version": 1, "kinds": {"99": {"ended": {}, "cut": {}}}}',
        '{"version": 1, "kinds": {"2": {"ended": []}}}',
        '{"version": 1, "kinds": [1]}',
    ],
)
def test_a_broken_file_is_told_in_a_line_and_written_anew(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _record()
    path.write_text(text)
    caplog.set_level(logging.WARNING)
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == LIMITS
    (told,) = caplog.messages
    assert str(path) in told and "\n" not in told
    _record(20)
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == [20, 8]


def test_the_file_stays_small() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        prompts, outputs = rng.integers(1, 2**21, 20_000), rng.integers(1, 2**17, 20_000)
        record_outputs(MODEL, prompts, outputs, rng.integers(0, 2, 20_000))
    path = history_path(MODEL)
    assert path is not None and path.stat().st_size < 150_000
    assert json.loads(path.read_text())["version"] == 1


def test_where_nothing_can_be_kept_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(length_history, "cache_folder", lambda: None)
    record_outputs(MODEL, [5], [5], [False])
    assert expected_outputs(MODEL, [5, 5], LIMITS).tolist() == LIMITS
    monkeypatch.undo()

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(length_history, "write_whole", fail)
    record_outputs(MODEL, [5], [5], [False])
    assert "no room" in caplog.text

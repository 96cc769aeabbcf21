"""The bar of a run over lanes is where the predicted run has as many tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import LanePolicy
from costmodel.schedule.job_simulation import simulate_job
from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
from executor.cli.lane_bar import LaneBar
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.executor.tiny_models import save_tiny_model

HARDWARE = make_hardware()
# Two lanes: the long answer, and the others behind each other.
LENGTHS = Lengths([5, 3, 8, 2], [9, 4, 2, 3])
PLACES = ("index", "token", "layer", "batch", "slot", "hidden_slot", "read_slot", "sent_slot")
TASK = Task(kind="compute", channel="cpu", waits=(), **dict.fromkeys(PLACES, 0))


@pytest.fixture
def bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaneBar:
    """The bar of a notebook, which needs no terminal, with the weights loaded."""
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", sys)
    save_tiny_model(tmp_path, "llama")
    base = make_policy(Checkpoint.open(tmp_path).spec, prompt_len=8, gen_len=9)
    lanes = LanePolicy(pool_tokens=64, pass_rows=16)
    policy = change_policy(base, gpu_batch_size=1, prefill_batch_size=1, lanes=lanes)
    made = LaneBar(policy, HARDWARE, LENGTHS)
    made.loading(7)
    made.loaded(7)
    return made


def shown_s(bar: LaneBar) -> float:
    assert bar._bar is not None
    return float(bar._bar.n)


def compute(bar: LaneBar, share: float) -> None:
    """Compute this share of the layers and batches of a pass."""
    for _ in range(round(share * bar._num_visits)):
        bar.computed(TASK)


def test_it_is_where_the_predicted_run_is(bar: LaneBar) -> None:
    timeline = simulate_job(bar._policy, HARDWARE, LENGTHS)
    tokens = (timeline.counts.decoding + timeline.counts.newcomers).astype(int).tolist()
    seconds = timeline.seconds.tolist()
    assert tokens == [2] * 9
    # The requests that end in each pass, longest answers first: 0 and 1, then 3, then 2.
    ends: dict[int, dict[int, int]] = {3: {1: 4}, 6: {3: 3}, 8: {0: 9, 2: 2}}
    reached = 0.0
    for number, (count, step) in enumerate(zip(tokens, seconds, strict=True)):
        bar.begin_pass(count)
        compute(bar, 0.5)
        assert shown_s(bar) == pytest.approx(reached + step / 2, rel=0.05)
        bar.end_pass(count, ends.get(number, {}))
        reached += step
        if number < len(tokens) - 1:
            assert shown_s(bar) == pytest.approx(reached)
    assert bar._bar is not None
    assert bar._bar.desc == "4/4 prompts" and "18 tokens" in str(bar._bar.postfix)
    assert shown_s(bar) == pytest.approx(timeline.total_s) == pytest.approx(bar._bar.total)


def test_answers_that_end_early_shorten_the_rest(bar: LaneBar) -> None:
    seconds = simulate_job(bar._policy, HARDWARE, LENGTHS).seconds.tolist()
    bar.begin_pass(2)
    # The longest answer has one token, and seven of eight missing ones will never be made.
    bar.end_pass(2, {0: 1})
    assert shown_s(bar) == pytest.approx(sum(seconds[:5]))


def test_longer_answers_do_not_fill_the_bar(bar: LaneBar) -> None:
    for _ in range(20):
        bar.begin_pass(2)
        compute(bar, 1)
        bar.end_pass(2, {})
    seconds = simulate_job(bar._policy, HARDWARE, LENGTHS).seconds.tolist()
    # Up to the pass in which but one token of each request is missing, four of 18.
    assert shown_s(bar) == pytest.approx(sum(seconds[:8]))
    assert shown_s(bar) < sum(seconds)


def test_nothing_is_predicted_for_nobody(bar: LaneBar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("executor.cli.lane_bar.simulate_job")
    hidden = LaneBar(bar._policy, HARDWARE, LENGTHS, is_shown=False)
    hidden.loading(7)
    hidden.begin_pass(2)
    compute(hidden, 1)
    hidden.end_pass(2, {0: 1})
    hidden.close()

"""Threads of a machine with a GPU, and work that goes on beside what is measured."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from profiles.cores import attending_threads, feeding_threads, kept_busy, num_threads_of
from profiles.repeats import QUICK, Repeater
from profiles.task_overhead import measure_task_overhead


@pytest.mark.parametrize("num_threads", [2, 3, 8, 16, 61])
def test_all_cores_are_given_away_once(num_threads: int) -> None:
    assert attending_threads(num_threads) + feeding_threads(num_threads) == num_threads


def test_a_single_core_does_both() -> None:
    assert attending_threads(1) == feeding_threads(1) == 1


def test_threads_are_as_many_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), num_threads_of(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_work_goes_on_until_the_end_and_no_longer() -> None:
    count, is_enough = itertools.count(1), threading.Event()

    def work() -> None:
        if next(count) == 3:
            is_enough.set()

    with kept_busy(work):
        assert is_enough.wait(10)
    done = next(count)
    assert next(count) == done + 1


def test_work_that_fails_is_told() -> None:
    with pytest.raises(ZeroDivisionError), kept_busy(lambda: 1 // 0):
        pass


def test_a_task_is_measured_while_other_work_goes_on() -> None:
    calls: list[int] = []
    repeater = Repeater(QUICK, lambda name: calls.append(-1))
    seconds = measure_task_overhead("cpu", "layer", repeater, beside=lambda: calls.append(1))
    assert seconds > 0
    # It had begun before the figure did, and was not stopped by it.
    assert calls[0] == 1 and calls[-1] == 1

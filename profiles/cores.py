"""Cores that are shared: with a GPU in a run, and with other work while something is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import torch

# One core in so many is left to the threads that feed a GPU.
FEEDING_SHARE = 8


def feeding_threads(num_threads: int) -> int:
    """Return how many of ``num_threads`` feed a GPU while the CPU attends."""
    return max(1, num_threads // FEEDING_SHARE)


def attending_threads(num_threads: int) -> int:
    """Return how many of ``num_threads`` attend on the CPU beside a GPU."""
    return max(1, num_threads - feeding_threads(num_threads))


@contextmanager
def num_threads_of(num_threads: int) -> Iterator[None]:
    """Compute with so many threads, and with as many as before again."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kept_busy(work: Callable[[], object]) -> Iterator[None]:
    """Repeat ``work`` in another thread while the body runs; the first call has ended when the body
    begins. Raises what ``work`` raised, unless the body did."""
    is_over, has_begun = Event(), Event()

    def repeat() -> None:
        try:
            with torch.inference_mode():
                while not is_over.is_set():
                    work()
                    has_begun.set()
        finally:
            has_begun.set()

    with ThreadPoolExecutor(1, thread_name_prefix="kept busy") as pool:
        repeated = pool.submit(repeat)
        try:
            has_begun.wait()
            yield
        finally:
            is_over.set()
    repeated.result()

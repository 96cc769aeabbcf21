"""One run at a time in a process: each may use all the memory that is free when it begins."""

from __future__ import annotations

import inspect
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from profiles.errors import RunError

T_co = TypeVar("T_co", covariant=True)

# Held while a run computes, and by whoever needs all results of one run.
TURN = threading.RLock()
# The run that was begun last.
_last: weakref.ref[ExclusiveRun[Any]] | None = None


class ExclusiveRun(Iterator[T_co]):
    """Yields the results of a run. It holds the run's memory until the end, or until ``close``.

    Where another run begins before the end, this one gives its memory back. It then raises
    ``RunError``, so that nobody takes a part of the results for all of them.
    """

    def __init__(self, results: Generator[T_co]) -> None:
        self._results = results
        self._is_replaced = False

    @classmethod
    def begin(cls, plan: Callable[[], Generator[T_co]]) -> ExclusiveRun[T_co]:
        """End the last run, then plan another one. Waits while another thread computes."""
        global _last
        with TURN:
            last = _last() if _last else None
            if last is not None:
                last._replace()
            run = cls(plan())
            _last = weakref.ref(run)
            return run

    def __next__(self) -> T_co:
        with TURN:
            if self._is_replaced:
                raise RunError(
                    "this run was ended by another one before its last block; try: taking all"
                    " blocks, or closing the iterator, before the next run"
                )
            return next(self._results)

    def close(self) -> None:
        """Give the memory back; there are no more results."""
        with TURN:
            self._results.close()

    def _replace(self) -> None:
        self._is_replaced = inspect.getgeneratorstate(self._results) != inspect.GEN_CLOSED
        self._results.close()


def forget_frames(error: BaseException) -> None:
    """Clear the variables of the frames that an error went through.

    Notebooks and debuggers keep the last error, whose frames would keep a run's memory.
    """
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None and found not in seen:
            seen.append(found)
            traceback.clear_frames(found.__traceback__)
            pending += [found.__cause__, found.__context__]

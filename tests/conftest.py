"""What all tests share: how processes share them, and which need a CUDA device."""

from __future__ import annotations

import gc
import os
from typing import Any

# Before torch is imported, in this process and in those that tests start. OpenMP's threads sleep
# while they wait: spinning, those of a dozen tiny runs take ten times the cores' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, so that its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from profiles.kernels import build

# Parts of names: what shares a costly thing is run by one process. These units come first, and
# the single tests fill up the time of the processes that end early.
UNITS = (
    "[portable",
    "test_expert_placement.py",
    "test_optimality.py",
    "test_plots.py",
    "test_notebooks.py",
    "test_report",
)
# Files whose tests of one family share its model.
BY_FAMILY = ("test_config_keys.py", "test_family_policies.py")
# Single tests that take long: what comes last should be short.
LONG = ("test_demo.py", "test_examples.py")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels once, before several processes would each do so."""
    if not hasattr(session.config, "workerinput"):
        build.load_library()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out single tests and ``UNITS``; the marks of ``--dist loadgroup`` need pytest < 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = unit_of
    return scheduling


def unit_of(name: str) -> str:
    """Return what a test is shared out with: one of ``UNITS``, its family, or itself."""
    file, _, case = name.partition("::")
    if file.endswith(BY_FAMILY) and "[" in case:
        return file + case[case.index("[") :]
    return next((unit for unit in UNITS if unit in name), name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with long tests, and skip what needs a GPU on a machine without one."""
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests, which stay to the end in any case."""
    gc.freeze()

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

from costmodel.pricing import buffers
from profiles.kernels import build

# Models of tests are tiny: of the usual size, a chunk would have half of all experts. Processes
# that tests start have the usual size.
buffers.LEAST_CHUNK_BYTES = 1

# Files whose tests share models, searches or processes that take long: one process runs all of one.
# These begin, so that what comes last is short.
LONG = (
    "test_demo.py",
    "test_notebooks.py",
    "test_optimality.py",
    "test_expert_placement.py",
    "test_plots.py",
    "test_report.py",
)
# Tests of a library that is built for other CPUs: one process builds it.
BUILT = ("[portable", "[avx2")
# Files that start a Ray cluster: two at once would starve each other.
RAY_CLUSTER = ("executor/test_ray_copies.py", "executor/test_ray_stages.py")
# Files of tests that compile kernels, each its own, where there is a GPU.
BY_KERNEL = ("test_gpu_encodings.py", "test_gpu_kernels.py")
# Files whose tests of one family share its model, and what transformers imports for it.
BY_FAMILY = ("test_config_keys.py", "test_families.py", "test_family_policies.py")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels once, before several processes would each do so."""
    if not hasattr(session.config, "workerinput"):
        build.load_library()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out the units of ``unit_of`` in the order in which they come."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = unit_of
    return scheduling


def unit_of(name: str) -> str:
    """Return what a test is shared out with: its family or its file, or nothing.

    With single tests as units, the scheduler itself would take half a minute.
    """
    file, _, case = name.partition("::")
    for kind in BUILT:
        if kind in case:
            return kind
    if file.endswith(BY_FAMILY) and "[" in case:
        return case[case.index("[") :]
    if file.endswith(BY_KERNEL) and torch.cuda.is_available():
        return name
    return "ray" if file.endswith(RAY_CLUSTER) else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with long units, and skip what needs a GPU on a machine without one."""
    items.sort(key=lambda item: not unit_of(item.nodeid).endswith((*LONG, *BUILT, "ray")))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Give each test the same numbers in every run, whichever process and order it runs in."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests, which stay to the end in any case."""
    gc.freeze()

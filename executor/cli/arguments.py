"""The arguments of ``LLM``: the flags of the commands, by their names in Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from costmodel.cli.flags import choose_permitted
from costmodel.plan.policy import Policy
from executor.cli.job_options import PLANNED, JobOptions
from executor.model.sampling_params import SamplingParams
from profiles.errors import InputError, ZigzagError
from profiles.hardware import HardwareProfile
from profiles.units import MIB, parse_bytes

_SIZES = ("cpu_memory", "gpu_memory", "disk")
_NAMES = (*PLANNED, "policy", "hardware", "offload_dir", *(f.name for f in fields(SamplingParams)))
# The flags that are arguments in Python.
_FLAGS = re.compile(rf"--({'|'.join(name.replace('_', '-') for name in _NAMES)})\b")


def read_arguments(
    policy: Policy | str | Path | None,
    hardware: HardwareProfile | str | Path | None,
    offload_dir: str | Path,
    planned: Mapping[str, Any],
) -> JobOptions:
    """Return what the arguments of ``LLM`` say.

    ``planned`` holds those to which a policy has an answer, by name; each may be ``None``.
    """
    given = [name for name in PLANNED if planned[name] is not None]
    if policy is not None and given:
        raise InputError(
            given[0],
            got=f"{given[0]} together with policy",
            allowed="what the policy was made for",
            hint="leaving out the policy, or making another one",
        )
    _check_type("policy", policy, Policy | str | Path | None, "a Policy, or its file")
    _check_type(
        "hardware", hardware, HardwareProfile | str | Path | None, "a HardwareProfile, or its file"
    )
    _check_type("offload_dir", offload_dir, str | Path, "a folder")
    return JobOptions(
        policy=Policy.load(Path(policy)) if isinstance(policy, str | Path) else policy,
        hardware=str(hardware) if isinstance(hardware, str | Path) else hardware,
        offload_dir=Path(offload_dir),
        gpu_memory=_bytes("gpu_memory", planned["gpu_memory"]),
        cpu_memory=_bytes("cpu_memory", planned["cpu_memory"]),
        disk=_bytes("disk", planned["disk"]),
        dtype=planned["dtype"],
        permitted=choose_permitted(
            weight_bits=_bits("weight_bits", planned["weight_bits"]),
            cache_bits=_bits("cache_bits", planned["cache_bits"]),
            group_size=_number("group_size", planned["group_size"], int),
            sparsity=_number("sparsity", planned["sparsity"], float | int),
            requantizes=bool(planned["requantize"]),
        ),
    )


@contextmanager
def arguments_told() -> Iterator[None]:
    """Have errors name arguments where they name the command's flags."""
    try:
        yield
    except ZigzagError as error:
        error.args = (_FLAGS.sub(lambda found: found[1].replace("-", "_"), str(error)),)
        raise


def _bytes(name: str, size: Any) -> int | None:
    if isinstance(size, str):
        return parse_bytes(size, what=name)
    if size is not None and (type(size) is not int or size < 0):
        raise InputError(name, got=repr(size), allowed='bytes, or a size such as "8GiB"')
    if size is not None and 0 < size < MIB:
        # Whoever writes 8 means 8 GiB.
        raise InputError(
            name, got=f"{size} bytes", allowed='a size such as "8GiB"', hint=f'"{size}GiB"'
        )
    return size


def _check_type(name: str, value: object, kind: Any, allowed: str) -> None:
    if not isinstance(value, kind):
        raise InputError(name, got=repr(value), allowed=allowed)


def _number(name: str, value: Any, kind: Any) -> Any:
    _check_type(name, value, kind | None, "a number")
    if isinstance(value, bool):
        raise InputError(name, got=repr(value), allowed="a number")
    return value


def _bits(name: str, bits: Any) -> tuple[int, ...] | None:
    if bits is None:
        return None
    listed = tuple(bits) if isinstance(bits, list | tuple) else (bits,)
    if not all(type(number) is int for number in listed):
        raise InputError(name, got=repr(bits), allowed="16, 8, 4, or several of them")
    return listed

"""What a node is: versions and checkpoint, which all nodes of a job must have alike. No Ray."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.checkpoint.opening import open_checkpoint
from profiles import version
from profiles.errors import InputError, RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node says of itself.

    Parameters
    ----------
    host
        The machine's name.
    versions
        Of each program that makes tokens, by its name.
    checkpoint
        The fingerprint of the checkpoint; ``None`` where none was asked for.
    """

    host: str
    versions: dict[str, str]
    checkpoint: str | None = None


def own_facts(model: Path | None) -> NodeFacts:
    """Return what this machine is; reads the checkpoint's fingerprint where one is given."""
    versions = {
        "zigzag": version.VERSION,
        "torch": torch.__version__.partition("+")[0],
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    checkpoint = None if model is None else open_checkpoint(model).fingerprint
    return NodeFacts(host=platform.node(), versions=versions, checkpoint=checkpoint)


def check_alike(nodes: Sequence[tuple[str, NodeFacts]], model: Path | None) -> None:
    """Refuse nodes that differ in a version or in the checkpoint.

    Parameters
    ----------
    nodes
        Names and facts of the nodes. The first is that of the machine that runs the command.

    Raises
    ------
    InputError
        With the name of the first node that differs from the first one.
    """
    first_name, first = nodes[0]
    for name, facts in nodes[1:]:
        for program, expected in first.versions.items():
            got = facts.versions.get(program, "none")
            if got != expected:
                raise InputError(
                    f"node {name}",
                    got=f"{program} {got}",
                    allowed=f"{program} {expected}, as on {first_name}",
                    hint="the same versions on all nodes",
                )
        if facts.checkpoint != first.checkpoint:
            raise InputError(
                f"node {name}",
                got=f"another checkpoint in {model}",
                allowed=f"the one that {first_name} has there",
                hint="a shared folder, or a new copy",
            )


def no_nodes_left(told: str) -> RunError:
    """Return the error of a job whose last node has failed."""
    return RunError(f"no node is left to run the job; the last one: {told}")

"""The search of every preset ends in a policy that the executor takes and runs.

Presets are too large for tests, so that small copies of them are searched and run: with the same
description of their layers, embedding and head, but fewer layers, heads and rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from costmodel.families import preset_names
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.dummy import DummyCheckpoint
from executor.run.runner import check_runnable
from profiles.files import from_json, to_json
from tests.executor.small_copies import small_copy
from tests.executor.tiny_machines import Case, make_hardware

PROMPTS = [[5, 9, 170, 3, 3, 77, 12, 88, 1], [33], [41, 2, 2, 7]]
GEN_LEN = 3
HARDWARE = make_hardware()


def copies() -> dict[str, dict[ModelSpec, list[str]]]:
    """Return the different copies of the presets by family, with the presets of each.

    Bases of rotations and the like are figures that neither the search nor the run depends on.
    """
    found: dict[str, dict[ModelSpec, list[str]]] = {}
    for name in preset_names():
        copy = small_copy(load_model_spec(name))
        alike = found.setdefault(copy.family, {})
        like = next((one for one in alike if _plain(one) == _plain(copy)), copy)
        alike.setdefault(like, []).append(name)
    return found


def _plain(spec: ModelSpec) -> ModelSpec:
    kinds = []
    for kind in spec.layer_kinds:
        attention = kind.attention
        rotary = attention.rotary and replace(attention.rotary, theta=1e4)
        norm = replace(kind.norm, eps=1e-6)
        kinds.append(replace(kind, attention=replace(attention, rotary=rotary), norm=norm))
    norm = replace(spec.final_norm, eps=1e-6)
    return replace(spec, layer_kinds=tuple(kinds), final_norm=norm)


COPIES = copies()


@pytest.mark.parametrize("family", COPIES)
def test_a_policy_of_the_search_runs(family: str, tmp_path: Path) -> None:
    for spec in COPIES[family]:
        workload = Workload(prompt_len=9, gen_len=GEN_LEN, num_prompts=len(PROMPTS))
        found = search(HARDWARE, spec, workload).policy
        policy = from_json(Policy, to_json(found), "policy")
        source = DummyCheckpoint(spec=spec)
        check_runnable(policy, HARDWARE, source)
        case = Case(source=source, prompts=PROMPTS, folder=tmp_path)
        tokens = case.generate(policy, HARDWARE)
        assert [len(of) for of in tokens] == [GEN_LEN] * len(PROMPTS)


def test_every_preset_has_a_copy() -> None:
    named = [name for alike in COPIES.values() for names in alike.values() for name in names]
    assert sorted(named) == preset_names()


@pytest.mark.parametrize("name", ["gemma-3-4b", "glm-4.6", "phi-3-mini-4k", "olmo-3-7b"])
def test_a_copy_has_the_kinds_of_its_preset(name: str) -> None:
    spec = load_model_spec(name)
    copy = small_copy(spec)
    assert len(copy.layer_kinds) == len(spec.layer_kinds)
    for kind, small in zip(spec.layer_kinds, copy.layer_kinds, strict=True):
        assert kind.component_names == small.component_names
        assert (kind.attention.window is None) == (small.attention.window is None)
        assert kind.norm_places == small.norm_places
